"""Training: a folder of good images in, a run folder out. The same few steps for every method.

Split off a hold-out by group, synthesise defects on it for validation, extract taps, fit the head, choose the
pooling rule on the validation set, save. Test images are never read.
"""

from __future__ import annotations

import platform
import time
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError

from deploy.parity import LEAST_GOOD_IMAGES
from edge.bundle import Crop, Preprocessing, Resize, Tiles
from edge.errors import DataError, UsageError
from trainer.backbones.registry import DEFAULT_TRUNK, TrunkSpec, build_trunk, trunk_id
from trainer.data.folder import content_hash, read_folder
from trainer.data.products import joined_hash, joined_name, product_names, read_products
from trainer.data.splits import Holdout, split_holdout, split_subclasses
from trainer.features import extract, extract_tiles, load_canvases, tiles_of
from trainer.methods.base import Features, FitContext, Head, Validation
from trainer.methods.registry import get
from trainer.methods.routed import Shown, fit_router, has_route, with_router
from trainer.methods.routed import tap_names as routed_taps
from trainer.pooling import choose_pooling, head_maps, image_products
from trainer.runs import Run, RunRecord
from trainer.synthesis.image2d import make_defects

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.bundle import Pooling
    from trainer.backbones.efficientnet_lite import Trunk
    from trainer.data.folder import Sample
    from trainer.methods.base import Method, MethodConfig

DEFAULT_SIZE = (224, 224)
HOLDOUT_FRACTION = 0.2
HOLDOUT_MINIMUM = 8
HOLDOUT_MAXIMUM = 400
# Training images whose moments stand for an expert: its mean is known to an eighth of the deviation between images.
REFERENCE_EACH, REFERENCE_MAXIMUM = 64, 400
_VALIDATION_DEFECTS = 120


