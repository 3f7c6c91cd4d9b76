"""Which method sees that a part is assembled wrongly, though every patch of the picture is a good one?

Generated plates with six components: moved, missing, extra and swapped ones, and a scratch as the control. All methods
on the same pictures, trunk and seeds; a method's pooling rule comes from synthetic defects on held-out good parts. Then
the figure of places: how well single patches of a fault are told apart at shares 0, 0.3 and 0.7 of the place in the
cost of prototypes. Run: ``python benchmarks/logical.py --json FILE``; ``--quick`` for a look.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from benchmarks._setting import Goal, heading, print_goals, quiet
from deploy.metrics import image_auroc, pixel_auroc, pixel_metrics
from deploy.state import stored_state
from edge.bundle import Preprocessing
from edge.judgement.score import pool_score
from trainer.backbones.registry import TrunkSpec, build_trunk
from trainer.data.assembled import Assembly, Fault, part_seed
from trainer.features import extract
from trainer.fit import Parts, head_maps, learn, make_context
from trainer.methods.prototypes.fit import PrototypesConfig, PrototypesMethod, SetConfig
from trainer.methods.prototypes.model import Metric
from trainer.methods.registry import methods

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from trainer.methods.base import Features, FitContext, Head, Method, MethodConfig

    Images = npt.NDArray[np.uint8]
    Maps = npt.NDArray[np.float32]

CPU = torch.device("cpu")
MARGIN, TOKEN_GAIN, TOKEN_LEAST, TEXTURE_LOSS = 0.10, 0.10, 0.95, 0.01
COMPARED = (Fault.MOVED, Fault.MISSING)
ALPHAS = (0.0, 0.3, 0.7)
NO_SITES = "memory, no sites"
PAPER = "prototypes, as published"
_COVERED = 0.2
"""Share of a cell that a fault covers, to count as a patch of it; cells that it only touches count neither way.

A scratch is thinner than a cell: at 224 pixels it covers a third."""
_PRODUCT = 4000
"""Seeds of products begin here: none that settings were tried on."""


@dataclass(frozen=True)
class Size:
    """How much is made.

    Attributes:
        side: of pictures in pixels.
        train: good parts to learn from.
        held: good parts that are held out.
        good: good parts to test on.
        each: faulty parts of each kind to test on.
        steps: most training steps of a method; None leaves them.
    """

    side: int = 224
    train: int = 60
    held: int = 20
    good: int = 60
    each: int = 30
    steps: int | None = None


QUICK = Size(side=96, train=24, held=8, good=12, each=6, steps=40)


@dataclass(frozen=True)
class Plates:
    """Pictures of one product and their taps.

    Attributes:
        context: what methods learn from.
        good: taps of good test parts.
        faulty: taps of faulty ones.
        kinds: of them, [m].
        masks: bool [m, side, side].
        preprocessing: one tile.
    """

    context: FitContext
    good: Features
    faulty: Features
    kinds: npt.NDArray[np.str_]
    masks: npt.NDArray[np.bool_]
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Row:
    """Figures of one method on one product.

    Attributes:
        image: I-AUROC of each fault against good parts.
        pixel: pixel AUROC likewise.
        aupro: likewise.
        state: bytes of what a box may change.
        whole: bytes of all tensors of the head.
        seconds: to fit.
    """

    image: dict[str, float]
    pixel: dict[str, float]
    aupro: dict[str, float]
    state: int
    whole: int
    seconds: float


def make_plates(seed: int, slack: float, size: Size, taps: Sequence[str]) -> Plates:
    """Draw a product and all its parts, whose components are off their places by at most ``slack``."""
    assembly = Assembly.draw(_PRODUCT + seed, slack=slack)
    numbers = iter(range(1_000_000))

    def pictures(fault: Fault | None, count: int) -> tuple[Images, npt.NDArray[np.bool_]]:
        parts = [assembly.part(part_seed(_PRODUCT + seed, next(numbers)), fault, side=size.side) for _ in range(count)]
        return np.stack([part.image[..., ::-1] for part in parts]), np.stack([part.mask for part in parts])

    fit, held, good = (pictures(None, count)[0] for count in (size.train, size.held, size.good))
    drawn = [pictures(fault, size.each) for fault in Fault]
    preprocessing = Preprocessing(height=size.side, width=size.side)
    trunk = build_trunk(TrunkSpec())
    names = [np.arange(len(part)).astype(np.str_) for part in (fit, held)]
    context = make_context(
        trunk, preprocessing, Parts(fit, names[0], held, names[1]), tap_names=taps, seed=seed, device=CPU,
        progress=quiet,
    )  # fmt: skip

    def seen(canvases: Images) -> Features:
        groups = np.arange(len(canvases)).astype(np.str_)
        return extract(
            trunk, canvases, preprocessing, tap_names=taps, groups=groups, device=CPU, progress=quiet, what=""
        )

    return Plates(
        context=context,
        good=seen(good),
        faulty=seen(np.concatenate([images for images, _ in drawn])),
        kinds=np.repeat([fault.value for fault in Fault], size.each),
        masks=np.concatenate([masks for _, masks in drawn]),
        preprocessing=preprocessing,
    )


def judged(method: type[Method], config: MethodConfig, plates: Plates) -> Row:
    """Fit a method and judge the test parts."""
    started = time.monotonic()
    head, pooling, _ = learn(method, config, plates.context, plates.preprocessing)
    seconds = time.monotonic() - started
    good, bad = (head_maps(head, part, plates.preprocessing, CPU) for part in (plates.good, plates.faulty))
    scores = [np.array([pool_score(one, pooling) for one in maps]) for maps in (good, bad)]
    image, pixel, aupro = {}, {}, {}
    side = plates.preprocessing.height
    nothing = np.zeros((side, side), np.bool_)
    for kind in dict.fromkeys(plates.kinds.tolist()):
        mine = np.flatnonzero(plates.kinds == kind)
        labels = np.r_[np.zeros(len(good), np.bool_), np.ones(len(mine), np.bool_)]
        image[kind] = float(image_auroc(labels, np.r_[scores[0], scores[1][mine]]) or 0.0)
        large = (cv2.resize(one, (side, side), interpolation=cv2.INTER_LINEAR) for one in (*good, *bad[mine]))
        found = pixel_metrics([nothing] * len(good) + list(plates.masks[mine]), large)
        pixel[kind], aupro[kind] = float(found.auroc or 0.0), float(found.aupro or 0.0)
    return Row(image, pixel, aupro, *head_bytes(head), seconds)


def head_bytes(head: Head) -> tuple[int, int]:
    """Return the bytes of a head's state as it is stored, and those of all its tensors, state included."""
    state = sum(values.nbytes for values in stored_state(head).values())
    fixed = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in head.state_dict().items()
        if name not in head.state_names
    )
    return state, state + fixed


