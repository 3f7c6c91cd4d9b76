"""What do FADeR's attenuation gates do when the mask misses part of a defect?

Good images with one synthetic defect each, whose place is known; the mask is made to cover 25, 50, 75 and 100 % of it.
Run: ``python -m benchmarks.masks --data FOLDER [FOLDER ...] --image FILE``; no real defect is read.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks._setting import heading, quiet
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.data.folder import read_folder
from trainer.data.splits import split_holdout
from trainer.features import extract_tiles, load_canvases
from trainer.fit import HOLDOUT_FRACTION, HOLDOUT_MINIMUM, preprocessing_for
from trainer.methods.base import FitContext, Validation
from trainer.methods.fader.base import MASK_STRIDE
from trainer.methods.fader.fit import FaderConfig, FaderMethod
from trainer.methods.fader.model import MAP_STRIDE, FaderHead, without_gates
from trainer.synthesis.image2d import make_defects

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from trainer.methods.base import Features

    Picture = npt.NDArray[np.uint8]

COVERAGES = (0.25, 0.5, 0.75, 1.0)
RECALL = 0.95
SIZE_RANGE = (0.12, 0.3)
"""Extent of the defects as a share of the diagonal: at 224 pixels 38 to 95, several cells of the mask."""
CPU = torch.device("cpu")
_DRAWS = 2000
_BATCH = 16


@dataclass(frozen=True)
class Sample:
    """Images with one known defect each.

    Attributes:
        features: taps of n images.
        defect: bool [n, h, w] on the map's grid: cells that lie at least half in the defect.
        normal: bool [n, h, w]: cells that no pixel of the defect touches, nor a neighbouring cell's.
        share: float64 [n, H/16, W/16], pixels of the defect in each cell of the mask.
    """

    features: Features
    defect: npt.NDArray[np.bool_]
    normal: npt.NDArray[np.bool_]
    share: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What maps say of a sample.

    Attributes:
        contrast: mean error on the defect / mean error on normal cells of the same image, mean over images.
        false_positives: share of all normal cells at the threshold that finds 95 % of all defect cells.
    """

    contrast: float
    false_positives: float


