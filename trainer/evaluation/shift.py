"""The sub-class shift protocol: learn some sub-classes of a material, judge these and others at one frozen threshold.

It knows images, splits and methods; it must not know folders or how the result is shown.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from deploy.metrics import fpr_at_threshold, image_auroc, pixel_metrics, recall_at_threshold
from deploy.progress import Progress, no_progress
from edge.bundle import Preprocessing
from edge.errors import CaptureError, DataError, EngineError
from edge.inference.preprocessing import to_canvas
from edge.judgement.score import pool_score
from edge.judgement.threshold import fit_threshold
from trainer.backbones.registry import DEFAULT_TRUNK, build_trunk, trunk_id
from trainer.data.subclass_shift import SHOTS, subclass_shift_splits
from trainer.data.subclasses import digests, material_hash
from trainer.evaluation.protocol import DEFAULT_ALPHA, enlarge_map
from trainer.evaluation.shift_report import (
    SEEN,
    UNSEEN,
    MaterialResult,
    RotationResult,
    SubclassFigures,
    summarise,
)
from trainer.features import extract
from trainer.fit import DEFAULT_SIZE, Parts, choose_device, head_maps, learn, make_context, seed_everything
from trainer.methods.base import Adaptable
from trainer.methods.registry import get

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from edge.bundle import Pooling
    from edge.judgement.threshold import Threshold
    from trainer.backbones.efficientnet_lite import Trunk
    from trainer.data.subclass_shift import SubclassShiftSplit
    from trainer.data.subclasses import Material, SubclassImage
    from trainer.methods.base import Features, FitContext, Head, Method, MethodConfig

    Images = Sequence[SubclassImage]

_CACHED_BYTES = 2 * 2**30  # taps of test images that stay in memory from one rotation to the next


@dataclass(frozen=True)
class ShiftSettings:
    """How the protocol is run.

    Attributes:
        methods: names in the registry.
        configs: of each method, in place of the preset's.
        preset: ``quick`` or ``full``.
        seed: of splits and methods.
        rotations: trainings per material and method.
        n_test: sub-classes left out at a time; None is a third.
        alpha: false-alarm probability per good image that the threshold is set for.
        preprocessing: of every image.
        trunk: name in the registry of trunks.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    methods: tuple[str, ...]
    configs: tuple[MethodConfig, ...] = ()
    preset: str = "quick"
    seed: int = 0
    rotations: int = 5
    n_test: int | None = None
    alpha: float = DEFAULT_ALPHA
    preprocessing: Preprocessing = field(
        default_factory=lambda: Preprocessing(height=DEFAULT_SIZE[0], width=DEFAULT_SIZE[1])
    )
    trunk: str = DEFAULT_TRUNK
    device: str = "auto"

    def fitted(self) -> list[tuple[type[Method], MethodConfig]]:
        """Return methods and their settings.

        Raises:
            UsageError: a method or the preset is unknown.
        """
        known = [get(name) for name in self.methods]
        return list(zip(known, self.configs or [method.config(self.preset) for method in known], strict=True))


@dataclass(frozen=True)
class _Block:
    """Test images of one sub-class: taps, and what is known of them."""

    images: Images
    features: Features
    shapes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Trained:
    """A head and what was frozen with it."""

    head: Head
    pooling: Pooling
    threshold: Threshold


def evaluate_material(
    material: Material, settings: ShiftSettings, *, progress: Progress = no_progress
) -> MaterialResult:
    """Train every method on every rotation of a material and judge all its sub-classes.

    The threshold comes from held-out good images of the trained sub-classes and stays the same in every setting;
    nothing is chosen on a test image. ``unseen+n`` is a head adapted to n good images of the sub-class it then judges,
    for methods whose heads are :class:`~trainer.methods.base.Adaptable`.

    Args:
        material: its sub-classes.
        settings: see there.
        progress: called now and then.

    Returns:
        Figures per sub-class, rotation and setting, and their summary.

    Raises:
        DataError: an image or mask is damaged, or there are too few images or sub-classes.
        UsageError: a setting is unknown.
        EngineError: a method gave a map with a NaN.
    """
    methods = settings.fitted()
    of = digests(material, progress=progress)
    try:
        splits = subclass_shift_splits(
            material, of, n_test=settings.n_test, seed=settings.seed, rotations=settings.rotations
        )
    except ValueError as error:
        raise DataError(f"{material.name}: {error}; choose other --rotations") from error
    stage = _Stage(settings, tuple(dict.fromkeys(name for method, _ in methods for name in method.tap_names)))
    found: dict[str, list[RotationResult]] = {method.name: [] for method, _ in methods}
    missing: dict[str, dict[str, str]] = {method.name: {} for method, _ in methods}
    for split in splits:
        context = stage.context(split, progress)
        for method, config in methods:
            trained = stage.train(method, config, context, split)
            found[method.name].append(stage.judge(trained, split, missing[method.name]))
        progress(f"rotations of {material.name}", split.rotation + 1, len(splits))
    return MaterialResult(
        material=material.name,
        data_sha256=material_hash(material, of),
        subclasses={
            one.name: {
                "train": len(one.train),
                "good": sum(not image.anomalous for image in one.test),
                "defective": sum(image.anomalous for image in one.test),
            }
            for one in material.subclasses
        },
        ordered=material.ordered,
        methods=tuple(
            summarise(method.name, config.model_dump(mode="json"), found[method.name], missing[method.name])
            for method, config in methods
        ),
        notes=material.notes,
    )


