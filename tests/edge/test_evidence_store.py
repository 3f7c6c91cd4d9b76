"""Evidence on disk: whole or not at all, under its limit, and nothing else can be read through it."""

from __future__ import annotations

import os
import re
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge.alerts.topics import check_camera
from edge.errors import EvidenceError, MessageError
from edge.evidence.names import (
    RECORD,
    camera_folder,
    check_file,
    check_reference,
    event_reference,
    is_reference,
    part_reference,
)
from edge.evidence.store import SCRATCH, EvidenceStore
from edge.frames import EventPhase
from tests.edge.evidence_values import judged

KIB = 1024


def reference(number: int, camera: str = "cam") -> str:
    return f"{camera}/20300102/{number:032x}"


def opened(root: Path, *, max_bytes: int = 2**20, min_free: int = 0) -> EvidenceStore:
    store = EvidenceStore(root, max_bytes=max_bytes, min_free=min_free)
    store.open()
    return store


def record(**files: bytes) -> dict[str, bytes]:
    listed = ", ".join(f'"{name}": {{"size": {len(content)}, "sha256": "0"}}' for name, content in files.items())
    return {**files, RECORD: f'{{"files": {{{listed}}}}}'.encode()}


def on_disk(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_what_was_written_is_listed_and_read(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(reference(1), record(**{"frame.jpg": b"abcdef"}))

    assert list(store.describe(reference(1))) == [RECORD, "frame.jpg"]
    assert store.describe(reference(1))["frame.jpg"]["size"] == 6
    assert store.read(reference(1), "frame.jpg", offset=2, limit=3) == b"cde"
    assert store.references() == ([(reference(1), store.occupied)], 1)


def test_references_are_newest_first_and_of_one_camera_and_day(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for number, camera in ((1, "a"), (2, "b"), (3, "a")):
        store.write(reference(number, camera), record())

    assert [name for name, _ in store.references(camera="a")[0]] == [reference(3, "a"), reference(1, "a")]
    assert store.references(limit=1) == ([(reference(3, "a"), 8 * KIB)], 3)
    assert store.references(day="20300103") == ([], 0)


@pytest.mark.parametrize("umask", [0, 0o077])
def test_files_are_for_owner_and_group_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = opened(tmp_path / "evidence")
        store.write(reference(1), record(**{"frame.jpg": b"x"}))
    finally:
        os.umask(before)

    files = [path for path in (tmp_path / "evidence").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    folders = {path for file in files for path in file.parents if path.is_relative_to(tmp_path / "evidence")}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o750}


def test_the_oldest_goes_first_with_its_folders(tmp_path: Path) -> None:
    store = opened(tmp_path, max_bytes=60 * KIB)
    for number in range(4):
        store.write(reference(number, f"cam{number}"), record(**{"frame.jpg": bytes(10 * KIB)}))

    assert [name for name, _ in store.references()[0]] == [reference(n, f"cam{n}") for n in (3, 2, 1)]
    assert not (tmp_path / "cam0").exists()
    assert store.removed == 1
    assert store.occupied == 60 * KIB


def test_the_limit_holds_over_restarts(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for number in range(4):
        store.write(reference(number), record(**{"frame.jpg": bytes(10 * KIB)}))
        # Their order after a restart is that of their folders' times.
        os.utime(tmp_path / reference(number), (number, number))
    again = opened(tmp_path, max_bytes=45 * KIB)

    assert [name for name, _ in again.references()[0]] == [reference(3), reference(2)]
    again.write(reference(9), record(**{"frame.jpg": bytes(10 * KIB)}))
    assert [name for name, _ in again.references()[0]] == [reference(9), reference(3)]
    assert {path.parent.name for path in tmp_path.rglob(RECORD)} == {f"{9:032x}", f"{3:032x}"}


def test_evidence_larger_than_the_limit_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path, max_bytes=40 * KIB)
    store.write(reference(1), record())
    with pytest.raises(EvidenceError, match="do not fit"):
        store.write(reference(2), record(**{"frame.jpg": bytes(41 * KIB)}))

    assert [name for name, _ in store.references()[0]] == [reference(1)]


def test_on_a_full_disk_new_evidence_takes_the_place_of_old(tmp_path: Path) -> None:
    EvidenceStore(tmp_path, max_bytes=2**20).open()
    for number in range(2):
        opened(tmp_path).write(reference(number), record(**{"frame.jpg": bytes(10 * KIB)}))
        os.utime(tmp_path / reference(number), (number, number))
    # No disk has so much free.
    store = opened(tmp_path, min_free=2**62)
    store.write(reference(2), record(**{"frame.jpg": bytes(8 * KIB)}))

    assert [name for name, _ in store.references()[0]] == [reference(2), reference(1)]
    with pytest.raises(EvidenceError, match="keep"):
        store.write(reference(3), record(**{"frame.jpg": bytes(64 * KIB)}))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
import resource, sys
from pathlib import Path
from edge.evidence.store import EvidenceStore
store = EvidenceStore(Path({str(tmp_path)!r}), max_bytes=2**24)
store.open()
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
try:
    store.write({reference(1)!r}, {{"frame.jpg": bytes(1000), "map.png": bytes(100_000)}})
except OSError as error:
    print(error.errno)
print(len(store), store.occupied)
store.write({reference(2)!r}, {{"frame.jpg": bytes(1000)}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.split() == ["27", "0", "0"]  # EFBIG
    assert on_disk(tmp_path) == {f"{reference(2)}/frame.jpg"}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 65536


def test_a_reference_that_is_taken_is_refused(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(reference(1), record(**{"frame.jpg": b"first"}))
    with pytest.raises(EvidenceError, match="already"):
        store.write(reference(1), record(**{"frame.jpg": b"second"}))

    assert store.read(reference(1), "frame.jpg", offset=0) == b"first"
    assert not list((tmp_path / SCRATCH).iterdir())


def test_a_kill_at_any_moment_leaves_whole_evidence_only(tmp_path: Path) -> None:
    script = f"""
import itertools
from pathlib import Path
from edge.evidence.store import EvidenceStore
store = EvidenceStore(Path({str(tmp_path)!r}), max_bytes=2**20)
store.open()
for number in itertools.count():
    name = f"cam/20300102/{{store.removed + len(store) + {{}}:032x}}"
    store.write(name, {{f"before-{{i}}.jpg": bytes(4096) for i in range(6)}} | {{"event.json": b"{{}}"}})
    print(number, flush=True)
"""
    for turn in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", script.replace("{}", str(turn * 10**9), 1)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        # Killed in the midst of writing, and of removing once the limit is reached.
        for _ in range(10 + 9 * turn):
            process.stdout.readline()
        process.kill()
        process.communicate()
        kept = [path for path in (tmp_path / "cam").glob("*/*") if path.is_dir()]
        assert kept
        assert all(len(list(path.iterdir())) == 7 for path in kept)

    store = opened(tmp_path)
    assert not list((tmp_path / SCRATCH).iterdir())
    assert store.occupied == sum(32 * KIB for _ in kept) <= 2**20


def test_a_kill_while_the_oldest_goes_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(tmp_path, max_bytes=20 * KIB)
    store.write(reference(1), record(**{"frame.jpg": bytes(8 * KIB)}))

    def die(path: Path, **_: object) -> None:
        (path / "frame.jpg").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("edge.evidence.store.shutil.rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            store.write(reference(2), record(**{"frame.jpg": bytes(8 * KIB)}))
    assert not (tmp_path / reference(1)).exists()
    assert len(opened(tmp_path)) == 0
    assert on_disk(tmp_path) == set()


def test_leftovers_are_cleared_at_the_start(tmp_path: Path) -> None:
    (tmp_path / SCRATCH / "123-4").mkdir(parents=True)
    (tmp_path / SCRATCH / "123-4" / "frame.jpg").write_bytes(b"half")

    assert len(opened(tmp_path)) == 0
    assert on_disk(tmp_path) == set()


def test_what_is_not_kept_is_said_so(tmp_path: Path) -> None:
    store = opened(tmp_path)
    with pytest.raises(EvidenceError, match="not kept"):
        store.describe(reference(1))
    with pytest.raises(EvidenceError, match="write it as in an alert"):
        store.describe("no such thing")


def test_a_damaged_record_is_said_so(tmp_path: Path) -> None:
    store = opened(tmp_path)
    store.write(reference(1), {RECORD: b""})  # as a power cut may leave it
    with pytest.raises(EvidenceError, match="damaged"):
        store.describe(reference(1))


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "20300102" / "aa").mkdir(parents=True)
    (outside / "20300102" / "aa" / RECORD).write_bytes(b"secret")
    store = opened(tmp_path / "evidence")
    (tmp_path / "evidence" / "cam").symlink_to(outside)
    store.write(reference(1, "other"), record())
    (tmp_path / "evidence" / reference(1, "other") / "frame.jpg").symlink_to(outside / "20300102" / "aa" / RECORD)

    with pytest.raises(EvidenceError):
        store.read("cam/20300102/aa", RECORD, offset=0)
    with pytest.raises(EvidenceError):
        store.read(reference(1, "other"), "frame.jpg", offset=0)


PIECES = st.sampled_from(
    ["..", ".", "/", "//", "\\", "%2e%2e", "cam", "20300102", "aa", "event.json", "\0", "~", "-", ""]
)


@example("../20300102/aa")
@example("./20300102/aa")
@example(".scratch/20300102/aa")
@example("cam/20300102/..")
@example("cam/../aa")
@example("cam/20300102/aa\n")
@example("..jpg")
@given(st.one_of(st.text(max_size=300), st.lists(PIECES, max_size=8).map("".join), st.lists(PIECES).map("/".join)))
def test_no_text_leads_out_of_the_root(text: str) -> None:
    root = Path("/evidence")
    if is_reference(text):
        assert os.path.normpath(root / text) == str(root / text)
        assert len((root / text).parts) == 5
        assert not (root / text).is_relative_to(root / SCRATCH)
    else:
        with pytest.raises(EvidenceError):
            check_reference(text)
    try:
        name = check_file(text)
    except EvidenceError:
        return
    assert Path(name).name == name
    assert not name.startswith(".")


@example(["x" * 199 + "1", "x" * 199 + "2"])
@example(["ß" * 200, "ß" * 199])
@example([".", "%2E"])
@given(st.lists(st.text(max_size=210), min_size=2, max_size=2, unique=True))
def test_cameras_have_folders_of_their_own(names: list[str]) -> None:
    try:
        for name in names:
            check_camera(name)
    except MessageError:
        return
    folders = [camera_folder(name) for name in names]
    assert folders[0] != folders[1]
    for folder in folders:
        assert re.fullmatch(r"[A-Za-z0-9_%-][A-Za-z0-9_.%~-]*", folder)
        assert len(folder) <= 140
        assert is_reference(f"{folder}/20300102/{0:032x}")


def test_references_are_as_documented() -> None:
    (event,) = judged(7, camera="Straße 1", phase=EventPhase.NEW).events
    assert event_reference(event) == "Stra%C3%9Fe%201/20300102/0123456789abcdef0123456789abcdef"
    assert part_reference(judged(7, camera="..").verdict) == "%2E./20300102/030405958900-7"


def test_removing_goes_on_when_somebody_else_has_removed_it(tmp_path: Path) -> None:
    store = opened(tmp_path, max_bytes=20 * KIB)
    store.write(reference(1), record(**{"frame.jpg": bytes(8 * KIB)}))
    for path in (tmp_path / reference(1)).iterdir():
        path.unlink()
    (tmp_path / reference(1)).rmdir()
    store.write(reference(2), record(**{"frame.jpg": bytes(8 * KIB)}))

    assert [name for name, _ in store.references()[0]] == [reference(2)]
