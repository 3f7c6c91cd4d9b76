"""The student as a run folder knows it: its settings, and how its head comes back from its tensors.

It must not know teachers: a student that is trained needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from edge.errors import DataError, UsageError
from trainer.distill.model import StudentHead
from trainer.methods.base import MethodConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

Embedding = Literal["auto", "teacher", "own"]


class StudentConfig(MethodConfig):
    """Settings of a student; docs/distill.md says what each was measured to do."""

    rows: int = Field(128, ge=2, le=2000, description="Rows of each level's bank; the finest level has half.")
    width: int = Field(64, ge=8, le=256, description="Channels of the map branch.")
    embedding: Embedding = Field(
        "auto", description="Space of the banks: the teacher's, the student's own, or the better on synthetic defects."
    )
    steps: int = Field(300, ge=1, description="Steps of gradient descent.")
    batch: int = Field(16, ge=1, description="Tiles in a step.")
    learning_rate: float = Field(3e-3, gt=0, description="Highest rate of the one-cycle schedule.")
    soft: float = Field(1.0, ge=0, description="Weight of the teacher's map in the loss; 0 without a teacher.")
    hard: float = Field(1.0, ge=0, description="Weight of the synthetic masks in the loss.")
    relit: int = Field(100, ge=0, description="Copies of good images under another light that the branch learns from.")
    defects: int = Field(200, ge=1, description="Images with synthetic defects that the branch learns from.")
    images: int = Field(150, ge=2, description="Good images that the branch and the banks learn from, at most.")
    candidates: int = Field(10_000, ge=1, description="Patches, drawn at random, that anchors are chosen from.")
    whitening: float = Field(0.3, gt=0, description="Added to every eigenvalue, as a share of their mean.")
    background: float = Field(0.3, ge=0, le=1, description="Share of its own mean that is taken off the banks' map.")
    fine_weight: float = Field(0.6, gt=0, description="Weight of the finest level in the banks' map.")


class Student:
    """What ``Run.load`` finds under the name of a student."""

    name: ClassVar[str] = "student"

    @classmethod
    def config(cls, preset: str) -> StudentConfig:
        """Return the preset.

        Raises:
            UsageError: unknown preset.
        """
        if preset == "quick":
            return StudentConfig()
        if preset == "full":
            return StudentConfig(steps=800, images=400, relit=300, defects=600)
        raise UsageError(f"--preset {preset}: unknown; choose quick or full")

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> StudentHead:
        """Rebuild a trained head.

        Raises:
            DataError: the tensors are not a student's.
        """
        if not isinstance(config, StudentConfig):
            raise UsageError(f"a student cannot use a {type(config).__name__}; take Student.config(preset)")
        try:
            names = [name for name in ("s4", "s8", "s16") if f"bank_{name}" in tensors]
            embeds = [tensors[f"embed_{name}.weight"] for name in names]
            head = empty_head(
                config,
                [len(tensors[f"bank_{name}"]) for name in names],
                [(e.shape[1], e.shape[0]) for e in embeds],
                (tensors["branch.place"].shape[2], tensors["branch.place"].shape[3]),
            )
            head.load_state_dict(tensors)
        except (KeyError, IndexError, TypeError, RuntimeError, ValueError) as error:
            raise DataError(f"these tensors are no student's head ({error}); distil again") from error
        return head.eval().requires_grad_(requires_grad=False)


def empty_head(
    config: StudentConfig,
    rows: Sequence[int],
    channels: Sequence[tuple[int, int]],
    places: tuple[int, int],
    generator: torch.Generator | None = None,
) -> StudentHead:
    """Return a head whose banks and embeddings are to be filled; with a generator its branch is drawn.

    Args:
        config: of the student.
        rows: of each level's bank, finest first.
        channels: (tap channels, embedding channels) of each level.
        places: rows and columns of 32 x 32 pixels in a tile.
        generator: see :class:`trainer.distill.model.Branch`.
    """
    return StudentHead(
        rows=tuple(rows),
        channels=tuple((int(a), int(b)) for a, b in channels),
        width=config.width,
        places=places,
        background=config.background,
        generator=generator,
    )
