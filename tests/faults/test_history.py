"""The history checker on histories made by hand: each thing that may not happen is found, and what may is not."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

import pytest

from tests.faults.history import Fact, Id, Kind, Recorder, check, read, require_sound

if TYPE_CHECKING:
    from pathlib import Path

E1, E2 = "a" * 16, "b" * 16


def fact(kind: Kind, seq: int = 0, epoch: str = E1, box: str = "b", **values: object) -> Fact:
    content = f"c{epoch[0]}{seq}" if kind in (Kind.ATTEMPTED, Kind.ENQUEUED, Kind.DELIVERED) else ""
    return Fact(kind, box, epoch, seq, **({"content": content, "pid": 1} | values))  # type: ignore[arg-type]


def life(seqs: range, epoch: str = E1, *, delivered: bool = True) -> list[Fact]:
    """Messages that went the ordinary way, one after the other."""
    kinds = [Kind.ATTEMPTED, Kind.ENQUEUED, Kind.PUBLISHED, Kind.ACKNOWLEDGED]
    kinds += [Kind.DELIVERED] if delivered else []
    return [fact(Kind.SESSION, epoch=""), *(fact(kind, seq, epoch) for seq in seqs for kind in kinds)]


GOOD = life(range(1, 6))


def test_ordinary_life_is_sound() -> None:
    report = check(GOOD)
    assert report.findings == []
    assert (report.enqueued, report.delivered, report.duplicates) == (5, 5, 0)


def test_what_may_happen_is_sound() -> None:
    """Repeats, a row whose box died before it could say so, late rows behind live ones, a second epoch, another box."""
    facts = [
        *GOOD,
        fact(Kind.DELIVERED, 2, late=True),
        fact(Kind.ATTEMPTED, 6), fact(Kind.PUBLISHED, 6), fact(Kind.DELIVERED, 6),
        fact(Kind.ATTEMPTED, 7), fact(Kind.ENQUEUED, 7),
        fact(Kind.ATTEMPTED, 8), fact(Kind.ENQUEUED, 8),
        fact(Kind.SESSION, epoch="", pid=2),
        fact(Kind.PUBLISHED, 8, pid=2), fact(Kind.DELIVERED, 8),
        fact(Kind.PUBLISHED, 7, pid=2, late=True), fact(Kind.DELIVERED, 7, late=True),
        *life(range(9, 12), E2),
        fact(Kind.ATTEMPTED, 1, box="other"), fact(Kind.ENQUEUED, 1, box="other"), fact(Kind.DELIVERED, 1, box="other"),
    ]  # fmt: skip
    report = check(facts)
    assert report.findings == []
    assert report.duplicates == 1


def test_attempt_that_failed_and_was_made_again_is_sound() -> None:
    facts = [fact(Kind.ATTEMPTED, 1, content="first"), fact(Kind.ATTEMPTED, 1, content="second"),
             fact(Kind.ENQUEUED, 1, content="second"), fact(Kind.DELIVERED, 1, content="second")]  # fmt: skip
    assert check(facts).findings == []


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ([*GOOD, fact(Kind.ATTEMPTED, 6), fact(Kind.ENQUEUED, 6)], "1 lost: b/aaaaaaaaaaaaaaaa/6"),
        ([*GOOD, *life(range(6, 8), delivered=False)], "2 lost"),
        ([*GOOD, fact(Kind.DELIVERED, 6)], "1 invented"),
        ([*GOOD, fact(Kind.DELIVERED, 5, epoch=E2)], "1 invented"),
        ([*GOOD, fact(Kind.DELIVERED, 3, box="other")], "1 invented"),
        ([*GOOD, fact(Kind.DELIVERED, 3, content="ca4")], "1 delivered with another content"),
        (
            [fact(Kind.ATTEMPTED, 1, content="x"), fact(Kind.ATTEMPTED, 1, content="y"),
             fact(Kind.ENQUEUED, 1, content="y"), fact(Kind.DELIVERED, 1, content="x")],
            "1 delivered with another content",
        ),
        ([*GOOD, fact(Kind.ATTEMPTED, 5, content="z"), fact(Kind.ENQUEUED, 5, content="z")], "number given twice"),
        ([*GOOD, *life(range(7, 9))], "1 numbers without a message: b/aaaaaaaaaaaaaaaa/6"),
        ([*GOOD, fact(Kind.ACKNOWLEDGED, 9)], "acknowledged but never sent"),
        ([*GOOD, fact(Kind.PUBLISHED, 6)], "1 sent but never made"),
        ([*GOOD, fact(Kind.PUBLISHED, 4)], "sent out of order"),
        (
            [*life(range(1, 2)), *(fact(kind, seq) for kind in (Kind.ATTEMPTED, Kind.ENQUEUED) for seq in (2, 3)),
             fact(Kind.DELIVERED, 3), fact(Kind.DELIVERED, 2)],
            "live out of order: b/aaaaaaaaaaaaaaaa/2 after 3",
        ),
        (
            [*GOOD, fact(Kind.ATTEMPTED, 6), fact(Kind.ENQUEUED, 6), fact(Kind.GAP, 6, first=6, last=6, dropped=2)],
            "gaps count 2 dropped messages, 1 are missing",
        ),
        ([*GOOD, fact(Kind.GAP, 3, first=2, last=3, dropped=2)], "gaps count 2 dropped messages, 0 are missing"),
    ],
)  # fmt: skip
def test_what_may_not_happen_is_found(facts: list[Fact], words: str) -> None:
    findings = check(facts).findings
    assert any(words in finding for finding in findings), findings


def test_what_a_gap_counts_is_given_up_and_not_lost() -> None:
    facts = [*GOOD, *(fact(kind, seq) for seq in (6, 7) for kind in (Kind.ATTEMPTED, Kind.ENQUEUED)),
             fact(Kind.GAP, 7, first=6, last=7, dropped=2), *life(range(8, 9))]  # fmt: skip
    report = check(facts)
    assert report.findings == []
    assert report.given_up == [Id("b", E1, 6), Id("b", E1, 7)]


def test_broker_that_keeps_no_order_is_asked_for_none() -> None:
    facts = [fact(kind, seq) for kind in (Kind.ATTEMPTED, Kind.ENQUEUED) for seq in (1, 2)]
    facts += [fact(Kind.DELIVERED, 2), fact(Kind.DELIVERED, 1)]
    assert not check(facts).sound
    assert check(facts, lanes_ordered=False).sound


def _note_many(path: Path, box: str) -> None:
    recorder = Recorder(path)
    for seq in range(1, 201):
        recorder.note(Kind.ATTEMPTED, box, epoch=E1, seq=seq, content=str(seq))
        recorder.note(Kind.ENQUEUED, box, epoch=E1, seq=seq, content=str(seq))
        recorder.note(Kind.DELIVERED, box, epoch=E1, seq=seq, content=str(seq))
    recorder.close()


def test_processes_that_write_at_once_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_note_many, args=(path, f"box{number}")) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    report = require_sound(path, seed=0)
    assert (report.enqueued, report.delivered) == (600, 600)


def test_history_with_a_hole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    Recorder(path).note(Kind.ENQUEUED, "b", epoch=E1, seq=1)
    path.write_text(path.read_text() + '{"kind": "enqueued", "bo\n')
    with pytest.raises(ValueError, match="line 2"):
        read(path)


def test_history_that_is_not_sound_is_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    path = tmp_path / "history.jsonl"
    Recorder(path).note(Kind.ENQUEUED, "b", epoch=E1, seq=1)
    with pytest.raises(AssertionError, match=r"1 lost.*seed 42, history kept as") as caught:
        require_sound(path, seed=42)
    kept = str(caught.value).rsplit(" ", 1)[1]
    assert read(type(path)(kept)) == read(path)
