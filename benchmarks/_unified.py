"""Several products in one training, as benchmarks use them: taps of all images once, figures of one head on each.

It must not know goals, tables or which methods there are.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks._images import Category, Split, at_size, fit_context, open_category, split
from benchmarks._setting import quiet
from deploy.export import export_head, tap_shapes
from deploy.metrics import image_auroc, pixel_metrics
from edge.bundle import Precision
from edge.errors import GateError
from edge.judgement.score import pool_score
from trainer.data.conveyor import write_default
from trainer.data.surfaces import KINDS
from trainer.export import export_run
from trainer.fit import drawn_evenly, learn, versions
from trainer.methods.base import Features, FitContext, Validation
from trainer.methods.routed import Shown, fit_router, has_route, with_router
from trainer.pooling import head_maps
from trainer.runs import Run, RunRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from edge.bundle import Pooling
    from trainer.methods.base import Head, Method, MethodConfig
    from trainer.methods.routed import ProductRouter

    Maps = npt.NDArray[np.float32]

_MEMORY_OF_WRONG = 16
"""Good images of each product that are shown as every other one."""


@dataclass(frozen=True)
class Products:
    """What is trained on and judged.

    Attributes:
        categories: one per product, sorted by name.
        names: of the products.
        taps: extracted of every image.
    """

    categories: tuple[Category, ...]
    names: tuple[str, ...]
    taps: tuple[str, ...]


def find_folders(roots: Sequence[Path]) -> list[Path]:
    """Return every folder in MVTec layout at or below the roots that has test images, sorted."""
    found = {good.parent.parent for root in roots for good in root.glob("**/train/good")}
    return sorted(folder for folder in found if (folder / "test").is_dir())


def generated(folder: Path, *, train: int, test: int, side: int, seed: int = 0) -> list[Path]:
    """Write the products that need no data: three generated webs and three photographs, with drawn defects."""
    halves = {"test_good": test // 2, "test_defective": test // 2}
    return [write_default(folder / kind, seed=seed, kind=kind, train=train, side=side, **halves) for kind in KINDS]


def open_products(
    folders: Sequence[Path], *, taps: Sequence[str], size: int, train: int | None, test: int | None
) -> Products:
    """Read folders and take all their images through the trunk, once for all methods."""
    categories = [open_category(folder, taps=taps, size=size, train=train, test=test) for folder in folders]
    named = sorted(zip(_names(folders), categories, strict=True), key=lambda one: one[0])
    return Products(tuple(one for _, one in named), tuple(name for name, _ in named), tuple(taps))


def together(products: Products, parts: Sequence[Split], *, seed: int, device: torch.device) -> FitContext:
    """Return what a method may see of all products at once."""
    own = contexts(products, parts, seed=seed, device=device)
    return replace(
        own[0],
        features=joined([one.features for one in own]),
        images=np.concatenate([one.images for one in own]),
        validation=Validation(
            joined([one.validation.good for one in own]),
            joined([one.validation.defective for one in own]),
            np.concatenate([one.validation.masks for one in own]),
        ),
        subclasses=np.repeat(np.array(products.names), [len(one.images) for one in own]),
        products=products.names,
    )


def contexts(products: Products, parts: Sequence[Split], *, seed: int, device: torch.device) -> list[FitContext]:
    """Return what a method may see of each product alone."""
    found = []
    for category, part in zip(products.categories, parts, strict=True):
        context = fit_context(category, part, seed=seed, taps=products.taps)
        found.append(replace(context, device=device))
    return found


def joined(features: Sequence[Features]) -> Features:
    """Return the features of several products, each numbered by its place."""
    return Features(
        taps={name: torch.cat([one.taps[name] for one in features]) for name in features[0].taps},
        tiles_per_image=1,
        groups=np.concatenate([[f"{index}/{group}" for group in one.groups] for index, one in enumerate(features)]),
        products=torch.cat([torch.full((len(one),), index) for index, one in enumerate(features)]),
    )


def splits(products: Products, seed: int) -> list[Split]:
    """Hold good images of every product out."""
    return [split(category, seed) for category in products.categories]


@dataclass(frozen=True)
class Fitted:
    """A head that was fitted, and what its fit took."""

    head: Head
    pooling: Pooling
    validation: dict[str, float]
    seconds: float


def fitted(method: type[Method], config: MethodConfig, context: FitContext, category: Category) -> Fitted:
    """Fit a head and choose its pooling rule on the validation set."""
    started = time.monotonic()
    head, pooling, validation = learn(method, config, context, category.preprocessing)
    return Fitted(head, pooling, validation, time.monotonic() - started)


def category_figures(
    found: Fitted, category: Category, *, device: torch.device, product: int | None = None
) -> dict[str, float | None]:
    """Return the figures of a head on the test images of one product."""
    maps = head_maps(found.head, shown_as(category.test, product), category.preprocessing, device)
    scores = np.array([pool_score(one, found.pooling) for one in maps])
    figures: dict[str, float | None] = {"I-AUROC": image_auroc(category.labels, scores)}
    if category.masks is not None:
        pixels = pixel_metrics(category.masks, at_size(maps, category.masks.shape[1]))
        figures |= {"P-AUROC": pixels.auroc, "pixel AP": pixels.ap, "AUPRO": pixels.aupro}
    return figures


def wrong_product(found: Fitted, products: Products, device: torch.device) -> dict[str, float]:
    """Return, for each product, its good test images' mean map as each other product over that as itself."""
    ratios = {}
    for own, (name, category) in enumerate(zip(products.names, products.categories, strict=True)):
        rows = np.flatnonzero(~category.labels)[:_MEMORY_OF_WRONG]
        good = Features({k: tap[torch.from_numpy(rows)] for k, tap in category.test.taps.items()}, 1,
                        category.test.groups[rows])  # fmt: skip
        levels = [
            float(head_maps(found.head, shown_as(good, product), category.preprocessing, device).mean())
            for product in range(len(products.names))
        ]
        others = [level for product, level in enumerate(levels) if product != own]
        ratios[name] = float(np.mean(others)) / levels[own]
    return ratios


