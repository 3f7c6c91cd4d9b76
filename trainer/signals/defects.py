"""Anomalies put into good windows, of no product in particular: for choices that must not see test recordings.

It must not know methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Window = npt.NDArray[np.float32]

_SHARE = (0.06, 0.25)
"""Share of a window that an anomaly fills."""


def make_defects(
    windows: npt.NDArray[np.float32], *, seed: int, repeats: int = 1, contrast: float = 1.0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Put one anomaly into each window.

    Args:
        windows: float32 [n, K, Q], good, finite.
        seed: of the kinds, places and sizes.
        repeats: copies of each window, each with an anomaly of its own.
        contrast: in (0, 1]; at 1 the anomaly stands as it was made, below it is mixed with what was there.

    Returns:
        float32 [n repeats, K, Q], row i from window i modulo n, and bool of that shape, where it was changed.
    """
    generator = np.random.default_rng(seed)
    scale = windows.std((0, 2))[:, np.newaxis].astype(np.float32)
    kinds = tuple(_KINDS.values())
    changed, masks = [], []
    for index in range(len(windows) * repeats):
        good = windows[index % len(windows)]
        length = max(4, round(good.shape[1] * generator.uniform(*_SHARE)))
        begin = int(generator.integers(0, good.shape[1] - length + 1))
        here = slice(begin, begin + length)
        which = generator.random(len(good)) < max(0.5, generator.random())
        which[generator.integers(len(good))] = True
        other = windows[int(generator.integers(len(windows)))]
        new = kinds[int(generator.integers(len(kinds)))](good[:, here].copy(), scale, other, generator)
        result, mask = good.copy(), np.zeros(good.shape, np.bool_)
        # Faded in and out, so that no edge gives it away.
        fade = np.minimum(1.0, np.minimum(np.arange(1, length + 1), np.arange(length, 0, -1)) / max(1, length // 8))
        weight = (contrast * fade).astype(np.float32)
        result[which, here] += weight * (new - good[:, here])[which]
        mask[which, here] = True
        changed.append(result)
        masks.append(mask)
    return np.stack(changed).astype(np.float32), np.stack(masks)


def copies(
    windows: npt.NDArray[np.float32], count: int, seed: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Fill a set up to ``count`` with copies that are a little louder or quieter, and noisier by a hundredth.

    Returns:
        float32 [max(count, n), K, Q], the originals first, and int64 the index of the original of each.
    """
    base = np.concatenate([np.arange(len(windows)), np.arange(max(count - len(windows), 0)) % len(windows)])
    generator, scale = np.random.default_rng(seed), windows.std((0, 2))[:, np.newaxis]
    made = [
        windows[i] * generator.uniform(0.97, 1.03) + 0.01 * scale * generator.standard_normal(windows.shape[1:])
        for i in base[len(windows) :]
    ]
    return np.concatenate([windows, *(one[np.newaxis] for one in made)]).astype(np.float32), base.astype(np.int64)


def _burst(here: Window, scale: Window, _: Window, generator: np.random.Generator) -> Window:
    """An oscillation on top."""
    cycles = generator.uniform(2, max(3, here.shape[1] / 6))
    wave = np.sin(2 * np.pi * (cycles * np.linspace(0, 1, here.shape[1]) + generator.random()))
    return here + (generator.uniform(0.7, 2.0) * scale * wave).astype(np.float32)


def _bump(here: Window, scale: Window, _: Window, generator: np.random.Generator) -> Window:
    """A wide bump, up or down."""
    shape = np.hanning(here.shape[1]) * generator.choice([-1, 1]) * generator.uniform(1.5, 4.0)
    return here + (scale * shape).astype(np.float32)


def _impulses(here: Window, scale: Window, _: Window, generator: np.random.Generator) -> Window:
    """A few knocks that ring out."""
    places = np.arange(here.shape[1])
    rung = np.zeros(here.shape[1])
    for start in generator.integers(0, here.shape[1], int(generator.integers(1, 4))):
        after = np.maximum(places - start, 0)
        rung += (places >= start) * np.exp(-after / 8) * np.sin(2 * np.pi * after / generator.uniform(4, 10))
    return here + (generator.uniform(1.5, 4.0) * scale * rung).astype(np.float32)


def _stretched(here: Window, _scale: Window, _: Window, generator: np.random.Generator) -> Window:
    """The same course, slower or faster in its middle."""
    length = here.shape[1]
    power = generator.uniform(1.5, 2.5) ** generator.choice([-1, 1])
    places = np.linspace(0, 1, length) ** power * (length - 1)
    return np.stack([np.interp(places, np.arange(length), row) for row in here]).astype(np.float32)


def _louder(here: Window, _scale: Window, _: Window, generator: np.random.Generator) -> Window:
    """The same course, larger or nearly gone."""
    gain = generator.uniform(1.8, 3.0) if generator.random() < 0.5 else generator.uniform(0.0, 0.3)  # noqa: PLR2004
    middle = here.mean(1, keepdims=True)
    return (middle + gain * (here - middle)).astype(np.float32)


def _turned(here: Window, _scale: Window, _: Window, _generator: np.random.Generator) -> Window:
    """Upside down about its mean."""
    return 2 * here.mean(1, keepdims=True) - here


def _elsewhere(here: Window, _scale: Window, other: Window, generator: np.random.Generator) -> Window:
    """A piece of another window, played backwards."""
    begin = int(generator.integers(0, other.shape[1] - here.shape[1] + 1))
    return other[:, begin : begin + here.shape[1]][:, ::-1]


_KINDS: dict[str, Callable[[Window, Window, Window, np.random.Generator], Window]] = {
    "burst": _burst,
    "bump": _bump,
    "impulses": _impulses,
    "stretched": _stretched,
    "louder": _louder,
    "turned": _turned,
    "elsewhere": _elsewhere,
}
