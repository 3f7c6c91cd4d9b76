"""The sub-class shift protocol: learn some sub-classes of a material, judge these and others at one frozen threshold.

It knows images, splits and methods; it must not know folders or how the result is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deploy.progress import Progress, no_progress
from edge.bundle import Preprocessing
from edge.errors import DataError
from trainer.backbones.registry import DEFAULT_TRUNK
from trainer.data.subclass_shift import subclass_shift_splits
from trainer.data.subclasses import digests, material_hash
from trainer.evaluation.protocol import DEFAULT_ALPHA
from trainer.evaluation.shift_pairs import compare_all
from trainer.evaluation.shift_report import MaterialResult, RotationResult, summarise
from trainer.evaluation.shift_stage import Stage
from trainer.evaluation.shift_variants import Variant, parse_variants
from trainer.fit import DEFAULT_SIZE

if TYPE_CHECKING:
    from trainer.data.subclasses import Material


@dataclass(frozen=True)
class ShiftSettings:
    """How the protocol is run.

    Attributes:
        methods: variants, see :meth:`~trainer.evaluation.shift_variants.Variant.parse`.
        compare: variants to compare in pairs, each with those after it; trained too where ``methods`` lacks them.
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
    compare: tuple[str, ...] = ()
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

    def variants(self) -> tuple[Variant, ...]:
        """Return everything that is trained.

        Raises:
            UsageError: a method, a setting of it, or the preset is unknown.
        """
        return parse_variants((*self.methods, *self.compare), self.preset)


def evaluate_material(
    material: Material, settings: ShiftSettings, *, progress: Progress = no_progress
) -> MaterialResult:
    """Train every method on every rotation of a material and judge all its sub-classes.

    The threshold comes from held-out good images of the trained sub-classes and stays the same in every setting of
    :data:`~trainer.evaluation.shift_settings.SETTINGS`; nothing is chosen on a test image.

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
    variants = settings.variants()
    of = digests(material, progress=progress)
    try:
        splits = subclass_shift_splits(
            material, of, n_test=settings.n_test, seed=settings.seed, rotations=settings.rotations
        )
    except ValueError as error:
        raise DataError(f"{material.name}: {error}; choose other --rotations") from error
    stage = Stage(settings, variants)
    found: dict[str, list[RotationResult]] = {one.name: [] for one in variants}
    missing: dict[str, dict[str, str]] = {one.name: {} for one in variants}
    for split in splits:
        for name, rotation in stage.rotation(split, missing, progress).items():
            found[name].append(rotation)
        progress(f"rotations of {material.name}", split.rotation + 1, len(splits))
    methods = tuple(
        summarise(one.name, one.method.name, one.config.model_dump(mode="json"), found[one.name], missing[one.name])
        for one in variants
    )
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
        methods=methods,
        comparisons=compare_all(methods, settings.compare, settings.seed),
        notes=material.notes,
    )