def shown_as(features: Features, product: int | None) -> Features:
    """Return features that say which product they show."""
    return features if product is None else replace(features, products=torch.full((len(features),), product))


def head_bytes(head: Head, category: Category) -> int:
    """Return the bytes of an exported head in float32, its state included."""
    shapes = tap_shapes(category.trunk, (category.preprocessing.height, category.preprocessing.width))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.onnx"
        export_head(head, path, tap_shapes=shapes)
        return path.stat().st_size


def gate(
    trained: tuple[type[Method], MethodConfig],
    found: Fitted,
    products: Products,
    parts: Sequence[Split],
    context: FitContext,
) -> dict[str, float | bool | str | None]:
    """Pack a bundle of a head and return what the parity gate says of int8 on the engine that a box takes first."""
    (method, config), seed = trained, context.seed
    holdout = np.concatenate([part.holdout for part in parts])
    assert context.subclasses is not None
    labels = np.repeat(np.array(products.names), [len(part.holdout) for part in parts])
    kept = drawn_evenly(context.subclasses)
    groups = context.validation.good.groups
    if not has_route(found.head):
        known, held = Shown(context.features, context.images), Shown(context.validation.good, holdout)
        router = fit_router(known, held, len(products.names), context.extract, seed=seed)
        found = replace(found, head=with_router(found.head, router))
    record = RunRecord(
        method=method.name, preset="benchmark", config=config.model_dump(mode="json"), product="products",
        products=products.names, preprocessing=products.categories[0].preprocessing, pooling=found.pooling, seed=seed,
        data_sha256="0" * 64, train_images=len(context.images), validation=found.validation, seconds=found.seconds,
        versions=versions(), created=datetime.now(timezone.utc), reference_images=len(kept),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            Path(folder) / "run", record, products.categories[0].trunk, found.head, holdout, groups, labels,
            context.images[kept], context.subclasses[kept],
        )  # fmt: skip
        run.save()
        try:
            bundle = export_run(run.path, Path(folder) / "bundle", progress=quiet)
        except GateError as error:
            return {"passed": False, "refusal": str(error)}
        whole = sum(path.stat().st_size for path in bundle.path.rglob("*") if path.is_file())
        parity = bundle.manifest.parity
        int8 = [path for path in parity["paths"] if path["precision"] == Precision.INT8.value]
        path = max(int8, key=lambda one: one["engine"])
        return {
            "passed": not path["refusals"], "refusal": "; ".join(path["refusals"]) or None,
            "auroc_drop": path["auroc_drop"], "shift_in_iqr": path["shift_in_iqr"], "int8_head": parity["int8_head"],
            "worst_drop": max((one["auroc_drop"] for one in path["products"]), default=None), "bundle_bytes": whole,
        }  # fmt: skip


def routing(products: Products, parts: Sequence[Split], context: FitContext, *, seed: int) -> dict[str, float]:
    """Return shares of test images that a router of all products names right or refuses, and of an unknown product.

    Each product in turn is the unknown one: a router of the others sees its test images.
    """
    count = len(products.names)
    sources = [
        (Shown(_part(context.features, own), _tiles(context, own)),
         Shown(_part(context.validation.good, own), parts[own].holdout))
        for own in range(count)
    ]  # fmt: skip
    whole = _router(sources, context, seed)
    right, refused, images = 0, 0, 0
    for own, category in enumerate(products.categories):
        route = _routes(whole, category.test)
        known = route.amax(1) >= 0
        right += int((known & (route.argmax(1) == own)).sum())
        refused += int((~known).sum())
        images += len(route)
    found = {"right": right / images, "wrong": (images - right - refused) / images, "refused": refused / images}
    if count > 2:
        strangers = [
            float((_routes(_router([s for j, s in enumerate(sources) if j != own], context, seed), category.test)
                   .amax(1) < 0).float().mean())
            for own, category in enumerate(products.categories)
        ]  # fmt: skip
        found |= {"unknown refused": float(np.mean(strangers)), "unknown refused, least": min(strangers)}
    return found


def _router(sources: Sequence[tuple[Shown, Shown]], context: FitContext, seed: int) -> ProductRouter:
    known, held = (
        Shown(joined([one[which].features for one in sources]), np.concatenate([one[which].tiles for one in sources]))
        for which in (0, 1)
    )
    return fit_router(known, held, len(sources), context.extract, seed=seed)


def _routes(router: ProductRouter, features: Features) -> torch.Tensor:
    return torch.cat([router(*taps) for taps in features.batches(("s8", "s16"), 64, device=torch.device("cpu"))])


def _part(features: Features, product: int) -> Features:
    assert features.products is not None
    rows = features.products == product
    return Features({name: tap[rows] for name, tap in features.taps.items()}, 1, features.groups[rows.numpy()])


def _tiles(context: FitContext, product: int) -> npt.NDArray[np.uint8]:
    assert context.features.products is not None
    return context.images[(context.features.products == product).numpy()]


def _names(folders: Sequence[Path]) -> Iterator[str]:
    """Name products by their folders, and where two are alike by the folder above too."""
    own = [folder.resolve().name for folder in folders]
    for folder, name in zip(folders, own, strict=True):
        yield name if own.count(name) == 1 else f"{folder.resolve().parent.name}-{name}"
