"""One model for all products against one memory detector for each, on the same trunk: what one model costs in accuracy.

``python -m benchmarks.unified --methods uniad onenip memory --json F`` measures three generated webs and three
photographs; ``--root DIR`` every folder in MVTec layout below it. Training images are decoded and taken through the
trunk once. With ``--json`` each run is kept, and what the file has is not run again: add methods and seeds one by one.
About 3 minutes for memory alone on two cores; a transformer takes as long as its preset's steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._setting import Goal, heading, print_goals
from benchmarks._unified import (
    category_figures,
    contexts,
    find_folders,
    fitted,
    gate,
    generated,
    head_bytes,
    open_products,
    routing,
    splits,
    together,
    wrong_product,
)
from trainer.fit import choose_device, configured, seed_everything
from trainer.methods.registry import methods
from trainer.methods.routed import TAPS

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from benchmarks._unified import Fitted, Products
    from trainer.methods.base import FitContext

BASELINE = "memory, one each"
FIGURES = ("I-AUROC", "P-AUROC", "pixel AP", "AUPRO")
WITHIN, WRONG, DROP, AP_GAIN = 0.03, 1.2, 0.005, 0.05
# What the goals are set for; any method can be measured.
ONE_MODEL = ("uniad", "onenip")


class Book:
    """Results by name, kept in a file where there is one.

    Args:
        path: JSON; None keeps nothing.
        setting: what results depend on; a file of another setting is refused.
    """

    def __init__(self, path: Path | None, setting: dict[str, Any]) -> None:
        self.path, self.content = path, {"setting": setting, "results": {}}
        if path is not None and path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["setting"] != setting:
                raise SystemExit(f"{path}: holds results of another setting; give another file")
            self.content = kept

    @property
    def results(self) -> dict[str, Any]:
        """Return every result."""
        found: dict[str, Any] = self.content["results"]
        return found

    def result(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a kept result, or make and keep it."""
        if name not in self.results:
            print(f"  {name} ...", file=sys.stderr, flush=True)
            self.results[name] = make()
            if self.path is not None:
                work = self.path.with_suffix(".part")
                work.write_text(json.dumps(self.content, indent=1), encoding="utf-8")
                work.replace(self.path)
        found: dict[str, Any] = self.results[name]
        return found


def one_model(name: str, products: Products, context: FitContext, options: argparse.Namespace) -> dict[str, Any]:
    """Fit one method on all products and measure it on each."""
    method, seed, device = methods()[name], context.seed, context.device
    config = configured(method.config(options.preset), name, dict(one.split("=", 1) for one in options.set))
    seed_everything(seed)
    found = fitted(method, config, context, products.categories[0])
    result = figures_of(found, products, device)
    if found.head.takes_product:
        result["wrong product"] = wrong_product(found, products, device)
    if not options.no_gate and seed == options.seeds[0]:
        result["gate"] = gate((method, config), found, products, splits(products, seed), context)
    return result


def figures_of(found: Fitted, products: Products, device: torch.device) -> dict[str, Any]:
    """Return the figures of one head on every product."""
    return {
        "products": {
            name: category_figures(found, category, device=device, product=index)
            for index, (name, category) in enumerate(zip(products.names, products.categories, strict=True))
        },
        "seconds": found.seconds,
        "bytes": head_bytes(found.head, products.categories[0]),
        "synthetic": max(found.validation.values()),
    }


def one_each(products: Products, seed: int, preset: str, device: torch.device) -> dict[str, Any]:
    """Fit a memory detector on each product alone."""
    method, figures, seconds, size = methods()["memory"], {}, 0.0, 0
    parts = splits(products, seed)
    for name, category, context in zip(
        products.names, products.categories, contexts(products, parts, seed=seed, device=device), strict=True
    ):
        seed_everything(seed)
        found = fitted(method, method.config(preset), context, category)
        figures[name] = category_figures(found, category, device=device)
        seconds += found.seconds
        size += head_bytes(found.head, category)
    return {"products": figures, "seconds": seconds, "bytes": size}


def mean_of(result: dict[str, Any], figure: str) -> float:
    """Return the mean of a figure over products that have it; NaN where none has."""
    known = [one[figure] for one in result["products"].values() if one.get(figure) is not None]
    return float(np.mean(known)) if known else float("nan")


def means(results: dict[str, Any], name: str, figure: str) -> list[float]:
    """Return the mean figure of each seed of a method."""
    return [mean_of(one, figure) for key, one in sorted(results.items()) if key.rsplit("/", 1)[0] == name]


def print_results(results: dict[str, Any], names: list[str]) -> None:
    """Print means, and I-AUROC by product."""
    print("\n| detector | seeds | " + " | ".join(FIGURES) + " | spread | head kB | fit s | wrong product | int8 drop |")
    print("|---|" + "---|" * (len(FIGURES) + 6))
    for name in names:
        own = [one for key, one in sorted(results.items()) if key.rsplit("/", 1)[0] == name]
        if not own:
            continue
        cells = [f"{np.mean([mean_of(one, figure) for one in own]):.3f}" for figure in FIGURES]
        spread = np.ptp([mean_of(one, "I-AUROC") for one in own])
        wrong = [float(np.mean(list(one["wrong product"].values()))) for one in own if "wrong product" in one]
        said = [f"{spread:.3f}", f"{np.mean([one['bytes'] for one in own]) / 1000:.0f}"]
        said += [f"{np.mean([one['seconds'] for one in own]):.0f}", f"{np.mean(wrong):.2f}" if wrong else "-"]
        print(f"| {name} | {len(own)} | {' | '.join((*cells, *said, _gate_cell(own)))} |")
    print("\nBytes are of all heads together. Spread: of the mean I-AUROC over seeds.")
    shown = [name for name in names if means(results, name, "I-AUROC")]
    print("\n| I-AUROC (pixel AP) | " + " | ".join(shown) + " |\n|---|" + "---|" * len(shown))
    first = next(iter(one for key, one in results.items() if "/" in key and "products" in one))
    for product in first["products"]:
        cells = []
        for name in shown:
            own = [one["products"][product] for key, one in results.items() if key.rsplit("/", 1)[0] == name]
            pixel = [one["pixel AP"] for one in own if one.get("pixel AP") is not None]
            cells.append(
                f"{np.mean([one['I-AUROC'] for one in own]):.3f}" + (f" ({np.mean(pixel):.3f})" if pixel else "")
            )
        print(f"| {product} | {' | '.join(cells)} |")
    for key, one in sorted(results.items()):
        if key.startswith("router/"):
            print(f"\n{key}: " + ", ".join(f"{what} {value:.3f}" for what, value in one.items()))


