"""Generated video of a camera over a line, for benchmarks of camera health: fixtures, a web or parts, light, noise.

It must not know what is measured on it. A frame is made for any moment, so that only those looked at cost time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Image = npt.NDArray[np.uint8]

HEIGHT, WIDTH = 540, 960
_MARGIN = 32


@dataclass(frozen=True, slots=True)
class Conditions:
    """What is usual at a line.

    Attributes:
        speed: of the web, pixels per second; 0 is a stopped belt.
        noise: sigma of the sensor's noise in grey levels.
        jitter: largest shift of a frame by vibration, pixels, each way.
        drift: share by which the light wanders slowly, each way.
        fixtures: whether something that stands still is in view.
        texture: of the web: ``grain``, ``stripes``, ``parts`` (dark parts on a plain belt), ``plain``, ``weave``, or
            the name of a photograph such as ``gravel.png``.
        stop_at: seconds; the belt stops then.
        start_at: seconds; the belt stands before.
    """

    speed: float = 180.0
    noise: float = 2.0
    jitter: float = 2.0
    drift: float = 0.1
    fixtures: bool = True
    texture: str = "grain"
    stop_at: float = float("inf")
    start_at: float = 0.0


class Scene:
    """One line, drawn from a seed.

    Args:
        seed: of everything in it.
        conditions: what is usual.
    """

    def __init__(self, seed: int, conditions: Conditions) -> None:
        self.conditions = conditions
        self._rng = np.random.default_rng(seed)
        self._web = _web(self._rng, conditions.texture)
        self._still, self._covers = _fixtures(self._rng, with_any=conditions.fixtures)
        self._noise = self._rng.standard_normal((8, HEIGHT, WIDTH), dtype=np.float32)
        self._phase = self._rng.uniform(0, 2 * np.pi)

    def with_conditions(self, **changes: object) -> Scene:
        """Return the same line under other conditions."""
        other = object.__new__(Scene)
        other.__dict__.update(self.__dict__)
        other.conditions = replace(self.conditions, **changes)  # type: ignore[arg-type]  # names of its fields
        return other

    def clean(self, seconds: float) -> npt.NDArray[np.float32]:
        """Return what the lens sees at a moment, float32 [H + 2 m, W + 2 m] grey, with a margin for shifts."""
        where = self.conditions
        moved = where.speed * (min(seconds, where.stop_at) - min(where.start_at, seconds, where.stop_at))
        top = int(moved) % self._web.shape[0]
        rows = (top + np.arange(HEIGHT + 2 * _MARGIN)) % self._web.shape[0]
        view = self._web[rows]
        if self._covers is not None:
            view = np.where(self._covers, self._still, view)
        return view.astype(np.float32)

    def frame(self, seconds: float, *, rng: np.random.Generator, **fault: float) -> Image:
        """Return the camera's frame uint8 [540, 960, 3] BGR at a moment.

        Args:
            seconds: since the start.
            rng: of jitter and noise.
            fault: strengths by name: ``blur`` (sigma), ``shift_x``, ``shift_y`` (pixels), ``turn`` (degrees), ``gain``
                (of the light), ``lift`` (grey levels added by stray light).
        """
        where = self.conditions
        view = self.clean(seconds)
        dx, dy = rng.uniform(-where.jitter, where.jitter, 2)
        dx, dy = dx + fault.get("shift_x", 0.0), dy + fault.get("shift_y", 0.0)
        turn = cv2.getRotationMatrix2D((WIDTH / 2 + _MARGIN, HEIGHT / 2 + _MARGIN), fault.get("turn", 0.0), 1.0)
        turn[:, 2] += (dx - _MARGIN, dy - _MARGIN)
        view = cv2.warpAffine(view, turn, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        if fault.get("blur", 0.0) > 0:
            view = cv2.GaussianBlur(view, (0, 0), fault["blur"])
        light = 1 + where.drift * np.sin(2 * np.pi * seconds / 1800 + self._phase)
        view = view * np.float32(light * fault.get("gain", 1.0)) + np.float32(fault.get("lift", 0.0))
        grain = self._noise[rng.integers(len(self._noise))]
        grain = np.roll(grain, (int(rng.integers(HEIGHT)), int(rng.integers(WIDTH))), (0, 1))
        view = view + np.float32(where.noise) * grain
        grey = np.clip(np.rint(view), 0, 255).astype(np.uint8)
        return cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)


def _web(rng: np.random.Generator, texture: str) -> npt.NDArray[np.float32]:
    height, width = 1400, WIDTH + 2 * _MARGIN
    if texture == "plain":
        return np.full((height, width), 120, np.float32)
    if texture.endswith(".png"):
        return _photograph(texture, height, width)
    if texture == "weave":
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        warp, weft = rng.uniform(6, 11, 2)
        threads = np.sin(2 * np.pi * x / warp) * np.sin(2 * np.pi * y / weft)
        return (120 + 45 * threads + 12 * rng.standard_normal((height, width))).astype(np.float32)
    if texture == "stripes":
        period = int(rng.integers(40, 90))
        rows = 90 + 70 * ((np.arange(height) % period) < period // 2)
        height -= height % period
        return np.repeat(rows[:height, np.newaxis], width, 1).astype(np.float32)
    if texture == "parts":
        web = np.full((height, width), 170, np.float32)
        for top in range(60, height - 260, 280):
            left = int(rng.integers(250, 380))
            cv2.rectangle(web, (left, top), (left + 300, top + 180), 60.0, -1)
            for _ in range(6):
                centre = (left + int(rng.integers(30, 270)), top + int(rng.integers(30, 150)))
                cv2.circle(web, centre, int(rng.integers(6, 20)), float(rng.integers(90, 200)), -1)
        return web
    fine = rng.standard_normal((height, width)).astype(np.float32)
    coarse = cv2.GaussianBlur(rng.standard_normal((height, width)).astype(np.float32), (0, 0), 9)
    mixed = cv2.GaussianBlur(fine, (0, 0), 1.2) + 6 * coarse
    return np.clip(125 + 30 * mixed / mixed.std(), 15, 240).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _photograph(name: str, height: int, width: int) -> npt.NDArray[np.float32]:
    """A photograph as a web without an end: beside it its mirror image."""
    from trainer.data.generic import photograph_folder
    from trainer.data.images import load_image

    grey = cv2.cvtColor(load_image(photograph_folder() / name), cv2.COLOR_BGR2GRAY)
    half = cv2.resize(grey, (width, height // 2), interpolation=cv2.INTER_AREA)
    return np.concatenate([half, half[::-1]]).astype(np.float32)


def _fixtures(
    rng: np.random.Generator, *, with_any: bool
) -> tuple[npt.NDArray[np.float32] | None, npt.NDArray[np.bool_] | None]:
    """Guide rails at both sides with bolts, a sensor bracket: what a line's camera usually also sees."""
    if not with_any:
        return None, None
    shape = (HEIGHT + 2 * _MARGIN, WIDTH + 2 * _MARGIN)
    still, covers = np.full(shape, 70, np.float32), np.zeros(shape, np.uint8)
    left, right = _MARGIN + int(rng.integers(60, 140)), shape[1] - _MARGIN - int(rng.integers(60, 140))
    covers[:, :left] = covers[:, right:] = 1
    still[:, :left] += rng.uniform(-30, 60)
    still[:, right:] += rng.uniform(-30, 60)
    for _ in range(10):
        side = rng.integers(2)
        x = int(rng.integers(_MARGIN + 12, left - 12) if side else rng.integers(right + 12, shape[1] - _MARGIN - 12))
        y = int(rng.integers(_MARGIN + 12, shape[0] - _MARGIN - 12))
        cv2.circle(still, (x, y), int(rng.integers(5, 12)), float(rng.integers(20, 230)), -1)
    x, y = int(rng.integers(left, right - 80)), _MARGIN + int(rng.integers(0, 40))
    cv2.rectangle(still, (x, y), (x + 70, y + 34), float(rng.integers(150, 220)), -1)
    covers[y : y + 35, x : x + 71] = 1
    return still, covers.astype(bool)