def embedding_id(network: Trunk, head: Head, preprocessing: Preprocessing) -> str:
    """Return the id of the space that a head compares patches in, by the recipe of a bundle's.

    The sha256 of trunk, projection (all of the head but its named state), preprocessing and numerics. It is never a
    bundle's own id, which hashes files.
    """
    projection = hashlib.sha256(type(head).__name__.encode())
    for name, tensor in sorted(head.state_dict().items()):
        if name not in head.state_names:
            projection.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            projection.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    parts = [trunk_id(network), projection.hexdigest(), preprocessing.model_dump_json(), "torch f32"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def measure(
    images: Images,
    maps: npt.NDArray[np.float32],
    shapes: Sequence[tuple[int, int]],
    *,
    trained_pooling: Pooling,
    threshold: float,
    setting: str,
    preprocessing: Preprocessing,
) -> SubclassFigures:
    """Measure one sub-class: image figures of all images, pixel figures of the good ones and those with a mask.

    Pixel figures are taken at the images' own resolution over all pixels of the sub-class together, from maps as they
    are: a stretch of each map to 0..1 would hide that a detector alarms all over a good image.

    Args:
        images: of one sub-class.
        maps: float32 [n, h, w], raw.
        shapes: (H, W) of each image.
        trained_pooling: from a map to a score.
        threshold: frozen.
        setting: name of it.
        preprocessing: of the images.

    Raises:
        EngineError: a map holds a NaN.
    """
    for image, one in zip(images, maps, strict=True):
        if np.isnan(one).any():
            raise EngineError(f"{image.name}: the anomaly map holds a NaN; train the method again")
    labels = np.array([image.anomalous for image in images], np.bool_)
    scores = np.array([pool_score(one, trained_pooling) for one in maps], np.float64)
    recall = recall_at_threshold(labels, scores, threshold)
    pixels = None
    if any(image.anomalous and image.load_mask for image in images):
        known = [
            (image.load_mask(shape), enlarge_map(one, shape, preprocessing.crop))
            for image, one, shape in zip(images, maps, shapes, strict=True)
            if image.load_mask
        ]
        pixels = pixel_metrics((mask for mask, _ in known), (one for _, one in known))
    return SubclassFigures(
        subclass=images[0].subclass,
        setting=setting,
        n_good=int(np.count_nonzero(~labels)),
        n_defective=int(np.count_nonzero(labels)),
        image_auroc=image_auroc(labels, scores),
        pixel_auroc=pixels.auroc if pixels else None,
        aupro=pixels.aupro if pixels else None,
        false_positive_rate=fpr_at_threshold(labels, scores, threshold),
        miss_rate=None if recall is None else 1.0 - recall,
    )


class _Stage:
    """The trunk, and taps of images through it."""

    def __init__(self, settings: ShiftSettings, tap_names: tuple[str, ...]) -> None:
        self.settings, self.tap_names = settings, tap_names
        self.preprocessing = settings.preprocessing
        self.device = choose_device(settings.device)
        self.network = build_trunk(settings.trunk)
        self._blocks: OrderedDict[tuple[str, ...], _Block] = OrderedDict()

    def context(self, split: SubclassShiftSplit, progress: Progress) -> FitContext:
        """Return what every method may see of a split."""
        seed_everything(self.settings.seed)
        canvases, holdout = self._canvases(split.fit)[0], self._canvases(split.calibration)[0]
        context = make_context(
            self.network,
            self.preprocessing,
            Parts(canvases, _groups(split.fit), holdout, _groups(split.calibration)),
            tap_names=self.tap_names,
            seed=self.settings.seed,
            device=self.device,
            progress=progress,
            subclasses=np.array([image.subclass for image in split.fit], np.str_),
        )
        self.network.to("cpu")
        return context

    def train(
        self, method: type[Method], config: MethodConfig, context: FitContext, split: SubclassShiftSplit
    ) -> _Trained:
        """Fit one method and freeze its threshold on the calibration images."""
        seed_everything(self.settings.seed)
        head, pooling, _ = learn(method, config, context, self.preprocessing)
        maps = head_maps(head, context.validation.good, self.preprocessing, self.device)
        scores = np.array([pool_score(one, pooling) for one in maps], np.float32)
        return _Trained(head, pooling, fit_threshold(scores, _groups(split.calibration), self.settings.alpha))

    def judge(self, trained: _Trained, split: SubclassShiftSplit, missing: dict[str, str]) -> RotationResult:
        """Judge every test image of a split in every setting; say in ``missing`` which settings have no figures."""
        figures = [self._judge(trained.head, trained, images, SEEN) for images in split.seen_test.values()]
        figures += [self._judge(trained.head, trained, images, UNSEEN) for images in split.unseen_test.values()]
        notes = list(split.notes)
        for count in SHOTS:
            setting = f"{UNSEEN}+{count}"
            if not isinstance(trained.head, Adaptable):
                missing[setting] = "the method cannot take in good images without training"
                continue
            short = []
            for name, images in split.unseen_test.items():
                shots = split.shots[name][:count]
                if len(shots) < count:
                    short.append(name)
                    continue
                generator = torch.Generator().manual_seed(self.settings.seed)
                head = trained.head.adapted(self._block(shots).features, generator)
                figures.append(self._judge(head, trained, images, setting))
            if short:
                notes.append(f"{setting}: fewer than {count} good images are free in sub-classes {', '.join(short)}")
        return RotationResult(
            rotation=split.rotation,
            trained=split.trained,
            unseen=split.unseen,
            n_fit=len(split.fit),
            n_calibration=trained.threshold.n,
            n_calibration_groups=trained.threshold.n_groups,
            threshold=trained.threshold.value,
            threshold_method=trained.threshold.method,
            budget_supported=trained.threshold.budget_supported,
            pooling_cells=trained.pooling.cells,
            embedding_id=embedding_id(self.network, trained.head, self.preprocessing),
            subclasses=tuple(figures),
            notes=tuple(notes),
        )

    def _judge(self, head: Head, trained: _Trained, images: Images, setting: str) -> SubclassFigures:
        block = self._block(images)
        return measure(
            images,
            head_maps(head, block.features, self.preprocessing, self.device),
            block.shapes,
            trained_pooling=trained.pooling,
            threshold=trained.threshold.value,
            setting=setting,
            preprocessing=self.preprocessing,
        )

    def _block(self, images: Images) -> _Block:
        key = tuple(image.name for image in images)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        canvases, shapes = self._canvases(images)
        features = extract(
            self.network,
            canvases,
            self.preprocessing,
            tap_names=self.tap_names,
            groups=_groups(images),
            device=self.device,
            progress=no_progress,
            what="",
        )
        self.network.to("cpu")
        block = _Block(images, features, shapes)
        self._blocks[key] = block
        while len(self._blocks) > 1 and sum(_bytes(one.features) for one in self._blocks.values()) > _CACHED_BYTES:
            self._blocks.popitem(last=False)
        return block

    def _canvases(self, images: Images) -> tuple[npt.NDArray[np.uint8], tuple[tuple[int, int], ...]]:
        side = (self.preprocessing.canvas_height, self.preprocessing.canvas_width)
        canvases = np.empty((len(images), *side, 3), np.uint8)
        shapes = []
        for index, image in enumerate(images):
            pixels = image.load()
            shapes.append((pixels.shape[0], pixels.shape[1]))
            try:
                canvases[index] = to_canvas(pixels, self.preprocessing)
            except CaptureError as error:
                raise DataError(f"{image.name}: {error}") from error
        return canvases, tuple(shapes)


def _groups(images: Images) -> npt.NDArray[np.str_]:
    return np.array([image.group for image in images], np.str_)


def _bytes(features: Features) -> int:
    return sum(tap.numel() * tap.element_size() for tap in features.taps.values())
