"""What changes between the lab and a line: light, optics, sensor, pose, transport, each from hardly to strongly.

Applied to what the network sees, so that a strength means the same for every camera; it must not know who judges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    Image = npt.NDArray[np.uint8]
    Change = Callable[[Image, float, np.random.Generator], Image]

CLEAN = "clean"
DIMMED = "gain 0.72, offset 0.16"
"""Another lamp and a stray light: both at once, beside the series of each."""

_LAMP_KELVIN = 3200.0  # a halogen lamp when new
_SECOND_RADIATION = 14_388.0  # micrometre kelvin (CODATA 2018, rounded)
_COLOURS = np.array([0.61, 0.55, 0.465])  # micrometres at which a camera's R, G and B are most sensitive


@dataclass(frozen=True)
class Series:
    """One kind of change, from weak to strong.

    Attributes:
        name: in words.
        unit: of the strengths, empty where they have none.
        strengths: from weak to strong.
        change: uint8 [H, W, 3] RGB, strength, generator -> the changed image, of the same shape.
    """

    name: str
    unit: str
    strengths: tuple[float, ...]
    change: Change

    def condition(self, strength: float) -> str:
        """Name one strength."""
        return f"{self.name} {strength:g}" + (f" {self.unit}" if self.unit else "")


@dataclass(frozen=True)
class Condition:
    """One change at one strength.

    Attributes:
        name: as tables show it.
        change: uint8 [H, W, 3] RGB and a generator -> the changed image.
    """

    name: str
    change: Callable[[Image, np.random.Generator], Image]

    def of(self, images: Image, *, seed: int) -> Image:
        """Return images uint8 [n, H, W, 3] changed; each draws its own noise, the same at every call."""
        made = [self.change(one, np.random.default_rng((seed, index))) for index, one in enumerate(images)]
        return np.stack(made) if made else images


def _grey(values: npt.NDArray[np.floating]) -> Image:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def gain(image: Image, factor: float, _rng: np.random.Generator) -> Image:
    """Scale all grey levels."""
    return _grey(image * np.float32(factor))


def offset(image: Image, share: float, _rng: np.random.Generator) -> Image:
    """Add stray light, as a share of white."""
    return _grey(image + np.float32(255 * share))


def dimmed(image: Image) -> Image:
    """Gain 0.72 and offset 0.16."""
    return _grey(image * np.float32(0.72) + np.float32(0.16 * 255))


def gamma(image: Image, exponent: float, _rng: np.random.Generator) -> Image:
    """Change the tone curve; above 1 the middle greys get darker."""
    return _grey(255 * (image / np.float32(255)) ** np.float32(exponent))


def blur(image: Image, sigma: float, _rng: np.random.Generator) -> Image:
    """Defocus: a Gaussian of ``sigma`` pixels of the network's input."""
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma), np.uint8)


def noise(image: Image, sigma: float, rng: np.random.Generator) -> Image:
    """Add Gaussian sensor noise of ``sigma`` grey levels, each channel its own."""
    return _grey(image + np.float32(sigma) * rng.standard_normal(image.shape, dtype=np.float32))


def white_balance(image: Image, share: float, _rng: np.random.Generator) -> Image:
    """Raise red and lower blue by a share."""
    return _grey(image * np.float32([1 + share, 1, 1 - share]))


def rotation(image: Image, degrees: float, _rng: np.random.Generator) -> Image:
    """Turn the part in the picture; beyond the picture's edge it is mirrored."""
    return _posed(image, degrees, 1.0)


def scale(image: Image, factor: float, _rng: np.random.Generator) -> Image:
    """Bring the camera nearer."""
    return _posed(image, 0.0, factor)


def jpeg(image: Image, quality: float, _rng: np.random.Generator) -> Image:
    """Compress and decompress; the blocks are of 8 pixels of the network's input."""
    done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
    assert done
    return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])


def conveyor(image: Image, length: float, _rng: np.random.Generator) -> Image:
    """Move the part by ``length`` pixels along the rows while the shutter is open."""
    whole = int(length) | 1
    # The ends weigh what is missing to an odd number of whole pixels.
    if whole > length:
        whole -= 2
    kernel = np.ones(whole + 2, np.float32)
    kernel[0] = kernel[-1] = (length - whole) / 2
    return np.asarray(cv2.filter2D(image, -1, kernel[None] / kernel.sum(), borderType=cv2.BORDER_REFLECT_101), np.uint8)


def lamp_ageing(image: Image, kelvin: float, _rng: np.random.Generator) -> Image:
    """Let a halogen lamp get cooler: less light, and less blue than red (Wien's approximation of Planck's law)."""
    gains = np.exp(_SECOND_RADIATION / _COLOURS * (1 / _LAMP_KELVIN - 1 / kelvin))
    return _grey(image * gains.astype(np.float32))


def _posed(image: Image, degrees: float, factor: float) -> Image:
    height, width = image.shape[:2]
    move = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, factor)
    turned = cv2.warpAffine(image, move, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(turned, np.uint8)


SERIES = (
    Series("gain", "", (0.9, 0.8, 0.72, 0.6, 0.5), gain),
    Series("offset", "", (0.04, 0.08, 0.12, 0.16, 0.24), offset),
    Series("gamma", "", (1.1, 1.2, 1.4, 1.7, 2.0), gamma),
    Series("blur", "px", (0.4, 0.6, 0.8, 1.0, 1.5), blur),
    Series("noise", "levels", (2, 4, 6, 10, 16), noise),
    Series("white balance", "", (0.05, 0.1, 0.15, 0.2, 0.3), white_balance),
    Series("lamp ageing", "K", (3150, 3100, 3050, 3000, 2900), lamp_ageing),
    Series("conveyor speed", "px", (1.5, 2, 3, 5, 8), conveyor),
    Series("rotation", "degrees", (1, 2, 5, 10, 20), rotation),
    Series("scale", "", (1.02, 1.05, 1.1, 1.2, 1.4), scale),
    Series("JPEG quality", "", (90, 75, 60, 40, 20), jpeg),
)

REQUIRED = (DIMMED, "gamma 1.4", "blur 0.8 px")
"""The shifts that the goals are for."""


def conditions(series: Sequence[Series] = SERIES) -> dict[str, Condition]:
    """Return all conditions by name: the images as they are, :data:`DIMMED`, and every strength of every series."""
    found = [Condition(CLEAN, lambda image, _rng: image), Condition(DIMMED, lambda image, _rng: dimmed(image))]
    for one in series:
        for strength in one.strengths:

            def change(image: Image, rng: np.random.Generator, one: Series = one, strength: float = strength) -> Image:
                return one.change(image, strength, rng)

            found.append(Condition(one.condition(strength), change))
    return {one.name: one for one in found}
