"""Slots hold exactly one serving bundle at every point, and take a bad one back."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edge.bundle import Bundle
from edge.errors import BundleError, SlotError
from edge.frames import Decision, Frame, JudgedFrame, Prediction, Verdict
from edge.slots.probe import Limits, examine, run_probe
from edge.slots.settings import TrialSettings
from edge.slots.slots import Slots
from edge.slots.trial import FAILED_OF, TIMED_FRAMES, Pace, TrialFrame, TrialRule
from tests.edge.tiny_bundle import make_tiny_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("first") / "bundle", product="first")


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("second") / "bundle", product="second")


def no_examination(new: Path, serving: Path | None) -> None:
    """Take every bundle."""


@pytest.fixture
def slots(tmp_path: Path, first: Bundle) -> Slots:
    made = Slots(tmp_path / "bundles")
    assert made.install(first.path, examine=no_examination) is None
    return made


def test_first_bundle_serves_without_a_trial(slots: Slots, first: Bundle) -> None:
    state = slots.state()

    assert Bundle.open(slots.current).id == first.id
    assert (state.serving, state.trial) == ("a", None)


def test_second_bundle_serves_on_trial(slots: Slots, second: Bundle, first: Bundle) -> None:
    trial = slots.install(second.path, examine=no_examination)

    assert trial is not None
    assert (trial.id, trial.slot, trial.back_to) == (second.id, "b", "a")
    assert Bundle.open(slots.current).id == second.id
    assert slots.state().bundles == {"a": first.id, "b": second.id}


def test_confirmed_bundle_has_no_trial(slots: Slots, second: Bundle) -> None:
    slots.install(second.path, examine=no_examination)

    assert slots.confirm() == second.id
    assert slots.trial() is None
    assert slots.confirm() is None


def test_rolled_back_bundle_is_refused_later(slots: Slots, first: Bundle, second: Bundle) -> None:
    slots.install(second.path, examine=no_examination)

    assert slots.roll_back("too slow") == first.id

    assert Bundle.open(slots.current).id == first.id
    assert slots.state().bad[0].reason == "too slow"
    with pytest.raises(SlotError, match="taken back before \\(too slow\\)"):
        slots.install(second.path, examine=no_examination)
    assert slots.install(second.path, examine=no_examination, allow_bad=True) is not None


def test_nothing_is_installed_during_a_trial(slots: Slots, second: Bundle, tmp_path: Path) -> None:
    slots.install(second.path, examine=no_examination)
    third = make_tiny_bundle(tmp_path / "third", product="third")

    with pytest.raises(SlotError, match="is on trial"):
        slots.install(third.path, examine=no_examination)


def test_bundle_that_serves_is_not_installed_again(slots: Slots, first: Bundle) -> None:
    with pytest.raises(SlotError, match="serves already"):
        slots.install(first.path, examine=no_examination)


def test_refused_bundle_leaves_no_trace(slots: Slots, first: Bundle, second: Bundle) -> None:
    def refuse(new: Path, serving: Path | None) -> None:
        assert serving is not None
        assert Bundle.open(new).id == second.id
        assert Bundle.open(serving).id == first.id
        raise SlotError("no")

    before = sorted(path.name for path in slots.root.iterdir())
    with pytest.raises(SlotError, match="no"):
        slots.install(second.path, examine=refuse)

    assert Bundle.open(slots.current).id == first.id
    assert sorted(path.name for path in slots.root.iterdir()) == before


def test_damaged_bundle_is_refused(slots: Slots, second: Bundle, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(second.path, damaged)
    trunk = damaged / second.manifest.trunk.float32
    trunk.write_bytes(trunk.read_bytes()[:-1] + b"x")

    with pytest.raises(BundleError, match="sha256"):
        slots.install(damaged, examine=no_examination)


def test_slot_with_a_damaged_bundle_is_nothing_to_go_back_to(slots: Slots, second: Bundle) -> None:
    slots.install(second.path, examine=no_examination)
    (slots.root / "a" / "manifest.json").unlink()

    with pytest.raises(SlotError, match="nothing to go back to"):
        slots.roll_back("bad")
    assert Bundle.open(slots.current).id == second.id


def test_starts_are_counted_during_a_trial_only(slots: Slots, second: Bundle) -> None:
    assert slots.count_start(1) == 0
    slots.install(second.path, examine=no_examination)

    assert [slots.count_start(by) for by in (1, 1, -1, -1, -1)] == [1, 2, 1, 0, 0]


def test_two_changes_at_once_are_refused(slots: Slots, second: Bundle) -> None:
    def meanwhile(new: Path, serving: Path | None) -> None:
        with pytest.raises(SlotError, match="another change"):
            slots.confirm()

    slots.install(second.path, examine=meanwhile)


def test_damaged_note_names_its_cure(slots: Slots) -> None:
    (slots.root / "slots.json").write_text("{")

    with pytest.raises(SlotError, match="remove it"):
        slots.trial()


@pytest.mark.parametrize("link", ["elsewhere", None])
def test_link_that_is_not_ours_is_refused(tmp_path: Path, link: str | None) -> None:
    slots = Slots(tmp_path)
    if link is None:
        slots.current.mkdir()
    else:
        slots.current.symlink_to(link)

    with pytest.raises(SlotError):
        slots.serving()


def test_plain_folder_is_no_slot(slots: Slots, first: Bundle) -> None:
    found = Slots.of(slots.current)

    assert Slots.of(first.path) is None
    assert found is not None
    assert found.root == slots.root


DISK_CALLS = ("replace", "fsync", "symlink", "mkdir", "unlink", "rmdir", "open")


def deadly(call: Callable[..., Any], left: Iterator[int]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return wrapped


def killed_at(action: Callable[[], object], point: int) -> bool:
    """Run a change in a process that kills itself before its n-th call to the disk; False where it came to its end."""
    child = os.fork()
    if child == 0:
        left = iter(range(point))
        for name in DISK_CALLS:
            setattr(os, name, deadly(getattr(os, name), left))
        try:
            action()
        except BaseException:  # noqa: BLE001 (the child ends here whatever happens)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("action", ["install", "back", "confirm"])
def test_killed_change_leaves_exactly_one_loadable_bundle(
    tmp_path: Path, action: str, first: Bundle, second: Bundle
) -> None:
    begin = Slots(tmp_path / "begin")
    begin.install(first.path, examine=no_examination)
    if action != "install":
        begin.install(second.path, examine=no_examination)
    seen = set()
    for point in range(500):
        root = tmp_path / f"{action}-{point}"
        shutil.copytree(begin.root, root, symlinks=True)
        slots = Slots(root)
        changes = {
            "install": lambda slots=slots: slots.install(second.path, examine=no_examination),
            "back": lambda slots=slots: slots.roll_back("bad"),
            "confirm": slots.confirm,
        }
        killed = killed_at(changes[action], point)
        serving = Bundle.open(slots.current)
        assert serving.id in (first.id, second.id)
        seen.add(serving.id)
        state = slots.state()
        if action == "install" and serving.id == second.id:
            assert state.trial is not None, "switched, and could not be taken back"
        if action == "back" and serving.id == second.id:
            assert state.trial is not None, "the bad bundle was confirmed by a kill"
        # Whatever was left behind does not stand in the way of the next change.
        other = second if serving.id == first.id else first
        if state.trial is not None:
            slots.confirm()
        slots.install(other.path, examine=no_examination, allow_bad=True)
        assert not [path for path in root.iterdir() if path.name.startswith((".incoming", ".outgoing", ".current"))]
        shutil.rmtree(root)
        if not killed:
            break
    else:
        pytest.fail("the change never came to its end")
    if action != "confirm":
        assert seen == {first.id, second.id}


def test_everything_is_on_disk_before_the_link_leads_to_it(
    slots: Slots, second: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill cannot lose what the kernel holds; a power cut can. So the order of syncs is looked at."""
    synced: set[tuple[int, int]] = set()
    linked: list[set[tuple[int, int]]] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle: int) -> None:
        fsync(handle)
        found = os.fstat(handle)
        synced.add((found.st_dev, found.st_ino))

    def note_replace(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        if Path(target).name == "current":
            linked.append(set(synced))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)

    slots.install(second.path, examine=no_examination)

    slot = slots.root / "b"
    needed = {(found.st_dev, found.st_ino) for path in [slot, slots.root, *slot.rglob("*")] for found in [path.stat()]}
    assert len(linked) == 1
    assert needed <= linked[0]