def cells(masks: npt.NDArray[np.bool_], stride: int) -> npt.NDArray[np.float64]:
    """Return the share of defect pixels in each cell, [n, H / stride, W / stride]."""
    n, height, width = masks.shape
    return masks.reshape(n, height // stride, stride, width // stride, stride).mean((2, 4))


def sample_of(features: Features, masks: npt.NDArray[np.bool_]) -> Sample:
    """Put labels on the grids of map and mask."""
    fine = torch.from_numpy(cells(masks, MAP_STRIDE))
    near = torch.nn.functional.max_pool2d(fine[:, None], 3, stride=1, padding=1)[:, 0]
    return Sample(features, (fine >= 0.5).numpy(), (near == 0).numpy(), cells(masks, MASK_STRIDE))


def covering(share: npt.NDArray[np.float64], coverage: float, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Choose cells of one image that cover about ``coverage`` of its defect.

    The defect is uncovered from one side, in a random direction, as a mask does that ends too early.

    Args:
        share: [h, w], pixels of the defect in each cell.
        coverage: share of the defect's pixels, in [0, 1]; 1 covers all of them.
        rng: draws the direction.

    Returns:
        bool [h, w]; of the cells in that order as many as come nearest to ``coverage``.
    """
    angle = rng.uniform(0, 2 * np.pi)
    rows, cols = np.nonzero(share)
    order = np.argsort(rows * np.sin(angle) + cols * np.cos(angle), kind="stable")
    reached = np.r_[0.0, np.cumsum(share[rows[order], cols[order]])] / share.sum()
    count = len(order) if coverage >= 1 else int(np.abs(reached - coverage).argmin())
    chosen = np.zeros(share.shape, np.bool_)
    chosen[rows[order[:count]], cols[order[:count]]] = True
    return chosen


def forced(own: torch.Tensor, share: npt.NDArray[np.float64], coverage: float, seed: int) -> torch.Tensor:
    """Return the head's own masks [n, 1, h, w] with the defect covered to a given share, and no cell of it beside."""
    rng = np.random.default_rng(seed)
    covered = np.stack([covering(one, coverage, rng) for one in share])
    return torch.where(torch.from_numpy(share > 0)[:, None], torch.from_numpy(covered)[:, None].float(), own)


def maps_under(head: FaderHead, features: Features, masks: torch.Tensor | None) -> npt.NDArray[np.float32]:
    """Return the errors float32 [n, h, w] under given masks (None: the head's own), no background taken off."""
    found = []
    with torch.inference_mode():
        for index, taps in enumerate(features.batches(head.tap_names, _BATCH, device=CPU)):
            rows = slice(index * _BATCH, index * _BATCH + len(taps[0]))
            judged = head.judge(taps, None if masks is None else masks[rows])
            found.append(judged.total[:, 0].numpy())
    return np.concatenate(found)


def own_masks(head: FaderHead, features: Features) -> torch.Tensor:
    """Return the masks that the head itself computes."""
    with torch.inference_mode():
        batches = features.batches(head.tap_names, _BATCH, device=CPU)
        return torch.cat([head.base.mask(head.base.read(taps)) for taps in batches])


def outcome(maps: npt.NDArray[np.float32], sample: Sample) -> Outcome:
    """Measure maps."""
    ratios = [
        one[defect].mean() / one[normal].mean()
        for one, defect, normal in zip(maps, sample.defect, sample.normal, strict=True)
        if defect.any()
    ]
    threshold = np.quantile(maps[sample.defect], 1 - RECALL)
    return Outcome(float(np.mean(ratios)), float((maps[sample.normal] >= threshold).mean()))


def ablate(head: FaderHead, sample: Sample, seed: int) -> dict[str, tuple[Outcome, Outcome]]:
    """Return outcomes with gates on and off, at each coverage and under the head's own mask (``own``)."""
    off, own = without_gates(head), own_masks(head, sample.features)
    results = {}
    for coverage in COVERAGES:
        masks = forced(own, sample.share, coverage, seed)
        on_off = (outcome(maps_under(one, sample.features, masks), sample) for one in (head, off))
        results[f"{coverage:.0%}"] = (next(on_off), next(on_off))
    results["own"] = tuple(outcome(maps_under(one, sample.features, own), sample) for one in (head, off))
    return results


def prepare(folder: Path, *, size: int, images: int, seed: int) -> tuple[FitContext, Sample]:
    """Split train/good, take features, and put one defect on every held-out image.

    Args:
        folder: in MVTec layout; only train/good is read.
        size: side of the network's input.
        images: training images at most; a third as many are held out at most.
        seed: of the split, the defects and the fit.
    """
    preprocessing = preprocessing_for(size=(size, size), tiles=(1, 1), overlap=0, crop=None)
    split = split_holdout(read_folder(folder).train, HOLDOUT_FRACTION, seed, HOLDOUT_MINIMUM)
    rng = np.random.default_rng(seed)
    kept = [
        [part[i] for i in sorted(rng.permutation(len(part))[:most])]
        for part, most in ((split.fit, images), (split.holdout, max(images // 3, HOLDOUT_MINIMUM)))
    ]
    train, held = (load_canvases(part, preprocessing, progress=quiet, what="") for part in kept)
    trunk = lite0_trunk()
    take = partial(extract_tiles, trunk=trunk, tap_names=FaderMethod.tap_names, device=CPU)
    defective, masks = make_defects(held, seed=seed, repeats=2, size=SIZE_RANGE)
    features, found = take(train), take(defective)
    validation = Validation(take(held), found, masks)
    context = FitContext(
        features=features, images=train, extract=take, validation=validation, seed=seed, device=CPU, progress=quiet
    )
    return context, sample_of(found, masks)


def interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return a 95 % bootstrap interval of the mean over folders and seeds, [folders, seeds]: both are drawn anew."""
    rng = np.random.default_rng(0)
    folders, seeds = values.shape
    drawn = [
        values[rng.integers(folders, size=folders)][:, rng.integers(seeds, size=seeds)].mean() for _ in range(_DRAWS)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def print_table(found: dict[str, list[list[tuple[Outcome, Outcome]]]]) -> dict[str, dict[str, float]]:
    """Print means over folders and seeds, and the difference that gates make with its interval."""
    said: dict[str, dict[str, float]] = {}
    print("| defect covered | measure | gates on | gates off | on - off | 95 % interval |\n|---|---|---|---|---|---|")
    for name, runs in found.items():
        said[name] = {}
        for measure in ("contrast", "false_positives"):
            on, off = (
                np.array([[getattr(pair[side], measure) for pair in seeds] for seeds in runs]) for side in (0, 1)
            )
            low, high = interval(on - off)
            label = "contrast" if measure == "contrast" else f"FPR at {RECALL:.0%} TPR"
            gain = (on - off).mean()
            print(
                f"| {name} | {label} | {on.mean():.4f} | {off.mean():.4f} | {gain:+.4f} | {low:+.4f} to {high:+.4f} |"
            )
            said[name] |= {
                f"{measure}_on": float(on.mean()), f"{measure}_off": float(off.mean()),
                f"{measure}_low": low, f"{measure}_high": high,
            }  # fmt: skip
    print(flush=True)
    return said


def draw(said: dict[str, dict[str, float]], path: Path) -> None:
    """Draw contrast and false positives over coverage."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in said if name != "own"]
    shares = [float(name.rstrip("%")) for name in names]
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2))
    for panel, measure, title in (
        (panels[0], "contrast", "contrast: error on defect / on normal cells"),
        (panels[1], "false_positives", f"false positives at {RECALL:.0%} recall"),
    ):
        for side in ("on", "off"):
            values = [said[name][f"{measure}_{side}"] for name in names]
            panel.plot(shares, values, marker="o", linestyle="-" if side == "on" else "--", label=f"gates {side}")
        panel.set_title(title, fontsize="medium")
        panel.legend(fontsize="small")
    gains = [said[name]["contrast_on"] - said[name]["contrast_off"] for name in names]
    below = [gain - said[name]["contrast_low"] for gain, name in zip(gains, names, strict=True)]
    above = [said[name]["contrast_high"] - gain for gain, name in zip(gains, names, strict=True)]
    panels[2].errorbar(shares, gains, yerr=[below, above], marker="o", capsize=3)
    panels[2].axhline(0, color="grey", linestyle=":", linewidth=1)
    panels[2].set_title("contrast gained by the gates, 95 % interval", fontsize="medium")
    for panel in panels:
        panel.set_xlabel("share of the defect that the mask covers, %")
        panel.set_xticks(shares)
        panel.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders in MVTec layout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of FADeR to change")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=120, help="training images of a folder at most")
    parser.add_argument("--image", type=Path, help="PNG file to draw into")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    heading("masks")
    changes = dict(one.split("=", 1) for one in options.set)
    config = FaderConfig.model_validate(FaderMethod.config(options.preset).model_dump(mode="json") | changes)
    found: dict[str, list[list[tuple[Outcome, Outcome]]]] = defaultdict(list)
    for folder in options.data:
        runs = []
        for seed in options.seeds:
            context, sample = prepare(folder, size=options.size, images=options.images, seed=seed)
            runs.append(ablate(FaderMethod.fit(context, config), sample, seed))
            print(f"  {folder.name} seed {seed}", flush=True)
        for name in runs[0]:
            found[name].append([run[name] for run in runs])
    said = print_table(found)
    if options.image:
        draw(said, options.image)
        print(f"curves: {options.image}")
    if options.json:
        options.json.write_text(json.dumps(said))
    return said


if __name__ == "__main__":
    main()
