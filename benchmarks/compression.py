"""How small may a memory be? Rows and bytes against accuracy and time, for each way of reducing and storing a bank.

Images in MVTec layout, or generated webs where none are given; nothing is chosen on the test images. Run:
``python benchmarks/compression.py [--data FOLDER ...] [--image docs/images/compression.png]``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks._images import CPU, at_size, fit_context, generated_folders, open_category, split
from benchmarks._setting import heading
from deploy.export import export_head
from deploy.metrics import image_auroc, pixel_metrics
from deploy.quantize import quantize_head
from edge.bundle import Engine, Precision
from edge.inference.engines import open_graph
from edge.inference.sessions import ANOMALY_MAP
from edge.judgement.score import pool_score
from edge.memory.rows import RowsPrecision, encode_rows, round_rows
from trainer.fit import choose_pooling, head_maps
from trainer.methods.memory.fit import MemoryConfig, MemoryMethod
from trainer.methods.memory.model import LEVELS
from trainer.methods.memory.reduce import Reduction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks._images import Category
    from trainer.methods.base import Head, Validation
    from trainer.methods.memory.model import MemoryHead

ROWS = (125, 250, 500, 1000, 2000)
_TURNS, _CALLS = 5, 20


@dataclass(frozen=True)
class Point:
    """One bank on one folder.

    Attributes:
        category: the folder.
        reduction: how the bank was made.
        stored: numbers that its rows are stored in.
        rows: of a level's bank, as set; the finest level has half.
        bytes: of all rows as stored, scales included.
        image_auroc: on the test images.
        aupro: on the test images; NaN without masks.
        fit_s: seconds to fit.
    """

    category: str
    reduction: str
    stored: str
    rows: int
    bytes: int
    image_auroc: float
    aupro: float
    fit_s: float


def measure(
    category: Category, rows: Sequence[int], *, seed: int, usual: MemoryConfig
) -> tuple[list[Point], dict[int, Head]]:
    """Fit and judge every bank, other settings as usual; also return a head of each number of rows, to be timed."""
    context = fit_context(category, split(category, seed), seed=seed, taps=LEVELS)
    points, heads = [], {}
    for count in rows:
        for reduction in Reduction:
            config = usual.model_copy(update={"rows": count, "reduction": reduction})
            started = time.perf_counter()
            head = MemoryMethod.fit(context, config)
            seconds = time.perf_counter() - started
            for stored, kept in ((RowsPrecision.FLOAT32, head), (RowsPrecision.INT8, rounded(head, config))):
                area, overlap = judge(kept, category, context.validation)
                points.append(
                    Point(
                        category=category.name,
                        reduction=reduction.value,
                        stored=stored.value,
                        rows=count,
                        bytes=stored_bytes(kept, stored),
                        image_auroc=area,
                        aupro=overlap,
                        fit_s=seconds,
                    )
                )
            heads[count] = head
        print(f"  {category.name}: {count} rows", file=sys.stderr, flush=True)
    return points, heads


def stored_bytes(head: Head, stored: RowsPrecision) -> int:
    """Return the bytes of a head's rows as a bundle stores them."""
    total = 0
    for name in head.state_names:
        rows = head.get_buffer(name).numpy()
        total += rows.nbytes if stored is RowsPrecision.FLOAT32 else sum(part.nbytes for part in encode_rows(rows))
    return total


def rounded(head: MemoryHead, config: MemoryConfig) -> MemoryHead:
    """Return the head that the same fit gives where rows are stored in int8."""
    tensors = dict(head.state_dict())
    tensors |= {name: torch.from_numpy(round_rows(tensors[name].numpy())) for name in head.state_names}
    return MemoryMethod.build(config.model_copy(update={"rows_precision": RowsPrecision.INT8}), tensors)


def judge(head: Head, category: Category, validation: Validation) -> tuple[float, float]:
    """Return I-AUROC, pooled by the rule chosen on the validation set, and AUPRO; NaN without masks."""
    good, defective = (
        head_maps(head, part, category.preprocessing, CPU) for part in (validation.good, validation.defective)
    )
    pooling, _ = choose_pooling(good, defective)
    maps = head_maps(head, category.test, category.preprocessing, CPU)
    area = image_auroc(category.labels, [pool_score(one, pooling) for one in maps])
    overlap = None
    if category.masks is not None:
        overlap = pixel_metrics(category.masks, at_size(maps, category.masks.shape[1])).aupro
    return (float("nan") if area is None else area), (float("nan") if overlap is None else overlap)


