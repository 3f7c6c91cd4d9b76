"""The trunks by name, and how a run says which one it stands on. Knows nothing of methods."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from edge.errors import DataError, UsageError
from trainer.backbones.efficientnet_lite import EfficientNetLite, Trunk, lite0, lite2
from trainer.backbones.external import LIBRARIES, external_trunk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

DEFAULT_TRUNK = "lite0"

_NETWORKS: dict[str, Callable[[], EfficientNetLite]] = {"lite0": lite0, "lite2": lite2}


class TrunkSpec(BaseModel):
    """Which trunk a run stands on.

    Attributes:
        name: network, one of :func:`trunk_names`, or ``timm:MODEL`` or ``torchvision:MODEL``.
        blocks: how many of its blocks; None is all up to stride 16.
        own_weights: whether the run carries the trunk's weights (a student that trained them) or the network's
            ImageNet weights are meant.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = DEFAULT_TRUNK
    blocks: int | None = Field(None, ge=1)
    own_weights: bool = False


def trunk_names() -> tuple[str, ...]:
    """Return the names of the networks, the default first."""
    return tuple(_NETWORKS)


def build_trunk(spec: TrunkSpec | str = DEFAULT_TRUNK, weights: Mapping[str, torch.Tensor] | None = None) -> Trunk:
    """Return a trunk, frozen and in eval mode.

    Args:
        spec: what to build, or a name.
        weights: its state where ``spec.own_weights``.

    Raises:
        UsageError: unknown name, or a number of blocks out of range.
        DataError: weights are missing or do not fit.
        MissingExtraError: the package with the ImageNet weights is not installed.
    """
    spec = TrunkSpec(name=spec) if isinstance(spec, str) else spec
    if spec.name.partition(":")[0] in LIBRARIES:
        # It quacks like one: the same taps and attributes from other blocks.
        return cast("Trunk", external_trunk(spec.name).requires_grad_(requires_grad=False))
    if spec.name not in _NETWORKS:
        raise UsageError(f"--trunk {spec.name}: unknown; choose one of {', '.join(_NETWORKS)}, timm:MODEL")
    trunk = Trunk(_NETWORKS[spec.name](), spec.blocks).eval().requires_grad_(requires_grad=False)
    if spec.own_weights:
        try:
            trunk.load_state_dict(dict(weights or {}), strict=True)
        except RuntimeError as error:
            raise DataError(f"these weights are not of a {spec.name} trunk of {len(trunk.blocks)} blocks") from error
    return trunk


def trunk_id(trunk: Trunk) -> str:
    """Return the sha256 of a trunk's layers and weights, 64 hex digits."""
    # The text of a module names its layers in order, with strides and paddings that no weight carries.
    digest = hashlib.sha256(f"{trunk.tap_names}{trunk}".encode())
    for name, tensor in trunk.state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return digest.hexdigest()
