"""From a head's features to maps, and from maps to the rule that pools them, chosen on synthetic defects alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from deploy.metrics import image_auroc
from edge.bundle import Pooling
from edge.errors import DataError
from edge.inference.preprocessing import join_maps
from edge.judgement.score import pool_score

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from edge.bundle import Preprocessing
    from trainer.methods.base import Features, Head

# Shares of the map's cells whose mean may become the image score; the choice is made on the validation set.
POOLING_SHARES = (0.0, 0.002, 0.005, 0.01, 0.02)
_BATCH = 32


def head_maps(
    head: Head, features: Features, preprocessing: Preprocessing, device: torch.device
) -> npt.NDArray[np.float32]:
    """Return the joined raw maps float32 [n images, h, w] of a head over features.

    Raises:
        DataError: the head takes products and the features do not say which ones they show.
    """
    if head.takes_product and features.products is None:
        raise DataError("the head judges by product, but nothing says which product each image shows; name them")
    head = head.to(device)
    found = []
    with torch.inference_mode():
        for index, taps in enumerate(features.batches(head.tap_names, _BATCH, device=device)):
            inputs = taps
            if head.takes_product:
                assert features.products is not None
                shown = features.products[index * _BATCH : (index + 1) * _BATCH]
                inputs = (*taps, shown.to(device))
            found.append(head(*inputs)[0].cpu().numpy())
    head.to("cpu")
    maps = np.concatenate(found)
    tiles, stride = features.tiles_per_image, head.map_stride
    return np.stack([join_maps(maps[i : i + tiles], preprocessing, stride) for i in range(0, len(maps), tiles)])


def image_products(features: Features) -> npt.NDArray[np.int64] | None:
    """Return which product each image shows, int64 [n images]; None where there is one."""
    return None if features.products is None else features.products[:: features.tiles_per_image].numpy()


def choose_pooling(
    good: npt.NDArray[np.float32],
    defective: npt.NDArray[np.float32],
    products: tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64] | None] = (None, None),
) -> tuple[Pooling, dict[str, float]]:
    """Choose how many of the highest cells are averaged, by I-AUROC on the validation set.

    Of several products it is the mean of the I-AUROC of each: each has a threshold of its own, so that scores of two
    are never compared.

    Args:
        good: maps float32 [n, h, w] of held-out good images.
        defective: maps float32 [m, h, w] of images with synthetic defects.
        products: that each of them shows, int64 [n] and [m]; None where there is one.

    Returns:
        The rule (the fewest cells among those within 0.002 of the best) and the I-AUROC of every candidate.
    """
    cells = sorted({max(1, round(share * good[0].size)) for share in POOLING_SHARES})
    found: dict[int, float] = {}
    for count in cells:
        rule = Pooling(cells=count)
        scores = [np.array([pool_score(one, rule) for one in maps]) for maps in (good, defective)]
        found[count] = product_mean(_auroc, (scores[0], products[0]), (scores[1], products[1]))
    best = max(found.values())
    chosen = min(count for count, value in found.items() if value >= best - 0.002)
    return Pooling(cells=chosen), {f"image_auroc_{count}_cells": value for count, value in found.items()}


def product_mean(
    figure: Callable[[npt.NDArray[np.float64], npt.NDArray[np.float64]], float],
    good: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64] | None],
    defective: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64] | None],
) -> float:
    """Return the mean over products of a figure of two sets of scores, or that of all where there is one product.

    Args:
        figure: of the scores of good and of defective images.
        good: scores [n] and the product of each.
        defective: scores [m] and the product of each.
    """
    if good[1] is None or defective[1] is None:
        return figure(good[0], defective[0])
    return float(
        np.mean(
            [
                figure(good[0][good[1] == product], defective[0][defective[1] == product])
                for product in np.unique(defective[1])
            ]
        )
    )


def _auroc(good: npt.NDArray[np.float64], defective: npt.NDArray[np.float64]) -> float:
    labels = np.r_[np.zeros(len(good), bool), np.ones(len(defective), bool)]
    return float(image_auroc(labels, np.r_[good, defective]) or 0.0)
