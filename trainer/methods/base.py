"""What every method is: a way to turn taps of good images into a head.

A method never sees test data. It gets the features of the training images, a seeded generator, and a validation
set made of held-out good images and of defects synthesised on them; whatever it chooses (a stopping point, a
pooling rule), it chooses there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from deploy.progress import Progress


class MethodConfig(BaseModel):
    """Settings of a method; each method subclasses it and gives ``quick`` and ``full`` presets."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Head(nn.Module):
    """A method's exported part: taps (and state) -> anomaly map.

    Attributes:
        tap_names: the taps that ``forward`` takes, in order.
        state_names: buffers that become named initialisers of the exported graph (a bank, prototypes).
        map_stride: input pixels per cell of the anomaly map.
        takes_product: whether ``forward`` takes one more tensor after the taps, int64 [N]: which product each tile
            shows, an index into the products that the head was fitted on.
        product_state: those of ``state_names`` whose first axis counts products: a prompt, prototypes of each.
    """

    tap_names: tuple[str, ...]
    state_names: tuple[str, ...] = ()
    map_stride: int
    takes_product: bool = False
    product_state: tuple[str, ...] = ()

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Judge taps.

        Args:
            taps: float32 [N, C, h, w] each, in the order of ``tap_names``; then the products, where it takes them.

        Returns:
            ``(anomaly_map,)`` float32 [N, H / map_stride, W / map_stride], raw, higher is more anomalous; or
            ``(anomaly_map, embedding)`` with embedding float32 [N, L, D], the patch rows that feed the memory; or
            either with a route float32 [N, E] behind it, see :data:`edge.inference.sessions.ROUTE`.
        """
        raise NotImplementedError


@runtime_checkable
class Adaptable(Protocol):
    """What a head may offer besides: to take in a few good images of what it is to judge next, without training.

    No gradient, no defect, no choice among candidates: what a box can do by itself once somebody says "these are good".
    The threshold stays as it was frozen, so an adapted head's scores must keep their scale: good images of the new kind
    should score as good images of the old ones did.
    """

    def adapted(self, good: Features, generator: torch.Generator) -> Head:
        """Return another head that has taken the images in; this one stays as it is.

        Args:
            good: taps of at least one good image.
            generator: a CPU generator, for every random choice.

        Raises:
            DataError: features that are not finite.
        """


@dataclass(frozen=True)
class Features:
    """Taps of a set of images, on the training device's reach.

    Attributes:
        taps: float16 or float32 [n, C, h, w] per tap name, on the CPU. n counts tiles: an image of T tiles gives T
            consecutive rows.
        tiles_per_image: T.
        groups: one name per image; images of one group are not independent.
        products: int64 [n], which product each tile shows; None where there is one product only.
    """

    taps: dict[str, torch.Tensor]
    tiles_per_image: int
    groups: npt.NDArray[np.str_]
    products: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(next(iter(self.taps.values())).shape[0])

    def batches(
        self, names: Sequence[str], size: int, *, device: torch.device, order: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield float32 batches of the named taps, in ``order`` (indices) or as stored.

        Args:
            names: tap names, in the order wanted.
            size: rows in a batch, >= 1; the last one may be smaller.
            device: where the batch should be.
            order: int64 indices to visit.
        """
        indices = torch.arange(len(self)) if order is None else order
        for start in range(0, len(indices), size):
            rows = indices[start : start + size]
            yield tuple(self.taps[name][rows].to(device, torch.float32, non_blocking=True) for name in names)


@dataclass(frozen=True)
class Validation:
    """Held-out good images and the same images with synthetic defects; never test data.

    Attributes:
        good: features of held-out good images.
        defective: features of images with synthetic defects.
        masks: bool [n, canvas_height, canvas_width] of the defective images.
    """

    good: Features
    defective: Features
    masks: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class FitContext:
    """What a method may use while fitting.

    Attributes:
        features: of the training images (good parts only).
        images: uint8 [n, H, W, 3] RGB, the tiles that ``features`` was computed from, row for row. What a method
            changes in them (synthetic defects, noise, a lamp) it sees through ``extract``.
        extract: taps of other tiles, uint8 [m, H, W, 3] RGB -> features of m rows, through the frozen trunk.
        validation: see :class:`Validation`.
        seed: every random choice derives from it.
        device: where to train.
        progress: to be called now and then.
        trunk_id: sha256 of the trunk's weights; what a method keeps between runs is kept under it. Empty: nothing is.
        subclasses: one name per training image (not per tile): its variant, line or lighting. None: all are alike.
            Of several products together they are the products.
        products: their names, to which ``Features.products`` are the indices; empty where there is one product only.
    """

    features: Features
    images: npt.NDArray[np.uint8]
    extract: Callable[[npt.NDArray[np.uint8]], Features]
    validation: Validation
    seed: int
    device: torch.device
    progress: Progress
    trunk_id: str = ""
    subclasses: npt.NDArray[np.str_] | None = None
    products: tuple[str, ...] = ()

    def generator(self) -> torch.Generator:
        """Return a CPU generator seeded for this run."""
        return torch.Generator().manual_seed(self.seed)


class Method(ABC):
    """A system that learns what good parts look like.

    Attributes:
        name: as on the command line.
        tap_names: taps of the shared trunk that it needs.
        uses_subclasses: whether it tells sub-classes apart, so that every one must be held out of as well.
    """

    name: ClassVar[str]
    tap_names: ClassVar[tuple[str, ...]]
    uses_subclasses: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def config(cls, preset: str) -> MethodConfig:
        """Return the settings of preset ``quick`` or ``full``."""

    @classmethod
    @abstractmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> Head:
        """Learn a head (in eval mode, on the CPU) from good images."""

    @classmethod
    @abstractmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> Head:
        """Rebuild a fitted head from its config and state dict.

        Raises:
            DataError: the tensors do not fit the config.
        """
