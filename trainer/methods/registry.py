"""The one list of methods. Training, export, benchmarks and tests go through it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from edge.errors import UsageError
from trainer.distill.student import Student
from trainer.methods.adapted_moe.fit import AdaptedMoEMethod
from trainer.methods.fader.fit import FaderMethod
from trainer.methods.feddymem.fit import FedDyMemMethod
from trainer.methods.hetnet.fit import HetNetMethod
from trainer.methods.memory.fit import MemoryMethod
from trainer.methods.onenip.fit import OneNipMethod
from trainer.methods.pbas.fit import PbasMethod
from trainer.methods.prototypes.fit import PrototypesMethod
from trainer.methods.uniad.fit import UniADMethod

if TYPE_CHECKING:
    import torch

    from trainer.methods.base import Head, Method, MethodConfig


class Builder(Protocol):
    """What a run folder needs to come back: a method, or a student that no method trained."""

    @classmethod
    def config(cls, preset: str) -> MethodConfig:
        """Return the settings of a preset."""

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> Head:
        """Rebuild a fitted head."""


def methods() -> dict[str, type[Method]]:
    """Return every method by name."""
    every = (
        PbasMethod,
        MemoryMethod,
        FaderMethod,
        HetNetMethod,
        FedDyMemMethod,
        AdaptedMoEMethod,
        UniADMethod,
        OneNipMethod,
        PrototypesMethod,
    )
    return {method.name: method for method in every}


def get(name: str) -> type[Method]:
    """Return one method.

    Raises:
        UsageError: no method of that name.
    """
    known = methods()
    if name not in known:
        raise UsageError(f"--method {name}: unknown; choose one of {', '.join(sorted(known))}")
    return known[name]


def builder(name: str) -> type[Builder]:
    """Return what rebuilds the head of a run: a method, or the student that `lineward distill` leaves.

    A student is no method: good images alone do not make one, so what trains every method leaves it out.

    Raises:
        UsageError: neither has that name.
    """
    return Student if name == Student.name else get(name)
