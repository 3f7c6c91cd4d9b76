"""What a box's memory learns, ships, tries and switches to; old frames meet old thresholds, whatever happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edge.alerts.command_messages import AcceptCommand, ShipCommand
from edge.alerts.message import build
from edge.bundle import CalibrationScores, Engine
from edge.errors import SettingsError
from edge.federation.connection import LinkKind, LinkState
from edge.federation.update import Order, WireRows
from edge.frames import Decision
from edge.inference.detector import Detector
from edge.judgement.region_of_interest import Rectangle, RegionOfInterest
from edge.memory.opening import open_memory
from edge.memory.settings import MemorySettings
from tests.edge.memory_bench import Bench, Fleet, fleet_bank
from tests.edge.tiny_bundle import good_frame, make_tiny_bundle
from tests.edge.tiny_memory import ENGINE, PRECISION, embedding_of, make_memory_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edge.bundle import Bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_memory_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def without_commissioning(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_memory_bundle(tmp_path_factory.mktemp("bundle") / "b", commissioning=0)


def accept(**values: Any) -> AcceptCommand:
    return build(AcceptCommand, camera="cam", **values)


def bring_fleet(bench: Bench, **changes: Any) -> None:
    """A bank of the fleet arrives and its shadow ends."""
    assert bench.link is not None
    bench.link.bank = bench.fleet_bank(**changes)
    bench.wait(0)
    bench.show_good(6)
    bench.wait(10)


# --- learning ---------------------------------------------------------------------------------------------------


def test_good_frames_below_the_quantile_feed(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path)
    median = float(np.median(bundle.calibration(ENGINE, PRECISION).scores))

    scores = [bench.show(good_frame(seed)).score for seed in range(3000, 3020)]

    below = sum(score < median for score in scores)
    assert 0 < below < 20
    assert bench.status["frames_fed"] == below
    assert bench.status["turned_away_since_start"] == 20 - below


def test_alerted_frames_never_feed(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, quantile=0.99)

    assert bench.show_defect().decision is Decision.NOK
    bench.show(good_frame(3000), alarmed=True)

    assert bench.status["frames_fed"] == 0
    assert bench.status["turned_away_since_start"] == 2


def test_declared_frame_feeds_whatever_its_score_and_once(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, learn="declared")
    bench.show_good(3)
    seq = bench.show_defect().camera_seq

    answer = bench.order(accept(camera_seq=seq, id="a"))
    again = bench.order(accept(camera_seq=seq))

    assert answer == {"verb": "accept", "id": "a", "ok": True, "count": 1}
    assert bench.status["frames_fed"] == 1
    assert not again["ok"]
    assert "counts once" in again["reason"]
    assert bench.status["frames_fed"] == 1


def test_part_is_declared_good_by_its_name(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, learn="declared")
    bench.show(good_frame(1), part_id="p-1")

    assert bench.order(accept(part_id="p-1"))["ok"]
    assert "not kept here" in bench.order(accept(part_id="p-2"))["reason"]


def test_what_lies_outside_the_region_of_interest_teaches_nothing(bundle: Bundle, tmp_path: Path) -> None:
    left = RegionOfInterest(include=(Rectangle(x=0, y=0, w=48, h=96),))
    bench = Bench(bundle, tmp_path, region=left, learn="declared")
    image = good_frame(1)
    image[:, 56:] = (20, 20, 250)

    seq = bench.show(image).camera_seq
    assert bench.order(accept(camera_seq=seq))["ok"]

    learned = bench.opened.learner.rows
    rows = embedding_of(bundle.path, image).reshape(8, 8, -1)
    assert bench.opened.learner._memory.patches == 32
    far = [float(np.sqrt(((row - learned) ** 2).sum(1).min())) for row in rows[:, 5:].reshape(-1, rows.shape[-1])]
    assert min(far) > 1


def test_region_of_interest_holds_for_shadow_and_thresholds(bundle: Bundle, tmp_path: Path) -> None:
    left = RegionOfInterest(include=(Rectangle(x=0, y=0, w=48, h=96),))
    bench = Bench(bundle, tmp_path, link=Fleet(), region=left)
    image = good_frame(1)
    image[:, 56:] = (20, 20, 250)
    assert bench.show(image).decision is Decision.OK
    bring_fleet(bench)

    assert bench.kinds() == ["memory.switched"]
    verdict = bench.show(image)
    assert (verdict.memory_version, verdict.decision) == (1, Decision.OK)
    assert bench.camera.judge.good_scores.tolist() != bench.camera.judge.calibration.scores.tolist()


def test_too_few_good_scores_place_no_gate_and_it_is_said(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path)
    few = bench.camera.judge.calibration
    few = CalibrationScores(few.scores[:9], few.maps[:9], few.groups[:9])
    bench.camera.judges[0] = bench.camera.judge.recalibrated(few, memory_version=0)
    bench.show_good(5)

    assert bench.status["frames_fed"] == 0
    assert "9 calibration scores cannot place the gate" in bench.status["trouble"]["learning"]
    assert "cannot place the gate" in bench.keeper.warnings()[0]
    assert bench.order(accept(camera_seq=4))["ok"], "a word needs no scores"


def test_nothing_feeds_where_learning_is_off(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, learn="off")
    bench.show_good(5)

    assert "learn is off" in bench.order(accept(camera_seq=0))["reason"]
    assert bench.status["frames_fed"] == 0


def test_one_frame_per_interval_is_sampled_and_the_camera_never_waits(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path)
    frame, verdict = bench.capture(good_frame(1))

    for _ in range(20):
        bench.keeper.offer(frame, verdict, False)
    bench.keeper.turn(0)
    assert bench.status["fed_since_start"] + bench.status["turned_away_since_start"] == 1
    for _ in range(20):
        bench.now += 1
        bench.keeper.offer(frame, verdict, False)

    assert bench.status["dropped_since_start"] == 16


# --- shipping ---------------------------------------------------------------------------------------------------


def test_update_is_shipped_when_due_and_names_what_it_is(bundle: Bundle, tmp_path: Path) -> None:
    link = Fleet()
    bench = Bench(bundle, tmp_path, link=link, min_frames=2, quantile=0.9)
    bench.show_good(20)
    bench.wait(100)

    (update,) = link.updates
    assert (update.fleet, update.box, update.product, update.round) == ("fleet", "plant/box1", "woven", 7)
    assert update.embedding_id == bundle.manifest.embedding_id[PRECISION]
    assert update.order is Order.ANCHOR
    assert (update.frames >= 2).all()
    assert update.n_frames == bench.status["frames_fed"]
    assert np.array_equal(update.rows.astype(np.float16).astype(np.float32), update.rows)
    assert bench.status["last_ship"] == f"{len(update.rows)} rows for round 7"
    bench.wait(100)
    assert len(link.updates) == 1, "nothing was learned since"


def test_rows_of_few_frames_never_leave(bundle: Bundle, tmp_path: Path) -> None:
    link = Fleet()
    bench = Bench(bundle, tmp_path, link=link, min_frames=8, quantile=0.9)
    bench.show_good(3)

    answer = bench.order(build(ShipCommand, id="s"))
    bench.wait(100)

    assert (answer["ok"], answer["id"]) == (False, "s")
    assert "8 frames" in answer["reason"]
    assert link.updates == []
    assert bench.kinds() == []


def test_ship_command_ships_now(bundle: Bundle, tmp_path: Path) -> None:
    link = Fleet()
    bench = Bench(bundle, tmp_path, link=link, min_frames=2, quantile=0.9, wire="uint8")
    bench.show_good(10)

    answer = bench.order(build(ShipCommand))

    assert answer == {"verb": "ship", "id": None, "ok": True, "count": len(link.updates[0].rows)}
    assert link.updates[0].wire is WireRows.UINT8
    assert "nothing was learned" in bench.order(build(ShipCommand))["reason"]


def test_ship_without_a_fleet_says_so(bundle: Bundle, tmp_path: Path) -> None:
    assert "in no fleet" in Bench(bundle, tmp_path).order(build(ShipCommand))["reason"]


def test_positional_update_has_a_row_per_place(bundle: Bundle, tmp_path: Path) -> None:
    link = Fleet()
    bench = Bench(bundle, tmp_path, link=link, order="positional", quantile=0.9)
    bench.show_good(15)

    assert bench.order(build(ShipCommand))["count"] == 64
    assert link.updates[0].order is Order.POSITIONAL


# --- shadow, recalibration, switch --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", list(Engine))
def test_fleet_memory_comes_into_force_after_its_shadow(bundle: Bundle, tmp_path: Path, engine: Engine) -> None:
    bench = Bench(bundle, tmp_path, link=Fleet(), engine=engine)
    old = bench.show(good_frame(1))
    bring_fleet(bench)

    assert bench.kinds() == ["memory.switched"]
    assert bench.announced == [(1, 1)]
    new = bench.show(good_frame(1))
    assert (old.memory_version, new.memory_version) == (0, 1)
    assert new.score < old.score
    assert new.threshold != old.threshold
    assert new.decision is Decision.OK
    assert bench.show_defect().decision is Decision.NOK
    assert (bench.status["version"], bench.status["fleet_version"]) == (1, 1)


def test_thresholds_come_from_the_commissioning_set_alone(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, link=Fleet())
    bring_fleet(bench)

    scores = bench.camera.judges[1].calibration.scores
    wanted = []
    with np.load(bundle.file("commissioning.npz"), allow_pickle=False) as archive:
        for embedding in archive["embedding_float32"][:, 0].astype(np.float32):
            rows = np.concatenate(bench.changeover.banks.rows)
            distance = np.sqrt(((embedding[:, None] - rows[None]) ** 2).sum(-1).min(1))
            wanted.append(np.sort(distance)[-3:].mean())
    assert scores == pytest.approx(np.array(wanted), rel=1e-3)


def test_shadow_lasts_its_frames_and_its_time_and_says_so(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, link=Fleet())
    assert bench.link is not None
    bench.link.bank = bench.fleet_bank()
    bench.wait(0)
    bench.show_good(4)
    bench.wait(100)

    assert bench.status["version"] == 0
    assert bench.status["candidate"]["waits_for"].startswith("in shadow: 4 of 5 frames, 0 s are left")
    figures = bench.status["candidate"]["cameras"]["cam"]
    assert (figures["frames"], figures["good"], figures["alarms"]) == (4, 4, 0)
    assert figures["mirror_error"] < 1e-3
    bench.show_good(1)
    assert bench.status["version"] == 1


def test_without_commissioning_it_stays_in_shadow_for_ever_and_says_so(
    without_commissioning: Bundle, tmp_path: Path
) -> None:
    bench = Bench(without_commissioning, tmp_path, link=Fleet())
    bring_fleet(bench)
    bench.wait(1e6)

    assert bench.status["version"] == 0
    assert bench.status["candidate"]["frames"] == 6
    assert bench.status["candidate"]["cameras"]["cam"]["mean_score_of_candidate"] > 0
    (warning,) = bench.keeper.warnings()
    assert "stays in shadow: there is no commissioning set" in warning
    assert bench.kinds() == []


def test_commissioning_folder_replaces_the_set_of_the_bundle(without_commissioning: Bundle, tmp_path: Path) -> None:
    import cv2

    for index in range(12):
        folder = tmp_path / "good" / f"part{index // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{index}.png"), good_frame(5000 + index))
    (tmp_path / "good" / "torn.png").write_bytes(b"torn")
    bench = Bench(without_commissioning, tmp_path / "state", link=Fleet(), commissioning=tmp_path / "good")
    bench.wait(0)

    # Declared good at this box: its thresholds come from them at once, whatever the line looks like to the packed ones.
    assert (bench.status["version"], bench.status["fleet_version"]) == (1, 0)
    assert bench.status["commissioning_images"] == 12
    assert bench.camera.judges[1].threshold.n_groups == 6
    assert bench.kinds() == ["memory.switched"]
    bring_fleet(bench)
    assert (bench.status["version"], bench.status["fleet_version"]) == (2, 1)

    again = Bench(without_commissioning, tmp_path / "state", link=Fleet(), commissioning=tmp_path / "good")
    again.wait(0)
    assert again.status["version"] == 2


def test_commissioning_folder_of_too_few_images_is_a_notice(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    bench = Bench(bundle, tmp_path / "state", link=Fleet(), commissioning=tmp_path / "good")
    bring_fleet(bench)

    assert bench.kinds() == ["memory.failed"]
    assert "fewer than 10 images" in bench.keeper.warnings()[0]
    assert bench.status["version"] == 0


def test_memory_that_alarms_on_good_frames_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """Its commissioning set is far from the line's frames: calibrated on it, the line would alarm."""
    bench = Bench(bundle, tmp_path, link=Fleet(), shadow_frames=40)
    bench.wait(0)
    commissioning = bench.changeover.commissioning
    assert commissioning is not None
    # Images whose patches are rows of the new bank: thresholds fall to zero.
    bank = bench.fleet_bank()
    far = np.tile(bank.rows[:1].astype(np.float16), (1, 64, 1))
    object.__setattr__(commissioning, "embeddings", np.tile(far, (len(commissioning), 1, 1, 1)))
    bench.changeover._unit = 1.0
    assert bench.link is not None
    bench.link.bank = bank
    bench.wait(0)
    bench.show_good(10)

    assert bench.kinds() == ["memory.refused"]
    _, severity, text, detail = bench.notices[0]
    assert severity == "warning"
    assert "alarms on" in text
    assert detail["fleet_version"] == 1
    assert bench.status["version"] == 0
    bench.link.bank = bank
    bench.wait(0)
    assert bench.status["candidate"] is None, "a refused version is not tried again"


