"""Folders of images as fleets: clients by condition or by folder, embeddings made once, runs kept under what made them.

It must not know figures or goals.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

import deploy.aggregator.aggregate as aggregate_code
import deploy.aggregator.gates as gates_code
import deploy.aggregator.lloyd as lloyd_code
import edge.memory.dynamic as dynamic_code
import edge.memory.reduce as reduce_code
import edge.memory.search as search_code
import trainer.evaluation.fleet as fleet_code
import trainer.evaluation.fleet_box as box_code
import trainer.evaluation.fleet_curves as curves_code
import trainer.evaluation.fleet_judge as judge_code
from benchmarks._setting import quiet
from deploy.aggregator.gates import examine
from trainer.data.folder import read_folder
from trainer.evaluation.fleet_box import BoxData
from trainer.features import load_canvases

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from trainer.data.folder import Sample
    from trainer.evaluation.fleet_embed import Embedder

    Half = npt.NDArray[np.float16]

LEAST_TRAIN, LEAST_TEST = 12, 5
"""Good training images, and test images of each class, without which a condition is no client."""

COMMISSIONING = 0.2
"""Share of a client's good images that set its threshold and are never learnt."""

PIECE = 64
CODE = (
    aggregate_code, lloyd_code, gates_code, dynamic_code, reduce_code, search_code, fleet_code, box_code, curves_code,
    judge_code,
)  # fmt: skip

scale_gate = partial(examine, canaries=None)
"""The gate without canaries: a folder has none that no client owns."""


@dataclass(frozen=True)
class Folder:
    """Embeddings of one folder.

    Attributes:
        name: of the folder.
        train: float16 [n, L, D].
        test: float16 [m, L, D].
        train_samples: what the training images are.
        test_samples: what the test images are.
    """

    name: str
    train: Half
    test: Half
    train_samples: tuple[Sample, ...]
    test_samples: tuple[Sample, ...]


@dataclass(frozen=True)
class FleetSplit:
    """A fleet made of folders.

    Attributes:
        name: what its clients differ in.
        clients: their names.
        boxes: from a seed to their data; the test images do not depend on it.
        dropped: conditions that are too small for a client.
    """

    name: str
    clients: tuple[str, ...]
    boxes: Callable[[int], list[BoxData]]
    dropped: tuple[str, ...] = ()


def open_folder(path: Path, embedder: Embedder, keep: Path | None) -> Folder:
    """Read and embed a folder in MVTec layout, or take the embeddings that were kept."""
    found = read_folder(path)
    arrays = []
    for samples in (found.train, found.test):
        names = "\n".join(f"{sample.name} {sample.path.stat().st_size}" for sample in samples)
        key = hashlib.sha256(f"{embedder.embedding_id}\n{path.resolve()}\n{names}".encode()).hexdigest()[:16]
        arrays.append(_kept(keep, f"emb-{path.name}-{key}", partial(_embed, samples, embedder)))
    print(f"  read {path}: {len(found.train)} to learn, {len(found.test)} to test", file=sys.stderr, flush=True)
    return Folder(path.name, *arrays, found.train, found.test)


def _embed(samples: Sequence[Sample], embedder: Embedder) -> Half:
    pieces = []
    for start in range(0, len(samples), PIECE):
        part = samples[start : start + PIECE]
        pieces.append(embedder(load_canvases(part, embedder.judge.preprocessing, progress=quiet, what="")))
    return np.concatenate(pieces)


def _kept(keep: Path | None, name: str, make: Callable[[], Half]) -> Half:
    if keep is None:
        return make()
    path = keep / f"{name}.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    keep.mkdir(parents=True, exist_ok=True)
    work = path.with_suffix(".part")
    with work.open("wb") as file:
        np.save(file, make())
    work.replace(path)
    return np.load(path, mmap_mode="r")


