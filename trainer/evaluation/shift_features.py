"""Taps of a material's images: each through the trunk once, whatever rotation or method asks for it.

It knows images and the trunk; it must not know splits, heads or thresholds.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from deploy.progress import Progress, no_progress
from edge.errors import CaptureError, DataError
from edge.inference.preprocessing import cut_tiles, to_canvas
from trainer.features import extract, extract_tiles
from trainer.methods.base import Features

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from edge.adaptation.look import Correction
    from edge.bundle import Preprocessing
    from trainer.backbones.efficientnet_lite import Trunk
    from trainer.data.subclasses import SubclassImage

    Images = Sequence[SubclassImage]
    Taps = dict[str, torch.Tensor]

REMEMBERED_BYTES = 2 * 2**30
"""Taps that stay in memory; beyond it the images that were asked for longest ago are computed anew."""


@dataclass(frozen=True)
class _Seen:
    taps: Taps
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        return sum(tap.numel() * tap.element_size() for tap in self.taps.values())


class FeatureStore:
    """The trunk and what it said.

    Args:
        network: the trunk.
        preprocessing: of every image.
        tap_names: taps to keep.
        device: where the trunk runs.
        limit: bytes of taps to remember.
    """

    def __init__(
        self,
        network: Trunk,
        preprocessing: Preprocessing,
        tap_names: tuple[str, ...],
        device: torch.device,
        *,
        limit: int = REMEMBERED_BYTES,
    ) -> None:
        self.network, self.preprocessing, self.tap_names, self.device = network, preprocessing, tap_names, device
        self._limit, self._held = limit, 0
        self._seen: OrderedDict[str, _Seen] = OrderedDict()

    def canvases(self, images: Images) -> npt.NDArray[np.uint8]:
        """Return uint8 [n, canvas_height, canvas_width, 3] RGB.

        Raises:
            DataError: an image cannot be read or is smaller than the crop.
        """
        return self._decoded(images)[0]

    def features(self, images: Images, *, progress: Progress = no_progress, what: str = "") -> Features:
        """Return the taps of images as they are, in their order.

        Raises:
            DataError: an image cannot be read or is smaller than the crop.
        """
        entries = {image.name: self._seen[image.name] for image in images if image.name in self._seen}
        new = [image for image in images if image.name not in entries]
        if new:
            canvases, shapes = self._decoded(new)
            found = extract(
                self.network,
                canvases,
                self.preprocessing,
                tap_names=self.tap_names,
                groups=groups_of(new),
                device=self.device,
                progress=progress,
                what=what,
            )
            self.network.to("cpu")
            per = found.tiles_per_image
            for index, (image, shape) in enumerate(zip(new, shapes, strict=True)):
                taps = {name: tap[index * per : (index + 1) * per].clone() for name, tap in found.taps.items()}
                entries[image.name] = _Seen(taps, shape)
        self._remember(entries)
        return self._joined(images, [entries[image.name].taps for image in images])

    def shapes(self, images: Images) -> list[tuple[int, int]]:
        """Return (H, W) of each image."""
        self.features([image for image in images if image.name not in self._seen])
        return [
            self._seen[image.name].shape if image.name in self._seen else image.load().shape[:2] for image in images
        ]

    def corrected(self, images: Images, corrections: Sequence[Correction]) -> Features:
        """Return the taps of images that were corrected before the trunk and after it; nothing is remembered.

        Args:
            images: at least one.
            corrections: one per image.
        """
        canvases = self.canvases(images)
        found = []
        for canvas, correction in zip(canvases, corrections, strict=True):
            tiles = np.array(cut_tiles(canvas, self.preprocessing))
            correction.canvas(tiles)
            found.append(tiles)
        plain = extract_tiles(np.concatenate(found), trunk=self.network, tap_names=self.tap_names, device=self.device)
        self.network.to("cpu")
        per = len(found[0])
        after = []
        for index, correction in enumerate(corrections):
            taps = {name: tap[index * per : (index + 1) * per].float().numpy() for name, tap in plain.taps.items()}
            moved = correction.taps(taps)
            after.append({name: torch.from_numpy(np.asarray(tap)).to(torch.float16) for name, tap in moved.items()})
        return self._joined(images, after)

    def _joined(self, images: Images, taps: Sequence[Taps]) -> Features:
        grid = self.preprocessing.tiles
        return Features(
            taps={name: torch.cat([one[name] for one in taps]) for name in self.tap_names} if taps else {},
            tiles_per_image=grid.rows * grid.cols,
            groups=groups_of(images),
        )

    def _remember(self, entries: dict[str, _Seen]) -> None:
        for name, entry in entries.items():
            if name not in self._seen:
                self._held += entry.size
            self._seen[name] = entry
            self._seen.move_to_end(name)
        while self._held > self._limit and self._seen:
            _, old = self._seen.popitem(last=False)
            self._held -= old.size

    def _decoded(self, images: Images) -> tuple[npt.NDArray[np.uint8], list[tuple[int, int]]]:
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
        return canvases, shapes


class SharedExtract:
    """What methods of one rotation ask of the trunk beyond their images: the same tiles are computed once.

    Variants of a method draw the same lights from the same seed.

    Args:
        extract: what computes; see :class:`~trainer.methods.base.FitContext`.
        limit: bytes of taps to remember.
    """

    def __init__(self, extract: Callable[[npt.NDArray[np.uint8]], Features], *, limit: int = 2**29) -> None:
        self._extract, self._limit = extract, limit
        self._known: OrderedDict[str, Features] = OrderedDict()

    def __call__(self, tiles: npt.NDArray[np.uint8]) -> Features:
        """Return taps of tiles uint8 [m, H, W, 3] RGB."""
        key = hashlib.sha256(repr(tiles.shape).encode() + tiles.tobytes()).hexdigest()
        if key in self._known:
            self._known.move_to_end(key)
        else:
            self._known[key] = self._extract(tiles)
        found = self._known[key]
        while self._known and sum(_bytes(one) for one in self._known.values()) > self._limit:
            self._known.popitem(last=False)
        # A method may change what it is given.
        return replace(found, taps={name: tap.clone() for name, tap in found.taps.items()})


def groups_of(images: Images) -> npt.NDArray[np.str_]:
    """Return the group of each image."""
    return np.array([image.group for image in images], np.str_)


def _bytes(features: Features) -> int:
    return sum(tap.numel() * tap.element_size() for tap in features.taps.values())
