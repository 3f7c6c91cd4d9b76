"""What a camera makes of a surface: drift, a small turn, light and sensor noise, each from its own seeded choices.

It knows one picture at a time; it must not know webs or defects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

SEEN = 7 / 8
"""Share of a view's width and height that a frame shows; the rest is room to drift and turn without leaving it."""

_LARGEST_DRIFT = 0.015  # of the view
_LEAST_BLUR = 0.05  # pixels; less changes no grey level
_LARGEST_TURN = 2.0  # degrees; 7/8 * (cos 2 + sin 2) + 2 * 0.015 = 0.935 of the view, so no border is ever seen


@dataclass(frozen=True)
class Pose:
    """Where the camera looks within a view.

    Attributes:
        dx: drift to the right, as a share of the view's width.
        dy: drift down, as a share of its height.
        degrees: turn, counter-clockwise.
    """

    dx: float = 0.0
    dy: float = 0.0
    degrees: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Pose:
        """Draw a sub-pixel drift and a turn of at most 2 degrees."""
        dx, dy = rng.uniform(-_LARGEST_DRIFT, _LARGEST_DRIFT, 2)
        return cls(float(dx), float(dy), float(rng.uniform(-_LARGEST_TURN, _LARGEST_TURN)))


@dataclass(frozen=True)
class Light:
    """How a picture is lit.

    Attributes:
        gain: factor on all grey levels.
        slope_x: relative change from the left to the right edge.
        slope_y: relative change from the top to the bottom edge.
    """

    gain: float = 1.0
    slope_x: float = 0.0
    slope_y: float = 0.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Light:
        """Draw a gain within 8 % and slopes within 10 %."""
        slopes = rng.uniform(-0.1, 0.1, 2)
        return cls(float(rng.uniform(0.92, 1.08)), float(slopes[0]), float(slopes[1]))


@dataclass(frozen=True)
class Optics:
    """An optical scheme: what lens, lamp and sensor settings make of every picture of a line.

    Attributes:
        gain: factor on all grey levels.
        offset: grey levels that stray light adds.
        gamma: exponent of the tone curve; above 1 darkens the middle.
        vignette: share of light that is missing in the corners.
        blur: deviation of the lens's blur as a share of the picture's side.
        balance: factors of blue, green and red.
    """

    gain: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0
    vignette: float = 0.0
    blur: float = 0.0
    balance: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Optics:
        """Draw a scheme as lines of one plant differ: dim to bright, sharp to a pixel of blur at 256, warm to cold."""
        balance = rng.uniform(0.85, 1.0, 3)
        blue, green, red = (float(value) for value in balance / balance.max())
        return cls(
            gain=float(rng.uniform(0.65, 1.25)),
            offset=float(rng.uniform(-5.0, 25.0)),
            gamma=float(np.exp(rng.uniform(np.log(0.7), np.log(1.45)))),
            vignette=float(rng.uniform(0.0, 0.4)),
            blur=float(rng.uniform(0.0, 0.004)),
            balance=(blue, green, red),
        )


def through(image: npt.NDArray[np.uint8], optics: Optics) -> npt.NDArray[np.uint8]:
    """Show a picture through an optical scheme.

    Args:
        image: uint8 [H, W, 3] BGR.
        optics: the scheme; the plain one changes nothing.

    Returns:
        uint8 [H, W, 3].
    """
    height, width = image.shape[:2]
    light = image.astype(np.float32)
    sigma = optics.blur * max(height, width)
    if sigma > _LEAST_BLUR:
        light = cv2.GaussianBlur(light, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
    ys = np.linspace(-1, 1, height, dtype=np.float32)[:, None, None]
    xs = np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    fall = 1 - np.float32(optics.vignette) * (ys * ys + xs * xs) / 2
    level = np.clip(light * fall * (optics.gain * np.array(optics.balance, np.float32)) / 255, 0, 1)
    level = 255 * level ** np.float32(optics.gamma) + np.float32(optics.offset)
    return np.asarray(np.clip(np.rint(level), 0, 255), dtype=np.uint8)


def look(view: npt.NDArray[np.uint8], pose: Pose, side: int) -> npt.NDArray[np.uint8]:
    """Show the middle of a view, moved and turned, at the frame's size.

    Args:
        view: uint8 [n, n] or [n, n, 3].
        pose: where to look.
        side: height and width of the frame in pixels.

    Returns:
        uint8 [side, side] or [side, side, 3].
    """
    n = view.shape[0]
    zoom = side / (SEEN * n)
    matrix = cv2.getRotationMatrix2D(((n - 1) / 2 + pose.dx * n, (n - 1) / 2 + pose.dy * n), pose.degrees, zoom)
    matrix[:, 2] += (side - 1) / 2 - (n - 1) / 2 - np.array([pose.dx, pose.dy]) * n
    how = cv2.INTER_CUBIC if zoom > 1.2 else cv2.INTER_LINEAR  # noqa: PLR2004 (linear looks blocky when enlarged)
    return np.asarray(cv2.warpAffine(view, matrix, (side, side), flags=how, borderMode=cv2.BORDER_REFLECT_101))


def look_at_mask(mask: npt.NDArray[np.bool_], pose: Pose, side: int) -> npt.NDArray[np.bool_]:
    """Move a mask as :func:`look` moves its picture; a pixel belongs if at least a quarter of it does."""
    return np.asarray(look(mask.astype(np.uint8) * 255, pose, side) >= 64)  # noqa: PLR2004


def illuminate(image: npt.NDArray[np.uint8], light: Light) -> npt.NDArray[np.uint8]:
    """Light a picture.

    Args:
        image: uint8 [H, W, 3].
        light: gain and slopes.

    Returns:
        uint8 [H, W, 3].
    """
    ys = np.linspace(-0.5, 0.5, image.shape[0], dtype=np.float32)[:, None, None]
    xs = np.linspace(-0.5, 0.5, image.shape[1], dtype=np.float32)[None, :, None]
    factor = np.float32(light.gain) * (1 + np.float32(light.slope_x) * xs + np.float32(light.slope_y) * ys)
    return np.asarray(np.clip(np.rint(image * factor), 0, 255), dtype=np.uint8)


def sensor_noise(
    image: npt.NDArray[np.uint8], rng: np.random.Generator, *, read: float = 1.2, shot: float = 0.18
) -> npt.NDArray[np.uint8]:
    """Add what a sensor adds: noise whose variance is ``read``**2 + ``shot``**2 * grey level, equal on grey pixels.

    Args:
        image: uint8 [H, W, 3].
        rng: source of the noise.
        read: deviation in the dark, in grey levels.
        shot: deviation per root of a grey level.

    Returns:
        uint8 [H, W, 3].
    """
    level = image.astype(np.float32)
    deviation = np.sqrt(np.float32(read**2) + np.float32(shot**2) * level)
    noise = rng.standard_normal(image.shape[:2], dtype=np.float32)[..., None]
    return np.asarray(np.clip(np.rint(level + deviation * noise), 0, 255), dtype=np.uint8)
