"""The generated stand-in: exact masks, many defects, the same bits each time, in memory and in folders."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from edge.errors import DataError
from trainer.data.camera import Light, Optics, Pose, through
from trainer.data.subclasses import digests, material_hash
from trainer.data.texture_ad import read_materials
from trainer.data.texture_factory import DEFECTS, SUBCLASSES, TextureFactory, TextureSubclass
from trainer.data.textures import STUFFS, TEXTURES, Cloth, Metal, TextureWeb
from trainer.synthesis.image2d import BY_NAME

if TYPE_CHECKING:
    from pathlib import Path

TINY = TextureFactory(seed=4, side=64, train=3, good=2, defective=12, subclasses={"cloth": 2, "wafer": 2, "metal": 2})


def test_materials_and_defects_are_as_many_as_in_texture_ad() -> None:
    assert SUBCLASSES == {"cloth": 15, "wafer": 14, "metal": 10}
    assert len(set(DEFECTS)) > 10
    assert set(DEFECTS) <= set(BY_NAME)


@pytest.mark.parametrize("material", SUBCLASSES)
@pytest.mark.parametrize("defect", DEFECTS)
def test_mask_is_what_the_defect_changes(monkeypatch: pytest.MonkeyPatch, material: str, defect: str) -> None:
    one = TextureSubclass(material, 3, seed=1, side=96)
    shoot, surfaces, shots = TextureSubclass._shoot, [], []

    def watched(self: TextureSubclass, surface: np.ndarray, *rest: object) -> np.ndarray:
        surfaces.append(surface)
        shots.append(shoot(self, surface, *rest))  # type: ignore[arg-type]
        return shots[-1]

    monkeypatch.setattr(TextureSubclass, "_shoot", watched)
    image, mask = one.defective(defect, 0)
    # The last two are the ones taken: with the defect and, from the same place, light and noise, without.
    marred, clean = shots[-2:]
    assert (surfaces[-2] != surfaces[-1]).any()
    np.testing.assert_array_equal(image, marred)
    np.testing.assert_array_equal(np.abs(marred.astype(int) - clean.astype(int)).max(2) > 2, mask)
    assert mask.any()
    far = ~cv2.dilate(mask.astype(np.uint8), np.ones((9, 9))).astype(bool)
    assert np.abs(marred.astype(int) - clean.astype(int))[far].max() <= 2


def test_pixels_are_the_same_each_time() -> None:
    found = {name: TINY.material(name) for name in TINY.subclasses}
    again = TINY.material("wafer")
    for one, other in zip(found["wafer"].images, again.images, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.load(), other.load())
    other_seed = TextureFactory(seed=5, side=64, train=1, good=0, defective=0, subclasses={"wafer": 1}).material(
        "wafer"
    )
    assert (other_seed.images[0].load() != again.images[0].load()).any()


def test_number_of_images_changes_no_image() -> None:
    fewer = TextureFactory(seed=4, side=64, train=1, good=1, defective=1, subclasses={"metal": 1}).material("metal")
    more = {image.name: image for image in TINY.material("metal").images}
    for image in fewer.images:
        np.testing.assert_array_equal(image.load(), more[image.name].load())


def test_images_and_subclasses_all_differ() -> None:
    for name in TINY.subclasses:
        found = TINY.material(name)
        pixels = digests(found)
        assert len(set(pixels.values())) == len(pixels)
        assert all({image.label for image in one.test} == {"good", *DEFECTS} for one in found.subclasses)
    made = [TextureSubclass("cloth", number, 0, 64) for number in range(1, 16)]
    assert len({one.stuff for one in made}) == len({one.optics for one in made}) == 15


def test_folder_holds_what_memory_does(tmp_path: Path) -> None:
    TINY.write(tmp_path / "set")
    for read in read_materials(tmp_path / "set"):
        made = TINY.material(read.name)
        assert material_hash(read, digests(read)) == _hash_with_groups_of(made)
        assert [image.name for image in read.images] == [image.name for image in made.images]
        for one, other in zip(read.images, made.images, strict=True):
            assert one.load_mask is not None
            assert other.load_mask is not None
            np.testing.assert_array_equal(one.load_mask((64, 64)), other.load_mask((64, 64)))
    with pytest.raises(DataError, match="holds files already"):
        TINY.write(tmp_path / "set")


def _hash_with_groups_of(made: object) -> str:
    return material_hash(made, digests(made))  # type: ignore[arg-type]


def test_plain_webs_are_what_they_were() -> None:
    digest = hashlib.sha256()
    for kind in TEXTURES:
        for seed in (0, 5, 99):
            digest.update(TextureWeb(kind, seed, 130).view(17, 140).tobytes())
            np.testing.assert_array_equal(
                TextureWeb(kind, seed, 130, STUFFS[kind]()).view(17, 140), TextureWeb(kind, seed, 130).view(17, 140)
            )
    # Of the webs that published figures were measured on.
    assert digest.hexdigest() == "9852db677a3c553cbd1a21b14bbe617964992889bc5cbce800b47cb0b72c0632"


def test_web_of_another_stuff_is_refused() -> None:
    with pytest.raises(ValueError, match="a web of cloth cannot be made of Metal"):
        TextureWeb("cloth", 0, 64, Metal())


@pytest.mark.parametrize("kind", TEXTURES)
def test_drawn_webs_are_continuous(kind: str) -> None:
    stuff = STUFFS[kind].draw(np.random.default_rng(8))
    web = TextureWeb(kind, 2, 70, stuff)
    np.testing.assert_array_equal(web.view(113, 40), web.view(100, 60)[13:53])
    assert web.view(0, 70).std() > 3


def test_twill_is_no_plain_weave() -> None:
    plain, twill = (TextureWeb("cloth", 0, 70, stuff).view(0, 70) for stuff in (Cloth(), Cloth(repeat=4, over=2)))
    assert (plain != twill).mean() > 0.2


def test_plain_optics_change_nothing_and_each_setting_does_what_it_says() -> None:
    image = np.random.default_rng(0).integers(20, 200, (64, 64, 3)).astype(np.uint8)
    np.testing.assert_array_equal(through(image, Optics()), image)
    np.testing.assert_allclose(through(image, Optics(gain=0.5)), image / 2, atol=0.51)
    np.testing.assert_array_equal(through(image, Optics(offset=9)), image + 9)
    assert (through(image, Optics(gamma=1.4)) < image).all()
    assert through(image, Optics(blur=0.02)).std() < image.std() / 2
    flat = np.full((65, 65, 3), 200, np.uint8)
    dim = through(flat, Optics(vignette=0.4))
    assert dim[32, 32, 0] == 200
    assert dim[0, 0, 0] == 120
    assert through(flat, Optics(balance=(0.5, 1.0, 1.0)))[0, 0].tolist() == [100, 200, 200]


@pytest.mark.parametrize(
    "wrong", [{"side": 63}, {"subclasses": {"wood": 2}}, {"subclasses": {"cloth": 0}}, {"train": -1}]
)
def test_factory_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"unknown|at least|outside"):
        TextureFactory(**wrong)


def test_every_image_has_a_place_a_turn_and_a_light_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Pose, Light]] = []
    shoot = TextureSubclass._shoot

    def watched(self: TextureSubclass, surface: np.ndarray, pose: Pose, light: Light, rng: object) -> np.ndarray:
        seen.append((pose, light))
        return shoot(self, surface, pose, light, rng)  # type: ignore[arg-type]

    monkeypatch.setattr(TextureSubclass, "_shoot", watched)
    one = TextureSubclass("metal", 2, seed=3, side=64)
    for index in range(12):
        one.good("train", index)
        one.good("good", index)
    goods = seen.copy()
    seen.clear()
    for index in range(12):
        one.defective("spot", index)
    # With the defect and without: the same place and light, so that the mask is of the defect alone.
    assert all(seen[i] == seen[i + 1] for i in range(0, len(seen), 2))
    for part in (goods, seen[::2]):
        poses, lights = ([one[i] for one in part] for i in (0, 1))
        assert len(set(poses)) == len(set(lights)) == len(part)
        for values, least in (
            ([pose.dx for pose in poses], 0.015),
            ([pose.dy for pose in poses], 0.015),
            ([pose.degrees for pose in poses], 2.0),
            ([light.gain for light in lights], 0.08),
            ([light.slope_x for light in lights], 0.1),
            ([light.slope_y for light in lights], 0.1),
        ):
            # A dozen uniform draws span well over half of their range, which is twice the limit.
            assert max(values) - min(values) > least
            assert max(values) - min(values) <= 2 * least + 1e-9


def test_place_and_light_are_in_the_pixels() -> None:
    one = TextureSubclass("metal", 2, seed=3, side=64)
    view = one._view("train", 0)
    plain = one._shoot(view, Pose(), Light(), np.random.default_rng(0))
    for pose, light in ((Pose(dx=0.01), Light()), (Pose(degrees=1.5), Light()), (Pose(), Light(gain=0.93))):
        other = one._shoot(view, pose, light, np.random.default_rng(0))
        assert np.abs(other.astype(int) - plain).mean() > 1.0
