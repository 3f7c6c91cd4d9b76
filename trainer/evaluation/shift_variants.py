"""Variants of methods as the command line writes them: ``method``, ``method:setting=value``, ``method:pooled``.

They know settings; they must not know data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.errors import UsageError
from trainer.fit import configured
from trainer.methods.registry import get

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.methods.base import Method, MethodConfig

POOLED = "pooled"
"""Word of a variant that is not told the sub-classes of its training images: all are one."""

PER_EXPERT = "/expert"
"""Ending of a whole number that is taken once for every expert that ``adapted_moe`` has of the same images: one per
trained sub-class, and with two or more of them a general one."""

COMPARED = (
    "adapted_moe:rows=180",
    "adapted_moe:rows=180:adaptation=none",
    f"adapted_moe:{POOLED}:rows=180{PER_EXPERT}:adaptation=none",
    f"memory:rows=180{PER_EXPERT}",
)
"""What a run without a choice of methods compares in pairs: experts that adapt, experts that do not, and one model for
all, of the same make and the usual one. All have the same number of rows in total: banks end at 2,000."""


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes:
        name: as it was written; no other of the run has it.
        method: from the registry.
        config: of one expert.
        multiplied: settings that are taken once for every expert.
        pooled: whether the names of sub-classes are kept from it.
    """

    name: str
    method: type[Method]
    config: MethodConfig
    multiplied: tuple[str, ...] = ()
    pooled: bool = False

    @classmethod
    def parse(cls, text: str, preset: str) -> Variant:
        """Read ``method[:pooled][:setting=value ...]``; ``value/expert`` is taken for every expert.

        Raises:
            UsageError: a method, preset, setting or value is unknown.
        """
        name, *words = text.split(":")
        method = get(name)
        changed: dict[str, object] = {}
        multiplied = []
        for word in words:
            if word == POOLED:
                continue
            key, given, value = word.partition("=")
            if not given:
                raise UsageError(f"--methods {text}: {word!r} is neither {POOLED} nor setting=value")
            if value.endswith(PER_EXPERT):
                value = value.removesuffix(PER_EXPERT)
                if not value.isdecimal():
                    raise UsageError(f"--methods {text}: give a whole number before {PER_EXPERT}")
                multiplied.append(key)
            changed[key] = value
        try:
            config = configured(method.config(preset), name, changed)
        except UsageError as error:
            raise UsageError(f"--methods {text}: {str(error).removeprefix('--set ')}") from error
        return cls(text, method, config, tuple(multiplied), POOLED in words)

    def config_for(self, subclasses: int) -> MethodConfig:
        """Return the settings where so many sub-classes are trained on.

        Raises:
            UsageError: a multiplied setting is out of range.
        """
        if not self.multiplied:
            return self.config
        experts = subclasses + (subclasses > 1)
        changed = {key: getattr(self.config, key) * experts for key in self.multiplied}
        try:
            return configured(self.config, self.method.name, changed)
        except UsageError as error:
            raise UsageError(
                f"--methods {self.name}: times {experts} experts: {str(error).removeprefix('--set ')}"
            ) from error


def parse_variants(texts: Sequence[str], preset: str) -> tuple[Variant, ...]:
    """Read several, each once.

    Raises:
        UsageError: one cannot be read.
    """
    return tuple(Variant.parse(text, preset) for text in dict.fromkeys(texts))
