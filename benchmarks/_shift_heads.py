"""Detectors to be judged under shifts: fitted as training does, exported, and kept, so that none is fitted twice.

It must not know shifts nor corrections.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import trainer.methods.patches
import trainer.synthesis.image2d
from benchmarks._images import CPU, fit_context, open_category, split
from benchmarks._setting import quiet
from deploy.export import export_head, tap_shapes
from edge.bundle import Engine, Pooling, Precision, Preprocessing
from edge.inference.engines import open_graph
from edge.inference.sessions import ANOMALY_MAP
from edge.judgement.score import pool_score
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.data.folder import content_hash, read_folder
from trainer.data.splits import split_holdout
from trainer.features import load_canvases
from trainer.fit import HOLDOUT_FRACTION, HOLDOUT_MINIMUM, choose_pooling, head_maps, seed_everything
from trainer.methods.registry import get
from trainer.synthesis import families, noise

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from benchmarks._images import Category
    from edge.inference.session import GraphSession
    from trainer.data.folder import Sample
    from trainer.methods.base import FitContext, Method, MethodConfig

    Canvases = npt.NDArray[np.uint8]

PLAIN_MOE = "adapted_moe-plain"
"""Adapted-MoE without the adaptation to each image's mean that its graph has by default."""
METHODS = ("memory", "feddymem", "pbas", "fader", "hetnet", PLAIN_MOE)
"""Whose figures are averaged; none of these adapts by itself."""


@dataclass(frozen=True)
class Source:
    """Good and defective images of one folder, drawn by groups and position, never by what a detector says of them.

    Attributes:
        name: of the folder and the one above it.
        folder: where it is.
        preprocessing: one tile.
        fit: uint8 [n, H, W, 3] RGB, what detectors learn from.
        holdout: uint8 [k, H, W, 3], good images for thresholds.
        holdout_groups: unicode [k].
        moments: uint8 [m, H, W, 3], good test images that moments are taken from and that are not judged.
        good: uint8 [g, H, W, 3], good test images to judge, of other groups.
        good_groups: unicode [g].
        bad: uint8 [b, H, W, 3], defective test images.
        bad_groups: unicode [b].
        content: hash of the training images' files.
    """

    name: str
    folder: Path
    preprocessing: Preprocessing
    fit: Canvases
    holdout: Canvases
    holdout_groups: npt.NDArray[np.str_]
    moments: Canvases
    good: Canvases
    good_groups: npt.NDArray[np.str_]
    bad: Canvases
    bad_groups: npt.NDArray[np.str_]
    content: str


@dataclass(frozen=True)
class Counts:
    """How many images of a folder are used, at most.

    Attributes:
        train: to learn and to calibrate from.
        moments: good test images for moments.
        good: good test images that are judged.
        bad: defective ones.
    """

    train: int = 150
    moments: int = 30
    good: int = 40
    bad: int = 30


@dataclass(frozen=True)
class Detector:
    """An exported head and its rule for image scores.

    Attributes:
        name: of the method.
        path: head.onnx.
        taps: that it takes.
        pooling: the rule.
    """

    name: str
    path: Path
    taps: tuple[str, ...]
    pooling: Pooling
    _session: list[GraphSession] = field(default_factory=list)

    def score(self, taps: Mapping[str, npt.NDArray[np.float32]]) -> float:
        """Return the raw image score of one image's taps float32 [1, C, h, w]."""
        if not self._session:
            shapes = {name: tuple(taps[name].shape) for name in self.taps}
            self._session.append(
                open_graph(
                    self.path,
                    engine=Engine.OPENVINO,
                    precision=Precision.FLOAT32,
                    threads=1,
                    outputs=[ANOMALY_MAP],
                    input_shapes=shapes,
                )
            )
        found = self._session[0].run({name: np.ascontiguousarray(taps[name]) for name in self.taps})[ANOMALY_MAP]
        return pool_score(found[0], self.pooling)


def settings_of(name: str, preset: str) -> tuple[type[Method], MethodConfig]:
    """Return the method and settings that a detector's name stands for."""
    if name != PLAIN_MOE:
        return get(name), get(name).config(preset)
    method = get("adapted_moe")
    config = method.config(preset)
    return method, type(config).model_validate({**config.model_dump(), "adaptation": "none"})


def open_source(folder: Path, counts: Counts, *, size: int, seed: int) -> Source:
    """Read a folder in MVTec layout.

    Raises:
        SystemExit: it has fewer good test images than moments and judging need at the least, or no defective ones.
    """
    found = read_folder(folder)
    train = thinned(found.train, counts.train)
    parts = split_holdout(train, HOLDOUT_FRACTION, seed, HOLDOUT_MINIMUM)
    moments, good = apart([sample for sample in found.test if not sample.anomalous], counts.moments, seed)
    good, bad = thinned(good, counts.good), thinned([one for one in found.test if one.anomalous], counts.bad)
    if not moments or not good or not bad:
        raise SystemExit(
            f"{folder}: {len(moments)} good test images for moments, {len(good)} to judge and {len(bad)} defective; "
            "each must be at least 1"
        )
    preprocessing = Preprocessing(height=size, width=size)
    read = {
        what: load_canvases(samples, preprocessing, progress=quiet, what="")
        for what, samples in (
            ("fit", parts.fit), ("holdout", parts.holdout), ("moments", moments), ("good", good), ("bad", bad)
        )
    }  # fmt: skip
    return Source(
        name=f"{folder.resolve().parent.name}/{folder.resolve().name}",
        folder=folder,
        preprocessing=preprocessing,
        holdout_groups=_groups(parts.holdout),
        good_groups=_groups(good),
        bad_groups=_groups(bad),
        content=content_hash(train),
        **read,
    )


