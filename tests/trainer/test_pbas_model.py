"""The folded head of PBAS against the network it was folded from, in torch and in both engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional

from edge.errors import DataError
from edge.inference.openvino_session import core
from trainer.methods.patches import enlarge, patch_mean
from trainer.methods.pbas.fit import PbasConfig, PbasMethod
from trainer.methods.pbas.model import PbasHead, PbasNetwork, embed

if TYPE_CHECKING:
    from pathlib import Path


def trained_network(seed: int = 0) -> PbasNetwork:
    """A network whose statistics are all off their defaults, as after training."""
    generator = torch.Generator().manual_seed(seed)
    network = PbasNetwork(generator)
    norm = network.discriminator.norm
    for tensor, low, high in (
        (network.projector.mean, -3.0, 3.0),
        (network.projector.scale, 0.05, 1.0),
        (norm.running_mean, -1.0, 1.0),
        (norm.running_var, 0.3, 3.0),
        (norm.weight.data, 0.5, 1.5),
        (norm.bias.data, -0.5, 0.5),
        (network.projector.linear.bias.data, -1.0, 1.0),
    ):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return network.eval()


def taps(n: int, height: int = 8, width: int = 12, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 40, height, width, generator=generator) * 7,
        torch.randn(n, 112, height // 2, width // 2, generator=generator) * 4,
    )


def test_patch_mean_counts_the_padding_as_zeros() -> None:
    tap = torch.arange(12.0).reshape(1, 1, 3, 4)
    mean = patch_mean(tap)[0, 0]
    assert mean[0, 0] == pytest.approx((0 + 1 + 4 + 5) / 9)
    assert mean[1, 1] == pytest.approx(5)


def test_enlarge_is_bilinear_with_half_pixel_centres() -> None:
    tap = torch.tensor([[[[0.0, 4.0]]]])
    assert enlarge(tap, 2)[0, 0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]


def test_embed_keeps_the_taps_apart_on_the_fine_grid() -> None:
    s8, s16 = taps(2)
    embedding = embed(s8, s16)
    assert embedding.shape == (2, 152, 8, 12)
    assert torch.equal(embedding[:, :40], embed(s8, s16 * 0)[:, :40])
    assert torch.equal(embedding[:, 40:], embed(s8 * 0, s16)[:, 40:])


@pytest.mark.parametrize(("channels", "half"), [((24, 112), 4), ((40, 112), 3)])
def test_embed_foreign_taps_are_refused(channels: tuple[int, int], half: int) -> None:
    with pytest.raises(DataError, match="s8"):
        embed(torch.zeros(1, channels[0], 8, 8), torch.zeros(1, channels[1], half, half))


def test_folded_head_equals_the_reference_network() -> None:
    network = trained_network()
    head = PbasHead.fold(network, smoothing=0)
    with torch.inference_mode():
        reference = network(*taps(3))
        (folded,) = head(*taps(3))
    assert folded.shape == (3, 8, 12)
    assert (folded - reference).abs().max() / reference.abs().max() < 1e-5


def test_smoothing_is_scipys_gaussian_with_repeated_edges() -> None:
    network = trained_network()
    with torch.inference_mode():
        raw = PbasHead.fold(network, smoothing=0)(*taps(2))[0].numpy()
        smooth = PbasHead.fold(network, smoothing=0.5)(*taps(2))[0].numpy()
    expected = np.stack([gaussian_filter(m, 0.5, mode="nearest") for m in raw])
    np.testing.assert_allclose(smooth, expected, atol=1e-5 * np.abs(raw).max())


def test_smoothing_leaves_a_constant_map_alone_up_to_the_border() -> None:
    network = trained_network()
    # Zero taps: the 3x3 mean is the same everywhere, so is the logit before smoothing.
    s8, s16 = torch.zeros(1, 40, 8, 8), torch.zeros(1, 112, 4, 4)
    with torch.inference_mode():
        (smooth,) = PbasHead.fold(network, smoothing=1.5)(s8, s16)
        (sharp,) = PbasHead.fold(network, smoothing=0)(s8, s16)
    assert sharp.abs().max() > 1e-4
    assert (smooth - sharp).abs().max() < 1e-5


def test_embedding_equals_the_papers_unfold_and_pool() -> None:
    s8, _ = taps(2)
    unfolded = functional.unfold(s8, 3, padding=1).reshape(2, 40, 9, 8, 12).mean(2)
    assert (patch_mean(s8) - unfolded).abs().max() < 1e-5


def test_build_restores_the_fitted_head() -> None:
    config = PbasConfig(smoothing=0.5)
    head = PbasHead.fold(trained_network(), config.smoothing)
    again = PbasMethod.build(config, head.state_dict())
    with torch.inference_mode():
        assert torch.equal(again(*taps(2))[0], head(*taps(2))[0])
    assert not again.training


def test_build_foreign_tensors_are_refused() -> None:
    head = PbasHead.fold(trained_network(), 0.5)
    for tensors in ({}, {"bank": torch.zeros(3)}, {k: v[:1] for k, v in head.state_dict().items()}):
        with pytest.raises(DataError, match="PBAS head"):
            PbasMethod.build(PbasConfig(smoothing=0.5), tensors)


def test_head_holds_no_centres_and_no_state() -> None:
    head = PbasHead.fold(trained_network(), 0.5)
    assert head.state_names == ()
    assert set(head.state_dict()) == {
        "from_s8.weight", "from_s8.bias", "from_s16.weight", "logit.weight", "smooth.weight"
    }  # fmt: skip


def test_exported_head_agrees_in_both_engines_at_any_batch(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    head = PbasHead.fold(trained_network(), 0.5)
    example = taps(2, 16, 16)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.onnx.export(
        head, example, dynamo=True, input_names=["s8", "s16"], output_names=["anomaly_map"],
        dynamic_shapes=(({0: batch}, {0: batch}),), verbose=False,
    )  # fmt: skip
    path = tmp_path / "head.onnx"
    program.save(str(path))
    kinds = {node.op_type for node in program.model.graph}
    assert kinds <= {"AveragePool", "Conv", "Resize", "Add", "LeakyRelu", "Pad", "Squeeze", "Gather"}, kinds
    ort = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compiled = core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for n in (1, 5):
        inputs = taps(n, 16, 16, seed=n)
        with torch.inference_mode():
            expected = head(*inputs)[0].numpy()
        feed = {"s8": inputs[0].numpy(), "s16": inputs[1].numpy()}
        for found in (ort.run(None, feed)[0], compiled(feed)[0]):
            assert found.shape == (n, 16, 16)
            assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-4
