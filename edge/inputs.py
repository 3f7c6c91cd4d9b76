"""What a frame is turned into for the networks: of an image, of a depth map, of a window of a signal.

Part of the manifest and of the identity of an embedding. Knows sizes and units, not how arrays are made of frames.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Taps are addressed by the stride of their grid; strides 2, 4, 8, 16 of the shared trunk.
STRIDE_MULTIPLE = 32
_XYZ = 3
_MAX_VALUES = 2**24  # of one window: 64 MiB


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Modality(str, Enum):
    """What ``Frame.image`` is.

    ``image``: uint8 [H, W, 3] BGR. ``depth``: float32 [H, W, 3], XYZ in metres in the sensor's frame (x to the right,
    y down, z away from it), NaN where nothing was measured. ``signal``: float32 [K, Q], K channels by Q samples, in
    the unit of the bundle, NaN where samples were lost.
    """

    IMAGE = "image"
    DEPTH = "depth"
    SIGNAL = "signal"


class Crop(_Model):
    """A rectangle of the camera frame, in pixels."""

    x: int = Field(ge=0)
    y: int = Field(ge=0)
    w: int = Field(ge=1)
    h: int = Field(ge=1)


class Tiles(_Model):
    """How the resized crop is cut into network inputs.

    ``rows`` x ``cols`` tiles of ``Preprocessing.height`` x ``width`` pixels that overlap by ``overlap`` pixels.
    """

    rows: int = Field(1, ge=1, le=16)
    cols: int = Field(1, ge=1, le=16)
    overlap: int = Field(0, ge=0, multiple_of=STRIDE_MULTIPLE)


class Resize(str, Enum):
    """How a crop becomes the canvas.

    ``linear``: one bilinear resize (aliases beyond a factor of 2). ``pyramid``: halve by 2x2 means while the crop
    is at least twice the canvas in both directions, then bilinear; a tenth of the cost of an area resize. ``valid``:
    of depth maps: the mean of the valid points of a canvas cell, none where fewer than half are valid.
    """

    LINEAR = "linear"
    PYRAMID = "pyramid"
    VALID = "valid"


class Preprocessing(_Model):
    """From a camera frame to network inputs; part of the identity of an embedding.

    The crop (or the whole frame) is resized to a canvas of ``canvas_height`` x ``canvas_width`` pixels, converted to
    RGB and cut into tiles of ``height`` x ``width``. Normalisation is inside the trunk. A depth map (``resize:
    valid``) keeps its metres and is float32.
    """

    height: int = Field(ge=STRIDE_MULTIPLE, multiple_of=STRIDE_MULTIPLE)
    width: int = Field(ge=STRIDE_MULTIPLE, multiple_of=STRIDE_MULTIPLE)
    crop: Crop | None = None
    tiles: Tiles = Tiles()
    resize: Resize = Resize.PYRAMID

    @model_validator(mode="after")
    def _overlap_fits(self) -> Preprocessing:
        if self.tiles.overlap >= min(self.height, self.width):
            raise ValueError("tiles.overlap must be smaller than the tile")
        return self

    @property
    def canvas_height(self) -> int:
        """Height in pixels of the resized crop."""
        return self.tiles.rows * (self.height - self.tiles.overlap) + self.tiles.overlap

    @property
    def canvas_width(self) -> int:
        """Width in pixels of the resized crop."""
        return self.tiles.cols * (self.width - self.tiles.overlap) + self.tiles.overlap

    @property
    def canvas_shape(self) -> tuple[int, ...]:
        """Shape of a canvas."""
        return (self.canvas_height, self.canvas_width, _XYZ)

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of one network input."""
        return (self.height, self.width, _XYZ)

    @property
    def dtype(self) -> Literal["uint8", "float32"]:
        """Of canvas and tiles."""
        return "float32" if self.resize is Resize.VALID else "uint8"


