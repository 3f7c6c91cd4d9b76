from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from toys import ToyMemoryHead, ToyPbasHead, ToyTrunk

from deploy.export import export_head, export_trunk, tap_shapes
from edge.errors import DataError, UsageError

if TYPE_CHECKING:
    from pathlib import Path


def test_export_trunk_two_exports_are_the_same_bytes(tmp_path: Path) -> None:
    first = export_trunk(ToyTrunk(), tmp_path / "a.onnx", size=(64, 64))
    second = export_trunk(ToyTrunk(), tmp_path / "b.onnx", size=(96, 64))
    assert first == second == hashlib.sha256((tmp_path / "a.onnx").read_bytes()).hexdigest()
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_export_trunk_file_names_no_place_and_no_source(tmp_path: Path) -> None:
    export_trunk(ToyTrunk(), tmp_path / "a.onnx", size=(64, 64))
    content = (tmp_path / "a.onnx").read_bytes()
    assert b"toys" not in content
    assert b".py" not in content


def test_export_trunk_serves_another_size_and_batch(tmp_path: Path) -> None:
    trunk = ToyTrunk()
    export_trunk(trunk, tmp_path / "a.onnx", size=(64, 64))
    image = np.random.default_rng(1).integers(0, 256, (3, 128, 32, 3), dtype=np.uint8)
    got = onnxruntime.InferenceSession(tmp_path / "a.onnx").run(None, {"image": image})
    with torch.no_grad():
        wanted = trunk(torch.from_numpy(image))
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-4)


def test_export_trunk_size_not_a_multiple_of_32_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="32"):
        export_trunk(ToyTrunk(), tmp_path / "a.onnx", size=(60, 64))


def test_export_head_keeps_state_name_shape_and_values(tmp_path: Path) -> None:
    bank = torch.randn(50, 40)
    head = ToyMemoryHead(bank, torch.ones(40))
    export_head(head, tmp_path / "h.onnx", tap_shapes=tap_shapes(ToyTrunk(), (64, 96)))
    model = onnx.load(tmp_path / "h.onnx")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(tensors["bank"], bank.numpy())
    np.testing.assert_array_equal(tensors["bank_norms"], head.bank_norms.numpy())
    # Nothing else may hold the bank: a new state would then change only half of the graph.
    assert [name for name, value in tensors.items() if value.size == bank.numel()] == ["bank"]


@pytest.mark.parametrize("head", [ToyMemoryHead(torch.randn(50, 40), torch.ones(40)), ToyPbasHead()])
def test_export_head_equals_torch_at_another_batch(head: torch.nn.Module, tmp_path: Path) -> None:
    export_head(head, tmp_path / "h.onnx", tap_shapes=tap_shapes(ToyTrunk(), (64, 64)))
    taps = {"s8": torch.rand(5, 16, 8, 8), "s16": torch.rand(5, 24, 4, 4)}
    got = onnxruntime.InferenceSession(tmp_path / "h.onnx").run(None, {k: v.numpy() for k, v in taps.items()})
    with torch.no_grad():
        wanted = head(*taps.values())
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-4)


class _Head(ToyPbasHead):
    state_names = ("centre", "unused")

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unused", torch.zeros(3))


class _RandomHead(ToyPbasHead):
    def forward(self, s8: torch.Tensor, s16: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (result,) = super().forward(s8, s16)
        return (result + torch.randn_like(result),)


@pytest.mark.parametrize(("head", "message"), [(_Head(), "unused"), (_RandomHead(), "RandomNormal")])
def test_export_head_refuses_dead_state_and_random_ops(head: torch.nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        export_head(head, tmp_path / "h.onnx", tap_shapes=tap_shapes(ToyTrunk(), (64, 64)))


class _PromptedHead(torch.nn.Module):
    """Distance to the prompt of the product that is asked for; and a route, but no rows."""

    tap_names = ("s8",)
    state_names = ("prompts",)
    product_state = ("prompts",)
    takes_product = True
    map_stride = 8

    def __init__(self, *, counts: bool = False) -> None:
        super().__init__()
        self.register_buffer("prompts", torch.randn(3, 16))
        self.counts = counts

    def forward(self, s8: torch.Tensor, product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        prompt = self.prompts.index_select(0, product)[:, :, None, None]
        away = (s8 - prompt).square().sum(1)
        if self.counts:
            away = away / self.prompts.square().mean()
        return away, away.mean((1, 2))[:, None] - torch.arange(3)


def test_export_head_takes_products_and_gives_a_route_without_rows(tmp_path: Path) -> None:
    head = _PromptedHead()
    export_head(head, tmp_path / "h.onnx", tap_shapes=tap_shapes(ToyTrunk(), (64, 64)))
    session = onnxruntime.InferenceSession(tmp_path / "h.onnx")
    assert [value.name for value in session.get_outputs()] == ["anomaly_map", "route"]
    assert {value.name: value.type for value in session.get_inputs()} == {
        "s8": "tensor(float)", "product": "tensor(int64)",
    }  # fmt: skip
    tap, product = torch.randn(5, 16, 8, 8), torch.tensor([2, 0, 1, 1, 2])
    got = session.run(None, {"s8": tap.numpy(), "product": product.numpy()})
    for one, wanted in zip(got, head(tap, product), strict=True):
        np.testing.assert_allclose(one, wanted.numpy(), rtol=1e-5)


def test_export_head_refuses_a_map_that_depends_on_how_many_products_there_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="how many products"):
        export_head(_PromptedHead(counts=True), tmp_path / "h.onnx", tap_shapes=tap_shapes(ToyTrunk(), (64, 64)))


def test_export_head_refuses_product_state_that_is_no_state(tmp_path: Path) -> None:
    head = _PromptedHead()
    head.product_state = ("prompts", "other")
    with pytest.raises(DataError, match="product_state names other"):
        export_head(head, tmp_path / "h.onnx", tap_shapes=tap_shapes(ToyTrunk(), (64, 64)))
