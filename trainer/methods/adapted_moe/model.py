"""The Adapted-MoE head: which sub-class an image shows, its taps adapted to that expert's moments, and its judgement.

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
from trainer.methods.adapted_moe.adapt import Adapt, Moments, Trust, unit
from trainer.methods.base import Head
from trainer.methods.memory.model import EMBEDDING_STRIDE, LEVELS, STRIDES, level_patches
from trainer.methods.memory.reduce import greedy_coreset
from trainer.methods.patches import enlarge, patch_mean

if TYPE_CHECKING:
    from trainer.methods.base import Features

TAP_NAMES = LEVELS
MAP_STRIDE = STRIDES[0]
LEAK = 0.2
ROUTING = ("route_centre", "route_floor")
MOMENTS = ("expert_mean", "expert_std")
ADAPTATION = ("tta_mean", "tta_std", "tta_usual", "tta_mode")
BANKS = tuple(f"bank_{name}" for name in LEVELS)
BANK = (
    *(f"{what}_{name}" for name in LEVELS for what in ("whiten", "offset", "bank")),
    *("level_scale", "site_project", "site_offset", "site_mean", "site_scale"),
)
DISCRIMINATOR = ("hidden_weight", "hidden_bias", "logit_weight")
_ADAPTED_SHARE = 4  # a bank grows by at most a quarter, and its search with it
_CANDIDATES = 1000  # patches of each image that a coreset is chosen from


def patches(s8: torch.Tensor, s16: torch.Tensor) -> torch.Tensor:
    """Return what the router pools, float32 [N, C, h, w], of taps [N, C8, h, w] and [N, C16, h/2, w/2].

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
    """One linear layer for each level, the same for all experts: what leaves the head as its embedding.

    Args:
        channels: of the taps.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        for name, width in zip(LEVELS, channels, strict=True):
            # skip_init: the global generator is not ours to advance.
            self.register_module(name, skip_init(nn.Conv2d, width, width, 1))

    @torch.no_grad()
    def set(self, name: str, mean: torch.Tensor, matrix: torch.Tensor) -> None:
        """Make a level's columns ``(x - mean) matrix`` of its patches x, mean [C] and matrix [C, C]."""
        layer = self.get_submodule(name)
        layer.weight.copy_(matrix.T[:, :, None, None])
        layer.bias.copy_(-(mean @ matrix))

    def forward(self, *taps: torch.Tensor) -> torch.Tensor:
        """Return rows float32 [N, H / 8 * W / 8, D], the levels side by side."""
        columns = []
        for name, tap, stride in zip(LEVELS, taps, STRIDES, strict=True):
            grid = self.get_submodule(name)(level_patches(name, tap))
            if stride < EMBEDDING_STRIDE:
                columns.append(functional.avg_pool2d(grid, EMBEDDING_STRIDE // stride))
            else:
                columns.append(enlarge(grid, stride // EMBEDDING_STRIDE))
        return torch.cat(columns, 1).flatten(2).transpose(1, 2)


class Router(nn.Module):
    """From an image's mean patch feature to a point, and from there to the centre of each sub-class.

    Args:
        channels: D of what it pools.
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
    """What the memory method computes, with the state of the chosen expert.

    Level by level the distance of every whitened patch to the nearest row of the expert's bank, and of every site to
    what the expert's good images show there; see :class:`trainer.methods.memory.model.MemoryHead`.

    Args:
        background: share of its own mean that is taken off a map.
        site_weight: of the sites in the map.
    """

    def __init__(self, background: float, site_weight: float) -> None:
        super().__init__()
        self.background, self.site_weight = background, site_weight

    @staticmethod
    def whitened(name: str, tap: torch.Tensor, whiten: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """Return rows float32 [N, L, C] of a tap [N, C, h, w] by matrices [N, C, C] and offsets [N, C]."""
        rows: torch.Tensor = level_patches(name, tap).flatten(2).transpose(1, 2) @ whiten + offset[:, None]
        return rows

    def forward(self, taps: tuple[torch.Tensor, ...], state: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the map float32 [N, H / 4, W / 4] of adapted taps by the state of each image's expert, [N, ...]."""
        total: torch.Tensor | None = None
        for index, (name, tap, stride) in enumerate(zip(LEVELS, taps, STRIDES, strict=True)):
            bank = state[f"bank_{name}"]
            rows = self.whitened(name, tap, state[f"whiten_{name}"], state[f"offset_{name}"])
            # ||q - m||^2 = ||q||^2 + (||m||^2 - 2 q.m): one matrix product, then a minimum over the bank.
            nearest = ((bank * bank).sum(2)[:, None] - 2.0 * (rows @ bank.transpose(1, 2))).amin(2)
            distance = (nearest + (rows * rows).sum(2)).clamp_min(0.0).sqrt().unflatten(1, tap.shape[2:])
            level = enlarge(distance[:, None] * state["level_scale"][:, index, None, None, None], stride // MAP_STRIDE)
            total = level[:, 0] if total is None else total + level[:, 0]
        assert total is not None
        if self.site_weight:
            total = total + self.site_weight * self._sites(taps, state)
        return total - self.background * total.mean((1, 2), keepdim=True)

    @staticmethod
    def _sites(taps: tuple[torch.Tensor, ...], state: dict[str, torch.Tensor]) -> torch.Tensor:
        start, grids = 0, []
        for tap in taps:
            columns = state["site_project"][:, :, start : start + tap.shape[1]]
            grids.append((columns @ tap.flatten(2)).unflatten(2, tap.shape[2:]))
            start += tap.shape[1]
        coarse = grids[1] + enlarge(grids[2], 2) - state["site_mean"]
        residual = grids[0] + enlarge(coarse, 2) + state["site_offset"][:, :, None, None]
        return (residual * residual).sum(1).sqrt() / state["site_scale"]


class DiscriminatorExpert(nn.Module):
    """Minus the chosen expert's opinion that a row is good: linear, LeakyReLU, linear, on rows of unit length."""

    def forward(self, rows: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return float32 [N, L] of rows [N, L, D], by weights [N, D, H], biases [N, H] and weights [N, H]."""
        weight, bias, out = (state[name] for name in DISCRIMINATOR)
        hidden = functional.leaky_relu(unit(rows) @ weight + bias[:, None], LEAK)
        return -(hidden * out[:, None]).sum(2)


class AdaptedMoEHead(Head):
    """Route, adapt, judge, for E experts in one graph, and with E > 1 a general one for what shows no known sub-class.

    Outputs: the map float32 [N, H / 4, W / 4]; rows before adaptation float32 [N, L, D] on the stride-8 grid;
    ``route`` float32 [N, E], closeness to each sub-class less the floor of the nearest: the greatest names the expert,
    and where it is below 0 the image shows none of them and the general expert has judged.

    State: ``route_centre`` [E, D'], ``route_floor`` [E]; for each expert, the general one last: ``expert_mean`` and
    ``expert_std`` [X, D] (moments of an image of the sub-class), ``tta_mean`` and ``tta_std`` [X, D] (moments that a
    box gives), ``tta_usual`` [X] (see :class:`~trainer.methods.adapted_moe.adapt.Trust`), ``tta_mode`` [X, 2] (largest
    share of the image's own moments in those that taps are adapted from, the rest being the given ones; share of the
    scale that is corrected), and the expert's own: those of ``BANK`` or of ``DISCRIMINATOR``.

    Source: Adapted-MoE; routing by the distance to centres, the general expert and the limits of adaptation are
    described in the README.

    Args:
        channels: of the taps.
        experts: shapes of the experts' state without X, by name.
        subclasses: their names, one per sub-class.
        trim: see :class:`~trainer.methods.adapted_moe.adapt.Moments`.
        background: see :class:`BankExpert`.
        site_weight: see :class:`BankExpert`.
    """

    tap_names = TAP_NAMES
    map_stride = MAP_STRIDE
    # Distances and moments are differences of near values; their products cost less than the trunk's.
    float_ops = ("project", "router", "expert")

    names: torch.Tensor
    route_floor: torch.Tensor
    route_centre: torch.Tensor
    expert_mean: torch.Tensor
    expert_std: torch.Tensor
    tta_mean: torch.Tensor
    tta_std: torch.Tensor
    tta_usual: torch.Tensor
    tta_mode: torch.Tensor

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        experts: dict[str, tuple[int, ...]],
        subclasses: tuple[str, ...],
        trim: float,
        background: float,
        site_weight: float,
    ) -> None:
        super().__init__()
        count, width, pooled = len(subclasses), sum(channels), sum(channels[1:])
        self.experts = count + (count > 1)
        self.project, self.router = Projection(channels), Router(pooled)
        self.moments, self.trust, self.adapt = Moments(trim), Trust(), Adapt()
        self.banks = BANKS[0] in experts
        self.expert = BankExpert(background, site_weight) if self.banks else DiscriminatorExpert()
        self.expert_state = tuple(name for name in experts if site_weight or not name.startswith("site_"))
        self.state_names = (*ROUTING, *MOMENTS, *ADAPTATION, *self.expert_state)
        self.register_buffer("route_centre", torch.zeros(count, pooled))
        self.register_buffer("route_floor", torch.zeros(count))
        for name in (*MOMENTS, *ADAPTATION[:2]):
            self.register_buffer(name, torch.full((self.experts, width), float(name.endswith("std"))))
        self.register_buffer("tta_usual", torch.zeros(self.experts))
        self.register_buffer("tta_mode", torch.ones(self.experts, 2))
        for name in self.expert_state:
            self.register_buffer(name, torch.zeros(self.experts, *experts[name]))
        # What rebuilding needs; the graph has no use for it.
        text = "\n".join(subclasses).encode()
        self.register_buffer("names", torch.tensor(list(text), dtype=torch.uint8))

    @property
    def subclasses(self) -> tuple[str, ...]:
        """Name of the sub-class of each expert, in order, without the general one."""
        return tuple(bytes(self.names.tolist()).decode().split("\n"))

    @torch.no_grad()
    def set_adaptation(self, *, own: float, scale: float) -> None:
        """Choose what the taps of every expert are adapted from.

        Args:
            own: largest share of the image's own moments, in [0, 1]; the rest are ``tta_mean`` and ``tta_std``. With 0
                and those of training there is no adaptation.
            scale: share of the correction of the deviation, in [0, 1]; 0 moves means alone.
        """
        self.tta_mode.copy_(torch.tensor([own, scale]))

    @torch.no_grad()
    def adapted(self, good: Features, generator: torch.Generator) -> AdaptedMoEHead:
        """Return a head whose nearest expert knows some good images of another kind.

        The expert that judges most of them, the general one where they are of no known sub-class: its banks grow by a
        coreset of their patches, as it sees them, at most a quarter of their size; other experts' repeat rows. So no
        distance grows. A discriminator stays as it is, and so do all moments and sites.

        Args:
            good: taps of at least one good image.
            generator: of the candidates and the coreset.

        Raises:
            DataError: features that are not finite.
        """
        head = copy.deepcopy(self)
        # One kind, one expert: the images vote.
        batches = list(good.batches(TAP_NAMES, 1, device=self.route_centre.device))
        expert = torch.cat([self.chosen(self.closeness(*taps)) for taps in batches]).mode().values[None]
        seen = [self.shown(taps, expert, self.present(taps, expert)) for taps in batches]
        if not all(torch.isfinite(tap).all() for taps in seen for tap in taps):
            raise DataError("features of the images to adapt to are not finite; check the images")
        for level, name in enumerate(LEVELS if self.banks else ()):
            bank, own = self.get_buffer(f"bank_{name}"), self.own(expert)
            rows = []
            for taps in seen:
                one = BankExpert.whitened(name, taps[level], own[f"whiten_{name}"], own[f"offset_{name}"])[0]
                rows.append(one[torch.randperm(len(one), generator=generator)[:_CANDIDATES].to(one.device)])
            pool = torch.cat(rows)
            new = pool[greedy_coreset(pool, max(1, bank.shape[1] // _ADAPTED_SHARE), generator).to(pool.device)]
            grown = torch.cat([bank, bank[:, : len(new)]], 1)
            grown[expert[0], bank.shape[1] :] = new
            head.register_buffer(f"bank_{name}", grown)
        return head.eval().requires_grad_(requires_grad=False)

    def closeness(self, *taps: torch.Tensor) -> torch.Tensor:
        """Return minus the distance of each image to every sub-class, float32 [N, E]; the greatest is its expert."""
        close: torch.Tensor = self.router(self.router.pooled(*taps[1:]), self.route_centre)
        return close

    def chosen(self, close: torch.Tensor) -> torch.Tensor:
        """Return which expert judges, int64 [N]: the nearest, or the general one (E) below its floor."""
        nearest = close.argmax(1)
        if self.experts == len(self.route_floor):
            return nearest
        known = close.amax(1) >= self.route_floor[nearest]
        return torch.where(known, nearest, torch.full_like(nearest, self.experts - 1))

    def own(self, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state of experts int64 [N], each [N, ...]."""
        return {name: self.get_buffer(name)[chosen] for name in self.expert_state}

    def measured(self, taps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images' own trimmed moments: mean and deviation float32 [N, D], the taps side by side."""
        means, stds = zip(*(self.moments(tap) for tap in taps), strict=True)
        return torch.cat(means, 1), torch.cat(stds, 1)

    def present(self, taps: tuple[torch.Tensor, ...], chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation [N, D] each that taps of experts int64 [N] are adapted from.

        Images' own moments, as far as they are to be believed, mixed with those that are given.
        """
        mean, std = self.measured(taps)
        given_mean, given_std = self.tta_mean[chosen], self.tta_std[chosen]
        share = self.tta_mode[chosen][:, :1] * self.trust(mean, given_mean, given_std, self.tta_usual[chosen])
        return share * mean + (1.0 - share) * given_mean, share * std + (1.0 - share) * given_std

    def shown(
        self, taps: tuple[torch.Tensor, ...], chosen: torch.Tensor, now: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Return taps as experts int64 [N] see them, ``now`` being what :meth:`present` gave."""
        trained = (self.expert_mean[chosen], self.expert_std[chosen])
        moved, start = [], 0
        for tap in taps:
            part = slice(start, start + tap.shape[1])
            moved.append(
                self.adapt(
                    tap,
                    now=(now[0][:, part], now[1][:, part]),
                    trained=(trained[0][:, part], trained[1][:, part]),
                    scale_share=self.tta_mode[chosen][:, 1:],
                )
            )
            start = part.stop
        return tuple(moved)

    def judge(self, taps: tuple[torch.Tensor, ...], chosen: torch.Tensor) -> torch.Tensor:
        """Return maps float32 [N, H / 4, W / 4] of taps, before adaptation, by experts int64 [N]."""
        seen = self.shown(taps, chosen, self.present(taps, chosen))
        if self.banks:
            anomaly_map: torch.Tensor = self.expert(seen, self.own(chosen))
            return anomaly_map
        scores = self.expert(self.project(*seen), self.own(chosen)).unflatten(1, taps[1].shape[2:])
        return enlarge(scores[:, None], EMBEDDING_STRIDE // MAP_STRIDE)[:, 0]

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return map, rows and route; see the class."""
        close = self.closeness(*taps)
        # The floor of the nearest for all: it decides whether to believe the router, not whom it names.
        route = close - self.route_floor[close.argmax(1)][:, None]
        return self.judge(taps, self.chosen(close)), self.project(*taps), route