def place_figure(plates: Plates) -> dict[float, dict[str, tuple[float, float]]]:
    """Return the AUROC of patches and of images for every share of the place and every fault.

    One set of prototypes in its published form on the stride-8 tap: 10 x 10 cells of 2, 75 steps, epsilon 0.01, 100
    iterations. A patch of a fault is a cell that it covers by a fifth.
    """
    found: dict[float, dict[str, tuple[float, float]]] = {}
    for alpha in ALPHAS:
        config = published([SetConfig(tap="s8", alpha=alpha, cells=10, copies=2)], steps=75)
        head = PrototypesMethod.fit(plates.context, config)
        good, bad = (head_maps(head, part, plates.preprocessing, CPU) for part in (plates.good, plates.faulty))
        cells = good.shape[1:]
        found[alpha] = {}
        for kind in dict.fromkeys(plates.kinds.tolist()):
            mine = np.flatnonzero(plates.kinds == kind)
            labels, values = [np.zeros(good.size, np.bool_)], [good.ravel()]
            for index in mine:
                share = cv2.resize(plates.masks[index].astype(np.float32), cells[::-1], interpolation=cv2.INTER_AREA)
                sure = (share == 0) | (share >= _COVERED)
                labels.append(share[sure] > 0)
                values.append(bad[index][sure])
            token = pixel_auroc([np.concatenate(labels)[None]], [np.concatenate(values)[None]])
            highest = [maps.reshape(len(maps), -1).max(1) for maps in (good, bad[mine])]
            truth = np.r_[np.zeros(len(good), np.bool_), np.ones(len(mine), np.bool_)]
            found[alpha][kind] = (
                np.nan if token is None else token,
                float(image_auroc(truth, np.concatenate(highest)) or 0.0),
            )
    return found


def published(sets: Sequence[SetConfig], *, steps: int) -> PrototypesConfig:
    """Return settings of prototypes as they were published, but for frozen normalisers and the trunk."""
    return PrototypesConfig(
        sets=tuple(sets), metric=Metric.COSINE, pooled=False, whitening=0.0, background=0.0, scaled=False,
        spread=False, balanced=True,
        epsilon=0.01, iterations=100, tolerance=0.0, follow=0.05, steps=steps,
    )  # fmt: skip


