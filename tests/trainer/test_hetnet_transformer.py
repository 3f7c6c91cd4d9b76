"""A vision transformer from a file as the global teacher: formats, tokens, distillation, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

from edge.errors import DataError, UsageError
from tests.trainer.test_hetnet import BRIEF, CPU, brick, context, maps
from trainer.methods.hetnet.fit import GlobalTeacher, HetNetMethod
from trainer.methods.hetnet.transformer import Transformer, distil

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.methods.hetnet.fit import HetNetConfig

STEP, WIDTH, TILE = 16, 24, 64
WEIGHT = torch.randn(WIDTH, 3, STEP, STEP, generator=torch.Generator().manual_seed(0)) / 16


class Tokens(nn.Module):
    """Patches to tokens with a class token in front, and one layer of attention: the shape of a ViT."""

    def __init__(self, extra: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT)
        self.extra = nn.Parameter(torch.ones(1, extra, WIDTH))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = functional.conv2d(image, self.weight, stride=STEP).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.extra.expand(image.shape[0], -1, -1), tokens], 1)
        return tokens + (tokens @ tokens.transpose(1, 2) / WIDTH).softmax(2) @ tokens


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, and the one format without pickle


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "vit.pt"
    torch.jit.save(torch.jit.trace(Tokens().eval(), torch.zeros(2, 3, TILE, TILE)), str(path))
    return path


def write_onnx(path: Path, side: int | str = TILE) -> Path:
    """Write patches as a map: one convolution."""
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "weight"], ["map"], strides=[STEP, STEP])],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, side, side])],
        [helper.make_tensor_value_info("map", TensorProto.FLOAT, ["n", WIDTH, "h", "w"])],
        [numpy_helper.from_array(WEIGHT.numpy(), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path


def opened(path: Path, side: int = TILE, deviation: float = 0.5) -> Transformer:
    return Transformer(path, side=side, mean=(0.5,) * 3, deviation=(deviation,) * 3, device=CPU)


def config(path: Path) -> HetNetConfig:
    return BRIEF.model_copy(
        update={
            "teacher": GlobalTeacher.TRANSFORMER,
            "transformer": str(path),
            "transformer_side": TILE,
            "adapter_steps": 10,
            "steps": 4,
        }
    )


def test_onnx_map_is_what_the_graph_gives(tmp_path: Path) -> None:
    tiles = brick()[0][:3]
    found = opened(write_onnx(tmp_path / "vit.onnx"))(tiles[:, :TILE, :TILE])
    pixels = torch.from_numpy(tiles[:, :TILE, :TILE]).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(
        found, functional.conv2d((pixels - 0.5) / 0.5, WEIGHT, stride=STEP), rtol=1e-4, atol=1e-4
    )


def test_script_tokens_become_a_map_without_the_class_token(script: Path) -> None:
    tiles = brick()[0][:2, :TILE, :TILE]
    found = opened(script)(tiles)
    assert found.shape == (2, WIDTH, TILE // STEP, TILE // STEP)
    pixels = (torch.from_numpy(tiles).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        tokens = Tokens()(pixels)
    torch.testing.assert_close(found[:, :, 1, 2], tokens[:, 1 + 4 + 2], rtol=1e-4, atol=1e-4)


def test_images_are_resized_to_what_the_network_takes(script: Path) -> None:
    assert opened(script)(brick()[0][:2]).shape == (2, WIDTH, 4, 4)


def test_distil_teaches_the_tokens_of_the_same_place(tmp_path: Path) -> None:
    """Where tokens are a linear function of the deepest map, the adapter's tokens follow them."""
    transformer = opened(write_onnx(tmp_path / "vit.onnx", "s"))
    tiles = brick()[0][:16]
    with torch.inference_mode():
        truth = functional.interpolate(transformer(tiles), size=(6, 6), mode="bilinear").clone()
    losses = {}
    for steps in (1, 150):
        adapter = distil(
            transformer,
            tiles,
            lambda rows: truth[rows],
            (6, 6),
            steps=steps,
            batch_tiles=8,
            generator=torch.Generator().manual_seed(0),
            device=CPU,
            progress=lambda *_: None,
        )
        assert not any(p.requires_grad for p in adapter.parameters())
        tokens = adapter(truth).permute(0, 2, 3, 1).flatten(0, 2)
        rows = truth.permute(0, 2, 3, 1).flatten(0, 2)
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        # How well the teacher's tokens can be read off the adapter's, whatever their rotation.
        fit = torch.cat([tokens, torch.ones(len(tokens), 1)], 1)
        rest = rows - fit @ torch.linalg.lstsq(fit, rows).solution
        losses[steps] = float(rest.square().mean() / (rows - rows.mean(0)).square().mean())
    assert losses[150] < 0.3
    assert losses[150] < 0.7 * losses[1]


def test_fit_ships_an_adapter_and_needs_no_transformer_after(script: Path) -> None:
    train, _, bad, _ = brick()
    settings = config(script)
    head = HetNetMethod.fit(context(train[:8]), settings)
    script.unlink()
    again = HetNetMethod.build(type(settings).model_validate(settings.model_dump(mode="json")), head.state_dict())
    assert np.array_equal(maps(again, bad[:3]), maps(head, bad[:3]))
    assert head.context is not None
    assert head.context.adapter is not None
    assert not any(p.requires_grad for p in head.parameters())
    plain = HetNetMethod.fit(context(train[:8]), BRIEF.model_copy(update={"steps": 4}))
    assert not np.array_equal(maps(plain, bad[:3]), maps(head, bad[:3]))


@pytest.mark.parametrize(("name", "format_"), [("vit.onnx", "ONNX"), ("vit.pt", "TorchScript")])
def test_a_file_that_is_something_else_is_named(tmp_path: Path, name: str, format_: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=rf"{name}: no {format_}"):
        opened(path)


def test_no_file_no_path_and_an_unknown_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        opened(tmp_path / "absent.onnx")
    with pytest.raises(UsageError, match="must end in one of"):
        opened(tmp_path / "vit.bin")
    with pytest.raises(UsageError, match="no path given"):
        HetNetMethod.fit(context(brick()[0][:4]), config(tmp_path / "x").model_copy(update={"transformer": ""}))


def test_an_input_size_that_the_network_does_not_take_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"takes no \[N, 3, 96, 96\]"):
        opened(write_onnx(tmp_path / "vit.onnx"), side=96)(brick()[0][:2])


def test_tokens_that_are_no_square_and_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vit.pt"
    torch.jit.save(torch.jit.trace(Tokens(extra=20).eval(), torch.zeros(2, 3, 240, 240)), str(path))
    with pytest.raises(DataError, match=r"\(2, 245, 24\), expected tokens"):
        opened(path, side=240)(brick()[0][:2])
    torch.jit.save(torch.jit.trace(nn.Flatten(), torch.zeros(2, 3, 32, 32)), str(path))
    with pytest.raises(DataError, match="expected tokens"):
        opened(path, side=32)(brick()[0][:2])
    torch.jit.save(torch.jit.trace(Tokens().eval(), torch.zeros(2, 3, TILE, TILE)), str(path))
    with pytest.raises(DataError, match="not finite"):
        opened(path, deviation=1e-42)(brick()[0][:2])
