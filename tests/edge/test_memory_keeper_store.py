"""The memory's files: whole or not there, whenever the box is killed; numbers that only rise."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge.bundle import CalibrationScores
from edge.errors import DataError
from edge.memory.store import MemoryInForce, MemoryStore

ROOT = Path(__file__).resolve().parents[2]
BUNDLE, EMBEDDING = "a" * 64, "b" * 64
KILLS = 3
WRITER = """
import os, sys, time, zipfile
from pathlib import Path
from tests.edge.test_memory_keeper_store import store, memory

def told(owner, name):
    plain = getattr(owner, name)
    def work(*args, **kwargs):
        print("at", name, flush=True)
        time.sleep(0.02)
        return plain(*args, **kwargs)
    setattr(owner, name, work)

# Within a file that grows, before it is synced, before it takes its name: places to be killed at.
told(zipfile.ZipFile, "open")
told(os, "fsync")
told(Path, "replace")
files = store(Path(sys.argv[1]))
version = files.next_version(0)
while True:
    print("begins", version, flush=True)
    files.write_in_force(memory(version))
    print("given", version, flush=True)
    files.write_learned({"since_ship_s": version}, {"rows": memory(version).local})
    version = files.next_version(version)
"""


def store(folder: Path, **changes: str) -> MemoryStore:
    return MemoryStore(folder, **({"bundle_id": BUNDLE, "embedding_id": EMBEDDING, "precision": "float32"} | changes))


def memory(version: int) -> MemoryInForce:
    """A memory whose every number is its version's."""
    rows = np.full((512, 152), version % 1000, np.float32)
    scores = np.full(40, version % 1000, np.float32)
    return MemoryInForce(
        version=version,
        fleet_version=version + 1,
        local=rows,
        fleet=rows[:100],
        calibration=CalibrationScores(scores, np.zeros((40, 28, 28), np.float16), np.arange(40).astype(np.str_)),
        drift=((1_900_000_000, 0.5), (1_900_000_001, 0.25)),
    )


def same(one: MemoryInForce, other: MemoryInForce) -> bool:
    return (
        (one.version, one.fleet_version, one.drift) == (other.version, other.fleet_version, other.drift)
        and np.array_equal(one.local, other.local)
        and one.fleet is not None
        and other.fleet is not None
        and np.array_equal(one.fleet, other.fleet)
        and np.array_equal(one.calibration.scores, other.calibration.scores)
        and np.array_equal(one.calibration.maps, other.calibration.maps)
        and one.calibration.groups.tolist() == other.calibration.groups.tolist()
    )


def test_memory_comes_back_as_it_was_written(tmp_path: Path) -> None:
    store(tmp_path).write_in_force(memory(3))

    found = store(tmp_path).read_in_force()

    assert found is not None
    assert same(found, memory(3))
    assert store(tmp_path).next_version(3) == 4


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_step_the_last_memory_is_whole(tmp_path: Path, seed: int) -> None:
    """Control: without the rename (writing in place) some kill leaves half a file, which the reader refuses."""
    chance = random.Random(seed)
    store(tmp_path).write_in_force(memory(1))
    store(tmp_path).write_learned({"since_ship_s": 1}, {"rows": memory(1).local})
    given = 1
    for _ in range(KILLS):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(chance.randrange(2, 34))]
            writer.kill()
            lines += writer.stdout.read().splitlines()
        said = [line.split() for line in lines]
        begun = [int(words[1]) for words in said if words[0] == "begins"]
        assert begun[0] > given, "a number was given twice"
        given = max([given, *(int(words[1]) for words in said if words[0] == "given")])
        found, learned = store(tmp_path).read_in_force(), store(tmp_path).read_learned()
        assert found is not None
        assert same(found, memory(found.version))
        assert given <= found.version <= begun[-1]
        given = found.version
        assert learned is not None
        assert learned[1]["rows"][0, 0] == learned[0]["since_ship_s"] <= given


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"embedding_id": "c" * 64}, "is of another embedding"), ({"bundle_id": "a" * 16 + "c" * 48}, "another bundle")],
)
def test_memory_of_another_space_is_refused(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    store(tmp_path).write_in_force(memory(1))

    with pytest.raises(DataError, match=words):
        store(tmp_path, **changes).read_in_force()


def test_precisions_have_memories_of_their_own_and_share_the_count(tmp_path: Path) -> None:
    store(tmp_path).write_in_force(memory(1))
    other = store(tmp_path, precision="int8")

    assert other.read_in_force() is None
    assert other.next_version(0) == 2