def candidates(chosen: Sequence[str], preset: str, size: Size) -> dict[str, tuple[type[Method], MethodConfig]]:
    """Return every method with its settings, and two that show what a default owes to its parts."""
    found = {name: (method, method.config(preset)) for name, method in methods().items() if name in chosen}
    if "memory" in found:
        method, config = found["memory"]
        found[NO_SITES] = (method, config.model_copy(update={"site_weight": 0.0}))
    if "prototypes" in found:
        sets = [SetConfig(tap=tap, alpha=alpha, copies=2) for tap in ("s8", "s16") for alpha in (0.0, 0.3)]
        found[PAPER] = (PrototypesMethod, published(sets, steps=60))
    if size.steps is None:
        return found
    return {
        name: (method, config.model_copy(update={"steps": min(size.steps, getattr(config, "steps", size.steps))})
               if "steps" in type(config).model_fields else config)
        for name, (method, config) in found.items()
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=sorted(methods()), default=list(methods()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="products")
    parser.add_argument("--preset", default="quick")
    parser.add_argument(
        "--slack", type=float, nargs="+", default=[0.02, 0.04], help="of components, as shares of the side"
    )
    parser.add_argument("--quick", action="store_true", help="few small pictures and little training, for a look")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    heading("logical")
    size = QUICK if options.quick else Size()
    products = [(seed, slack) for slack in options.slack for seed in options.seeds][: 1 if options.quick else None]
    chosen = candidates(options.methods, options.preset, size)
    taps = tuple(dict.fromkeys(tap for method, _ in chosen.values() for tap in (*method.tap_names, "s8")))
    rows: dict[str, list[Row]] = defaultdict(list)
    figures = []
    for seed, slack in products:
        plates = make_plates(seed, slack, size, taps)
        for name, (method, config) in chosen.items():
            rows[name].append(judged(method, config, plates))
            print(f"  product {seed}, slack {slack:g}: {name}", file=sys.stderr, flush=True)
        figures.append(place_figure(plates))
    print(f"{size}; products and slack: {products}\n")
    print_rows(rows)
    print_places(figures)
    print_goals([*method_goals(rows), *place_goals(figures)])
    if options.json:
        said = {name: [asdict(row) for row in runs] for name, runs in rows.items()}
        options.json.write_text(json.dumps({"methods": said, "places": figures}))


def print_rows(rows: dict[str, list[Row]]) -> None:
    """Print the table of methods; means over products, the range of the image figure in parentheses."""
    kinds = [fault.value for fault in Fault]
    print("I-AUROC (range over products) / pixel AUROC / AUPRO\n")
    print(f"| method | {' | '.join(kinds)} | state kB | whole head kB | fit s |")
    print(f"|---|{'---|' * (len(kinds) + 3)}")
    for name, runs in rows.items():
        cells = []
        for kind in kinds:
            images = [run.image[kind] for run in runs]
            pixel, pro = (np.mean([getattr(run, what)[kind] for run in runs]) for what in ("pixel", "aupro"))
            cells.append(f"{np.mean(images):.3f} ({np.ptp(images):.3f}) / {pixel:.3f} / {pro:.3f}")
        seconds = np.mean([run.seconds for run in runs])
        print(
            f"| {name} | {' | '.join(cells)} | {runs[0].state / 1e3:.0f} | {runs[0].whole / 1e3:.0f} | {seconds:.0f} |"
        )
    print(flush=True)


def print_places(figures: Sequence[dict[float, dict[str, tuple[float, float]]]]) -> None:
    """Print what the share of the place does."""
    print(
        "AUROC of patches / of images (highest patch), one set of prototypes as published, by the share of the place\n"
    )
    print(f"| fault | {' | '.join(f'{alpha:g}' for alpha in ALPHAS)} |\n|---|{'---|' * len(ALPHAS)}")
    for fault in Fault:
        cells = []
        for alpha in ALPHAS:
            token, image = np.mean([one[alpha][fault.value] for one in figures], 0)
            cells.append(f"{token:.3f} / {image:.3f}")
        print(f"| {fault.value} | {' | '.join(cells)} |")
    print(flush=True)


def method_goals(rows: dict[str, list[Row]]) -> list[Goal]:
    """Return by how much prototypes are ahead of memory on moved and missing components."""
    goals = []
    for other in ("memory", NO_SITES):
        if "prototypes" not in rows or other not in rows:
            continue
        ahead = [
            np.mean([ours.image[fault.value] - theirs.image[fault.value] for fault in COMPARED])
            for ours, theirs in zip(rows["prototypes"], rows[other], strict=True)
        ]
        limit = MARGIN if other == "memory" else np.nan
        name = f"I-AUROC of moved and missing: prototypes less {other}"
        goals.append(Goal(name, float(np.mean(ahead)), limit, at_least=True, spread=_each(ahead)))
    return goals


def place_goals(figures: Sequence[dict[float, dict[str, tuple[float, float]]]]) -> list[Goal]:
    """Return what places must do for patches."""

    def tokens(alpha: float, fault: Fault) -> npt.NDArray[np.float64]:
        return np.array([one[alpha][fault.value][0] for one in figures])

    gain = tokens(0.3, Fault.MISSING) - tokens(0.0, Fault.MISSING)
    high = tokens(0.7, Fault.MISSING)
    loss = tokens(0.0, Fault.SCRATCH) - tokens(0.3, Fault.SCRATCH)
    measured: list[tuple[str, npt.NDArray[np.float64], float, bool]] = [
        ("patch AUROC of a missing component: 0.3 less 0", gain, TOKEN_GAIN, True),
        ("patch AUROC of a missing component at 0.7", high, TOKEN_LEAST, True),
        ("patch AUROC of a scratch: 0 less 0.3", loss, TEXTURE_LOSS, False),
    ]
    return [
        Goal(name, float(values.mean()), limit, at_least=least, spread=_each(values))
        for name, values, limit, least in measured
    ]


def _each(values: Sequence[float] | npt.NDArray[np.float64]) -> str:
    return "products: " + ", ".join(f"{value:+.3f}" for value in values)


if __name__ == "__main__":
    main()
