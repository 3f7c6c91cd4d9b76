"""A router for the head of any method: which of a run's products an image shows, beside the map, which stays as it is.

It knows taps and products; it must not know what a head does with them. Nothing in it is trained by steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import skip_init

from edge.errors import DataError
from trainer.methods.adapted_moe.fit import in_another_light
from trainer.methods.adapted_moe.model import closeness
from trainer.methods.adapted_moe.routing import RouterSpace
from trainer.methods.base import Head
from trainer.methods.patches import patch_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from trainer.methods.base import Features

ROUTER = "product_router"
TAPS = ("s8", "s16")
WHITENING = 1.0
"""Added to every eigenvalue of the covariance within products, as a share of their mean: few images measure few."""
MARGIN = 2.5
"""The floor's distance from a centre, squared, over that of the farthest held-out good tile.

Six generated products, 32 images to learn from and 8 held out of each, five or three of them known: of known test
images 98 of 100 stay below 1.8 and all below 2.1, defective ones too; every image of an unknown one is beyond 4.3.
"""
COPIES, LIGHT, NOISE = 32, 0.05, 3.0
"""Tiles of each product that are shown in another light, how far it goes, and the deviation of their noise."""
_BATCH = 32


class ProductRouter(nn.Module):
    """From the mean patch feature of an image to how near it is to each product.

    Args:
        channels: D of what is pooled.
        count: P, products.
    """

    centre: torch.Tensor
    floor: torch.Tensor

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        # skip_init: the global generator is not ours to advance.
        self.embed = skip_init(nn.Linear, channels, channels)
        self.register_buffer("centre", torch.zeros(count, channels))
        self.register_buffer("floor", torch.zeros(count))

    def closeness(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return minus the mean squared distance to every product's centre, float32 [N, P], of [N, D]."""
        return closeness(self.embed(pooled), self.centre)

    def forward(self, *taps: torch.Tensor) -> torch.Tensor:
        """Return closeness less the floor of the nearest, float32 [N, P]; below 0 everywhere: none of them.

        Args:
            taps: float32 [N, C, h, w] each, those of ``TAPS``.
        """
        close = self.closeness(pooled(*taps))
        return close - self.floor.index_select(0, close.argmax(1))[:, None]


def pooled(*taps: torch.Tensor) -> torch.Tensor:
    """Return the mean patch feature float32 [N, D] of each tile."""
    return torch.cat([patch_mean(tap).mean((2, 3)) for tap in taps], 1)


@dataclass(frozen=True)
class Shown:
    """Good tiles of several products, for a router to learn from or to be set by.

    Attributes:
        features: of the tiles, with ``products``.
        tiles: uint8 [n, H, W, 3] RGB, row for row.
    """

    features: Features
    tiles: npt.NDArray[np.uint8]


@torch.no_grad()
def fit_router(
    known: Shown, held_out: Shown, count: int, extract: Callable[[npt.NDArray[np.uint8]], Features], *, seed: int
) -> ProductRouter:
    """Make a router in closed form: whitened by what varies within products, each product's mean its centre.

    Copies of the tiles in another light, a little blurred and noisy, vary too, so that a lamp makes no other product.
    The floor of a product is ``MARGIN`` times as far from its centre as the farthest of its held-out tiles and their
    copies: that many are known good ones, and nothing else is known of what is none of the products.

    Args:
        known: training images; every product at least once.
        held_out: other good images of the same products.
        count: P.
        extract: see :class:`trainer.methods.base.FitContext`.
        seed: of the copies.

    Raises:
        DataError: the features say no products, or are not finite.
    """
    rng = np.random.default_rng((seed, count))
    (points, labels), (others, theirs) = (_with_copies(one, count, extract, rng) for one in (known, held_out))
    if not (torch.isfinite(points).all() and torch.isfinite(others).all()):
        raise DataError("features of the training images are not finite; check the images")
    space = RouterSpace.closed_form(points, labels, count, WHITENING)
    router = ProductRouter(points.shape[1], count)
    router.embed.load_state_dict(space.embed.state_dict())
    router.centre.copy_(space.centres)
    own = router.closeness(others).gather(1, theirs[:, None])[:, 0]
    router.floor.copy_(torch.stack([MARGIN * own[theirs == product].min() for product in range(count)]))
    return router.eval().requires_grad_(requires_grad=False)


