"""One material through the sub-class shift protocol: what is trained, frozen, corrected and judged in each rotation.

It knows images, splits and methods; it must not know folders or how the result is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from edge.judgement.score import pool_score
from edge.judgement.threshold import fit_threshold
from trainer.backbones.registry import build_trunk
from trainer.data.subclass_shift import SHOTS
from trainer.evaluation.shift_features import FeatureStore, SharedExtract, groups_of
from trainer.evaluation.shift_measure import embedding_id, measure
from trainer.evaluation.shift_moments import ALL, MomentsOfTraining
from trainer.evaluation.shift_report import RotationResult
from trainer.evaluation.shift_settings import OWN, SEEN, SETTINGS, UNSEEN, by_moments, by_rows
from trainer.fit import Parts, choose_device, head_maps, learn, make_context, seed_everything
from trainer.methods.base import Adaptable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.adaptation.look import Correction
    from edge.adaptation.moments import Moments
    from edge.bundle import Pooling
    from edge.judgement.threshold import Threshold
    from trainer.data.subclass_shift import SubclassShiftSplit
    from trainer.data.subclasses import SubclassImage
    from trainer.evaluation.shift import ShiftSettings
    from trainer.evaluation.shift_report import SubclassFigures
    from trainer.evaluation.shift_variants import Variant
    from trainer.methods.base import Features, FitContext, Head

    Images = Sequence[SubclassImage]


@dataclass(frozen=True)
class Trained:
    """A head and what was frozen with it."""

    variant: Variant
    head: Head
    pooling: Pooling
    threshold: Threshold


class Stage:
    """Trunk, taps and moments of a material; trains and judges one rotation after the other."""

    def __init__(self, settings: ShiftSettings, variants: Sequence[Variant]) -> None:
        self.settings, self.variants = settings, variants
        self.preprocessing, self.device = settings.preprocessing, choose_device(settings.device)
        self.network = build_trunk(settings.trunk)
        taps = tuple(dict.fromkeys(name for one in variants for name in one.method.tap_names))
        self.store = FeatureStore(self.network, self.preprocessing, taps, self.device)
        self.known: dict[str, Moments] = {}

    def rotation(
        self, split: SubclassShiftSplit, missing: dict[str, dict[str, str]], progress: Progress
    ) -> dict[str, RotationResult]:
        """Train every variant on a split and judge its test images in every setting.

        All variants judge a sub-class before the next one, so that what was corrected for one is there for all.

        Args:
            split: what is learned from and judged.
            missing: per variant takes settings without figures, and why.
            progress: called now and then.
        """
        context = self.context(split, progress)
        trained = [self.train(variant, context, split) for variant in self.variants]
        figures: dict[str, list[SubclassFigures]] = {one.name: [] for one in self.variants}
        notes: dict[str, list[str]] = {one.name: list(split.notes) for one in self.variants}
        for images in split.seen_test.values():
            for one in trained:
                figures[one.variant.name].append(self.judge(one, one.head, self.store.features(images), images, SEEN))
        moments = MomentsOfTraining(split.fit, self.store, self.known)
        for name, images in split.unseen_test.items():
            judging = Unseen(self, moments, images, split.shots[name])
            for one in trained:
                figures[one.variant.name] += judging.figures(one)
        short = {count: [name for name in split.unseen_test if len(split.shots[name]) < count] for count in SHOTS}
        for one in trained:
            for count, names in short.items():
                if not isinstance(one.head, Adaptable):
                    missing[one.variant.name][by_rows(count)] = "the method cannot take in good images without training"
                if names:
                    notes[one.variant.name].append(
                        f"{UNSEEN}+{count}: fewer than {count} good images are free in sub-classes {', '.join(names)}"
                    )
        return {
            one.variant.name: self._result(split, one, figures[one.variant.name], notes[one.variant.name])
            for one in trained
        }

    def context(self, split: SubclassShiftSplit, progress: Progress) -> FitContext:
        """Return what every method may see of a split."""
        seed_everything(self.settings.seed)
        context = make_context(
            self.network,
            self.preprocessing,
            Parts(
                self.store.canvases(split.fit),
                groups_of(split.fit),
                self.store.canvases(split.calibration),
                groups_of(split.calibration),
            ),
            tap_names=self.store.tap_names,
            seed=self.settings.seed,
            device=self.device,
            progress=progress,
            subclasses=np.array([image.subclass for image in split.fit], np.str_),
            known=(
                self.store.features(split.fit, progress=progress, what="features"),
                self.store.features(split.calibration, progress=progress, what="features of hold-out"),
            ),
        )
        self.network.to("cpu")
        return replace(context, extract=SharedExtract(context.extract))

    def train(self, variant: Variant, context: FitContext, split: SubclassShiftSplit) -> Trained:
        """Fit one variant and freeze its threshold on the calibration images."""
        seed_everything(self.settings.seed)
        if variant.pooled:
            context = replace(context, subclasses=None)
        head, pooling, _ = learn(variant.method, variant.config_for(len(split.trained)), context, self.preprocessing)
        scores = self.scores(head, context.validation.good, pooling)
        threshold = fit_threshold(scores, groups_of(split.calibration), self.settings.alpha)
        return Trained(variant, head, pooling, threshold)

    def scores(self, head: Head, features: Features, pooling: Pooling) -> npt.NDArray[np.float32]:
        """Return the score of every image."""
        maps = head_maps(head, features, self.preprocessing, self.device)
        return np.array([pool_score(one, pooling) for one in maps], np.float32)

    def judge(self, trained: Trained, head: Head, features: Features, images: Images, setting: str) -> SubclassFigures:
        """Measure a head, the trained one or what became of it, on one sub-class."""
        return measure(
            images,
            head_maps(head, features, self.preprocessing, self.device),
            self.store.shapes(images),
            trained_pooling=trained.pooling,
            threshold=trained.threshold.value,
            setting=setting,
            preprocessing=self.preprocessing,
        )

    def _result(
        self, split: SubclassShiftSplit, one: Trained, figures: Sequence[SubclassFigures], notes: Sequence[str]
    ) -> RotationResult:
        order = [setting.name for setting in SETTINGS]
        return RotationResult(
            rotation=split.rotation,
            trained=split.trained,
            unseen=split.unseen,
            n_fit=len(split.fit),
            n_calibration=one.threshold.n,
            n_calibration_groups=one.threshold.n_groups,
            threshold=one.threshold.value,
            threshold_method=one.threshold.method,
            budget_supported=one.threshold.budget_supported,
            pooling_cells=one.pooling.cells,
            embedding_id=embedding_id(self.network, one.head, self.preprocessing),
            subclasses=tuple(sorted(figures, key=lambda found: order.index(found.setting))),
            notes=tuple(notes),
        )


class Unseen:
    """Test images of one sub-class that no head was trained on, in every setting; what is corrected serves all heads.

    Args:
        stage: where they are judged.
        moments: of training.
        images: to judge.
        shots: good images that are given, none of them in ``images``.
    """

    def __init__(self, stage: Stage, moments: MomentsOfTraining, images: Images, shots: Images) -> None:
        self.stage, self.moments, self.images, self.shots = stage, moments, images, shots
        self._corrected: dict[tuple[str, ...], Features] = {}

    def figures(self, one: Trained) -> list[SubclassFigures]:
        """Judge in every setting that has figures."""
        plain = self.stage.store.features(self.images)
        found = [self._judge(one, one.head, plain, UNSEEN)]
        experts = self._experts(one.head, plain)
        own = [self.moments.own(name) for name in experts]
        found.append(self._judge(one, one.head, self._correct((OWN, *experts), own), OWN))
        for count in SHOTS:
            shots = self.shots[:count]
            if len(shots) < count:
                continue
            given = self.stage.store.features(shots)
            # One camera, one product: the given images vote for the expert whose moments all images are brought to.
            votes = self._experts(one.head, given)
            expert = max(sorted(set(votes)), key=votes.count)
            key = (by_moments(count), expert)
            if key not in self._corrected:
                self._correct(key, [self.moments.given(shots, expert)] * len(self.images))
            found.append(self._judge(one, one.head, self._corrected[key], by_moments(count)))
            if isinstance(one.head, Adaptable):
                generator = torch.Generator().manual_seed(self.stage.settings.seed)
                found.append(self._judge(one, one.head.adapted(given, generator), plain, by_rows(count)))
        return found

    def _correct(self, key: tuple[str, ...], corrections: Sequence[Correction]) -> Features:
        if key not in self._corrected:
            self._corrected[key] = self.stage.store.corrected(self.images, corrections)
        return self._corrected[key]

    def _judge(self, one: Trained, head: Head, features: Features, setting: str) -> SubclassFigures:
        return self.stage.judge(one, head, features, self.images, setting)

    def _experts(self, head: Head, features: Features) -> list[str]:
        """Return for each image the trained sub-class that the head takes it for.

        ``ALL`` where it has one expert, and where it takes it for none of them, so that what judges it knows them all.
        """
        names: tuple[str, ...] = getattr(head, "subclasses", ())
        if len(names) < 2:  # noqa: PLR2004 (one expert was trained on all)
            return [ALL] * (len(features) // features.tiles_per_image)
        with torch.inference_mode():
            outputs = [head(*taps) for taps in features.batches(head.tap_names, 32, device=torch.device("cpu"))]
        route = torch.cat([output[2] for output in outputs]).unflatten(0, (-1, features.tiles_per_image)).mean(1)
        return [names[int(one.argmax())] if one.max() >= 0 else ALL for one in route]
