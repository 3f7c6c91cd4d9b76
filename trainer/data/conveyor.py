"""The embedded example: a web under a camera, generated or cut from photographs, with defects at known frames.

It knows surfaces, cameras and defects; it must not know detectors or how a replay is judged.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from deploy.progress import no_progress
from edge.errors import DataError
from trainer.data.camera import Light, Pose, illuminate, look, look_at_mask, sensor_noise
from trainer.data.images import new_folder, write_png
from trainer.data.surfaces import (
    KINDS,
    Crops,
    independent_crops,
    open_web,
    pieces,
    refuse_kind,
    replay_start,
    view_side,
)
from trainer.synthesis.image2d import FAMILIES, Defect, synthesise

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploy.progress import Progress
    from trainer.data.surfaces import Web

    Picture = npt.NDArray[np.uint8]

__all__ = ["KINDS", "Crops", "WebReplay", "independent_crops", "stamp", "write_default", "write_replay"]

DEFECT_SIZE = (0.03, 0.2)
"""Extent of the example's defects as a share of the diagonal of the surface in view."""

FRAMES_PER_DEFECT = 16
"""Fewest frames from one defect of a replay to the next: about 9 with it in view, then some good ones."""

_HALF = FRAMES_PER_DEFECT // 2
_HALF_CROSSING = 5  # frames from the middle of the picture to well outside
_USUAL_GAP = 30
_STEP = 0.117  # of a view, from frame to frame: no whole number of pixels
_MARGIN = 0.1  # of a view: defects inside it stay in the frame at every pose
_CONTRASTS = (0.5, 1.0)


@dataclass(frozen=True)
class WebReplay:
    """A written replay.

    Attributes:
        frames: folder of PNG files whose names sort in order of time.
        labels: one per frame: family of the defect in view, empty where there is none.
        truth: labels.csv, one row per frame: frame, file, defect (number from 1, empty without), family, and the
            bounding box x, y, w, h and area of the visible part in pixels.
    """

    frames: Path
    labels: tuple[str, ...]
    truth: Path


def write_default(
    out: Path,
    *,
    seed: int,
    kind: str,
    train: int = 120,
    test_good: int = 60,
    test_defective: int = 60,
    side: int = 256,
    progress: Progress = no_progress,
) -> Path:
    """Write an MVTec-style folder of an example, with exact masks and a meta.csv.

    Each image is its own drift, turn, light and noise of a piece of surface; the piece is its group. Training and
    test share no piece. Defects are put on the surface, before the camera; families take turns.

    Args:
        out: new or empty folder.
        seed: the same seed gives the same bytes.
        kind: one of ``KINDS``.
        train: images in train/good, >= 2.
        test_good: images in test/good, >= 0.
        test_defective: defective images, >= 0.
        side: height and width in pixels, 64..1024.
        progress: called after each image.

    Returns:
        ``out``.

    Raises:
        DataError: ``out`` holds files already or cannot be written.
        MissingExtraError: a photograph is asked for and scikit-image is not installed.
        ValueError: a value is out of range.
    """
    refuse_kind(kind)
    if train < 2 or min(test_good, test_defective) < 0 or not 64 <= side <= 1024:  # noqa: PLR2004
        raise ValueError(
            f"train {train} must be >= 2, test_good {test_good} and test_defective {test_defective} >= 0, "
            f"side {side} in 64..1024"
        )
    families = list(FAMILIES)
    plan = [("train", "good", i) for i in range(train)]
    plan += [("test", "good", i) for i in range(test_good)]
    plan += [("test", families[i % len(families)], i) for i in range(test_defective)]
    piece = pieces(kind, seed, side, train)
    piece("test", test_good + test_defective)  # refuses too many images before anything is written
    new_folder(out)
    rows = []
    for done, (split, label, index) in enumerate(plan, start=1):
        rng = np.random.default_rng((seed, KINDS.index(kind), done))
        # Good and defective test images of a generated web show different places.
        number = index + (test_good if label != "good" else 0)
        group, view = piece(split, number)
        defect = None if label == "good" else stamp(view, rng, family=label)
        pose = Pose.draw(rng)
        image = illuminate(look(view if defect is None else defect.image, pose, side), Light.draw(rng))
        name = f"{index:04d}.png"
        write_png(out / split / label / name, sensor_noise(image, rng))
        if defect is not None:
            mask = look_at_mask(defect.mask, pose, side).astype(np.uint8) * 255
            write_png(out / "ground_truth" / label / f"{index:04d}_mask.png", mask)
        rows.append([f"{split}/{label}/{name}", split, label, int(defect is not None), kind, group])
        progress(f"drawing {kind}", done, len(plan))
    _write_csv(out / "meta.csv", ["path", "split", "label", "anomaly", "condition", "group"], rows)
    return out


