"""Generated signals with exact labels: an electrocardiogram's likeness, and a bearing whose outer race is damaged.

Neither is a model of a patient or of a machine; they are for choices and tests that must not see real recordings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.signals.recording import Recording, around

if TYPE_CHECKING:
    import numpy.typing as npt

_PQRST = (
    # place in the beat, of its length up to 1 s; width in seconds; height
    (-0.18, 0.025, 0.15),
    (-0.035, 0.010, -0.12),
    (0.0, 0.012, 1.0),
    (0.035, 0.011, -0.25),
    (0.28, 0.055, 0.30),
)
_ECTOPIC = ((0.0, 0.045, 0.75), (0.11, 0.050, -0.30), (0.34, 0.080, -0.25))
_EVENT_S = 0.15


@dataclass(frozen=True, slots=True)
class EcgLike:
    """Beats of one shape in every channel, and now and then a wide one that comes early, without its first wave.

    Attributes:
        channels: K.
        rate_hz: samples per second.
        heart_hz: beats per second.
        noise: deviation of the noise; the tallest wave is about 1.
        ectopic: share of beats that are anomalous.
    """

    channels: int = 2
    rate_hz: float = 360.0
    heart_hz: float = 1.2
    noise: float = 0.02
    ectopic: float = 0.0

    def recording(self, seconds: float, seed: int, name: str = "ecg") -> Recording:
        """Draw a recording; equal arguments give equal samples."""
        generator = np.random.default_rng(seed)
        count = round(seconds * self.rate_hz)
        time = np.arange(count) / self.rate_hz
        # The shape belongs to whoever it is measured on, so it does not depend on the seed.
        shape = np.random.default_rng(self.channels)
        usual = shape.uniform(0.4, 1.2, (self.channels, len(_PQRST))) * shape.choice([-1, 1], (self.channels, 1))
        wide = shape.uniform(0.5, 1.1, (self.channels, len(_ECTOPIC))) * shape.choice([-1, 1], (self.channels, 1))
        signal = np.zeros((self.channels, count))
        at, anomalous = 0.5, []
        while at < seconds:
            interval = generator.normal(1.0, 0.04) / self.heart_hz
            strange = generator.random() < self.ectopic
            if strange:
                at -= 0.3 * interval
                anomalous.append(round(at * self.rate_hz))
            waves, weights = (_ECTOPIC, wide) if strange else (_PQRST, usual)
            _beat(signal, time, at, waves, weights * generator.normal(1.0, 0.12))
            at += interval * (1.6 if strange else 1.0)
        drift = sum(
            0.06 * np.sin(2 * math.pi * (f * time[None] + generator.random((self.channels, 1)))) for f in (0.15, 0.31)
        )
        signal += drift + self.noise * generator.standard_normal(signal.shape)
        reach = round(_EVENT_S * self.rate_hz)
        labels = around(np.array(anomalous, np.int64), reach, count)
        names = tuple(f"lead {index + 1}" for index in range(self.channels))
        return Recording(name, signal.astype(np.float32), self.rate_hz, names, "mV", labels, least=reach + 1)


def _beat(
    signal: npt.NDArray[np.float64],
    time: npt.NDArray[np.float64],
    at: float,
    waves: tuple[tuple[float, float, float], ...],
    weights: npt.NDArray[np.float64],
) -> None:
    first, last = (int(np.searchsorted(time, at + edge)) for edge in (-0.5, 0.8))
    for index, (place, width, height) in enumerate(waves):
        bump = height * np.exp(-0.5 * ((time[first:last] - at - place) / width) ** 2)
        signal[:, first:last] += weights[:, index, None] * bump


@dataclass(frozen=True, slots=True)
class Bearing:
    """The vibration of a shaft in a rolling bearing; where the outer race is damaged, each ball that passes knocks.

    The rate of the knocks is that of a geometry (Randall and Antoni, Mechanical Systems and Signal Processing 25, 2011,
    equation 1): BPFO = n f / 2 (1 - d / D cos phi); each comes up to 1 % of a period early or late, since balls slip,
    and excites a resonance that dies away.

    Attributes:
        channels: K, directions of one accelerometer.
        rate_hz: samples per second.
        shaft_hz: revolutions per second.
        speed_jitter: deviation of the speed, of its mean, over seconds.
        noise: deviation of the noise in g; the shaft's own vibration is about 0.5.
        balls: n.
        ratio: d / D cos phi.
        resonance_hz: of the housing.
        decay_s: seconds in which its vibration falls to 1 / e.
        fault: height of the first swing of a knock in g; 0 for none.
        episodes: seconds from and to which the race is loaded; empty for always.
    """

    channels: int = 3
    rate_hz: float = 5120.0
    shaft_hz: float = 29.5
    speed_jitter: float = 0.004
    noise: float = 0.05
    balls: int = 9
    ratio: float = 0.2
    resonance_hz: float = 1400.0
    decay_s: float = 0.0015
    fault: float = 0.0
    episodes: tuple[tuple[float, float], ...] = ()

    @property
    def knocks_hz(self) -> float:
        """Knocks per second at the mean speed."""
        return self.balls * self.shaft_hz / 2 * (1 - self.ratio)

    def recording(self, seconds: float, seed: int, name: str = "bearing") -> Recording:
        """Draw a recording; equal arguments give equal samples."""
        generator = np.random.default_rng(seed)
        count = round(seconds * self.rate_hz)
        time = np.arange(count) / self.rate_hz
        knots = np.arange(math.ceil(seconds) + 1)
        wander = np.interp(time, knots, generator.normal(1, self.speed_jitter, len(knots)))
        turns = np.cumsum(self.shaft_hz * wander) / self.rate_hz + generator.random()
        machine = np.random.default_rng(self.channels)
        signal = self.noise * generator.standard_normal((self.channels, count))
        # Unbalance, misalignment, and a mesh of 23 teeth whose strength follows the shaft.
        for order, height in ((1, 0.35), (2, 0.2), (3, 0.1), (23, 0.25)):
            height_of, phase = (
                height * machine.uniform(0.5, 1.2, (self.channels, 1)),
                machine.random((self.channels, 1)),
            )
            swing = 1 + 0.4 * np.cos(2 * math.pi * turns) if order == 23 else 1.0  # noqa: PLR2004 (the mesh)
            signal += height_of * swing * np.sin(2 * math.pi * (order * turns + phase))
        labels = np.zeros(count, np.bool_)
        if self.fault > 0:
            knocks = self._knocks(turns, generator)
            inside = [any(a <= at / self.rate_hz < b for a, b in self.episodes) for at in knocks]
            knocks = knocks[np.array(inside, np.bool_)] if self.episodes else knocks
            transfer = machine.uniform(0.4, 1.0, (self.channels, 1))
            signal += transfer * self._ringing(knocks, count, generator)
            # What a knock leaves is under a tenth after 2.3 decays.
            reach = round(1.15 * self.decay_s * self.rate_hz)
            labels = around(knocks + reach, reach, count)
        names = ("radial x", "radial y", "axial")[: self.channels]
        names += tuple(f"sensor {index + 1}" for index in range(len(names), self.channels))
        return Recording(name, signal.astype(np.float32), self.rate_hz, names, "g", labels)

    def _knocks(self, turns: npt.NDArray[np.float64], generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Samples at which balls pass the damage."""
        passes = turns * self.knocks_hz / self.shaft_hz
        whole = np.arange(math.ceil(passes[0]), math.floor(passes[-1]) + 1)
        slipped = whole + generator.uniform(-0.01, 0.01, len(whole))
        return np.asarray(np.clip(np.searchsorted(passes, slipped), 0, len(turns) - 1), np.int64)

    def _ringing(
        self, knocks: npt.NDArray[np.int64], count: int, generator: np.random.Generator
    ) -> npt.NDArray[np.float64]:
        places = np.zeros(count)
        np.add.at(places, knocks, generator.normal(1.0, 0.15, len(knocks)))
        after = np.arange(round(8 * self.decay_s * self.rate_hz)) / self.rate_hz
        response = np.exp(-after / self.decay_s) * np.sin(2 * math.pi * self.resonance_hz * after)
        return np.asarray(self.fault * np.convolve(places, response / np.abs(response).max())[:count])
