"""A generated stand-in for Texture-AD: sub-classes of cloth, wafer and metal, each of its own make and optics.

It knows how a sub-class is drawn and laid out in folders; it must not know splits or detectors.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from deploy.progress import Progress, no_progress
from trainer.data.camera import Light, Optics, Pose, illuminate, look, sensor_noise, through
from trainer.data.conveyor import stamp
from trainer.data.images import new_folder, write_png
from trainer.data.subclasses import Material, Subclass, SubclassImage
from trainer.data.surfaces import view_side
from trainer.data.textures import STUFFS, TextureWeb

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from trainer.data.textures import Stuff

    Picture = npt.NDArray[np.uint8]

SUBCLASSES = {"cloth": 15, "wafer": 14, "metal": 10}
"""Materials and their numbers of sub-classes, as in Texture-AD."""

DEFECTS = (
    "scratch",
    "wrinkle",
    "colour",
    "spot",
    "stain",
    "crack",
    "scar",
    "smear",
    "missing",
    "warp",
    "perlin",
    "cut_paste",
)
"""Types of defects, families of ``trainer.synthesis``; they take turns."""

MASK_FLOOR = 2
"""Grey levels; a pixel that a defect changes by more, in any channel, belongs to its mask."""

_PARTS = {"train": 0, "good": 1, "defect": 2}
_PART_VIEWS = 50_000  # views of the web between two parts, so that no image shows a place of another
_LEAST_MASK = 6  # pixels; a defect that optics and noise leave less of is drawn anew


@dataclass(frozen=True)
class TextureSubclass:
    """One sub-class: a make of the material under an optical scheme.

    Attributes:
        material: key of ``SUBCLASSES``.
        number: from 1.
        seed: of everything.
        side: height and width of its images in pixels.
    """

    material: str
    number: int
    seed: int
    side: int

    def _rng(self, *place: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, zlib.crc32(self.material.encode()), self.number, *place))

    @cached_property
    def stuff(self) -> Stuff:
        """What it is made of."""
        return STUFFS[self.material].draw(self._rng(0))

    @cached_property
    def optics(self) -> Optics:
        """What it is seen through."""
        return Optics.draw(self._rng(1))

    @cached_property
    def _web(self) -> TextureWeb:
        own = int(self._rng(2).integers(2**31))
        return TextureWeb(self.material, own, view_side("cloth", self.side), self.stuff)

    def good(self, part: str, index: int) -> Picture:
        """Draw a good image uint8 [side, side, 3] BGR.

        Args:
            part: ``train`` or ``good``.
            index: of the image, >= 0.
        """
        view, rng = self._view(part, index), self._rng(3, _PARTS[part], index)
        return self._shoot(view, Pose.draw(rng), Light.draw(rng), rng)

    def defective(self, defect: str, index: int) -> tuple[Picture, npt.NDArray[np.bool_]]:
        """Draw an image with a defect, which is made on the surface, before lens, lamp and sensor.

        Args:
            defect: one of ``DEFECTS``.
            index: of the image among all defective ones, >= 0.

        Returns:
            uint8 [side, side, 3] BGR, and its mask bool [side, side]: the pixels that differ by more than
            ``MASK_FLOOR`` from the same image without the defect, noise included.
        """
        view, attempt = self._view("defect", index), 0
        while True:
            rng = self._rng(3, _PARTS["defect"], index, attempt)
            marred = stamp(view, rng, family=defect).image
            pose, light, noise = Pose.draw(rng), Light.draw(rng), int(rng.integers(2**31))
            image, clean = (
                self._shoot(surface, pose, light, np.random.default_rng(noise)) for surface in (marred, view)
            )
            mask = np.abs(image.astype(np.int16) - clean).max(axis=2) > MASK_FLOOR
            if np.count_nonzero(mask) >= _LEAST_MASK:
                return image, mask
            attempt += 1

    def _view(self, part: str, index: int) -> Picture:
        n = view_side("cloth", self.side)
        if not 0 <= index < _PART_VIEWS:
            raise ValueError(f"image {index} is outside 0..{_PART_VIEWS - 1}")
        return self._web.view((_PARTS[part] * _PART_VIEWS + index) * n, n)

    def _shoot(self, surface: Picture, pose: Pose, light: Light, rng: np.random.Generator) -> Picture:
        return sensor_noise(illuminate(through(look(surface, pose, self.side), self.optics), light), rng)


@dataclass(frozen=True)
class TextureFactory:
    """How much of the stand-in is made.

    Attributes:
        seed: the same seed gives the same pixels.
        side: height and width in pixels, 64..1024.
        train: images in train/good of each sub-class.
        good: good test images.
        defective: defective test images; 12 or a multiple show each defect alike.
        subclasses: per material; fewer make smaller examples.
    """

    seed: int = 0
    side: int = 256
    train: int = 24
    good: int = 16
    defective: int = 24
    subclasses: dict[str, int] = field(default_factory=lambda: dict(SUBCLASSES))

    def __post_init__(self) -> None:
        unknown = set(self.subclasses) - set(SUBCLASSES)
        if unknown:
            raise ValueError(f"materials {', '.join(sorted(unknown))}: unknown; there are {', '.join(SUBCLASSES)}")
        if not 64 <= self.side <= 1024:  # noqa: PLR2004
            raise ValueError(f"side {self.side}: outside 64..1024 pixels")
        if min(self.train, self.good, self.defective) < 0 or min(self.subclasses.values(), default=0) < 1:
            raise ValueError("numbers of images must be at least 0, and of sub-classes at least 1")

    def material(self, name: str, *, progress: Progress = no_progress) -> Material:
        """Draw one material into memory.

        Args:
            name: one of ``subclasses``.
            progress: called after each image.
        """
        count = self.subclasses[name]
        made = []
        for number in range(1, count + 1):
            images = self._images(TextureSubclass(name, number, self.seed, self.side))
            made.append(
                Subclass(
                    str(number),
                    tuple(image for image in images if image.split == "train"),
                    tuple(sorted((image for image in images if image.split == "test"), key=lambda image: image.name)),
                )
            )
            progress(f"drawing {name}", number, count)
        return Material(name, tuple(made))

    def write(self, out: Path, *, progress: Progress = no_progress) -> Path:
        """Write every material in Texture-AD's layout; what is read back is what :meth:`material` gives.

        Args:
            out: new or empty folder.
            progress: called after each sub-class.

        Returns:
            ``out``.

        Raises:
            DataError: ``out`` holds files already or cannot be written.
        """
        new_folder(out)
        for name in self.subclasses:
            for image in self.material(name, progress=progress).images:
                folder = out / name / image.subclass
                file = image.name.removeprefix(f"{image.subclass}/")
                write_png(folder / file, image.load())
                if image.anomalous and image.load_mask:
                    mask = image.load_mask((self.side, self.side)).astype(np.uint8) * 255
                    stem = file.rpartition("/")[2].removesuffix(".png")
                    write_png(folder / "ground_truth" / image.label / f"{stem}_mask.png", mask)
        return out

    def _images(self, one: TextureSubclass) -> list[SubclassImage]:
        images = [_image(one, ("train", "good", i), one.good("train", i)) for i in range(self.train)]
        images += [_image(one, ("test", "good", i), one.good("good", i)) for i in range(self.good)]
        for index in range(self.defective):
            # Sub-classes begin with different defects, so that few images of each still show all types.
            label = DEFECTS[(index + one.number) % len(DEFECTS)]
            picture, mask = one.defective(label, index)
            images.append(_image(one, ("test", label, index), picture, mask))
        return images


def _image(
    one: TextureSubclass, place: tuple[str, str, int], picture: Picture, mask: npt.NDArray[np.bool_] | None = None
) -> SubclassImage:
    split, label, index = place
    name = f"{one.number}/{split}/{label}/{index:04d}.png"
    truth = np.zeros(picture.shape[:2], np.bool_) if mask is None else mask
    return SubclassImage(
        name=name,
        subclass=str(one.number),
        split=split,
        label=label,
        anomalous=mask is not None,
        group=name,  # every image shows a place of its own
        load=lambda: picture,
        load_mask=lambda _: truth,
    )