def _with_copies(
    shown: Shown, count: int, extract: Callable[[npt.NDArray[np.uint8]], Features], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean patch features [m, D] and products [m] of tiles, and of copies of some of each product."""
    labels = shown.features.products
    if labels is None or len(labels.unique()) != count:
        raise DataError("a router needs good images of every product, and to know which is which; name the products")
    own = [np.flatnonzero((labels == product).numpy()) for product in range(count)]
    rows = np.concatenate([one[np.linspace(0, len(one) - 1, min(COPIES, len(one))).round().astype(int)] for one in own])
    copies = extract(np.stack([_copy(shown.tiles[row], rng) for row in rows]))
    return torch.cat([_pooled(shown.features), _pooled(copies)]), torch.cat([labels, labels[torch.from_numpy(rows)]])


def _copy(tile: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    lit = in_another_light(tile, LIGHT, rng)
    noisy = lit + rng.uniform(0, NOISE) * rng.standard_normal(lit.shape, dtype=np.float32)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


class Routed(Head):
    """What a head becomes with a router: the same head with one output more. See :func:`with_router`."""

    own_taps: int

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what the head returns, and ``route`` float32 [N, P] behind it.

        Args:
            inputs: the head's taps, those that only the router needs, and the products, where the head takes them.
        """
        count = len(self.tap_names)
        found = super().forward(*inputs[: self.own_taps], *inputs[count:])
        by_name = dict(zip(self.tap_names, inputs, strict=False))
        return *found, self.get_submodule(ROUTER)(*(by_name[name] for name in TAPS))


def has_route(head: Head) -> bool:
    """Whether a head names the sub-class that it sees by itself: one expert for each."""
    return isinstance(head, Routed) or bool(getattr(head, "subclasses", ()))


def with_router(head: Head, router: ProductRouter) -> Head:
    """Give a head a router, in place.

    It stays the head of its method, with the names of its modules and states, and whatever else it offers.
    """
    own = tuple(head.tap_names)
    head.__class__ = type(f"Routed{type(head).__name__}", (Routed, type(head)), {})
    assert isinstance(head, Routed)
    head.own_taps = len(own)
    head.tap_names = (*own, *(name for name in TAPS if name not in own))
    # Distances of near values: their product costs nothing and is not rounded.
    extra: Any = (*getattr(head, "float_ops", ()), ROUTER)
    head.float_ops = extra
    head.add_module(ROUTER, router)
    return head


def split_tensors(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], ProductRouter | None]:
    """Take a router's tensors out of a head's.

    Returns:
        The head's own tensors, and the router where there is one.

    Raises:
        DataError: the tensors are not a router's.
    """
    own = {name: values for name, values in tensors.items() if not name.startswith(f"{ROUTER}.")}
    rest = {name.removeprefix(f"{ROUTER}."): values for name, values in tensors.items() if name not in own}
    if not rest:
        return own, None
    try:
        count, channels = rest["centre"].shape
        router = ProductRouter(int(channels), int(count))
        router.load_state_dict(rest)
    except (KeyError, ValueError, RuntimeError) as error:
        raise DataError(f"these tensors are no router ({error}); train again") from error
    return own, router.eval().requires_grad_(requires_grad=False)


def tap_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the taps that a head of ``names`` needs together with a router."""
    return tuple(dict.fromkeys((*names, *TAPS)))


def _pooled(features: Features) -> torch.Tensor:
    cpu = torch.device("cpu")
    return torch.cat([pooled(*taps) for taps in features.batches(TAPS, _BATCH, device=cpu)])
