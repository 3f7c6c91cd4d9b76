"""Calls into engines are stamped, and one that does not come back ends the process; a long first call does not."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edge.alerts.message import NoticeKind
from edge.bundle import Engine, Precision
from edge.errors import EngineError
from edge.inference import session as session_module
from edge.inference.calls import NS_PER_S, Calls
from edge.inference.engines import open_graph
from edge.inference.stall_guard import STALLED_EXIT_CODE, StallGuard
from tests.edge.tiny_bundle import make_tiny_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edge.inference.engines import GraphSession

SOON = 10.0


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> int:
        return round(self.seconds * NS_PER_S)


def test_oldest_call_over_its_limit_is_found() -> None:
    clock = Clock()
    calls = Calls(clock_ns=clock)
    building = calls.begin("compiles", first=True)
    clock.seconds = 1.0
    calls.begin("hangs", first=False)
    clock.seconds = 6.0
    assert calls.stalled(limit_s=5.0, first_limit_s=100.0) is None
    clock.seconds = 6.5
    call, age = calls.stalled(limit_s=5.0, first_limit_s=100.0) or pytest.fail("not found")
    assert (call.what, age) == ("hangs", 5.5)
    assert calls.oldest_s() == 6.5
    clock.seconds = 101.0
    assert (calls.stalled(limit_s=500.0, first_limit_s=100.0) or pytest.fail("not found"))[0].what == "compiles"
    calls.end(building)
    assert calls.stalled(limit_s=500.0, first_limit_s=100.0) is None


def test_result_that_waits_to_be_fetched_is_no_stall() -> None:
    clock = Clock()
    calls = Calls(clock_ns=clock)
    done: list[bool] = []
    calls.begin("a", first=False, done=lambda: bool(done))
    clock.seconds = 10.0
    assert calls.stalled(limit_s=5.0, first_limit_s=5.0) is not None
    done.append(True)
    assert calls.stalled(limit_s=5.0, first_limit_s=5.0) is None


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("stall") / "bundle").file("trunk.onnx")


@pytest.mark.parametrize("engine", list(Engine))
def test_every_way_of_running_is_stamped(trunk: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(session_module, "IN_PROGRESS", calls)
    session = open_graph(trunk, engine=engine, precision=Precision.FLOAT32, threads=1)
    image = {"image": np.zeros((1, 64, 64, 3), np.uint8)}
    seen: list[Any] = []
    real = type(session)._run

    def watched(self: GraphSession, inputs: Any) -> Any:
        seen.append(calls.stalled(limit_s=-1.0, first_limit_s=-1.0))
        return real(self, inputs)

    monkeypatch.setattr(type(session), "_run", watched)
    expected = {name: array.copy() for name, array in session.run(image).items()}
    session.clone().run(image)
    # A clone shares the compiled graph, so its first call compiles nothing.
    assert [call.first for call, _ in seen] == [True, False]
    session.start(image)
    assert calls.oldest_s() > 0
    found = session.finish()
    assert calls.oldest_s() == 0
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("engine", list(Engine))
def test_call_that_fails_is_no_longer_in_progress(trunk: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setattr(session_module, "IN_PROGRESS", calls)
    session = open_graph(trunk, engine=engine, precision=Precision.FLOAT32, threads=1)

    def fail(*_: object) -> None:
        raise EngineError("gives up")

    for name in ("_run", "_start", "_finish"):
        monkeypatch.setattr(session, name, fail)
    for step in (session.run, session.start):
        with pytest.raises(EngineError, match="gives up"):
            step({"image": np.zeros((1, 64, 64, 3), np.uint8)})
    with pytest.raises(EngineError, match="gives up"):
        session.finish()
    assert calls.oldest_s() == 0


class Ended:
    def __init__(self) -> None:
        self.codes: list[int] = []
        self.event = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.event.set()


def test_guard_gives_notice_and_ends_the_process(caplog: pytest.LogCaptureFixture) -> None:
    calls, ended = Calls(), Ended()
    notices: list[tuple[Any, ...]] = []
    guard = StallGuard(
        limit_s=0.05,
        detectors=lambda: None,
        notify=lambda *words, **_: notices.append(words),
        calls=calls,
        end=ended,
    )
    guard.start()
    calls.begin("head.onnx", first=False)
    assert ended.event.wait(SOON)
    assert ended.codes == [STALLED_EXIT_CODE]
    assert [kind for kind, *_ in notices] == [NoticeKind.ENGINE_STALLED]
    assert "head.onnx: the engine has not come back for" in caplog.text
    assert guard.stop(SOON)


def test_guard_ends_the_process_although_its_notice_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.inference.stall_guard.LAST_WORDS_S", 0.05)
    calls, ended, forever = Calls(), Ended(), threading.Event()
    guard = StallGuard(
        limit_s=0.05, detectors=lambda: None, notify=lambda *_, **__: forever.wait(), calls=calls, end=ended
    )
    guard.start()
    calls.begin("a", first=False)
    assert ended.event.wait(SOON)
    forever.set()


def test_guard_leaves_a_first_call_alone() -> None:
    calls, ended = Calls(), Ended()
    guard = StallGuard(limit_s=0.02, detectors=lambda: None, notify=lambda *_, **__: None, calls=calls, end=ended)
    guard.start()
    calls.begin("compiles", first=True)
    # Many rounds of the guard: as long as another guard takes to see a call of the same age that is no first one.
    seen, control = Calls(), Ended()
    other = StallGuard(limit_s=0.2, detectors=lambda: None, notify=lambda *_, **__: None, calls=seen, end=control)
    other.start()
    seen.begin("hangs", first=False)
    assert control.event.wait(SOON)
    assert ended.codes == []
    assert guard.status()["oldest_call_s"] > 0
    assert guard.stop(SOON)