def test_probe_reports_what_the_bundle_does(first: Bundle) -> None:
    probe = run_probe(first.path)

    assert probe.fallback_reason == ""
    assert probe.latency_ms > 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", "ended with -6"),
        ("import time; time.sleep(60)", "within 0.5 s"),
        ("print('hello')", "nothing sensible"),
        ("import sys; sys.stderr.write('wrong shape\\n'); sys.exit(3)", "wrong shape"),
    ],
)
def test_child_that_crashes_or_hangs_is_an_error_here(first: Bundle, code: str, reason: str) -> None:
    with pytest.raises(SlotError, match=reason):
        run_probe(first.path, python=(sys.executable, "-c", code), timeout_s=0.5 if "sleep" in code else 60)


def test_bundle_that_cannot_be_loaded_is_refused(first: Bundle, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(SlotError, match="no bundle"):
        examine(tmp_path / "empty", first.path)


def test_slow_bundle_is_refused(first: Bundle, second: Bundle) -> None:
    """Any bundle is slow beside a bound that none keeps."""
    with pytest.raises(SlotError, match="is allowed"):
        examine(second.path, first.path, limits=Limits(max_slowdown=0.001))


def judged(*, finite: bool = True, predicted: bool = True, ms: float = 4.0, empty: bool = False) -> JudgedFrame:
    image = np.zeros((0, 0, 3) if empty else (8, 8, 3), np.uint8)
    now = datetime.now(timezone.utc)
    frame = Frame(image=image, camera="cam", camera_seq=0, captured_ns=0, captured_at=now)
    values = np.full((2, 2), 1.0 if finite else np.nan, np.float32)
    prediction = Prediction(values, frame, preprocess_ns=0, inference_ns=round(ms * 1e6)) if predicted else None
    decision = Decision.OK if finite and predicted else Decision.NOT_JUDGED
    return JudgedFrame(frame, prediction, Verdict(decision, 0.0, 1.0, 1.0, "cam", 0, 0, now))


def test_frame_that_never_came_says_nothing_of_the_detector() -> None:
    assert TrialFrame.of(judged(empty=True, predicted=False)) is None


@pytest.mark.parametrize("values", [{"finite": False}, {"predicted": False}])
def test_frames_that_cannot_be_judged_end_a_trial(values: dict[str, bool]) -> None:
    rule = TrialRule(TrialSettings(max_failed=3), begun_s=0, before_ms=None)
    good, bad = TrialFrame.of(judged()), TrialFrame.of(judged(**values))
    assert good is not None
    assert bad is not None

    said = [rule.feed(frame) for frame in (good, bad, good, bad, bad)]

    assert said[:4] == [""] * 4
    assert said[4] == "3 of 5 frames could not be judged"


def test_rare_failures_do_not_end_a_trial() -> None:
    rule = TrialRule(TrialSettings(max_failed=2), begun_s=0, before_ms=None)
    frames = [TrialFrame(failed=index % FAILED_OF == 0, processing_ms=1) for index in range(200)]

    assert {rule.feed(frame) for frame in frames} == {""}


def test_slow_frames_end_a_trial() -> None:
    before = Pace()
    for _ in range(TIMED_FRAMES):
        before.feed(TrialFrame(failed=False, processing_ms=2.0))
    rule = TrialRule(TrialSettings(max_slowdown=3), begun_s=0, before_ms=before.median_ms)

    said = [rule.feed(TrialFrame(failed=False, processing_ms=7.0)) for _ in range(TIMED_FRAMES)]

    assert said[-2] == ""
    assert said[-1] == "a frame takes 7.0 ms, and took 2.0 ms with the bundle before"


def test_trial_is_passed_after_time_and_frames() -> None:
    rule = TrialRule(TrialSettings(seconds=10, frames=2), begun_s=100, before_ms=None)

    rule.feed(TrialFrame(failed=False, processing_ms=1))
    assert not rule.passed(200)
    rule.feed(TrialFrame(failed=False, processing_ms=1))
    assert not rule.passed(109)
    assert rule.passed(110)