def write_replay(
    out: Path,
    *,
    seed: int,
    kind: str,
    frames: int = 240,
    defect_frames: Sequence[int] | None = None,
    side: int = 256,
    progress: Progress = no_progress,
) -> WebReplay:
    """Write a web in motion as a folder of frames, with the truth beside it.

    The web moves up by 0.117 of a view per frame, sways and turns a little; light breathes. A defect belongs to the
    surface and crosses the picture in about 9 frames. It lies on parts of the web that training never saw.

    Args:
        out: new or empty folder; gets ``frames/`` and ``labels.csv``.
        seed: the same as in :func:`write_default`, to see the same web.
        kind: one of ``KINDS``.
        frames: length of the replay.
        defect_frames: frames at which a defect is about in the middle, at least 16 apart and 8 from both ends; None
            puts one about every 30 frames.
        side: height and width in pixels, 64..1024.
        progress: called after each frame.

    Returns:
        The folder and its labels.

    Raises:
        DataError: ``out`` holds files already or cannot be written.
        MissingExtraError: a photograph is asked for and scikit-image is not installed.
        ValueError: a value is out of range.
    """
    refuse_kind(kind)
    if not 64 <= side <= 1024:  # noqa: PLR2004
        raise ValueError(f"side {side} is outside 64..1024")
    phase = np.random.default_rng((seed, 2)).uniform(0, 2 * np.pi, 4)
    film = _Film(open_web(kind, seed, side), view_side(kind, side), side, replay_start(kind), phase)
    centres = film.centres(frames) if defect_frames is None else list(defect_frames)
    film.refuse(frames, centres)
    new_folder(out)
    scars = [
        _Scar.put(film.web, film.n, film.place(centre)[0], np.random.default_rng((seed, KINDS.index(kind), 1, number)))
        for number, centre in enumerate(centres)
    ]
    rows: list[list[object]] = []
    for frame in range(frames):
        image, masks = film.shoot(scars, frame)
        name = f"{frame:05d}.png"
        rng = np.random.default_rng((seed, KINDS.index(kind), 3, frame))
        write_png(out / "frames" / name, sensor_noise(image, rng))
        rows.append([frame, name, *_truth(scars, masks)])
        progress(f"filming {kind}", frame + 1, frames)
    _write_csv(out / "labels.csv", ["frame", "file", "defect", "family", "x", "y", "w", "h", "area"], rows)
    return WebReplay(out / "frames", tuple(str(row[3]) for row in rows), out / "labels.csv")


def stamp(view: Picture, rng: np.random.Generator, *, family: str | None = None) -> Defect:
    """Put a defect on a view, far enough inside to stay in the frame at every pose.

    Args:
        view: uint8 [n, n, 3], n >= 24.
        rng: source of all choices.
        family: one of ``FAMILIES``; None draws one.

    Returns:
        The defect, its image and mask of the view's size.
    """
    margin = int(np.ceil(_MARGIN * len(view)))
    inner = slice(margin, len(view) - margin)
    made = synthesise(
        np.ascontiguousarray(view[inner, inner]),
        rng=rng,
        family=family,
        contrast=rng.uniform(*_CONTRASTS),
        size=DEFECT_SIZE,
    )
    image, mask = view.copy(), np.zeros(view.shape[:2], np.bool_)
    image[inner, inner], mask[inner, inner] = made.image, made.mask
    return Defect(image, mask, made.family, made.contrast)


