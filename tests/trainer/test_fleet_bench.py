"""The simulated fleet: it uses what boxes and aggregators use, counts what travels, shows what helps or harms."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.aggregator.aggregate import AggregateSettings
from deploy.aggregator.gates import Examination
from edge.bundle import MemoryLayout, Pooling, Preprocessing
from edge.federation.wire import Limits, decode_update, encode_update
from edge.judgement.score import pool_score
from edge.memory.dynamic import DynamicSettings
from edge.memory.search import anomaly_map
from trainer.evaluation.fleet import FleetSettings, Simulation
from trainer.evaluation.fleet_box import BoxData, BoxSettings
from trainer.evaluation.fleet_curves import bytes_curve, computed_points, coreset_point, pooled_bank
from trainer.evaluation.fleet_judge import Exam, Judge, squared_distances
from trainer.evaluation.fleet_poison import Poison, poisoned

SPACE = "a" * 64
WIDTH = 6
JUDGE = Judge(
    MemoryLayout(grid=(4, 4), smoothing=1, background=0.3), Preprocessing(height=32, width=32), 8, Pooling(cells=2)
)


def patches(rng, centre, images, bad=0.0):
    """Patches around a product's centre; ``bad`` moves three of each image's away."""
    rows = centre + 0.3 * rng.standard_normal((images, 16, WIDTH))
    rows[:, 5:8] += bad
    return rows.astype(np.float16)


def make_boxes(count=4, *, learn=12, seed=0):
    """Boxes of two products whose good patches are defects to each other."""
    found = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        centre = np.zeros(WIDTH) if number % 2 else np.full(WIDTH, 4.0)
        found.append(
            BoxData(
                name=f"site/box{number}",
                product=f"product {number % 2}",
                condition=f"condition {number}",
                learn=patches(rng, centre, learn),
                commissioning=patches(rng, centre, 20),
                test=np.concatenate([patches(rng, centre, 10), patches(rng, centre, 10, bad=1.5)]),
                labels=np.repeat([False, True], 10),
                groups=np.arange(20).astype(np.str_),
                defects=(centre + 1.5 + 0.3 * rng.standard_normal((30, WIDTH))).astype(np.float32),
            )
        )
    return found


def settings(**changed):
    box = BoxSettings(local_rows=40, update_rows=20, min_frames=2)
    return FleetSettings(**{"rounds": 3, "box": box, "aggregate": AggregateSettings(rows=40), **changed})


def simulation(boxes=None, *, gate=None, seed=0, **changed):
    return Simulation(
        make_boxes() if boxes is None else boxes, settings(**changed), JUDGE, embedding_id=SPACE, seed=seed, gate=gate
    )


def test_a_box_judges_as_the_head_does_with_both_banks():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, 16, WIDTH)).astype(np.float16)
    banks = [rng.standard_normal((9, WIDTH)).astype(np.float32) for _ in range(2)]
    squared = np.minimum(*(squared_distances(images, bank) for bank in banks))
    maps = [
        anomaly_map(image[None].astype(np.float32), banks, JUDGE.layout, JUDGE.preprocessing, 8) for image in images
    ]
    expected = [pool_score(one, JUDGE.pooling) for one in maps]
    assert JUDGE.scores(squared) == pytest.approx(expected, rel=1e-6)


def test_the_fleet_memory_helps_boxes_with_what_they_never_saw_and_leaves_their_own_product_alone():
    fleet = simulation()
    last = fleet.run()[-1].judged
    exam = fleet.exam
    assert exam.mixed(last.local).max() < 0.8
    assert exam.mixed(last.fleet).min() > exam.mixed(last.local).max() + 0.1
    assert (exam.own(last.local) - exam.own(last.fleet)).max() <= 0.02


def test_thresholds_are_set_for_the_memory_that_judges():
    last = simulation().run()[-1].judged
    assert (last.false_alarms < 0.35).all()


def test_bytes_are_those_of_the_messages_and_of_every_fetched_bank():
    fleet = simulation(judged_rounds=())
    first = fleet.round(1)
    sent = [encode_update(box.update(1, base_version=0, seed=3)) for box in fleet.boxes]
    assert first.bytes_up == sum(map(len, sent))
    assert first.counted == 4
    assert first.bytes_down % 4 == 0
    assert fleet.bank.version == 1
    assert fleet.bank.members == tuple(box.data.name for box in fleet.boxes)


def test_a_box_whose_rows_too_few_frames_stand_behind_is_silent_until_it_has_seen_more():
    box = BoxSettings(local_rows=4, update_rows=4, min_frames=8.5, dynamic=DynamicSettings(beta=0.9))
    fleet = simulation(make_boxes(2, learn=24), box=box, rounds=4, judged_rounds=())
    found = fleet.run()
    assert (found[0].silent, found[0].counted, found[0].rows) == (2, 0, 0)
    assert (found[-1].silent, found[-1].counted) == (0, 2)


def test_late_updates_count_one_round_later():
    fleet = simulation(late=0.99, rounds=3, judged_rounds=())
    first, second = fleet.round(1), fleet.round(2)
    assert (first.counted, first.late, first.rows) == (0, 0, 0)
    assert second.late == second.counted == 4


def test_a_box_that_is_cut_off_neither_sends_nor_fetches_and_judges_alone():
    fleet = simulation(cut_off=0.99, rounds=2)
    first = fleet.round(1)
    assert (first.cut_off, first.bytes_down) == (4, 0)
    second = fleet.round(2)
    assert second.late == 4
    assert second.rows > 0
    assert np.array_equal(second.judged.local, second.judged.fleet) or second.cut_off < 4


def test_equal_seeds_give_equal_fleets():
    first, second = (simulation(late=0.3, cut_off=0.2, seed=5).run() for _ in range(2))
    assert [(one.counted, one.late, one.bytes_up) for one in first] == [
        (one.counted, one.late, one.bytes_up) for one in second
    ]
    assert np.array_equal(first[-1].judged.fleet, second[-1].judged.fleet)
    other = simulation(late=0.3, cut_off=0.2, seed=6).run()
    assert [one.late for one in first] != [one.late for one in other] or first[-1].bytes_up != other[-1].bytes_up


def test_what_a_gate_refuses_is_in_no_bank():
    def refuse_first(update, *, reference, peers):
        assert len(peers) == 3
        return Examination(update.box != "site/box0", ("it is the first",), {})

    fleet = simulation(gate=refuse_first, judged_rounds=())
    found = fleet.round(1)
    assert found.refused == (("site/box0", "it is the first"),)
    assert "site/box0" not in fleet.bank.members


def test_a_gate_sees_the_bank_in_force_from_the_second_round_on():
    seen = []

    def watch(update, *, reference, peers):
        seen.append(None if reference is None else len(reference))
        return Examination(True, (), {})

    fleet = simulation(gate=watch, rounds=2, judged_rounds=())
    rows = fleet.round(1).rows
    fleet.round(2)
    assert seen == [None] * 4 + [rows] * 4


@pytest.mark.parametrize("kind", Poison)
def test_poison_has_the_form_of_an_update(kind):
    box = simulation().boxes[0]
    honest = box.update(1, base_version=0, seed=0)
    spoilt = poisoned(honest, kind, defects=box.data.defects, rng=np.random.default_rng(0))
    arrived = decode_update(encode_update(spoilt), Limits())
    assert np.array_equal(arrived.rows, spoilt.rows)
    if kind is Poison.SCALED:
        assert np.abs(arrived.rows).max() == pytest.approx(100 * np.abs(honest.rows).max(), rel=0.01)
    if kind is Poison.COUNTS:
        assert arrived.support.sum() == pytest.approx(1e4 * honest.support.sum(), rel=1e-3)
    if kind is Poison.DEFECTS:
        near = [np.abs(box.data.defects - row).sum(1).min() for row in arrived.rows]
        far = [np.abs(box.data.defects - row).sum(1).min() for row in honest.rows]
        assert np.median(near) < np.median(far)


def test_defect_rows_blind_the_fleet_to_these_defects():
    boxes = make_boxes(5)
    clean = simulation(boxes[1:]).run()[-1].judged.fleet
    spoilt = simulation(boxes, poison=Poison.DEFECTS, poisoners=1)
    fleet = spoilt.run()[-1].judged.fleet
    same = spoilt.exam.product == boxes[0].product
    owners = [index for index, box in enumerate(boxes[1:]) if box.product == boxes[0].product]
    before, after = (np.mean([spoilt.exam.auroc(rows[i], same) for i in owners]) for rows in (clean, fleet))
    assert after < before - 0.1


def test_a_poisoner_without_defects_is_refused():
    box = simulation().boxes[0]
    with pytest.raises(ValueError, match="no defect rows"):
        poisoned(
            box.update(1, base_version=0, seed=0),
            Poison.DEFECTS,
            defects=np.zeros((0, WIDTH), np.float32),
            rng=np.random.default_rng(0),
        )


@pytest.mark.parametrize("changed", [{"poisoners": 4, "poison": Poison.NOISE}, {"poisoners": 1}])
def test_a_fleet_of_liars_or_unnamed_poison_is_refused(changed):
    with pytest.raises(ValueError, match="poisoners"):
        simulation(**changed)


def test_fewer_rows_travel_in_fewer_bytes_and_uint8_in_fewer_than_float16():
    fleet = simulation(judged_rounds=())
    fleet.run()
    points = bytes_curve(fleet.boxes, fleet.judgement(), AggregateSettings(rows=40), seed=0, sizes=(5, 20))
    size = {(one.name, one.rows): one.bytes for one in points}
    assert size["float16", 5] < size["float16", 20]
    assert size["uint8", 20] < size["float16", 20]
    assert all(one.measured and 0.5 < one.mixed <= 1 for one in points)


def test_other_ways_to_share_are_counted_by_their_rows_and_parameters():
    fleet = simulation(judged_rounds=())
    data = make_boxes()
    raw = coreset_point(data, fleet.judgement(), share=0.1, seed=0)
    assert raw.rows == round(0.1 * 12 * 16)
    assert raw.bytes == raw.rows * WIDTH * 2
    every, model = computed_points(data, 1000)
    assert every.bytes == 12 * 16 * WIDTH * 2
    assert model.bytes == 4000


def test_the_pooled_bank_is_of_all_boxes():
    bank = pooled_bank(make_boxes(), 30, seed=0)
    assert len(bank) == 30
    assert bank[:, 0].min() < 1
    assert bank[:, 0].max() > 3


def test_groups_of_two_boxes_never_share_a_name():
    exam = Exam.of(make_boxes())
    assert len(set(exam.groups)) == len(exam.groups) == 80
