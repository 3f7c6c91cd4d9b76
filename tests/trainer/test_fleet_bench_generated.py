"""The generated fleet, its cost and its report; and the verb from its options to its files."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import cv2
import numpy as np
import pytest

import trainer.bench
from deploy.aggregator.aggregate import AggregateSettings
from deploy.progress import no_progress
from edge.bundle import MemoryLayout, Pooling, Preprocessing
from edge.errors import DataError, UsageError
from edge.memory.search import nearest
from trainer.data.textures import TextureWeb
from trainer.evaluation import fleet_bench
from trainer.evaluation.fleet import FleetSettings
from trainer.evaluation.fleet_bench import BenchSettings, simulate
from trainer.evaluation.fleet_box import BoxSettings
from trainer.evaluation.fleet_cost import Cost, extrapolated, growth, made_updates, measure, sizes
from trainer.evaluation.fleet_generated import ImageCounts, generated_boxes, trainer_gate
from trainer.evaluation.fleet_judge import Judge
from trainer.evaluation.fleet_report import draw, tables
from trainer.evaluation.fleet_scene import KNOWN_DEFECTS, UNKNOWN_DEFECTS, make_sites, trainer_sites

SPACE = "b" * 64
FEW = ImageCounts(learn=6, commissioning=3, good=2, defective=2, taught=2, canary=2)
SMALL = FleetSettings(
    rounds=2,
    box=BoxSettings(local_rows=64, update_rows=32, min_frames=2),
    aggregate=AggregateSettings(rows=64),
    late=0.1,
    cut_off=0.1,
)


class Colours:
    """Embeds an image by the means and deviations of its patches' colours: quick, and knows light from dark."""

    embedding_id = SPACE
    parameters = 1000
    judge = Judge(MemoryLayout(grid=(28, 28)), Preprocessing(height=224, width=224), 8, Pooling())

    def __call__(self, canvases):
        cells = canvases.reshape(len(canvases), 28, 8, 28, 8, 3).astype(np.float32) / 64
        rows = np.concatenate([cells.mean((2, 4)), cells.std((2, 4))], -1)
        return rows.reshape(len(canvases), 784, 6).astype(np.float16)


@pytest.fixture(scope="module")
def report():
    settings = BenchSettings(boxes=8, drawn=3, images=FEW, fleet=SMALL, curve_rows=(16, 32))
    return simulate(settings, embedder=Colours(), progress=no_progress)


def test_a_site_shows_the_same_images_at_every_visit_and_no_other_site_shows_them():
    first, second = make_sites(8, seed=0)[0], make_sites(3, seed=0)[0]
    assert np.array_equal(first.good("learn", 2), second.good("learn", 2))
    twin = make_sites(8, seed=0)[6]  # of the same product
    assert twin.product == first.product
    assert not np.array_equal(twin.good("learn", 2), first.good("learn", 2))


def test_no_place_of_a_web_is_seen_by_two_boxes_or_in_two_splits(monkeypatch):
    seen = []
    view = TextureWeb.view

    def watched(web, position, height):
        seen.append((position, position + height))
        return view(web, position, height)

    monkeypatch.setattr(TextureWeb, "view", watched)
    for site in (*make_sites(7, seed=0)[::6], trainer_sites(seed=0)[0]):  # of one product
        for split in ("learn", "commissioning", "good", "canary_good"):
            site.good(split, 2)
        for split in ("defective", "taught", "canary_defective"):
            site.defective(split, 2)
    seen.sort()
    assert len(seen) == 3 * 7 * 2
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(seen))


def test_conditions_differ_between_boxes_of_one_product():
    sites = make_sites(12, seed=1)
    means = [site.good("learn", 2).mean() for site in (sites[0], sites[6])]
    assert abs(means[0] - means[1]) > 2


def test_defects_are_where_their_masks_say():
    site = make_sites(1, seed=0)[0]
    canvases, masks = site.defective("defective", 4)
    assert canvases.shape == (4, 224, 224, 3)
    assert masks.any((1, 2)).all()
    assert masks.mean() < 0.2


def test_a_fleet_longer_than_its_webs_is_refused():
    with pytest.raises(ValueError, match="at most 3000"):
        make_sites(5000, seed=0)


def test_images_beyond_a_boxs_stretch_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        make_sites(1, seed=0)[0].good("learn", 10_000)


def test_poisoners_teach_defects_that_no_canary_shows():
    assert not set(KNOWN_DEFECTS) & set(UNKNOWN_DEFECTS)


def test_the_gate_knows_every_product_from_places_where_no_box_is():
    sites = trainer_sites(seed=0, products=2)
    gate = trainer_gate(sites, Colours(), 6, embedding_id=SPACE)
    assert set(gate.canaries) == {site.product for site in make_sites(2, seed=0)}
    assert not {site.number for site in sites} & {site.number for site in make_sites(12, seed=0)}
    for canaries in gate.canaries.values():
        assert canaries.embedding_id == SPACE
        assert len(canaries.defect) > 10
        known = nearest(canaries.good, gate.reference.rows)[0]
        assert np.mean(np.sqrt(known) > canaries.threshold) < 0.02