def by_condition(folder: Folder, most_test: int) -> FleetSplit | None:
    """Make a client of every condition with enough images; None where that leaves fewer than two."""
    where = np.array([sample.condition for sample in folder.train_samples])
    tested = np.array([sample.condition for sample in folder.test_samples])
    bad = np.array([sample.anomalous for sample in folder.test_samples])
    kept, dropped = [], []
    for name in sorted(set(where) | set(tested)):
        classes = min(int(((tested == name) & bad).sum()), int(((tested == name) & ~bad).sum()))
        enough = int((where == name).sum()) >= LEAST_TRAIN and classes >= LEAST_TEST
        (kept if enough else dropped).append(str(name))
    if len(kept) < 2:
        return None

    def boxes(seed: int) -> list[BoxData]:
        return [
            _box(
                number,
                folder,
                train=np.flatnonzero(where == name),
                test=_thinned(np.flatnonzero(tested == name), bad, most_test),
                condition=name,
                seed=seed,
            )
            for number, name in enumerate(kept)
        ]

    return FleetSplit(f"{folder.name} by condition", tuple(kept), boxes, tuple(dropped))


def across(folders: Sequence[Folder], most_train: int, most_test: int) -> FleetSplit:
    """Make a client of every folder, each a product of its own."""

    def boxes(seed: int) -> list[BoxData]:
        found = []
        for number, folder in enumerate(folders):
            bad = np.array([sample.anomalous for sample in folder.test_samples])
            drawn = np.random.default_rng((seed, number, 1)).permutation(len(folder.train))[:most_train]
            test = _thinned(np.arange(len(bad)), bad, most_test)
            found.append(_box(number, folder, train=drawn, test=test, condition="", seed=seed))
        return found

    return FleetSplit(f"{len(folders)} products", tuple(folder.name for folder in folders), boxes)


def _box(
    number: int,
    folder: Folder,
    *,
    train: npt.NDArray[np.int64],
    test: npt.NDArray[np.int64],
    condition: str,
    seed: int,
) -> BoxData:
    """Take a client's images; whole groups, where there are some, set the threshold."""
    rng = np.random.default_rng((seed, number))
    groups = np.array([folder.train_samples[index].group for index in train])
    aside = max(1, round(COMMISSIONING * len(train)))
    held = np.zeros(len(train), np.bool_)
    for group in rng.permutation(np.unique(groups)):
        if held.sum() >= aside or held.sum() + (groups == group).sum() > len(train) // 2:
            continue
        held |= groups == group
    if not held.any():  # one group only, or groups too large
        held[rng.permutation(len(train))[:aside]] = True
    learn = rng.permutation(train[~held])
    return BoxData(
        name=f"bench/{number}",
        product=folder.name,
        condition=condition,
        learn=folder.train[learn],
        commissioning=folder.train[train[held]],
        test=folder.test[test],
        labels=np.array([folder.test_samples[index].anomalous for index in test]),
        groups=np.array([folder.test_samples[index].group or str(index) for index in test], np.str_),
        defects=np.zeros((0, folder.train.shape[2]), np.float32),
    )


def _thinned(index: npt.NDArray[np.int64], bad: npt.NDArray[np.bool_], most: int) -> npt.NDArray[np.int64]:
    """Keep at most half of ``most`` images of each class, evenly drawn."""
    kept = []
    for part in (index[~bad[index]], index[bad[index]]):
        room = most // 2
        kept.append(part if len(part) <= room else part[np.linspace(0, len(part) - 1, room).round().astype(int)])
    return np.concatenate(kept)


class Runs:
    """Results on disk, each under the code and settings that it came from; None keeps nothing."""

    def __init__(self, keep: Path | None) -> None:
        self._keep = keep
        self._code = "".join(inspect.getsource(module) for module in CODE)

    def arrays(
        self, name: str, recipe: Sequence[str], make: Callable[[], dict[str, npt.NDArray[np.generic]]]
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Return the kept arrays, or make and keep them."""
        if self._keep is None:
            return make()
        key = hashlib.sha256("\0".join([self._code, name, *recipe]).encode()).hexdigest()[:16]
        path = self._keep / f"run-{name.replace(' ', '-')}-{key}.npz"
        if not path.exists():
            self._keep.mkdir(parents=True, exist_ok=True)
            found = make()
            work = path.with_suffix(".part")
            with work.open("wb") as file:
                np.savez(file, **found)
            work.replace(path)
        with np.load(path) as kept:
            return dict(kept)
