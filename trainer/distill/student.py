"""The student as a run folder knows it: its settings, and how its head comes back from its tensors.

It must not know teachers: a student that is trained needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edge.errors import DataError, UsageError
from trainer.distill.model import StudentHead
from trainer.methods.memory.fit import MemoryConfig, MemoryMethod

if TYPE_CHECKING:
    import torch

    from trainer.methods.base import MethodConfig


class StudentConfig(MemoryConfig):
    """Settings of a student: those of its small memory detector, and of its branch (docs/distill.md)."""

    rows: int = Field(256, ge=2, le=2000, description="Rows of each level's bank; the finest level has half.")
    candidates: int = Field(10_000, ge=1, description="Patches, drawn at random, that anchors are chosen from.")
    site_components: int = Field(48, ge=1, description="Principal directions that the sites are compared in.")
    width: int = Field(64, ge=8, le=256, description="Channels of the map branch.")
    steps: int = Field(300, ge=1, description="Steps of gradient descent.")
    batch: int = Field(16, ge=1, description="Tiles in a step.")
    learning_rate: float = Field(3e-3, gt=0, description="Highest rate of the one-cycle schedule.")
    relit: int = Field(100, ge=0, description="Copies of good images under another light that the branch learns from.")
    defects: int = Field(200, ge=1, description="Images with synthetic defects that the branch learns from.")
    images: int = Field(150, ge=2, description="Good images that the branch and the banks learn from, at most.")


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
        own = ("branch.", "offset", "gain")
        try:
            memory = MemoryMethod.build(config, {k: v for k, v in tensors.items() if not k.startswith(own)})
            head: StudentHead = StudentHead(memory, width=config.width)
            head.load_state_dict(tensors)
        except (DataError, RuntimeError, ValueError) as error:
            raise DataError(f"these tensors are no student's head ({error}); distil again") from error
        head.eval().requires_grad_(requires_grad=False)
        return head
