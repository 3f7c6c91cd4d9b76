"""Where the part is: told from a plain still backdrop, and not guessed where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.textures import TextureWeb
from trainer.synthesis.foreground import foreground
from trainer.synthesis.image2d import make_defects


def shots(count: int = 8, *, moves: int = 4, light: float = 0.0, noise: float = 1.0) -> np.ndarray:
    """A textured disc of radius 30 with a plain hole on a plain backdrop, 120 x 160 pixels."""
    rng = np.random.default_rng(0)
    web = TextureWeb("metal", 1, 160)
    pictures = []
    for index in range(count):
        y, x = np.mgrid[:120, :160] - np.array([60, 80])[:, None, None] - rng.integers(-moves, moves + 1, (2, 1, 1))
        away = np.hypot(y, x)
        picture = np.full((120, 160, 3), 230.0)
        disc = away < 30
        picture[disc] = web.view(400 * index, 120)[disc]
        picture[away < 8] = 90
        picture += light * rng.normal() + rng.normal(0, noise, picture.shape)
        pictures.append(np.clip(picture, 0, 255).astype(np.uint8))
    return np.stack(pictures)


def test_a_part_on_a_plain_backdrop_is_found_with_its_plain_hole() -> None:
    found = foreground(shots())
    assert found is not None
    away = np.hypot(*(np.mgrid[:120, :160] - np.array([60, 80])[:, None, None]))
    assert found[away < 24].all()
    assert not found[away > 45].any()


@pytest.mark.parametrize("kind", ["cloth", "wafer", "metal"])
def test_a_surface_that_fills_the_picture_has_no_backdrop(kind: str) -> None:
    web = TextureWeb(kind, 3, 128)
    assert foreground(np.stack([web.view(500 * index, 128) for index in range(8)])) is None


def test_nothing_is_claimed_where_light_changes_or_images_are_few_or_all_is_plain() -> None:
    assert foreground(shots(light=20.0)) is None
    assert foreground(shots(3)) is None
    assert foreground(np.full((8, 64, 64, 3), 100, np.uint8)) is None


def test_defects_land_on_the_part() -> None:
    pictures = shots(moves=0)
    where = foreground(pictures)
    away = np.hypot(*(np.mgrid[:120, :160] - np.array([60, 80])[:, None, None]))
    missed = {
        name: np.mean([not mask[away < 33].any() for mask in make_defects(pictures, seed=1, repeats=5, where=at)[1]])
        for name, at in (("anywhere", None), ("part", where))
    }
    assert missed["part"] < 0.25
    assert missed["anywhere"] > 0.6
