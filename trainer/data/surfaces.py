"""The surfaces of the embedded example: generated webs, and photographs cut into pieces that share no pixel.

It knows which piece is for what; it must not know cameras, defects or files to write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from edge.errors import DataError
from trainer.data.camera import SEEN
from trainer.data.generic import photograph_folder
from trainer.data.images import load_image
from trainer.data.textures import TEXTURES, TextureWeb

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Picture = npt.NDArray[np.uint8]

PHOTOGRAPHS = ("brick", "gravel", "grass")
KINDS = (*TEXTURES, *PHOTOGRAPHS)

CELL = 128
"""Pixels of a photograph in one view."""

REPLAY_START = 2**24
"""Row of a generated web where replays begin; training and test images end below."""

_PHOTO_SIDE = 512
_LANES = _PHOTO_SIDE // CELL
_TEST_LANE = _LANES - 1  # the right-hand strip is never trained on


class Web(Protocol):
    """Anything endless that moves past a camera.

    Attributes:
        run: rows after which the surface starts anew; two places of one run are parts of one surface.
    """

    run: int

    def view(self, position: int, height: int) -> Picture:
        """Return uint8 [height, width, 3] BGR from row ``position`` on."""
        ...


class Crops(NamedTuple):
    """How many independent pieces of surface an example shows; frames beyond it repeat a piece in another light.

    Attributes:
        train: for training and calibration, which split them between each other by group.
        test: for test images; a photograph's replay moves over the same strip, never over one of training.
    """

    train: int
    test: int


class PhotoWeb:
    """One strip of a photograph, passing the camera again and again.

    A pass is ``run`` rows; then the web starts anew. No view shows the joint, which would be a defect of its own.
    """

    run = _PHOTO_SIDE - CELL + 1

    def __init__(self, kind: str, lane: int) -> None:
        """Load a photograph that ships with scikit-image.

        Args:
            kind: one of ``PHOTOGRAPHS``.
            lane: 0..3, from left to right; strips share no pixel.

        Raises:
            MissingExtraError: scikit-image is not installed.
            DataError: the photograph is missing, damaged or of another size.
        """
        path = photograph_folder() / f"{kind}.png"
        photo = load_image(path)
        if photo.shape[:2] != (_PHOTO_SIDE, _PHOTO_SIDE):
            raise DataError(f"{path}: is {photo.shape[1]}x{photo.shape[0]}, not 512x512; reinstall scikit-image")
        self._strip = photo[:, lane * CELL : (lane + 1) * CELL]

    def view(self, position: int, height: int) -> Picture:
        """Return uint8 [height, 128, 3] BGR from row ``position`` >= 0 on; ``height`` is at most 128."""
        start = position % self.run
        return np.array(self._strip[start : start + height])


def independent_crops(kind: str, *, train: int, test: int) -> Crops:
    """Count the independent pieces of surface in an example of ``train`` and ``test`` images.

    Raises:
        ValueError: the kind is unknown.
    """
    refuse_kind(kind)
    if kind in TEXTURES:
        return Crops(train, test)
    return Crops(min(train, _TEST_LANE * _LANES), min(test, _LANES))


def pieces(kind: str, seed: int, side: int, train: int) -> Callable[[str, int], tuple[str, Picture]]:
    """Return a function from split and number to the name and the view of a piece of surface.

    Args:
        kind: one of ``KINDS``.
        seed: of a generated web.
        side: of the frames in pixels.
        train: images of the training split; those of test come after them.
    """
    n = view_side(kind, side)
    if kind in TEXTURES:
        web = open_web(kind, seed, side)

        def generated(split: str, number: int) -> tuple[str, Picture]:
            place = number + (train if split == "test" else 0)
            if (place + 1) * n >= REPLAY_START:
                raise ValueError(f"image {place} lies beyond the example's web; ask for fewer images")
            return f"piece_{place}", web.view(place * n, n)

        return generated
    lanes = [PhotoWeb(kind, lane) for lane in range(_LANES)]

    def cut(split: str, number: int) -> tuple[str, Picture]:
        row, lane = number % _LANES, number // _LANES % _TEST_LANE if split == "train" else _TEST_LANE
        return f"piece_{lane}_{row}", lanes[lane].view(row * n, n)

    return cut


def open_web(kind: str, seed: int, side: int) -> Web:
    """Return the web that a replay moves over: of a photograph the strip that is never trained on."""
    return TextureWeb(kind, seed, view_side(kind, side)) if kind in TEXTURES else PhotoWeb(kind, _TEST_LANE)


def replay_start(kind: str) -> int:
    """Return the first row of a replay."""
    return REPLAY_START if kind in TEXTURES else 0


def view_side(kind: str, side: int) -> int:
    """Return the height and width of a view in pixels of the surface."""
    return int(np.ceil(side / SEEN)) if kind in TEXTURES else CELL


def refuse_kind(kind: str) -> None:
    """Raise ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known are {', '.join(KINDS)}")