class SignalPreprocessing(_Model):
    """From a window of a signal to the network's input, which is the window itself: float32 [channels, samples].

    Samples that were lost are filled from their neighbours, see :func:`edge.inference.signals.signal_canvas`;
    normalisation is inside the trunk. It is read like a :class:`Preprocessing` of one tile without a crop.
    """

    channels: int = Field(ge=1, le=4096)
    samples: int = Field(ge=2, le=1 << 20)

    @property
    def crop(self) -> Crop | None:
        """None: a window has no crop."""
        return None

    @property
    def tiles(self) -> Tiles:
        """One."""
        return Tiles()

    @property
    def height(self) -> int:
        """Channels."""
        return self.channels

    @property
    def width(self) -> int:
        """Samples."""
        return self.samples

    @property
    def canvas_height(self) -> int:
        """Channels."""
        return self.channels

    @property
    def canvas_width(self) -> int:
        """Samples."""
        return self.samples

    @property
    def canvas_shape(self) -> tuple[int, ...]:
        """Shape of a canvas."""
        return (self.channels, self.samples)

    @property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of one network input."""
        return (self.channels, self.samples)

    @property
    def dtype(self) -> Literal["uint8", "float32"]:
        """Of canvas and tiles."""
        return "float32"


Inputs = Preprocessing | SignalPreprocessing
"""From a frame to network inputs, of whichever modality."""


class SignalLayout(_Model):
    """The signal that a bundle judges, as a source must give it.

    ``window`` samples of every channel are judged at once, every ``hop`` samples; neighbouring windows overlap by
    their difference. A window of which more than ``max_lost``, or all of one channel, was lost is not judged.
    """

    channels: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(min_length=1, max_length=4096)
    unit: str = Field(min_length=1, max_length=32, description="Of all channels, such as mV, g or A.")
    rate_hz: float = Field(gt=0, le=1e7, allow_inf_nan=False, description="Samples per second of each channel.")
    window: int = Field(ge=2, le=1 << 20, description="Samples per window.")
    hop: int = Field(ge=1, description="Samples from the begin of one window to that of the next, at most the window.")
    max_lost: float = Field(
        0.05, ge=0, lt=1, description="Largest share of a window's values that may be lost for it to be judged."
    )
    low_hz: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="The trunk takes off what is slower; null: nothing."
    )
    high_hz: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="The trunk takes off what is faster; null: nothing."
    )

    @model_validator(mode="after")
    def _windows_cover_the_signal(self) -> SignalLayout:
        if self.hop > self.window:
            raise ValueError(f"hop {self.hop} leaves samples between windows of {self.window} unjudged; at most that")
        if len(set(self.channels)) != len(self.channels):
            raise ValueError("two channels have one name; give each its own")
        if self.low_hz is not None and self.low_hz * self.window_s < 1:
            raise ValueError(
                f"a window of {self.window_s:g} s is too short to take off what is below {self.low_hz:g} Hz"
            )
        if self.high_hz is not None and not (self.low_hz or 0) < self.high_hz < self.rate_hz / 2:
            raise ValueError(f"high_hz {self.high_hz:g}: above low_hz, and below half of {self.rate_hz:g} Hz")
        if len(self.channels) * self.window > _MAX_VALUES:
            raise ValueError(f"a window has {len(self.channels) * self.window} values, {_MAX_VALUES} are allowed")
        return self

    @property
    def preprocessing(self) -> SignalPreprocessing:
        """What belongs into the manifest beside it."""
        return SignalPreprocessing(channels=len(self.channels), samples=self.window)

    @property
    def window_s(self) -> float:
        """Seconds of one window."""
        return self.window / self.rate_hz


class DepthLayout(_Model):
    """The depth maps that a bundle judges, in metres.

    Points nearer than ``near_m`` or further than ``far_m`` (along z) count as not measured. A frame with fewer than
    ``min_valid`` of its canvas cells measured is not judged.
    """

    pitch_m: float = Field(
        gt=0, allow_inf_nan=False, description="Nominal distance of neighbouring points of the canvas, in metres."
    )
    near_m: float = Field(0.0, ge=0, allow_inf_nan=False, description="Nearest z that is measured, in metres.")
    far_m: float | None = Field(None, gt=0, allow_inf_nan=False, description="Furthest z, in metres; any where absent.")
    min_valid: float = Field(0.5, gt=0, le=1, description="Smallest share of valid canvas cells for a frame to judge.")

    @model_validator(mode="after")
    def _range_is_one(self) -> DepthLayout:
        if self.far_m is not None and self.far_m <= self.near_m:
            raise ValueError("far_m must be larger than near_m")
        return self


def check_layouts(modality: Modality, inputs: Inputs, signal: SignalLayout | None, depth: DepthLayout | None) -> None:
    """Raise a ValueError where layouts and inputs do not belong to a modality."""
    wanted = {Modality.SIGNAL: signal, Modality.DEPTH: depth}
    for of, layout in wanted.items():
        if (layout is not None) != (of is modality):
            missing = "lacks" if layout is None else "has"
            raise ValueError(f"a bundle of modality {modality.value} {missing} a layout of a {of.value}")
    if isinstance(inputs, SignalPreprocessing) != (modality is Modality.SIGNAL):
        raise ValueError(f"the preprocessing is not one of modality {modality.value}")
    if isinstance(inputs, Preprocessing) and (inputs.resize is Resize.VALID) != (modality is Modality.DEPTH):
        raise ValueError(f"resize {inputs.resize.value} is not for modality {modality.value}; `valid` is that of depth")
    if signal is not None and inputs != signal.preprocessing:
        raise ValueError("the preprocessing has other channels or samples than the signal's layout")
