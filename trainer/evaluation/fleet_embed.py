"""From images to the patch rows of an embedding space that no box of a simulated fleet had a part in.

It knows the trunk and the generic generator; it must not know boxes, rounds or labels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from deploy.progress import no_progress
from edge.bundle import Pooling, Preprocessing
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.backbones.registry import trunk_id
from trainer.evaluation.fleet_judge import Judge
from trainer.features import extract_tiles
from trainer.methods.feddymem.embed import embed_tiles
from trainer.methods.feddymem.fit import FedDyMemConfig, recipe_of
from trainer.methods.feddymem.model import LEVELS, MAP_STRIDE, FedDyMemHead
from trainer.methods.feddymem.sources import generic_generator

if TYPE_CHECKING:
    import numpy.typing as npt

    from deploy.progress import Progress
    from trainer.backbones.efficientnet_lite import Trunk

SIDE = 224
_PIECE = 32  # images at once, so that float32 rows of a whole folder are never held


@dataclass(frozen=True)
class Embedder:
    """The trunk and the generator that all boxes share.

    Attributes:
        trunk: frozen.
        head: whose generator makes the rows; its banks are not used.
        embedding_id: 64 hex digits, of trunk, generator, preprocessing and numerics.
        judge: how a box judges with these rows.
        parameters: numbers in trunk and generator, which would travel if parameters were shared instead.
    """

    trunk: Trunk
    head: FedDyMemHead
    embedding_id: str
    judge: Judge
    parameters: int

    def __call__(self, canvases: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        """Return the patch rows float16 [n, L, D] of images uint8 [n, 224, 224, 3] RGB, n >= 1."""
        pieces = (canvases[start : start + _PIECE] for start in range(0, len(canvases), _PIECE))
        return np.concatenate([embed_tiles(self.head, self.trunk, piece).astype(np.float16) for piece in pieces])


def generic_embedder(config: FedDyMemConfig | None = None, *, progress: Progress = no_progress) -> Embedder:
    """Return the embedder of the generic set, which is made of images that no box sees, or read from the cache.

    Args:
        config: of the method; its defaults if None.
        progress: progress function.

    Raises:
        MissingExtraError: the trunk's weights or scikit-image are not installed.
        DataError: the cache cannot be written.
    """
    config = config or FedDyMemConfig()
    trunk = lite0_trunk()
    extract = partial(extract_tiles, trunk=trunk, tap_names=LEVELS, device=torch.device("cpu"))
    made = generic_generator(extract, recipe_of(config), trunk_id=trunk_id(trunk), progress=progress)
    side = SIDE // MAP_STRIDE
    head = FedDyMemHead(
        made.generator,
        rows=config.rows,
        fleet_rows=config.fleet_rows,
        grid=(side, side),
        smoothing=config.smoothing,
        background=config.background,
    ).eval()
    preprocessing = Preprocessing(height=SIDE, width=SIDE)
    digest = hashlib.sha256(f"{trunk_id(trunk)} {preprocessing.model_dump_json()} torch f32 in f16".encode())
    for name, tensor in sorted(made.generator.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    parameters = sum(p.numel() for module in (trunk, made.generator) for p in module.parameters())
    judge = Judge(head.memory_layout, preprocessing, MAP_STRIDE, Pooling())
    return Embedder(trunk, head.requires_grad_(requires_grad=False), digest.hexdigest(), judge, parameters)