def milliseconds(head: Head, category: Category, precision: Precision) -> float:
    """Return the best of several turns of the exported head on OpenVINO with one thread, in ms an image."""
    taps = [tap[:1].float().numpy() for tap in (category.test.taps[name] for name in head.tap_names)]
    feed = dict(zip(head.tap_names, taps, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path, int8 = Path(folder) / "head.onnx", Path(folder) / "head.int8.onnx"
        export_head(head, path, tap_shapes={name: tap.shape[1:] for name, tap in feed.items()})
        if precision is Precision.INT8:
            some = range(min(8, len(category.test)))
            batches = [{name: category.test.taps[name][[i]].float().numpy() for name in head.tap_names} for i in some]
            quantize_head(path, int8, batches, state_names=head.state_names, float_ops=head.float_ops)
        session = open_graph(
            int8 if precision is Precision.INT8 else path,
            engine=Engine.OPENVINO,
            precision=precision,
            threads=1,
            outputs=[ANOMALY_MAP],
            input_shapes={name: tap.shape for name, tap in feed.items()},
        )
        session.run(feed)
        turns = []
        for _ in range(_TURNS):
            started = time.perf_counter()
            for _ in range(_CALLS):
                session.run(feed)
            turns.append(1e3 * (time.perf_counter() - started) / _CALLS)
    return min(turns)


def mean_of(points: Sequence[Point], key: str) -> float:
    """Return the mean of a figure over folders, without those that lack it."""
    values = np.array([getattr(point, key) for point in points], np.float64)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def print_table(points: Sequence[Point], times: dict[int, tuple[float, float]]) -> None:
    """Print one line for each bank, means over folders; the spread is over folders too."""
    print("| reduction | stored | rows | bytes | I-AUROC | to float32 | AUPRO | head ms | int8 head ms | fit s |")
    print("|---" * 10 + "|")
    for (reduction, stored, rows), some in grouped(points).items():
        plain = grouped(points)[reduction, RowsPrecision.FLOAT32.value, rows]
        lost = mean_of(some, "image_auroc") - mean_of(plain, "image_auroc")
        figures = f"{mean_of(some, 'image_auroc'):.4f} | {lost:+.4f} | {mean_of(some, 'aupro'):.4f}"
        size = round(mean_of(some, "bytes"))
        timed = f"{times[rows][0]:.2f} | {times[rows][1]:.2f}"
        print(f"| {reduction} | {stored} | {rows} | {size} | {figures} | {timed} | {mean_of(some, 'fit_s'):.1f} |")
    print(flush=True)


def grouped(points: Sequence[Point]) -> dict[tuple[str, str, int], list[Point]]:
    """Return the points of each bank, over folders."""
    found: dict[tuple[str, str, int], list[Point]] = defaultdict(list)
    for point in points:
        found[point.reduction, point.stored, point.rows].append(point)
    return dict(found)


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw I-AUROC against bytes, one line for each reduction and storage."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panel = plt.subplots(figsize=(6.4, 4.0))
    banks = grouped(points)
    colours = {reduction.value: f"C{index}" for index, reduction in enumerate(Reduction)}
    styles = {RowsPrecision.FLOAT32.value: "-", RowsPrecision.INT8.value: "--"}
    for reduction, colour in colours.items():
        for stored, style in styles.items():
            line = [some for key, some in banks.items() if key[:2] == (reduction, stored)]
            sizes, values = ([mean_of(some, key) for some in line] for key in ("bytes", "image_auroc"))
            panel.plot(sizes, values, style, color=colour, marker="o", markersize=4, label=f"{reduction}, {stored}")
    panel.set_xscale("log")
    folders = len({point.category for point in points})
    panel.set(xlabel="bytes of all rows as stored", ylabel=f"I-AUROC, mean of {folders} folders")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[Point]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", help="folders in MVTec layout; generated webs if absent")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--train", type=int, default=60, help="most training images of a folder")
    parser.add_argument("--test", type=int, default=80, help="most test images of a folder, half of them good")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bank-alone", action="store_true", help="judge by the banks only, not by the sites too")
    parser.add_argument("--image", type=Path, help="PNG file to draw the curve into")
    parser.add_argument("--json", type=Path, help="file for every figure")
    options = parser.parse_args(argv)
    heading("compression")
    points: list[Point] = []
    usual = MemoryConfig(site_weight=0.0) if options.bank_alone else MemoryConfig()

    def of(folders: Sequence[Path]) -> dict[int, tuple[float, float]]:
        heads: dict[int, Head] = {}
        for folder in folders:
            category = open_category(folder, taps=LEVELS, size=options.size, train=options.train, test=options.test)
            found, heads = measure(category, options.rows, seed=options.seed, usual=usual)
            points.extend(found)
        both = (Precision.FLOAT32, Precision.INT8)
        return {rows: tuple(milliseconds(head, category, one) for one in both) for rows, head in heads.items()}

    if options.data:
        times = of(options.data)
    else:
        with generated_folders(train=options.train, test=options.test, seed=options.seed) as folders:
            times = of(folders)
    print(
        f"{', '.join(dict.fromkeys(point.category for point in points))}: means over these, {options.size} pixels, at "
        f"most {options.train} images to train on and {options.test} to test, seed {options.seed}. Times of the "
        "exported head: OpenVINO, one thread, one image, best of some turns; storage does not change them. "
        f"{'Banks alone.' if options.bank_alone else 'Bytes are of the rows; what is known of sites comes on top.'}\n"
    )
    print_table(points, times)
    if options.image:
        draw(points, options.image)
        print(f"curve: {options.image}")
    if options.json:
        options.json.write_text(json.dumps([asdict(point) for point in points], indent=1))
    return points


if __name__ == "__main__":
    main()
