"""Figures of one sub-class from its anomaly maps, at a threshold that was frozen before.

It must not know how maps came about.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from deploy.metrics import fpr_at_threshold, image_auroc, pixel_metrics, recall_at_threshold
from edge.errors import EngineError
from edge.judgement.score import pool_score
from trainer.backbones.registry import trunk_id
from trainer.evaluation.protocol import enlarge_map
from trainer.evaluation.shift_report import SubclassFigures

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from edge.bundle import Pooling, Preprocessing
    from trainer.backbones.efficientnet_lite import Trunk
    from trainer.data.subclasses import SubclassImage
    from trainer.methods.base import Head

    Images = Sequence[SubclassImage]


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
