"""The Adapted-MoE head: which sub-class an image shows, its rows adapted to that expert's moments, and its judgement.

A pure module with every expert in one graph, chosen by an index; it does not know how anything in it was learnt.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from edge.errors import DataError
from trainer.methods.adapted_moe.adapt import Adapt, Moments, unit
from trainer.methods.base import Head
from trainer.methods.memory.reduce import greedy_coreset
from trainer.methods.patches import enlarge, patch_mean

if TYPE_CHECKING:
    from trainer.methods.base import Features

TAP_NAMES = ("s8", "s16")
MAP_STRIDE = 8
LEAK = 0.2
ROUTING = ("route_centre", "route_floor")
MOMENTS = ("expert_mean", "expert_std")
ADAPTATION = ("tta_mean", "tta_std", "tta_mode")
BANK = ("bank", "bank_scale")
_ADAPTED_SHARE = 4  # a bank grows by at most a quarter, and its search with it
DISCRIMINATOR = ("hidden_weight", "hidden_bias", "logit_weight")


def patches(s8: torch.Tensor, s16: torch.Tensor) -> torch.Tensor:
    """Return patch features float32 [N, C, h, w] on the stride-8 grid of taps [N, C8, h, w] and [N, C16, h/2, w/2].

    Raises:
        DataError: the grids do not fit.
    """
    if (2 * s16.shape[2], 2 * s16.shape[3]) != tuple(s8.shape[2:]):
        raise DataError(
            f"tap s8 is {tuple(s8.shape[2:])}, s16 is {tuple(s16.shape[2:])}; "
            "make the input's height and width multiples of 16"
        )
    return torch.cat([patch_mean(s8), enlarge(patch_mean(s16), 2)], 1)


class Projection(nn.Module):
    """One linear layer on patch features, each tap's part on its own grid (the same by linearity): rows at unit length.

    Args:
        channels: of the taps s8 and s16.
    """

    def __init__(self, channels: tuple[int, int]) -> None:
        super().__init__()
        width = sum(channels)
        # skip_init: the global generator is not ours to advance.
        self.from_s8 = skip_init(nn.Conv2d, channels[0], width, 1)
        self.from_s16 = skip_init(nn.Conv2d, channels[1], width, 1, bias=False)

    @torch.no_grad()
    def set(self, mean: torch.Tensor, matrix: torch.Tensor) -> None:
        """Make rows ``(x - mean) matrix`` of patch features x, mean [D] and matrix [D, D], at unit length."""
        first = self.from_s8.in_channels
        self.from_s8.weight.copy_(matrix[:first].T[:, :, None, None])
        self.from_s8.bias.copy_(-(mean @ matrix))
        self.from_s16.weight.copy_(matrix[first:].T[:, :, None, None])

    def forward(self, s8: torch.Tensor, s16: torch.Tensor) -> torch.Tensor:
        """Return rows float32 [N, h * w, D]."""
        grid = self.from_s8(patch_mean(s8)) + enlarge(self.from_s16(patch_mean(s16)), 2)
        return unit(grid.flatten(2).transpose(1, 2))


class Router(nn.Module):
    """From an image's mean patch feature to a point, and from there to the centre of each sub-class.

    Args:
        channels: D of patch features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embed = skip_init(nn.Linear, channels, channels)

    @staticmethod
    def pooled(s8: torch.Tensor, s16: torch.Tensor) -> torch.Tensor:
        """Return the mean patch feature float32 [N, D] of each image."""
        # Enlarging by 2 repeats the mean of what it enlarges but for its border, which half as many sites have.
        return torch.cat([patch_mean(s8).mean((2, 3)), patch_mean(s16).mean((2, 3))], 1)

    def forward(self, pooled: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """Return minus the mean squared distance to every centre, float32 [N, E], of [N, D] and centres [E, D]."""
        return closeness(self.embed(pooled), centres)


def closeness(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return minus the squared distance over D, float32 [N, E], of points [N, D] to centres [E, D]."""
    away = points[:, None] - centres[None]
    return -away.square().mean(2)


class BankExpert(nn.Module):
    """Distance of every row to the nearest row of the chosen expert's bank, over what good patches show."""

    def forward(self, rows: torch.Tensor, chosen: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
        """Return float32 [N, L] of rows [N, L, D], experts [N], bank [E, R, D] and scale [E]."""
        bank, scale = (one[chosen] for one in state)
        nearest = ((bank * bank).sum(2)[:, None] - 2.0 * (rows @ bank.transpose(1, 2))).amin(2)
        return (nearest + (rows * rows).sum(2)).clamp_min(0.0).sqrt() / scale[:, None]


class DiscriminatorExpert(nn.Module):
    """Minus the chosen expert's opinion that a row is good: linear, LeakyReLU, linear."""

    def forward(self, rows: torch.Tensor, chosen: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
        """Return float32 [N, L] of rows [N, L, D], experts [N], weights [E, D, H], biases [E, H], weights [E, H]."""
        weight, bias, out = (one[chosen] for one in state)
        hidden = functional.leaky_relu(rows @ weight + bias[:, None], LEAK)
        return -(hidden * out[:, None]).sum(2)


class AdaptedMoEHead(Head):
    """Route, adapt, judge, for E experts in one graph.

    Outputs: the map float32 [N, H / 8, W / 8]; the rows before adaptation float32 [N, L, D], from which a box takes
    moments; ``route`` float32 [N, E], closeness to each sub-class less the floor of the nearest: the greatest names the
    expert, and where it is below 0 the image shows none of them.

    State: ``route_centre`` [E, D], ``route_floor`` [E], ``expert_mean`` and ``expert_std`` [E, D] (moments of an image
    of each sub-class), ``tta_mean`` and ``tta_std`` [E, D] (moments that a box gives), ``tta_mode`` [2] (share of the
    image's own moments in those that rows are adapted from, the rest being the given ones; share of the scale that is
    corrected), and the experts': ``bank`` [E, R, D] with ``bank_scale`` [E], or ``hidden_weight`` [E, D, H],
    ``hidden_bias`` [E, H], ``logit_weight`` [E, H].

    Source: Adapted-MoE; routing by the distance to centres, and the limits of adaptation, are described in the README.

    Args:
        channels: of the taps s8 and s16.
        experts: shapes of the experts' state without E, by name: those of ``BANK`` or of ``DISCRIMINATOR``.
        subclasses: their names, one per expert.
        trim: see :class:`~trainer.methods.adapted_moe.adapt.Moments`.
    """

    tap_names = TAP_NAMES
    map_stride = MAP_STRIDE
    # Distances and moments of unit rows are differences of near values; their products cost less than the trunk's.
    float_ops = ("project", "router", "expert")

    names: torch.Tensor
    route_floor: torch.Tensor
    route_centre: torch.Tensor
    expert_mean: torch.Tensor
    expert_std: torch.Tensor
    tta_mean: torch.Tensor
    tta_std: torch.Tensor
    tta_mode: torch.Tensor

    def __init__(
        self,
        *,
        channels: tuple[int, int],
        experts: dict[str, tuple[int, ...]],
        subclasses: tuple[str, ...],
        trim: float,
    ) -> None:
        super().__init__()
        count, width = len(subclasses), sum(channels)
        self.project, self.router = Projection(channels), Router(width)
        self.moments, self.adapt = Moments(trim), Adapt()
        self.expert = BankExpert() if "bank" in experts else DiscriminatorExpert()
        self.expert_state = tuple(experts)
        self.state_names = (*ROUTING, *MOMENTS, *ADAPTATION, *self.expert_state)
        self.register_buffer("route_centre", torch.zeros(count, width))
        self.register_buffer("route_floor", torch.zeros(count))
        for name in (*MOMENTS, *ADAPTATION[:2]):
            self.register_buffer(name, torch.full((count, width), float(name.endswith("std"))))
        self.register_buffer("tta_mode", torch.ones(2))
        for name, shape in experts.items():
            self.register_buffer(name, torch.zeros(count, *shape))
        # What rebuilding needs; the graph has no use for it.
        text = "\n".join(subclasses).encode()
        self.register_buffer("names", torch.tensor(list(text), dtype=torch.uint8))

    @property
    def subclasses(self) -> tuple[str, ...]:
        """Name of the sub-class of each expert, in order."""
        return tuple(bytes(self.names.tolist()).decode().split("\n"))

    @torch.no_grad()
    def set_adaptation(self, *, own: float, scale: float) -> None:
        """Choose what rows are adapted from.

        Args:
            own: share of the image's own moments, in [0, 1]; the rest are ``tta_mean`` and ``tta_std``. With 0 and
                those of training there is no adaptation.
            scale: share of the correction of the deviation, in [0, 1]; 0 moves means alone.
        """
        self.tta_mode.copy_(torch.tensor([own, scale]))

    def adapted(self, good: Features, generator: torch.Generator) -> AdaptedMoEHead:
        """Return a head whose nearest expert knows some good images of another kind.

        Its bank grows by a coreset of their rows, as it sees them, at most a quarter of its size; the other banks
        repeat rows. So no distance grows. A discriminator stays as it is, and so do all moments.

        Args:
            good: taps s8 and s16 of at least one good image.
            generator: of the coreset.

        Raises:
            DataError: features that are not finite.
        """
        head = copy.deepcopy(self)
        device = self.route_centre.device
        with torch.no_grad():
            taps = list(good.batches(TAP_NAMES, 1, device=device))
            rows = torch.cat([self.project(*one) for one in taps])
            if not torch.isfinite(rows).all():
                raise DataError("features of the images to adapt to are not finite; check the images")
            # One kind, one expert: the images vote.
            expert = int(torch.cat([self.closeness(*one) for one in taps]).mean(0).argmax())
            if "bank" in self.expert_state:
                chosen = torch.full((len(rows),), expert, device=device)
                new = self.shown(rows, chosen, self.present(rows, chosen)).flatten(0, 1)
                bank = self.get_buffer("bank")
                new = new[greedy_coreset(new, max(1, bank.shape[1] // _ADAPTED_SHARE), generator)]
                grown = torch.cat([bank, bank[:, : len(new)]], 1)
                grown[expert, bank.shape[1] :] = new
                head.register_buffer("bank", grown)
        return head.eval().requires_grad_(requires_grad=False)

    def closeness(self, *taps: torch.Tensor) -> torch.Tensor:
        """Return minus the distance of each image to every sub-class, float32 [N, E]; the greatest is its expert."""
        close: torch.Tensor = self.router(self.router.pooled(*taps), self.route_centre)
        return close

    def present(self, rows: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation [N, D] each that rows [N, L, D] of experts int64 [N] are adapted from."""
        return self.blended(*self.moments(rows), chosen)

    def blended(self, mean: torch.Tensor, std: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images' own moments [N, D], mixed with those that are given for experts int64 [N]."""
        own = self.tta_mode[:1]
        return (
            own * mean + (1.0 - own) * self.tta_mean[chosen],
            own * std + (1.0 - own) * self.tta_std[chosen],
        )

    def shown(self, rows: torch.Tensor, chosen: torch.Tensor, now: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return rows [N, L, D] as experts int64 [N] see them, ``now`` being what :meth:`present` gave."""
        trained = (self.expert_mean[chosen], self.expert_std[chosen])
        moved: torch.Tensor = self.adapt(rows, now=now, trained=trained, scale_share=self.tta_mode[1:])
        return moved

    def judge(self, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return scores [N, L] of rows [N, L, D], before adaptation, by experts int64 [N]."""
        state = (self.get_buffer(name) for name in self.expert_state)
        scores: torch.Tensor = self.expert(self.shown(rows, chosen, self.present(rows, chosen)), chosen, *state)
        return scores

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return map, rows and route; see the class."""
        rows, close = self.project(*taps), self.closeness(*taps)
        chosen = close.argmax(1)
        anomaly_map = self.judge(rows, chosen).unflatten(1, taps[0].shape[2:])
        # The floor of the chosen one for all: it decides whether to believe the router, not whom it chooses.
        return anomaly_map, rows, close - self.route_floor[chosen][:, None]
