"""Which segments of a signal are hidden: at random for training, complementary and fixed for judging.

Index arithmetic only; it must not know signals or networks. Source: Zhou et al., arXiv 2502.05494, equations 1 to 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from edge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Scales:
    """How a window is seen: all of its segments, and a run of some consecutive ones.

    Attributes:
        segments: T, of the window.
        local: delta, of the run, 2 <= delta <= T.
        ratio: theta, share of each that is hidden.
    """

    segments: int
    local: int
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if not 2 <= self.local <= self.segments:  # noqa: PLR2004 (one seen, one hidden)
            raise UsageError(
                f"local {self.local}: give at least 2 and at most the {self.segments} segments of a window"
            )
        if not 0 < self.hidden_global < self.segments or not 0 < self.hidden_local < self.local:
            raise UsageError(
                f"ratio {self.ratio:g}: of {self.segments} and of {self.local} segments some must be hidden, some not"
            )

    @property
    def hidden_global(self) -> int:
        """Segments of the window that are hidden: theta T, a half rounded up so that two passes hide each."""
        return int(self.ratio * self.segments + 0.5)

    @property
    def hidden_local(self) -> int:
        """Segments of the run that are hidden."""
        return int(self.ratio * self.local + 0.5)

    @property
    def covering(self) -> int:
        """Passes that together hide every segment at least once."""
        return -(-self.segments // self.hidden_global)


@dataclass(frozen=True, slots=True)
class Masks:
    """Which segments each row sees and which are hidden from it; made by :meth:`of`.

    Attributes:
        global_visible: int64 [N, T - n_g], indices of the window's segments, ascending.
        global_hidden: int64 [N, n_g], likewise.
        local_visible: int64 [N, delta - n_l], likewise.
        local_hidden: int64 [N, n_l], likewise.
        starts: int64 [N, 1], where each run begins.
        global_order: int64 [N, T]: where each segment stands among the visible ones followed by the hidden ones.
        local_order: int64 [N, delta]: the same of each segment of the run.
    """

    global_visible: torch.Tensor
    global_hidden: torch.Tensor
    local_visible: torch.Tensor
    local_hidden: torch.Tensor
    starts: torch.Tensor
    global_order: torch.Tensor
    local_order: torch.Tensor

    @classmethod
    def of(
        cls,
        global_visible: torch.Tensor,
        global_hidden: torch.Tensor,
        local_visible: torch.Tensor,
        local_hidden: torch.Tensor,
    ) -> Masks:
        """Return the masks of these indices."""
        whole, run = torch.cat([global_visible, global_hidden], 1), torch.cat([local_visible, local_hidden], 1)
        starts = run.min(1, keepdim=True).values
        return cls(global_visible, global_hidden, local_visible, local_hidden, starts, whole.argsort(1), run.argsort(1))

    def __len__(self) -> int:
        return len(self.global_hidden)

    def to(self, device: torch.device) -> Masks:
        """Return the same masks on a device."""
        return Masks(*(getattr(self, name).to(device) for name in self.__slots__))

    def counts(self, segments: int) -> torch.Tensor:
        """Return how often each segment is hidden in all rows together, int64 [T]."""
        hidden = torch.cat([self.global_hidden.flatten(), self.local_hidden.flatten()])
        return torch.bincount(hidden, minlength=segments)


def random_masks(scales: Scales, rows: int, generator: torch.Generator, *, couple: bool = False) -> Masks:
    """Draw masks for training: both scales apart, the run beginning anywhere.

    Args:
        scales: how a window is seen.
        rows: N.
        generator: on the CPU.
        couple: hide at the global scale whatever is hidden at the local one, so that it cannot be copied; the numbers
            stay as they are.
    """
    starts = torch.randint(0, scales.segments - scales.local + 1, (rows, 1), generator=generator)
    order = torch.rand(rows, scales.local, generator=generator).argsort(1)
    local_hidden, local_visible = (
        (starts + part).sort(1).values
        for part in order.split([scales.hidden_local, scales.local - scales.hidden_local], 1)
    )
    keys = torch.rand(rows, scales.segments, generator=generator)
    if couple:
        keys.scatter_(1, local_hidden, -1.0)
    split = [scales.hidden_global, scales.segments - scales.hidden_global]
    hidden, visible = (part.sort(1).values for part in keys.argsort(1).split(split, 1))
    return Masks.of(visible, hidden, local_visible, local_hidden)


def fixed_masks(scales: Scales, passes: int, seed: int, *, couple: bool = False) -> Masks:
    """Return the masks of the passes that a window is judged by.

    Runs begin at evenly spread places (one pass: in the middle). Every ``scales.covering`` passes, two at theta 0.5,
    hide each segment at the global scale at least once.

    Args:
        scales: how a window is seen.
        passes: H, at least 1.
        seed: of the choice.
        couple: as in :func:`random_masks`.
    """
    if passes < 1:
        raise UsageError(f"passes {passes}: give at least 1")
    generator = torch.Generator().manual_seed(seed)
    last = scales.segments - scales.local
    starts = [last // 2] if passes == 1 else [round(h * last / (passes - 1)) for h in range(passes)]
    local: list[list[int]] = []
    hidden: list[list[int]] = []
    for first in range(0, passes, scales.covering):
        runs = starts[first : first + scales.covering]
        together = _local_of(scales, runs, generator)
        local += together
        hidden += _global_of(scales, together if couple else [[] for _ in runs], generator)
    return Masks.of(
        _others(hidden, [range(scales.segments)] * passes),
        _rows(hidden),
        _others(local, [range(start, start + scales.local) for start in starts]),
        _rows(local),
    )


def _local_of(scales: Scales, starts: Sequence[int], generator: torch.Generator) -> list[list[int]]:
    """Hide segments of each run, others in each while there are enough."""
    taken: set[int] = set()
    found = []
    for start in starts:
        order = [start + int(i) for i in torch.randperm(scales.local, generator=generator)]
        fresh = [one for one in order if one not in taken]
        chosen = [*fresh, *(one for one in order if one in taken)][: scales.hidden_local]
        taken.update(chosen)
        found.append(chosen)
    return found


def _global_of(scales: Scales, forced: Sequence[list[int]], generator: torch.Generator) -> list[list[int]]:
    """Deal the segments out so that all are hidden once, then fill up; ``forced`` ones are hidden first."""
    done = {one for row in forced for one in row}
    pool = [int(i) for i in torch.randperm(scales.segments, generator=generator) if int(i) not in done]
    found = []
    for row in forced:
        missing = scales.hidden_global - len(row)
        dealt, pool = pool[:missing], pool[missing:]
        chosen = [*row, *dealt]
        spare = [int(i) for i in torch.randperm(scales.segments, generator=generator) if int(i) not in chosen]
        found.append(chosen + spare[: scales.hidden_global - len(chosen)])
    return found


def _rows(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([sorted(row) for row in rows], dtype=torch.int64)


def _others(rows: Sequence[Sequence[int]], ranges: Sequence[range]) -> torch.Tensor:
    return _rows([[one for one in whole if one not in set(row)] for row, whole in zip(rows, ranges, strict=True)])
