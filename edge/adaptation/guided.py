"""GuidedDetector: a detector as one camera uses it, each frame seen as the camera's follower says.

It must not know how moments are followed, nor what becomes of a frame that is refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from edge.adaptation.look import PLAIN
from edge.adaptation.routing import nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from edge.adaptation.look import Look
    from edge.frames import Frame, Prediction
    from edge.inference.detector import Detector

    Route = npt.NDArray[np.float32]


class Guide(Protocol):
    """What :class:`~edge.adaptation.follower.Follower` or :class:`~edge.products.guide.ProductGuide` says of frames.

    It is cheap and never raises.
    """

    def look(self, frame: Frame) -> Look:
        """How a frame is to be seen; by the moment of its capture, where that says which product it shows."""
        ...

    def rerouted(self, route: Route | None, frame: Frame) -> Look | None:
        """How a frame is to be seen that shows another sub-class than it was seen as; None where it does not."""
        ...

    def refusal(self, route: Route | None, frame: Frame) -> str:
        """Why no expert may judge a frame; empty where one may."""
        ...


@dataclass(frozen=True, slots=True)
class Seen:
    """What was made of a frame.

    Attributes:
        prediction: of the detector.
        refusal: empty, or why the prediction says nothing of this product.
    """

    prediction: Prediction
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class PendingSight:
    """A frame that the engine works on; :attr:`result` waits for it, and must be called once."""

    frame: Frame
    result: Callable[[], Seen]


class GuidedDetector:
    """A detector and the guide of one camera. For one thread.

    A frame that shows another sub-class than it was seen as is judged again, once, as that one.

    Args:
        detector: may be shared with other cameras.
        guide: of this camera; without one every frame is seen as it is, and refused only where it shows no sub-class
            that the bundle has an expert for.
    """

    def __init__(self, detector: Detector, guide: Guide | None = None) -> None:
        self.detector = detector
        self._guide = guide

    def predict(self, frame: Frame) -> Seen:
        """Judge one frame.

        Raises:
            CaptureError: the frame does not fit the bundle's crop or is no colour image.
            EngineError: the engine gives up.
        """
        if self._guide is None:
            return _plain(self.detector.predict(frame))
        look = self._guide.look(frame)
        return self._seen(self._guide, self.detector.predict(frame, look), look)

    def begin(self, frame: Frame) -> PendingSight | None:
        """Let the engine begin with a frame; None where all requests for that are in use.

        Raises:
            CaptureError: the frame does not fit the bundle's crop or is no colour image.
            EngineError: the engine gives up.
        """
        guide = self._guide
        look = PLAIN if guide is None else guide.look(frame)
        pending = self.detector.begin(frame) if guide is None else self.detector.begin(frame, look)
        if pending is None:
            return None
        if guide is None:
            return PendingSight(frame, lambda: _plain(pending.result()))
        return PendingSight(frame, lambda: self._seen(guide, pending.result(), look))

    def _seen(self, guide: Guide, prediction: Prediction, look: Look) -> Seen:
        # A frame that was begun ahead may have been seen as what the camera showed before it changed over.
        frame = prediction.frame
        other = guide.rerouted(prediction.route, frame) or guide.look(frame)
        if other.expert == look.expert:
            return Seen(prediction, guide.refusal(prediction.route, frame))
        again = self.detector.predict(frame, other)
        again = dataclasses.replace(
            again,
            preprocess_ns=prediction.preprocess_ns + again.preprocess_ns,
            inference_ns=prediction.inference_ns + again.inference_ns,
        )
        refusal = guide.refusal(again.route, frame)
        if not refusal and again.route is not None and nearest(again.route) != other.expert:
            refusal = "unknown product: its sub-class changes with the light that is assumed"
        return Seen(again, refusal)


def _plain(prediction: Prediction) -> Seen:
    unknown = prediction.route is not None and nearest(prediction.route) is None
    return Seen(prediction, "unknown product: it is near to no sub-class of the bundle" if unknown else "")