def thinned(samples: Sequence[Sample], most: int) -> tuple[Sample, ...]:
    """Return at most so many samples, evenly drawn."""
    if len(samples) <= most:
        return tuple(samples)
    return tuple(samples[i] for i in np.linspace(0, len(samples) - 1, most).round().astype(int))


def apart(samples: Sequence[Sample], count: int, seed: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Draw about ``count`` samples, at most half of all, of the same mix of conditions as the rest, which comes second.

    Whole groups are drawn, so that the two parts share none; only where a condition has a single group is it split.
    A line shows what it runs: moments of some of its variants would not be those of the others.
    """
    conditions: dict[str, set[str]] = {}
    for sample in samples:
        conditions.setdefault(sample.group, set()).add(sample.condition)
    strata: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        strata.setdefault(tuple(sorted(conditions[sample.group])), []).append(index)
    rng, drawn = np.random.default_rng(seed), set()
    for places in strata.values():
        wanted = max(1, round(min(count / len(samples), 0.5) * len(places)))
        groups = list(dict.fromkeys(samples[i].group for i in places))
        several = len(groups) > 1
        units = [[i for i in places if samples[i].group == one] for one in groups] if several else [[i] for i in places]
        held: list[int] = []
        for unit in rng.permutation(len(units))[: len(units) - 1]:
            if len(held) < wanted:
                held += units[unit]
        drawn |= set(held)
    first = tuple(sample for index, sample in enumerate(samples) if index in drawn)
    return thinned(first, count), tuple(sample for index, sample in enumerate(samples) if index not in drawn)


def detectors(source: Source, names: Sequence[str], options: Fitting) -> list[Detector]:
    """Return a folder's detectors, fitted now or read from where they were kept."""
    keys = {name: options.folder / f"{source.name.replace('/', '-')}-{name}-{_key(source, name, options)}"
            for name in names}  # fmt: skip
    missing = [name for name, path in keys.items() if not (path / "done.json").exists()]
    if missing:
        taps = tuple(dict.fromkeys(tap for name in missing for tap in settings_of(name, options.preset)[0].tap_names))
        category = open_category(source.folder, taps=taps, size=options.size, train=options.train, test=2)
        context = fit_context(category, split(category, options.seed), seed=options.seed, taps=taps)
        for name in missing:
            _fit(name, keys[name], category, context, options)
    return [_read(name, path) for name, path in keys.items()]


@dataclass(frozen=True)
class Fitting:
    """How detectors are fitted and where they are kept.

    Attributes:
        folder: of kept detectors.
        preset: of every method.
        seed: of splits and methods.
        size: of the network's input in pixels.
        train: most training images.
    """

    folder: Path
    preset: str
    seed: int
    size: int
    train: int


def _fit(name: str, path: Path, category: Category, context: FitContext, options: Fitting) -> None:
    started = time.monotonic()
    seed_everything(options.seed)
    method, config = settings_of(name, options.preset)
    head = method.fit(context, config)
    maps = (
        head_maps(head, part, category.preprocessing, CPU)
        for part in (context.validation.good, context.validation.defective)
    )
    pooling, _ = choose_pooling(*maps)
    path.mkdir(parents=True, exist_ok=True)
    shapes = tap_shapes(category.trunk, (options.size, options.size))
    export_head(head, path / "head.onnx", tap_shapes=shapes)
    # Written last: a folder without it is not read.
    (path / "done.json").write_text(json.dumps({"taps": head.tap_names, "cells": pooling.cells}), encoding="utf-8")
    print(f"  {name} on {category.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def _read(name: str, path: Path) -> Detector:
    said = json.loads((path / "done.json").read_text(encoding="utf-8"))
    return Detector(name, path / "head.onnx", tuple(said["taps"]), Pooling(cells=said["cells"]))


def _key(source: Source, name: str, options: Fitting) -> str:
    method, config = settings_of(name, options.preset)
    code = (sys.modules[method.__module__], trainer.methods.patches, trainer.synthesis.image2d, families, noise)
    seen = (
        source.content, config.model_dump_json(), str(options.seed), str(options.size), str(options.train),
        *(_text(str(module.__file__)) for module in code),
    )  # fmt: skip
    return hashlib.sha256("\0".join(seen).encode()).hexdigest()[:16]


def _text(file: str) -> str:
    path = Path(file)
    files = sorted(path.parent.glob("*.py")) if path.name in {"__init__.py", "fit.py"} else [path]
    return "".join(one.read_text(encoding="utf-8") for one in files)


def _groups(samples: Sequence[Sample]) -> npt.NDArray[np.str_]:
    return np.array([sample.group for sample in samples], np.str_)


def trunk_of(size: int) -> GraphSession:
    """Open the shared trunk as a box has it: float32, OpenVINO, one thread, one image of ``size`` pixels."""
    from deploy.trunks import build_trunk_files
    from edge.inference.sessions import IMAGE
    from trainer.data.generic import generic_canvases

    files = build_trunk_files(lite0_trunk(), generic_canvases())
    return open_graph(
        files.float32,
        engine=Engine.OPENVINO,
        precision=Precision.FLOAT32,
        threads=1,
        input_shapes={IMAGE: (1, size, size, 3)},
    )