def test_local_memory_is_tried_at_home(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, quantile=0.9)
    bench.show_good(20)
    bench.wait(100)
    assert bench.status["candidate"]["source"] == "local"
    bench.show_good(6, first=3100)
    bench.wait(10)

    assert (bench.status["version"], bench.status["fleet_version"]) == (1, 0)
    assert bench.show(good_frame(1)).memory_version == 1


def test_drift_bound_refuses_and_alarms(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, quantile=0.9, drift_per_week=1e-6)
    bench.show_good(20)
    bench.wait(100)
    bench.show_good(6, first=3100)
    bench.wait(10)

    assert bench.kinds() == ["memory.drift"]
    _, severity, text, detail = bench.notices[0]
    assert severity == "alarm"
    assert "the bound is 1e-06" in text
    assert detail["drift"] > detail["bound"]
    assert bench.status["version"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"embedding_id": "f" * 64}, "of the embedding ffffffffffff"), ({"rows": np.ones((9, 21), np.float32)}, "21")],
)
def test_bank_that_does_not_fit_is_refused(bundle: Bundle, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    bench = Bench(bundle, tmp_path, link=Fleet())
    bring_fleet(bench, **changes)

    assert bench.kinds() == ["memory.refused"]
    assert words in bench.notices[0][2]
    assert bench.status["version"] == 0


def test_larger_fleet_memory_is_reduced_to_the_room_there_is(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, link=Fleet())
    rows = fleet_bank(bundle, 1).rows
    many = np.concatenate([rows, rows + np.float32(1e-3), rows[:1] + 50])
    bring_fleet(bench, rows=many)

    used = bench.changeover.banks.fleet
    assert bench.status["version"] == 1
    assert used is not None
    assert used.shape == (64, 20)
    assert {row.tobytes() for row in used} <= {row.tobytes() for row in many}
    assert (used == many[-1]).all(1).any(), "what is rare stays in"


def test_newer_fleet_memory_replaces_the_one_in_shadow(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, link=Fleet())
    assert bench.link is not None
    bench.link.bank = bench.fleet_bank(1)
    bench.wait(0)
    bring_fleet(bench, version=2)

    assert bench.announced == [(1, 2)]
    assert bench.status["counters"] == {"proposed": 2, "switched": 1, "refused": 0, "replaced": 1}


def test_second_switch_starts_from_the_first(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, link=Fleet(), min_frames=2, quantile=0.9)
    bring_fleet(bench)
    bench.show_good(10)
    bring_fleet(bench, version=2)

    figures = bench.notices[-1][3]["thresholds"]["cam"]
    thresholds = [bench.camera.judges[version].threshold.value for version in (1, 2)]
    assert [figures["old"], figures["new"]] == thresholds
    assert bench.order(build(ShipCommand))["ok"]
    assert bench.link is not None
    assert bench.link.updates[0].base_version == 2


def test_refused_link_is_a_notice_once(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, link=Fleet(state=LinkState(LinkKind.REFUSED, "revoked: enrol it again")))
    for _ in range(3):
        bench.wait(1)

    assert [(kind, text) for kind, _, text, _ in bench.notices] == [("federation.refused", "revoked: enrol it again")]
    assert bench.keeper.warnings() == ["federation: revoked: enrol it again"]


def test_refused_updates_are_notices_by_their_code(bundle: Bundle, tmp_path: Path) -> None:
    link = Fleet()
    bench = Bench(bundle, tmp_path, link=link)
    bench.wait(0)
    for refused in ({"busy": 3}, {"busy": 4, "bad_support": 1}, {"busy": 4, "bad_support": 2, "already_counted": 1}):
        link.counters = {"refused": refused}
        bench.wait(1)

    assert [(kind, severity, detail) for kind, severity, _, detail in bench.notices] == [
        ("federation.refused", "warning", {"code": "bad_support"}),
        ("federation.refused", "info", {"code": "already_counted"}),
    ]
    bench.wait(3600)
    assert len(bench.notices) == 2, "nothing was refused since"
    link.counters = {"refused": {"bad_support": 3}}
    bench.wait(0)
    assert len(bench.notices) == 3


def test_damaged_spool_is_a_notice_once(bundle: Bundle, tmp_path: Path) -> None:
    bench = Bench(bundle, tmp_path, link=Fleet(counters={"damage": "malformed; kept as x"}))
    bench.wait(1)
    bench.wait(1)

    assert bench.kinds() == ["federation.damaged"]


# --- restarts and damage ----------------------------------------------------------------------------------------


def test_restart_goes_on_with_the_memory_in_force(bundle: Bundle, tmp_path: Path) -> None:
    first = Bench(bundle, tmp_path, link=Fleet(), quantile=0.9)
    first.show_good(12)
    bring_fleet(first)
    before = first.show(good_frame(1))
    first.stop()

    second = Bench(bundle, tmp_path, link=Fleet(), quantile=0.9)

    after = second.show(good_frame(1))
    assert (after.memory_version, after.score, after.threshold) == (1, before.score, before.threshold)
    assert second.status["fleet_version"] == 1
    assert second.status["frames_fed"] >= first.status["frames_fed"] > 0
    bring_fleet(second, version=2)
    assert second.announced == [(2, 2)]


def test_killed_box_has_the_version_on_disk_before_it_judges(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(bundle, tmp_path, link=Fleet())
    kept: list[tuple[int, int]] = []
    install = bench.camera.install_judge

    def look(judge: Any) -> None:
        memory = bench.opened.store.read_in_force()
        assert memory is not None
        kept.append((memory.version, bench.detector.memory_version))
        install(judge)

    monkeypatch.setattr(bench.camera, "install_judge", look)
    bring_fleet(bench)

    assert kept == [(1, 0)]


def test_memory_that_cannot_be_stored_does_not_judge_until_it_can(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(bundle, tmp_path, link=Fleet())

    def full(_memory: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bench.opened.store, "write_in_force", full)
        bring_fleet(bench)
        assert bench.show(good_frame(1)).memory_version == 0
        assert "No space left" in bench.status["candidate"]["waits_for"]
    bench.wait(60)

    assert bench.show(good_frame(1)).memory_version == 1


@pytest.mark.parametrize("damage", ["junk", "cut", "bit"])
def test_damaged_memory_is_put_aside_and_the_packed_one_judges(bundle: Bundle, tmp_path: Path, damage: str) -> None:
    first = Bench(bundle, tmp_path, link=Fleet())
    bring_fleet(first)
    first.stop()
    (file,) = tmp_path.rglob("in_force-float32.npz")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes({"junk": b"junk", "cut": bytes(content[: len(content) // 2]), "bit": bytes(content)}[damage])

    second = Bench(bundle, tmp_path, link=Fleet())

    assert len(second.opened.damage) == 1
    assert "the memory packed in the bundle judges" in second.opened.damage[0]
    assert second.show(good_frame(1)).memory_version == 0
    assert len(list(tmp_path.rglob("in_force-*.damaged-*"))) == 1
    bring_fleet(second)
    assert second.announced == [(2, 1)], "a number is never given twice"
    assert Bench(bundle, tmp_path, link=Fleet()).opened.damage == []


def test_damaged_learning_begins_again_and_the_memory_in_force_stays(bundle: Bundle, tmp_path: Path) -> None:
    first = Bench(bundle, tmp_path, link=Fleet())
    bring_fleet(first)
    first.stop()
    (file,) = tmp_path.rglob("learned-float32.npz")
    file.write_bytes(b"junk")

    second = Bench(bundle, tmp_path, link=Fleet())

    assert "learning begins again" in second.opened.damage[0]
    assert second.show(good_frame(1)).memory_version == 1


def test_another_bundle_begins_afresh_and_the_old_file_stays(
    bundle: Bundle, without_commissioning: Bundle, tmp_path: Path
) -> None:
    first = Bench(bundle, tmp_path, link=Fleet())
    bring_fleet(first)
    first.stop()

    other = Bench(without_commissioning, tmp_path)

    assert other.show(good_frame(1)).memory_version == 0
    assert other.opened.damage == []
    assert Bench(bundle, tmp_path).show(good_frame(1)).memory_version == 1


def test_memory_of_another_bundle_in_its_place_is_refused(
    bundle: Bundle, without_commissioning: Bundle, tmp_path: Path
) -> None:
    first = Bench(bundle, tmp_path, link=Fleet())
    bring_fleet(first)
    first.stop()
    (folder,) = (tmp_path).iterdir()
    folder.rename(tmp_path / without_commissioning.id[:16])

    other = Bench(without_commissioning, tmp_path)

    assert other.show(good_frame(1)).memory_version == 0
    assert [text.split(": ")[1].split(";")[0] for text in other.opened.damage] == ["is of another bundle"] * 2


def test_time_since_the_last_ship_outlives_a_restart(bundle: Bundle, tmp_path: Path) -> None:
    first = Bench(bundle, tmp_path)
    first.wait(70)
    first.stop()

    assert Bench(bundle, tmp_path).status["next_ship_s"] == pytest.approx(30)


def test_bundle_with_a_fixed_memory_is_refused(tmp_path: Path) -> None:
    detector = Detector.open(make_tiny_bundle(tmp_path / "b"), engine=ENGINE, precision=PRECISION, threads=1)

    with pytest.raises(SettingsError, match=r"method tiny\) cannot change"):
        open_memory(MemorySettings(), detector, tmp_path)


def test_rows_that_could_never_leave_are_refused_in_the_settings() -> None:
    with pytest.raises(ValueError, match="no row can ever leave"):
        MemorySettings.model_validate({"min_frames": 10, "update": {"beta": 0.9}})