def test_made_boxes_all_send_something_else():
    boxes = generated_boxes(make_sites(2, seed=0), Colours(), FEW, progress=no_progress)
    simulated = fleet_bench.Simulation(boxes, SMALL, Colours.judge, embedding_id=SPACE, seed=0)
    updates = [box.update(1, base_version=0, seed=0) for box in simulated.boxes]
    made = list(made_updates(updates, [box.learn for box in boxes], seed=0, count=6))
    assert [one.box for one in made[:2]] == [one.box for one in updates]
    assert len({one.rows.tobytes() for one in made}) == len({one.box for one in made}) == 6
    assert {one.product for one in made} == {one.product for one in updates}


def test_fleets_grow_to_the_one_asked_for():
    assert sizes(8) == (8,)
    assert sizes(10) == (10,)
    assert sizes(100) == (10, 30, 100)
    assert sizes(200) == (10, 30, 100, 200)


def test_extrapolation_is_the_line_through_the_last_two_and_growth_its_power():
    costs = [Cost(n, n / 100, n / 10, 2 + n / 10, 50 + n, 40, 100 * n, 10 * n) for n in (10, 100, 1000)]
    assert extrapolated(costs, "cpu_s") == pytest.approx(2 + 1000)
    assert extrapolated(costs, "bytes_up") == pytest.approx(1_000_000)
    assert growth(costs, "aggregate_s") == pytest.approx(1)
    assert math.isnan(growth(costs[:1], "cpu_s"))
    assert math.isnan(extrapolated(costs[:1], "cpu_s"))


def test_what_a_fleet_sends_is_counted_in_its_cost(report):
    (cost,) = report.costs
    assert cost.boxes == 8
    assert cost.bytes_up > 8 * 32 * 6 * 2 * 0.5
    assert 10 < cost.peak_mb < 600
    assert cost.cpu_s > 0


def test_a_report_holds_every_curve(report):
    assert [line.number for line in report.rounds] == [1, 2]
    assert report.rounds[-1].fleet_mixed > 0
    assert {point.name for point in report.curve} >= {"float16", "uint8", "all rows"}
    assert {line.kind for line in report.poison} == {"none", "noise", "scaled", "counts", "defects"}
    assert {line.gates for line in report.poison if line.kind == "noise"} == {True, False}


def test_gates_keep_noise_and_scaled_rows_out(report):
    kept_out = {line.kind: line.kept_out for line in report.poison if line.gates}
    assert kept_out["scaled"] == 1


def test_json_has_null_for_what_is_undefined(report):
    text = json.dumps(report.as_json(), allow_nan=False)
    content = json.loads(text)
    assert content["curve"][-1]["mixed"] is None
    assert content["about"]["boxes"] == 8


def test_tables_say_what_is_measured_and_what_is_not(report):
    longer = replace(report, costs=(replace(report.costs[0], boxes=4), report.costs[0]))
    text = tables(longer)
    assert "| 8 | measured |" in text
    assert "| 10000 | extrapolated |" in text
    assert "10000" not in tables(report)


def test_the_picture_is_written(report, tmp_path):
    draw(report, tmp_path / "fleet.png")
    assert cv2.imread(str(tmp_path / "fleet.png")) is not None
    with pytest.raises(DataError, match="cannot be written"):
        draw(report, tmp_path / "missing" / "fleet.png")


def test_the_verb_writes_what_it_says(report, tmp_path, monkeypatch, capsys):
    seen = []

    def quick(settings, *, progress):
        seen.append(settings)
        return report

    monkeypatch.setattr(fleet_bench, "simulate", quick)
    trainer.bench.bench("fleet", boxes=20, json_file=tmp_path / "new" / "fleet.json", rounds=4, seed=3)
    assert (seen[0].boxes, seen[0].fleet.rounds, seen[0].seed) == (20, 4, 3)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"fleet.json", "fleet.md", "fleet.png"}
    assert "with fleet memory" in capsys.readouterr().out


def test_another_bench_is_refused():
    with pytest.raises(UsageError, match="bench camera"):
        trainer.bench.bench("camera", boxes=10)


def test_a_fleet_of_one_is_refused_by_the_options_name():
    with pytest.raises(UsageError, match="--boxes 1"):
        trainer.bench.bench("fleet", boxes=1)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be made"):
        trainer.bench.bench("fleet", boxes=4, out=tmp_path / "file" / "out")


def test_fleets_are_merged_in_processes_of_their_own(report):
    simulated = fleet_bench.Simulation(
        generated_boxes(make_sites(2, seed=0), Colours(), FEW, progress=no_progress),
        SMALL,
        Colours.judge,
        embedding_id=SPACE,
        seed=0,
    )
    updates = [box.update(1, base_version=0, seed=0) for box in simulated.boxes]
    rows = [box.data.learn for box in simulated.boxes]
    (small,) = measure(updates, rows, 2, SMALL.aggregate, seed=0, progress=no_progress)
    assert small.boxes == 2
    assert small.bytes_up < report.costs[0].bytes_up
