"""Detectors: one per distinct bundle of a box, handed out by camera. Knows settings and bundles, no frames."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import cv2

from edge.bundle import Bundle
from edge.inference.detector import Detector
from edge.inference.engines import Accelerator, Provider
from edge.process_memory import give_back_freed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from edge.settings import BoxSettings

ENGINES_FOLDER = "engines"
"""Inside state_dir: engines that TensorRT built for this GPU, minutes to build and hundreds of megabytes."""


class Detectors:
    """What judges the cameras of a box. Made by :meth:`open`; never changed, so it may be read from any thread.

    A bundle is opened once however many cameras name it and by whatever path, links followed; a trunk is compiled
    once however many bundles hold it.

    Attributes:
        default: of the box's own bundle, whose memory may change.
        all: each once, the default first.
        runtime: what they were asked to run on.
    """

    default: Detector
    all: tuple[Detector, ...]

    def __init__(
        self, by_path: Mapping[Path, Detector], default: Path, cameras: Mapping[str, Path], runtime: object = None
    ) -> None:
        """Put detectors together.

        Args:
            by_path: the detector of each bundle folder, by its path with links followed.
            default: folder of the box's own bundle.
            cameras: folder of the bundle of each enabled camera, by name.
            runtime: what they were asked to run on.
        """
        self._by_path = dict(by_path)
        self.runtime = runtime
        self._cameras = {name: self._by_path[path] for name, path in cameras.items()}
        self.default = self._by_path[default]
        self.all = tuple({id(one): one for one in (self.default, *self._cameras.values())}.values())

    @classmethod
    def open(cls, settings: BoxSettings, *, reuse: Detectors | None = None) -> Detectors:
        """Open the bundles that the box and its enabled cameras name.

        Args:
            settings: of the box.
            reuse: detectors that are in use: a bundle among them is not opened again where the settings ask for the
                same engine, precision and threads. A folder is known by its path with links followed, so a link that
                was switched to another bundle gives a new detector.

        Raises:
            BundleError: a bundle is damaged, or not calibrated for the engine or precision asked for.
            EngineError: no engine runs it.
            MissingExtraError: no engine, or not the one asked for, is installed.
        """
        default = settings.bundle.resolve()
        cameras = {
            camera.name: default if camera.bundle is None else camera.bundle.resolve()
            for camera in settings.cameras
            if camera.enabled
        }
        accelerator = _accelerator(settings)
        runtime = (settings.engine, settings.precision, settings.threads, accelerator)
        found: dict[Path, Detector] = {}
        by_id: dict[str, Detector] = {}
        for path in dict.fromkeys((default, *cameras.values())):
            known = reuse.at(path) if reuse is not None and reuse.runtime == runtime else None
            if known is None:
                bundle = Bundle.open(path)
                # Two folders of the same content are one bundle.
                known = by_id.get(bundle.id) or Detector.open(
                    bundle,
                    engine=settings.engine,
                    precision=settings.precision,
                    threads=settings.threads,
                    streams=_streams(len(cameras)),
                    accelerator=accelerator,
                )
            found[path] = by_id[known.bundle.id] = known
        if _streams(len(cameras)) > 1:
            # Each core has a camera's thread already: more of OpenCV's would only take turns with them.
            cv2.setNumThreads(1)
        # What compiling needed and the graphs do not.
        give_back_freed()
        return cls(found, default, cameras, runtime)

    @property
    def fallback_reason(self) -> str:
        """Why another engine or precision judges than was asked for, of the bundles where that is so; else empty."""
        told = [(one.bundle.manifest.product, one.status.fallback_reason) for one in self.all]
        if len(self.all) == 1:
            return told[0][1]
        return "; ".join(f"{product}: {reason}" for product, reason in told if reason)

    def __iter__(self) -> Iterator[Detector]:
        return iter(self.all)

    def at(self, path: Path) -> Detector | None:
        """Return the detector of a bundle's folder, links followed; None where it was not opened."""
        return self._by_path.get(path.resolve())

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the enabled cameras."""
        return tuple(self._cameras)

    def of(self, camera: str) -> Detector:
        """Return the detector that judges an enabled camera.

        Raises:
            KeyError: no enabled camera of the settings has that name.
        """
        return self._cameras[camera]

    def shares_memory(self, camera: str) -> bool:
        """Whether a camera is judged by the box's own bundle, and so by the memory that may change."""
        return self._cameras.get(camera) is self.default


def _accelerator(settings: BoxSettings) -> Accelerator:
    if settings.provider is not Provider.TENSORRT:
        return Accelerator(settings.provider)
    # Rows for a fleet carry the id of float32 numerics, which must then be what made them.
    float16 = settings.precision is None and settings.federation is None
    return Accelerator(settings.provider, float16=float16, cache=settings.state_dir / ENGINES_FOLDER)


def _streams(cameras: int) -> int:
    """One camera wants the lowest latency; several share the cores side by side."""
    return max(1, min(cameras, len(os.sched_getaffinity(0))))
