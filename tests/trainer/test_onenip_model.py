"""OneNIP's networks: what is hidden from whom, that a kept prompt is the live one, and the map's parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional

from deploy.export import export_head
from trainer.methods.onenip.fit import dice
from trainer.methods.onenip.model import BothWays, OneNipHead, PromptedReconstructor, Refiner
from trainer.methods.uniad.model import Attention

if TYPE_CHECKING:
    from pathlib import Path


GRID = (6, 7)
SITES = GRID[0] * GRID[1]
CHANNELS = (4, 6, 6, 8)
DEPTH = sum(CHANNELS)
PRODUCTS = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small() -> PromptedReconstructor:
    network = PromptedReconstructor(grid=GRID, channels=DEPTH, width=16, layers=2, heads=4, hidden=32, neighbours=3)
    network.initialise(generator())
    return network.eval()


def head(products: int = PRODUCTS, share: float = 0.5, level: float = 3.0) -> OneNipHead:
    refiner = Refiner(DEPTH, 5)
    refiner.initialise(generator(1))
    made = OneNipHead(
        small(),
        refiner,
        mean=torch.randn(DEPTH, generator=generator(2)),
        scale=torch.rand(DEPTH, generator=generator(3)) + 0.5,
        prompts=torch.randn(products, SITES, 16, generator=generator(4)),
        share=share,
        level=level,
    )
    return made.eval().requires_grad_(requires_grad=False)


def taps(n: int, seed: int = 9) -> tuple[torch.Tensor, ...]:
    drawn = generator(seed)
    return tuple(
        torch.randn(n, count, GRID[0] * factor, GRID[1] * factor, generator=drawn)
        for count, factor in zip(CHANNELS, (8, 4, 2, 1), strict=True)
    )


def near(site: int) -> list[int]:
    row, column = divmod(site, GRID[1])
    return [
        r * GRID[1] + c
        for r in range(max(0, row - 1), min(GRID[0], row + 2))
        for c in range(max(0, column - 1), min(GRID[1], column + 2))
    ]


def test_kept_prompt_gives_what_the_image_itself_gives() -> None:
    judge = head()
    features, prompts = judge.tokens(*taps(4)), judge.tokens(*taps(PRODUCTS, seed=10))
    judge.prompts.copy_(judge.reconstructor.encode(prompts))
    products = torch.tensor([2, 0, 1, 2])
    live = judge.reconstructor(features, prompts[products])
    kept = judge.reconstructor.decode(judge.reconstructor.encode(features), judge.prompts[products])
    assert torch.allclose(live, kept, atol=1e-5)
    error = judge.errors(features, judge.prompts[products])[0]
    assert torch.allclose(error.flatten(1), (live - features).norm(dim=2), atol=1e-4)


def test_paper_size_has_as_many_parameters_as_the_original() -> None:
    network = PromptedReconstructor(
        grid=(14, 14), channels=272, width=256, layers=4, heads=8, hidden=1024, neighbours=7
    )
    refiner = Refiner(272, 128)
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in (network, refiner)]
    assert sizes == [7_779_856, 592_769]  # 8.37 M together


def seen_weights(network: PromptedReconstructor) -> dict[str, torch.Tensor]:
    """Attention weights of every attention, by name, in one pass."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        part.register_forward_hook(
            lambda module, args, _, name=name: found.update({name: module.weights(args[0], args[1], args[3])})
        )
        for name, part in network.named_modules()
        if isinstance(part, Attention)
    ]
    with torch.no_grad():
        network(
            torch.randn(2, SITES, DEPTH, generator=generator(5)), torch.randn(2, SITES, DEPTH, generator=generator(6))
        )
    for hook in hooks:
        hook.remove()
    return found


def test_surroundings_are_hidden_in_every_attention_but_the_last() -> None:
    found = seen_weights(small())
    assert set(found) == {
        "encoder.0.attention", "encoder.1.attention", "decoder.0.to_image", "decoder.0.to_prompt",
        "decoder.1.to_image", "decoder.1.to_prompt", "last",
    }  # fmt: skip
    for name, weights in found.items():
        assert torch.allclose(weights.sum(-1), torch.ones(()))
        for site in range(SITES):
            assert (weights[:, :, site, near(site)] == 0).all() == (name != "last"), name
    assert (found["last"] > 0).all()


def test_image_is_updated_with_what_it_sees_of_the_prompt_and_not_with_the_prompts_network() -> None:
    layer = BothWays(16, 4, 32)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator(7))
    prompt, image = (torch.randn(2, SITES, 16, generator=generator(seed)) for seed in (8, 9))
    place, mask = torch.zeros(SITES, 16), torch.zeros(SITES, SITES)
    found, moved = layer(prompt, image, place, mask)
    wanted = layer.norms[2](image + layer.to_prompt(image, found, found, mask))
    assert torch.equal(moved, wanted)
    assert not torch.allclose(moved, layer.norms[2](image + layer.feed(found)))


