"""Trunks by name: Lite2's weights fit and know photographs, cuts agree with the whole, other libraries' networks."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from edge.errors import DataError, MissingExtraError, UsageError
from tests.trainer.test_efficientnet_lite import CATS, ESPRESSO, photograph
from trainer.backbones.efficientnet_lite import lite2
from trainer.backbones.external import ExternalTrunk
from trainer.backbones.registry import TrunkSpec, build_trunk, trunk_names

IMAGES = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "classes"), [("coffee.png", {ESPRESSO}), ("chelsea.png", CATS)])
def test_lite2_knows_what_photographs_show(name: str, classes: set[int]) -> None:
    with torch.inference_mode():
        assert int(lite2()(photograph(name))[0].argmax()) in classes


@pytest.mark.parametrize("name", trunk_names())
def test_trunk_says_its_channels_and_strides(name: str) -> None:
    trunk = build_trunk(name)
    with torch.inference_mode():
        taps = trunk(IMAGES)
    assert trunk.tap_names == ("s1", "s2", "s4", "s8", "s16")
    assert [tuple(tap.shape) for tap in taps] == [
        (2, trunk.tap_channels[n], 64 // trunk.tap_strides[n], 96 // trunk.tap_strides[n]) for n in trunk.tap_names
    ]
    assert not trunk.training
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


def test_trunk_of_fewer_blocks_has_the_same_finer_taps() -> None:
    whole, cut = build_trunk("lite0"), build_trunk(TrunkSpec(blocks=6))
    with torch.inference_mode():
        many, few = (
            dict(zip(whole.tap_names, whole(IMAGES), strict=True)),
            dict(zip(cut.tap_names, cut(IMAGES), strict=True)),
        )
    assert cut.tap_channels == {"s1": 3, "s2": 16, "s4": 24, "s8": 40, "s16": 80}
    for name in ("s1", "s2", "s4", "s8"):
        assert torch.equal(many[name], few[name])
    assert build_trunk(TrunkSpec(blocks=5)).tap_names == ("s1", "s2", "s4", "s8")


@pytest.mark.parametrize("blocks", [12, 16])
def test_trunk_of_more_blocks_than_it_has_is_refused(blocks: int) -> None:
    with pytest.raises(UsageError, match="gives 1 to 11"):
        build_trunk(TrunkSpec(blocks=blocks))


def test_trunk_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="--trunk resnet"):
        build_trunk("resnet")


def test_trunk_own_weights_are_taken_or_refused() -> None:
    spec = TrunkSpec(blocks=3, own_weights=True)
    weights = {name: value + 1 for name, value in build_trunk(TrunkSpec(blocks=3)).state_dict().items()}
    built = build_trunk(spec, weights)
    assert all(torch.equal(value, weights[name]) for name, value in built.state_dict().items())
    for wrong in (None, dict(list(weights.items())[1:])):
        with pytest.raises(DataError, match="3 blocks"):
            build_trunk(spec, wrong)


class Net(nn.Sequential):
    """A network as other libraries have them: a map at strides 2, 4 and 8, then a classifier."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(5, 6, 3, 2, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
        )  # fmt: skip


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_external_network_gives_its_last_map_of_each_stride(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    net = Net()
    net.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    asked: list[Any] = []

    def give(name: str, **options: Any) -> nn.Module:
        asked.append((name, options))
        return net

    fake = SimpleNamespace(create_model=give, models=SimpleNamespace(get_model=give))
    monkeypatch.setitem(sys.modules, library, fake)
    trunk = build_trunk(f"{library}:some_net")
    assert asked[0][0] == "some_net"
    assert (trunk.tap_names, trunk.tap_channels) == (("s1", "s4", "s8"), {"s1": 3, "s4": 5, "s8": 6})
    with torch.inference_mode():
        taps = trunk(IMAGES)
        assert [tuple(tap.shape[1:]) for tap in taps] == [(3, 64, 96), (5, 16, 24), (6, 8, 12)]
        if library == "timm":
            pixels = (IMAGES.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
            torch.testing.assert_close(taps[1], nn.Sequential(*list(net)[:3])(pixels))


def test_external_network_without_feature_maps_is_refused() -> None:
    with pytest.raises(UsageError, match="no feature map"):
        ExternalTrunk(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)))


def test_external_library_that_does_not_import_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match="pip install timm"):
        build_trunk("timm:resnet18")


def test_external_library_that_lacks_the_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def give(_name: str, **_options: Any) -> nn.Module:
        raise RuntimeError("Unknown model (nothing)")

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=give))
    with pytest.raises(UsageError, match="Unknown model"):
        build_trunk("timm:nothing")