def choose_device(name: str) -> torch.device:
    """Return ``cpu``, ``cuda`` or, for ``auto``, the GPU where there is one.

    Raises:
        UsageError: unknown name, or no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this torch sees no GPU; install a CUDA build (docs/install.md) or use cpu")
    if name not in {"cpu", "cuda"}:
        raise UsageError(f"--device {name}: unknown; choose auto, cpu or cuda")
    return torch.device(name)


def preprocessing_for(
    *,
    size: tuple[int, int] | None,
    tiles: tuple[int, int],
    overlap: int,
    crop: tuple[int, int, int, int] | None,
    resize: Resize = Resize.PYRAMID,
) -> Preprocessing:
    """Build the preprocessing that the command line asks for.

    Args:
        size: height and width of the network input in pixels; None is 224 x 224.
        tiles: rows and columns.
        overlap: pixels that neighbouring tiles share.
        crop: x, y, width, height in pixels of the camera frame.
        resize: how a crop becomes the canvas.

    Raises:
        UsageError: a value is out of range; the message names it.
    """
    height, width = size or DEFAULT_SIZE
    try:
        return Preprocessing(
            height=height,
            width=width,
            tiles=Tiles(rows=tiles[0], cols=tiles[1], overlap=overlap),
            crop=None if crop is None else Crop(x=crop[0], y=crop[1], w=crop[2], h=crop[3]),
            resize=resize,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "size, tiles, overlap"
        raise UsageError(f"--{where}: {first['msg']}") from error


class Parts(NamedTuple):
    """Good images, split: what is learned from and what is held out.

    Attributes:
        canvases: uint8 [n, canvas_height, canvas_width, 3] RGB, to learn from.
        groups: unicode [n].
        holdout: uint8 [m, ...], to validate and calibrate with.
        holdout_groups: unicode [m].
        products: int64 [n], which product each shows; None where there is one.
        holdout_products: int64 [m].
    """

    canvases: npt.NDArray[np.uint8]
    groups: npt.NDArray[np.str_]
    holdout: npt.NDArray[np.uint8]
    holdout_groups: npt.NDArray[np.str_]
    products: npt.NDArray[np.int64] | None = None
    holdout_products: npt.NDArray[np.int64] | None = None


def make_context(
    network: Trunk,
    preprocessing: Preprocessing,
    parts: Parts,
    *,
    tap_names: Sequence[str],
    seed: int,
    device: torch.device,
    progress: Progress,
    subclasses: npt.NDArray[np.str_] | None = None,
    known: tuple[Features, Features] | None = None,
    products: tuple[str, ...] = (),
) -> FitContext:
    """Return what methods may see of good images: taps, and a validation set with synthetic defects on the hold-out.

    Args:
        network: the trunk.
        preprocessing: how a canvas is cut into tiles.
        parts: the good images.
        tap_names: taps to extract; at least those of every method that will be fitted.
        seed: of the defects and of the fit.
        device: where to compute.
        progress: progress function.
        subclasses: unicode [n], see :class:`FitContext`.
        known: taps of ``parts.canvases`` and of ``parts.holdout``, where somebody has computed them already.
        products: their names, see :class:`FitContext`.
    """

    def features(
        of: npt.NDArray[np.uint8], groups: npt.NDArray[np.str_], shown: npt.NDArray[np.int64] | None, what: str
    ) -> Features:
        return extract(
            network,
            of,
            preprocessing,
            tap_names=tap_names,
            groups=groups,
            products=shown,
            device=device,
            progress=progress,
            what=what,
        )

    repeats = max(1, round(_VALIDATION_DEFECTS / len(parts.holdout)))
    defective, masks = make_defects(parts.holdout, seed=seed, repeats=repeats)
    return FitContext(
        features=known[0] if known else features(parts.canvases, parts.groups, parts.products, "features"),
        images=tiles_of(parts.canvases, preprocessing),
        extract=partial(extract_tiles, trunk=network, tap_names=tap_names, device=device),
        validation=Validation(
            good=known[1]
            if known
            else features(parts.holdout, parts.holdout_groups, parts.holdout_products, "features of hold-out"),
            defective=features(
                defective,
                np.tile(parts.holdout_groups, repeats),
                None if parts.holdout_products is None else np.tile(parts.holdout_products, repeats),
                "features of synthetic defects",
            ),
            masks=masks,
        ),
        seed=seed,
        device=device,
        progress=progress,
        trunk_id=trunk_id(network),
        subclasses=subclasses,
        products=products,
    )


def learn(
    method: type[Method], config: MethodConfig, context: FitContext, preprocessing: Preprocessing
) -> tuple[Head, Pooling, dict[str, float]]:
    """Fit a head and choose its pooling rule on the validation set.

    Returns:
        The head, the rule, and the I-AUROC of every candidate rule.
    """
    head = method.fit(context, config)
    good, defective = context.validation.good, context.validation.defective
    pooling, validation = choose_pooling(
        head_maps(head, good, preprocessing, context.device),
        head_maps(head, defective, preprocessing, context.device),
        (image_products(good), image_products(defective)),
    )
    return head, pooling, validation


def train(
    *,
    method: str,
    data: Path | Sequence[Path],
    out: Path,
    preset: str = "quick",
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    product: str | Sequence[str] | None = None,
    device: str = "auto",
    trunk: str = DEFAULT_TRUNK,
    settings: Mapping[str, object] | None = None,
    router: bool = True,
    progress: Progress,
) -> Run:
    """Train one method on one product, or on several together.

    Args:
        method: name in the registry.
        data: folder in MVTec layout; only train/good is read, of at least 12 images. Of several folders each is a
            product, and one run serves them all; their order does not matter.
        out: run folder to write; must not hold anything but an earlier run.
        preset: ``quick`` or ``full``.
        seed: of every random choice, 0 <= seed < 2**63.
        preprocessing: crop, tiles and size; the default is one tile of 224 x 224.
        product: name of the product, or one for each folder; the folder's name if None.
        device: ``auto``, ``cpu`` or ``cuda``.
        trunk: name in the registry of trunks.
        settings: of the method, by name, in place of the preset's; text is read as the setting's type.
        router: whether a head of several products that has no router of its own gets one.
        progress: progress function.

    Returns:
        The saved run.

    Raises:
        UsageError: unknown method, preset, setting, trunk or device, a value out of range, no product, or ``out``
            holds other files.
        DataError: the folder cannot be used, has too few images, or the run cannot be written.
    """
    started = time.monotonic()
    chosen, torch_device = get(method), choose_device(device)
    config = configured(chosen.config(preset), method, settings or {})
    folders = [data] if isinstance(data, Path) else list(data)
    if not folders:
        raise UsageError("--data: missing; give at least one folder of good images")
    given = [product] if isinstance(product, str) else list(product or ())
    named = product_names(folders, given)
    seed_everything(seed)
    Run.refuse_foreign(out)
    preprocessing = preprocessing or preprocessing_for(size=None, tiles=(1, 1), overlap=0, crop=None)
    if len(named) == 1:
        material = _one_product(*named[0], seed, chosen)
    else:
        material = _several_products([path for _, path in named], [name for name, _ in named], seed)
    split, products = material.split, material.products
    spec = TrunkSpec(name=trunk)
    network = build_trunk(spec)
    canvases = load_canvases(split.fit, preprocessing, progress=progress, what="read good images")
    holdout = load_canvases(split.holdout, preprocessing, progress=progress, what="read hold-out")

    context = make_context(
        network,
        preprocessing,
        Parts(
            canvases,
            groups_of(split.fit),
            holdout,
            groups_of(split.holdout),
            product_index(split.fit, products),
            product_index(split.holdout, products),
        ),
        tap_names=routed_taps(chosen.tap_names) if products and router else chosen.tap_names,
        seed=seed,
        device=torch_device,
        progress=progress,
        subclasses=subclasses_of(split.fit),
        products=products,
    )
    head, pooling, validation = learn(chosen, config, context, preprocessing)
    _check_products(head, products, method)
    if products and router and not has_route(head):
        known = Shown(context.features, context.images)
        held_out = Shown(context.validation.good, tiles_of(holdout, preprocessing))
        head = with_router(head, fit_router(known, held_out, len(products), context.extract, seed=seed))
    subclasses = subclasses_of(split.fit)
    kept = drawn_evenly(
        subclasses if chosen.uses_subclasses or products else np.full(len(subclasses), ""),
    )
    record = RunRecord(
        method=method,
        trunk=spec,
        preset=preset,
        config=config.model_dump(mode="json"),
        product=material.name,
        products=products,
        preprocessing=preprocessing,
        pooling=pooling,
        seed=seed,
        data_sha256=material.sha256,
        train_images=len(split.fit),
        validation=validation,
        seconds=round(time.monotonic() - started, 1),
        versions=versions(),
        created=datetime.now(timezone.utc),
        reference_images=len(kept),
    )
    run = Run(
        out,
        record,
        network.to("cpu"),
        head,
        holdout,
        groups_of(split.holdout),
        subclasses_of(split.holdout),
        canvases[kept],
        subclasses[kept],
    )
    run.save()
    return run


class _Material(NamedTuple):
    """What is learned from: its name for people, its products (none where there is one), the images, their hash."""

    name: str
    products: tuple[str, ...]
    split: Holdout
    sha256: str


def _one_product(name: str, folder: Path, seed: int, method: type[Method]) -> _Material:
    samples = read_folder(folder).train
    split = hold_out(folder, samples, seed, by_subclass=method.uses_subclasses)
    return _Material(name, (), split, content_hash(samples))


def _several_products(folders: Sequence[Path], names: Sequence[str], seed: int) -> _Material:
    found = read_products(folders, names)
    splits = [hold_out(one.images.root, one.images.train, seed) for one in found]
    split = Holdout(
        fit=tuple(sample for one in splits for sample in one.fit),
        holdout=tuple(sample for one in splits for sample in one.holdout),
        by_group=all(one.by_group for one in splits),
    )
    products = tuple(one.name for one in found)
    return _Material(
        joined_name(products), products, split, joined_hash([(one.name, one.images.train) for one in found])
    )


def product_index(samples: Sequence[Sample], products: tuple[str, ...]) -> npt.NDArray[np.int64] | None:
    """Return which product each sample shows, int64 [n]; None where there is one."""
    return np.array([products.index(sample.condition) for sample in samples], np.int64) if products else None


def _check_products(head: Head, products: tuple[str, ...], method: str) -> None:
    own = tuple(getattr(head, "subclasses", ()))
    if products and own and own != products:
        raise DataError(f"{method} made experts for {', '.join(own)}, not for {', '.join(products)}; train them apart")
    if head.takes_product and not products:
        raise DataError(f"{method} judges by product, but was given one alone; give it --data of at least two")


def configured(config: MethodConfig, method: str, settings: Mapping[str, object]) -> MethodConfig:
    """Return a preset with some settings changed."""
    try:
        return type(config).model_validate({**config.model_dump(), **settings})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        known = ", ".join(type(config).model_fields)
        raise UsageError(f"--set {where}: {first['msg']}; the settings of {method} are {known}") from error


def hold_out(data: Path, samples: Sequence[Sample], seed: int, *, by_subclass: bool = False) -> Holdout:
    """Hold images out, whole groups together, as many as calibration needs and the parity gate demands.

    Args:
        data: where they are from, for errors.
        samples: good images.
        seed: of the choice.
        by_subclass: hold some of every sub-class out.

    Raises:
        DataError: too few images, or groups that leave too few.
    """
    where = data / "train" / "good"
    cure = f"give at least {2 * LEAST_GOOD_IMAGES}"
    if len(samples) < 2 * LEAST_GOOD_IMAGES:
        raise DataError(f"{where}: {len(samples)} images of good parts are too few to learn and calibrate from; {cure}")
    fraction = min(HOLDOUT_FRACTION, HOLDOUT_MAXIMUM / len(samples))
    split = (split_subclasses if by_subclass else split_holdout)(samples, fraction, seed, HOLDOUT_MINIMUM)
    if min(len(split.holdout), len(split.fit)) < LEAST_GOOD_IMAGES:
        raise DataError(
            f"{where}: {len(samples)} images in {len({sample.group for sample in samples})} groups leave "
            f"{len(split.fit)} to learn and {len(split.holdout)} to calibrate from, of which each needs at least "
            f"{LEAST_GOOD_IMAGES}; add images of further groups, or correct the groups in meta.csv"
        )
    return split


def groups_of(samples: Sequence[Sample]) -> npt.NDArray[np.str_]:
    """Return the group of each sample."""
    return np.array([sample.group for sample in samples], np.str_)


def subclasses_of(samples: Sequence[Sample]) -> npt.NDArray[np.str_]:
    """Return the sub-class of each sample: its condition."""
    return np.array([sample.condition for sample in samples], np.str_)


def drawn_evenly(labels: npt.NDArray[np.str_]) -> npt.NDArray[np.intp]:
    """Return which images stand for each label, evenly spread over its own, int64 [m] in order."""
    known = np.unique(labels)
    most = max(2, min(REFERENCE_EACH, REFERENCE_MAXIMUM // max(1, len(known))))
    own = (np.flatnonzero(labels == label) for label in known)
    drawn = [one[np.unique(np.linspace(0, len(one) - 1, min(most, len(one))).round().astype(np.intp))] for one in own]
    return np.sort(np.concatenate(drawn))


def seed_everything(seed: int) -> None:
    """Seed torch and ask it for deterministic algorithms.

    Raises:
        UsageError: the seed is out of range.
    """
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed}: out of range; give a whole number from 0 to 2**63 - 1")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def versions() -> dict[str, str]:
    """Return what a run was made with."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("lineward", "torch", "numpy")}}
