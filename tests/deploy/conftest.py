"""Toy graphs and pictures, made once for all deploy tests."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from toys import ToyMemoryHead, ToyTrunk

from deploy.trunks import TrunkFiles, build_trunk_files
from edge.bundle import Preprocessing

SIZE = 64


def textures(count: int, *, seed: int, size: int = SIZE) -> np.ndarray:
    """Draw woven pictures uint8 [count, size, size, 3] that differ in phase, light and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    pictures = []
    for _ in range(count):
        weave = np.sin(x / 3.0 + rng.uniform(0, 6)) + np.sin(y / 4.0 + rng.uniform(0, 6))
        light = 110 + rng.normal(0, 6) + rng.normal(0, 0.15) * (x - size / 2)
        colour = np.array([1.0, 0.9, 0.7])
        picture = light[..., None] + 25 * weave[..., None] * colour + rng.normal(0, 4, (size, size, 3))
        pictures.append(np.clip(picture, 0, 255).astype(np.uint8))
    return np.stack(pictures)


def make_defects(contrast: float) -> np.ndarray:
    """Put a stain, faint at a low contrast, on 24 pictures."""
    rng = np.random.default_rng(77)
    pictures = textures(24, seed=5).astype(np.float32)
    for picture in pictures:
        y, x = rng.integers(4, SIZE - 20, 2)
        picture[y : y + 16, x : x + 16] += contrast * rng.choice([-1, 1]) * np.array([150.0, -100.0, 50.0])
    return np.clip(pictures, 0, 255).astype(np.uint8)


def fit_memory(trunk: ToyTrunk, *, rows: int = 128, embedding: bool = True) -> ToyMemoryHead:
    """Fill a bank with patch rows of good pictures."""
    blank = ToyMemoryHead(torch.zeros(rows, 40), torch.ones(40))
    with torch.no_grad():
        taps = dict(zip(trunk.tap_names, trunk(torch.from_numpy(textures(16, seed=1))), strict=True))
        found = blank.embed(taps["s8"], taps["s16"]).reshape(-1, 40)
        scale = 1.0 / found.std(0).clamp_min(1e-3)
        chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:rows]
        centre = found.mean(0)
    return ToyMemoryHead(((found - centre) * scale)[chosen], scale, centre, embedding=embedding)


@pytest.fixture(scope="session")
def trunk() -> ToyTrunk:
    return ToyTrunk()


@pytest.fixture(scope="session")
def memory_head(trunk: ToyTrunk) -> ToyMemoryHead:
    return fit_memory(trunk)


@pytest.fixture(scope="session")
def trunk_files(trunk: ToyTrunk, tmp_path_factory: pytest.TempPathFactory) -> TrunkFiles:
    return build_trunk_files(trunk, textures(16, seed=3), tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def preprocessing() -> Preprocessing:
    return Preprocessing(height=SIZE, width=SIZE)