@dataclass(frozen=True)
class _Scar:
    """A defect as part of a web: what it adds to the rows from ``top`` on."""

    top: int
    run: int
    change: npt.NDArray[np.int16]
    mask: npt.NDArray[np.bool_]
    family: str

    @classmethod
    def put(cls, web: Web, n: int, top: int, rng: np.random.Generator) -> _Scar:
        view = web.view(top, n)
        defect = stamp(view, rng)
        return cls(top, web.run, defect.image.astype(np.int16) - view, defect.mask, defect.family)

    def on(self, view: Picture, position: int) -> tuple[Picture, npt.NDArray[np.bool_]]:
        """Add the part of it that lies in a view, and return that part's mask."""
        n, shift = len(view), self.top - position
        mask = np.zeros(view.shape[:2], np.bool_)
        if abs(shift) >= n or self.top // self.run != position // self.run:
            return view, mask
        here, there = slice(max(shift, 0), n + min(shift, 0)), slice(max(-shift, 0), n - max(shift, 0))
        view = view.copy()
        view[here] = (view[here] + self.change[there]).astype(np.uint8)
        mask[here] = self.mask[there]
        return view, mask


@dataclass(frozen=True)
class _Film:
    """A camera over a moving web.

    Attributes:
        web: what moves.
        n: height and width of a view.
        side: height and width of a frame.
        start: row at frame 0.
        phase: of sway, turn, breath and lean, float64 [4] in radians.
    """

    web: Web
    n: int
    side: int
    start: int
    phase: npt.NDArray[np.float64]

    def place(self, frame: int) -> tuple[int, float]:
        """Return the whole row nearest to a frame's position, and the fraction of a pixel that is left."""
        exact = frame * _STEP * self.n
        return self.start + round(exact), exact - round(exact)

    def shoot(self, scars: Sequence[_Scar], frame: int) -> tuple[Picture, list[npt.NDArray[np.bool_]]]:
        """Return a frame without noise, and each scar's mask in it."""
        position, rest = self.place(frame)
        view = self.web.view(position, self.n)
        sway, turn, breath, lean = np.sin(self.phase + 2 * np.pi * frame / np.array([61.0, 143.0, 97.0, 211.0]))
        pose = Pose(dx=0.008 * float(sway), dy=rest / self.n, degrees=0.6 * float(turn))
        nothing = np.zeros((self.side, self.side), np.bool_)
        masks = []
        for scar in scars:
            view, mask = scar.on(view, position)
            masks.append(look_at_mask(mask, pose, self.side) if mask.any() else nothing)
        light = Light(gain=1 + 0.04 * float(breath), slope_x=0.05 * float(lean), slope_y=0.03)
        return illuminate(look(view, pose, self.side), light), masks

    def clear(self, frame: int) -> bool:
        """Say whether a defect in the middle of this frame crosses the picture before the web starts anew."""
        ends = (self.place(max(frame + shift, 0))[0] // self.web.run for shift in (-_HALF_CROSSING, _HALF_CROSSING))
        return len(set(ends)) == 1

    def centres(self, frames: int) -> list[int]:
        """Spread defects, about one every 30 frames."""
        found: list[int] = []
        for frame in range(_HALF, frames - _HALF + 1):
            due = found[-1] + _USUAL_GAP if found else min(_USUAL_GAP // 2, frames // 2)
            if frame >= due and self.clear(frame):
                found.append(frame)
        return found

    def refuse(self, frames: int, centres: Sequence[int]) -> None:
        """Raise ValueError if defects would overlap, or be cut off by an end or by the web starting anew."""
        gaps = np.diff(centres) if len(centres) > 1 else np.array([FRAMES_PER_DEFECT])
        if not centres or centres[0] < _HALF or centres[-1] > frames - _HALF or int(gaps.min()) < FRAMES_PER_DEFECT:
            raise ValueError(
                f"{frames} frames with defects at {list(centres)}: there must be some, in order, {FRAMES_PER_DEFECT} "
                f"frames apart and {_HALF} from both ends"
            )
        cut_off = [frame for frame in centres if not self.clear(frame)]
        if cut_off:
            allowed = [frame for frame in range(_HALF, frames - _HALF + 1) if self.clear(frame)]
            raise ValueError(f"defects at {cut_off} would be cut off where the photograph ends; choose from {allowed}")


def _truth(scars: Sequence[_Scar], masks: Sequence[npt.NDArray[np.bool_]]) -> Sequence[object]:
    """Return defect, family, x, y, w, h, area of the scar that shows most."""
    areas = [int(mask.sum()) for mask in masks]
    if not any(areas):
        return [""] * 7
    number = int(np.argmax(areas))
    x, y, w, h = cv2.boundingRect(masks[number].astype(np.uint8))
    return [number + 1, scars[number].family, x, y, w, h, areas[number]]


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another folder"
        ) from error