def _gate_cell(own: list[dict[str, Any]]) -> str:
    for one in own:
        if "gate" in one:
            drop = one["gate"].get("auroc_drop")
            figure = "-" if drop is None else f"{drop:+.4f}"
            return figure if one["gate"]["passed"] else f"{figure} refused: {one['gate']['refusal']}"
    return "-"


def goals(results: dict[str, Any], names: list[str], *, synthetic: bool) -> list[Goal]:
    """Return what was asked for of one model."""
    found = []
    limit = float(np.mean(means(results, BASELINE, "I-AUROC") or [np.nan])) - WITHIN
    for name in names:
        own = means(results, name, "I-AUROC")
        if name not in ONE_MODEL or not own:
            continue
        said = f"seeds {min(own):.3f} to {max(own):.3f}"
        found.append(Goal(f"{name}: mean I-AUROC, one each less {WITHIN}", float(np.mean(own)), limit, True, said))
        runs = [one for key, one in results.items() if key.rsplit("/", 1)[0] == name]
        ratios = [value for one in runs for value in one.get("wrong product", {}).values()]
        if ratios:
            said = f"products {min(ratios):.2f} to {max(ratios):.2f}"
            found.append(Goal(f"{name}: error as a wrong product", float(np.mean(ratios)), WRONG, True, said))
        drops = [one["gate"]["auroc_drop"] for one in runs if one.get("gate", {}).get("auroc_drop") is not None]
        if drops:
            passed = all(one["gate"]["passed"] for one in runs if "gate" in one)
            said = "passed the gate" if passed else "refused by the gate"
            found.append(Goal(f"{name}: I-AUROC drop of int8", max(drops), DROP, False, said))
    pixel = {name: np.mean(means(results, name, "pixel AP")) for name in ONE_MODEL if means(results, name, "pixel AP")}
    if len(pixel) == len(ONE_MODEL):
        gain = float(pixel["onenip"] - pixel["uniad"])
        found.append(Goal("onenip: pixel AP over uniad's", gain, AP_GAIN if synthetic else 0.0, True, ""))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, nargs="+", help="folders in MVTec layout, or folders of them")
    parser.add_argument("--methods", nargs="+", choices=sorted(methods()), default=["memory"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the methods")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--train", type=int, help="most training images of each product")
    parser.add_argument("--test", type=int, help="most test images of each product, half of them good")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-gate", action="store_true", help="do not pack bundles")
    parser.add_argument("--json", type=Path, help="file of results; what it has is not run again")
    options = parser.parse_args()
    heading("unified")
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        if options.root:
            folders = find_folders(options.root)
        else:
            # As sharp as the network sees them.
            folders = generated(Path(scratch), train=options.train or 80, test=options.test or 60, side=options.size)
        if len(folders) < 2:
            raise SystemExit("give --root with at least two folders that hold train/good and test")
        results = measure(folders, options, device)
    names = [BASELINE, *dict.fromkeys(key.rsplit("/", 1)[0] for key in results if not key.startswith("router/"))]
    names = list(dict.fromkeys(names))
    print_results(results, names)
    print_goals(goals(results, names, synthetic=not options.root))


def measure(folders: list[Path], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Run what the book lacks."""
    wanted = tuple(dict.fromkeys([*methods()["memory"].tap_names, *TAPS, *(
        tap for name in options.methods for tap in methods()[name].tap_names
    )]))  # fmt: skip
    products = open_products(folders, taps=wanted, size=options.size, train=options.train, test=options.test)
    seen = hashlib.sha256(b"".join(np.ascontiguousarray(one.canvases).tobytes() for one in products.categories))
    setting = {"products": list(products.names), "size": options.size, "preset": options.preset, "set": options.set,
               "images": seen.hexdigest(), "test": [len(one.labels) for one in products.categories]}  # fmt: skip
    book = Book(options.json, setting)
    for seed in options.seeds:
        book.result(f"{BASELINE}/{seed}", lambda seed=seed: one_each(products, seed, options.preset, device))
        missing = [name for name in (*options.methods, "router") if f"{name}/{seed}" not in book.results]
        if not missing:
            continue
        parts = splits(products, seed)
        context = together(products, parts, seed=seed, device=device)
        for name in options.methods:
            book.result(
                f"{name}/{seed}", lambda name=name, context=context: one_model(name, products, context, options)
            )
        book.result(
            f"router/{seed}",
            lambda seed=seed, parts=parts, context=context: routing(products, parts, context, seed=seed),
        )
    return book.results


if __name__ == "__main__":
    main()
