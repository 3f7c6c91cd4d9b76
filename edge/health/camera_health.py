"""CameraHealth: is a camera that delivers frames well? Frozen, dark, overexposed, blurred, moved or too slow.

A state machine over samples of frames and their times; it must not know cameras, threads or messages.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edge.health.baseline import Learner
from edge.health.camera_measures import brightness, points, share_changed, share_clipped, sharpness
from edge.health.settings import CameraFault
from edge.health.static_view import RunningEdges, StaticView

if TYPE_CHECKING:
    from edge.health.baseline import Baseline
    from edge.health.camera_measures import Image, Sample
    from edge.health.settings import CameraHealthSettings

NS_PER_S = 1_000_000_000
# A look stands for the time since the last one, but for no longer than this: a gap in the frames shows nothing.
LONGEST_STEP_S = 2.0
# A driver that repeats its buffers in turn shows the same picture again after a few.
RECALLED = 4
# Shares of the learnt edges: found again, still in place, and of edges that are new. Measured on generated lines: in
# place at least 0.7 under vibration, dim light, a stopped belt; below 0.4 with a turn of 3 degrees or another view.
# Without new edges nothing has moved: something is in the way, or what stood while it was learnt has begun to move.
FOUND, IN_PLACE, FRESH = 0.5, 0.4, 0.3
# A shift is believed where the edges fit so much better elsewhere than in place.
BETTER_ELSEWHERE = 0.7

# Share of clipped pixels that leaves nothing to see.
NEARLY_ALL = 0.98


class Lasting:
    """A condition that must hold for some seconds to begin, and be gone for some to end.

    Args:
        enter_s: seconds to begin; 0 begins at once.
        leave_s: seconds to end.
    """

    def __init__(self, enter_s: float, leave_s: float) -> None:
        self._enter_s, self._leave_s = enter_s, leave_s
        self._run_s = 0.0
        self.active = False
        self.entered = 0

    def step(self, bad: bool | None, seconds: float) -> bool:  # noqa: FBT001 (the observation)
        """Take an observation; None says nothing, neither for nor against.

        Args:
            bad: whether the condition holds.
            seconds: that the observation stands for.

        Returns:
            Whether ``active`` has changed.
        """
        if bad is None:
            return False
        if bad is self.active:
            self._run_s = 0.0
            return False
        self._run_s += seconds
        if self._run_s < (self._leave_s if self.active else self._enter_s):
            return False
        self.active, self._run_s = bad, 0.0
        self.entered += bad
        return True


@dataclass(frozen=True, slots=True)
class Change:
    """A fault that begins or is over.

    Attributes:
        fault: which.
        lasting: True where it begins.
        text: for people.
        figures: behind it.
    """

    fault: CameraFault
    lasting: bool
    text: str
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Look:
    bad: bool | None
    text: str = ""
    figures: dict[str, float] | None = None


_NOTHING = _Look(None)


class CameraHealth:
    """The health of one camera. Not safe to call from several threads at once.

    Args:
        settings: of the camera.
        baseline: learnt earlier; it is learnt from the first good frames where None.

    Attributes:
        baseline: what is normal; None while it is learnt.
        baseline_changed: True from the moment it was learnt or changed until somebody sets it back.
    """

    def __init__(self, settings: CameraHealthSettings, baseline: Baseline | None = None) -> None:
        self._settings = settings
        self._learner = Learner(settings.baseline_frames)
        self._edges = RunningEdges()
        self._recalled: deque[Image] = deque(maxlen=RECALLED)
        self._view: StaticView | None = None
        self._taken_ns: int | None = None
        self._looks = 0
        self._figures: dict[str, float] = {}
        self.baseline_changed = False
        times = {
            CameraFault.FROZEN: settings.frozen_s,
            CameraFault.MOVED: settings.moved_s,
            CameraFault.SLOW: settings.slow_s,
        }
        self._lasting = {
            fault: Lasting(times.get(fault, settings.enter_s), settings.leave_s) for fault in settings.checks
        }
        self._take_baseline(baseline)

    @property
    def faults(self) -> tuple[CameraFault, ...]:
        """Which last now."""
        return tuple(fault for fault, lasting in self._lasting.items() if lasting.active)

    def take(self, sample: Sample, captured_ns: int, *, good: bool) -> list[Change]:
        """Look at a frame.

        Args:
            sample: of it.
            captured_ns: monotonic time of its capture.
            good: it was found good, so it may be learnt from.

        Returns:
            Faults that begin or are over with it.
        """
        if self.baseline is not None and self.baseline.frame_shape != sample.frame_shape:
            self._take_baseline(None)  # another resolution is another camera
        elapsed = 0.0 if self._taken_ns is None else (captured_ns - self._taken_ns) / NS_PER_S
        self._taken_ns = captured_ns
        seconds = min(max(elapsed, 0.0), LONGEST_STEP_S)
        self._looks += 1
        looks = {
            CameraFault.FROZEN: self._look_frozen(sample),
            CameraFault.DARK: self._look_dark(sample),
            CameraFault.OVEREXPOSED: self._look_overexposed(sample),
        }
        unlit = any(look.bad for fault, look in looks.items() if fault is not CameraFault.FROZEN)
        looks[CameraFault.BLURRED] = _NOTHING if unlit else self._look_blurred(sample)
        looks[CameraFault.MOVED] = self._look_moved(sample, unlit=unlit)
        changes = [change for fault, look in looks.items() if (change := self._step(fault, look, seconds)) is not None]
        if self.baseline is None and good and not unlit and not looks[CameraFault.FROZEN].bad:
            self._take_baseline(self._learner.take(sample))
            if self.baseline is not None:
                self.baseline_changed = True
                self._learner = Learner(
                    self._settings.baseline_frames
                )  # its running means are as large as all the rest
        return changes

    def rate(self, frames_per_second: float | None, asked: float | None, seconds: float) -> list[Change]:
        """Look at the frame rate.

        Args:
            frames_per_second: that the camera delivered lately; None where it is not streaming.
            asked: that it should deliver; None where nobody says.
            seconds: that this look stands for.
        """
        if frames_per_second is None or asked is None:
            look = _NOTHING
        else:
            self._figures["frame_rate"] = frames_per_second
            look = _Look(
                frames_per_second < self._settings.slow_ratio * asked,
                f"{frames_per_second:.3g} frames per second come, {asked:g} are asked for",
                {"frame_rate": frames_per_second, "asked": asked},
            )
        change = self._step(CameraFault.SLOW, look, seconds)
        return [] if change is None else [change]

    def status(self) -> dict[str, Any]:
        """What there is to show, as JSON values."""
        baseline, wanted = self.baseline, self._settings.baseline_frames
        return {
            "faults": [fault.value for fault in self.faults],
            "baseline": "learnt" if baseline is not None else f"learning, {self._learner.frames} of {wanted} frames",
            "unobservable": [] if baseline is None else self._unobservable(baseline),
            "measured": {name: round(value, 4) for name, value in self._figures.items() if math.isfinite(value)},
            "normal": {} if baseline is None else self._normal(baseline),
            "looks": self._looks,
            "counters": {fault.value: lasting.entered for fault, lasting in self._lasting.items()},
        }

    def _unobservable(self, baseline: Baseline) -> list[str]:
        found = []
        if math.isnan(self._sharpness_of(baseline)) and CameraFault.BLURRED in self._lasting:
            found.append(CameraFault.BLURRED.value)
        if (self._view is None or not self._view.observable) and CameraFault.MOVED in self._lasting:
            found.append(CameraFault.MOVED.value)
        return found

    def _normal(self, baseline: Baseline) -> dict[str, float]:
        normal = {
            "brightness": self._settings.brightness or baseline.brightness,
            "clipped": baseline.clipped,
            "sharpness": self._sharpness_of(baseline),
        }
        return {name: round(value, 4) for name, value in normal.items() if math.isfinite(value)}

    def _sharpness_of(self, baseline: Baseline) -> float:
        return self._settings.sharpness or baseline.sharpness

    def _take_baseline(self, baseline: Baseline | None) -> None:
        self.baseline = baseline
        self._view = None if baseline is None else StaticView(baseline.still)

    def _step(self, fault: CameraFault, look: _Look, seconds: float) -> Change | None:
        lasting = self._lasting.get(fault)
        if lasting is None or not lasting.step(look.bad, seconds):
            return None
        return Change(fault, lasting.active, look.text, look.figures or {})

    def _look_frozen(self, sample: Sample) -> _Look:
        now = points(sample)
        shares = [share_changed(now, before) for before in self._recalled if before.size == now.size]
        self._recalled.append(now)
        known = [share for share in shares if share is not None]
        if not known:
            return _NOTHING
        least = min(known)
        self._figures["changed"] = least
        return _Look(
            least < self._settings.frozen_share,
            f"{least:.2%} of the pixels differ from an earlier frame: less than any sensor's noise",
            {"changed": least},
        )

    def _look_dark(self, sample: Sample) -> _Look:
        mean, high = brightness(sample)
        self._figures["brightness"] = mean
        normal = self._settings.brightness or (math.nan if self.baseline is None else self.baseline.brightness)
        # Comparisons with NaN are false: before anything was learnt the fixed level decides alone.
        bad = high < self._settings.dark_level or mean < self._settings.dark_ratio * normal
        return _Look(bad, f"the mean luma is {mean:.3g}, the 99th percentile {high:g}", {"brightness": mean})

    def _look_overexposed(self, sample: Sample) -> _Look:
        share = share_clipped(sample)
        self._figures["clipped"] = share
        if self.baseline is None:
            # A backlight clips most of a good picture: until it is learnt, only a picture without anything is too much.
            return _Look(share > NEARLY_ALL, f"{share:.0%} of the pixels are clipped", {"clipped": share})
        usual = self.baseline.clipped
        limit = min(usual + self._settings.overexposed_share, NEARLY_ALL)
        return _Look(share > limit, f"{share:.0%} of the pixels are clipped, {usual:.0%} usually", {"clipped": share})

    def _look_blurred(self, sample: Sample) -> _Look:
        found = sharpness(sample)
        self._figures["sharpness"] = math.nan if found is None else found
        if self.baseline is None and self._settings.sharpness is None:
            return _NOTHING
        normal = self._settings.sharpness or (math.nan if self.baseline is None else self._sharpness_of(self.baseline))
        if math.isnan(normal):
            return _NOTHING
        if found is None:
            lost = self.baseline is not None and self.baseline.edges_always
            return _Look(True, "no edge is left that could be measured", {}) if lost else _NOTHING
        return _Look(
            found < self._settings.blurred_ratio * normal,
            f"edges have a sharpness of {found:.2g}, usually {normal:.2g}",
            {"sharpness": found, "usual": normal},
        )

    def _look_moved(self, sample: Sample, *, unlit: bool) -> _Look:
        if CameraFault.MOVED not in self._lasting:
            return _NOTHING
        self._edges.take(sample.thumb)
        view = self._view
        if view is None or not view.observable or unlit or not self._edges.settled:
            return _NOTHING
        still = self._edges.still()
        if still.shape != view.learnt.shape:
            return _NOTHING
        shift = view.locate(still)
        pixels = math.hypot(shift.x, shift.y) * sample.scale
        self._figures |= {"in_place": shift.in_place, "shift_pixels": pixels if shift.found >= FOUND else math.nan}
        limit = self._settings.moved_share * sample.frame_shape[1]
        shifted = shift.found >= FOUND and pixels > limit and shift.in_place < BETTER_ELSEWHERE * shift.found
        lost = shift.in_place < IN_PLACE and shift.fresh >= FRESH
        if not (shifted or lost or self._lasting[CameraFault.MOVED].active):
            self._forget_moving(view)
        text = (
            f"what stands still is {pixels:.0f} pixels from where it was learnt"
            if shift.found >= FOUND
            else f"{max(0.0, shift.in_place):.0%} of what stands still is where it was learnt"
        )
        return _Look(shifted or lost, text, {"in_place": shift.in_place, "shift_pixels": pixels})

    def _forget_moving(self, view: StaticView) -> None:
        if view.leave_out(self._edges.moving()) and self.baseline is not None:
            self.baseline = replace(self.baseline, still=view.learnt)
            self.baseline_changed = True