def test_one_prompt_serves_every_image_as_repeated_ones_do() -> None:
    network = small()
    image, prompt = torch.randn(3, SITES, 16, generator=generator(1)), torch.randn(1, SITES, 16, generator=generator(2))
    assert torch.allclose(network.decode(image, prompt), network.decode(image, prompt.repeat(3, 1, 1)), atol=1e-5)


def test_map_is_made_of_error_and_probability_in_frozen_shares() -> None:
    inputs = (*taps(3), torch.tensor([1, 0, 2]))
    error, probability = (head(share=share, level=1.0)(*inputs)[0] for share in (0.0, 1.0))
    assert error.shape == probability.shape == (3, 4 * GRID[0], 4 * GRID[1])
    assert float(probability.min()) >= 0
    assert float(probability.max()) <= 1
    mixed = head(share=0.3, level=5.0)(*inputs)[0]
    assert torch.allclose(mixed, 0.7 * error + 0.3 * 5.0 * probability, atol=1e-5)


def test_embedding_is_a_prompt() -> None:
    judge = head()
    _, embedding = judge(*taps(2), torch.tensor([0, 1]))
    assert torch.equal(embedding, judge.reconstructor.encode(judge.tokens(*taps(2))))
    assert embedding.shape[1:] == judge.prompts.shape[1:]


def test_each_tile_is_judged_with_its_own_products_prompt() -> None:
    judge, products = head(), torch.tensor([2, 0, 1])
    together = judge(*taps(3), products)[0]
    for row, product in enumerate(products):
        alone = judge(*(tap[row : row + 1] for tap in taps(3)), product[None])[0]
        assert torch.allclose(together[row : row + 1], alone, atol=1e-5)
    assert not torch.allclose(together, judge(*taps(3), torch.tensor([0, 0, 0]))[0])


def test_head_of_one_product_takes_no_product() -> None:
    judge = head(products=1)
    assert (judge.takes_product, judge.product_state, judge.state_names) == (False, (), ("prompts",))
    assert torch.isfinite(judge(*(torch.zeros_like(tap) for tap in taps(2)))[0]).all()
    several = head()
    assert (several.takes_product, several.product_state) == (True, ("prompts",))


def test_graph_is_the_module_at_another_batch_with_its_norms_folded(tmp_path: Path) -> None:
    judge, names = head(products=1), ("s2", "s4", "s8", "s16")
    judge.refiner.train()
    for seed in range(3):  # so that a norm does something
        judge.refiner(torch.randn(4, DEPTH, *GRID, generator=generator(seed)))
    judge.refiner.eval()
    shapes = dict(zip(names, (tap.shape[1:] for tap in taps(1)), strict=True))
    export_head(judge, tmp_path / "h.onnx", tap_shapes=shapes)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(tmp_path / "h.onnx").graph.node}
    session = onnxruntime.InferenceSession(tmp_path / "h.onnx")
    got = session.run(None, dict(zip(names, (tap.numpy() for tap in taps(3)), strict=True)))
    for one, other in zip(got, judge(*taps(3)), strict=True):
        assert torch.allclose(torch.from_numpy(one), other, atol=1e-4)


def test_refiner_is_four_times_as_fine() -> None:
    refiner = Refiner(8, 5)
    refiner.initialise(generator())
    assert refiner.eval()(torch.zeros(2, 8, *GRID)).shape == (2, 4 * GRID[0], 4 * GRID[1])


@pytest.mark.parametrize("cells", [1, 12, 400])
def test_dice_has_no_factor_two(cells: int) -> None:
    truth = torch.zeros(1, 20, 20)
    truth.view(-1)[:cells] = 1
    assert dice(truth, truth).item() == pytest.approx(1 - (cells + 1) / (2 * cells + 1))
    assert dice(torch.zeros(1, 20, 20), truth).item() == pytest.approx(1 - 1 / (cells + 1))
    assert dice(torch.zeros(1, 20, 20), torch.zeros(1, 20, 20)).item() == 0


def test_dice_teaches_the_transformer_too() -> None:
    network, refiner = small(), Refiner(DEPTH, 5)
    refiner.initialise(generator(1))
    features, prompt = (torch.randn(2, SITES, DEPTH, generator=generator(seed)) for seed in (2, 3))
    error = (network(features, prompt) - features).abs().transpose(1, 2).unflatten(2, GRID)
    truth = functional.one_hot(torch.tensor([3, 9]), 16 * SITES).float().unflatten(1, (4 * GRID[0], 4 * GRID[1]))
    dice(torch.sigmoid(refiner(error)), truth).mean().backward()
    for part in (network.encoder, network.decoder, network.last, network.leave):
        gradients = [parameter.grad for parameter in part.parameters()]
        assert any(gradient is not None and float(gradient.abs().max()) > 0 for gradient in gradients)
