"""OneNIP trained on three generated products: the prompt matters, defects are restored, the refiner finds them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch.nn import functional

from edge.errors import DataError, UsageError
from tests.trainer.prompted_products import CPU, HELD, PRODUCTS, SMALL, TRAIN, context, trained, unseen
from trainer.methods.onenip.anomalies import pseudo_anomaly
from trainer.methods.onenip.fit import (
    Material,
    OneNipConfig,
    OneNipMethod,
    batches,
    choose_prompts,
    error_level,
    make_anomalies,
    products_of,
)
from trainer.methods.onenip.model import OneNipHead, PromptedReconstructor
from trainer.methods.uniad.fit import UniADMethod

if TYPE_CHECKING:
    from trainer.methods.base import Features

TAPS = OneNipMethod.tap_names


def parts(head: OneNipHead, of: Features, *, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Error on the fine grid and probability, as ``shift`` products further are prompted."""
    prompt = head.prompts[(products_of(of) + shift) % len(PRODUCTS)]
    with torch.inference_mode():
        error, probability, _ = head.errors(features_of(head, of), prompt)
    return functional.interpolate(error[:, None], scale_factor=4.0, mode="bilinear")[:, 0], probability


def features_of(head: OneNipHead, of: Features) -> torch.Tensor:
    return head.tokens(*(of.taps[name].float() for name in TAPS))


def cells(masks: np.ndarray, size: int) -> torch.Tensor:
    return functional.avg_pool2d(torch.from_numpy(masks)[:, None].float(), size)[:, 0]


def test_prompt_of_another_product_raises_the_error_on_good_images() -> None:
    head, good = trained(), unseen().good
    own = parts(head, good)[0].mean()
    for shift in range(1, len(PRODUCTS)):
        assert float(parts(head, good, shift=shift)[0].mean() / own) >= 1.2


def test_refiner_adds_to_the_pixel_precision_of_the_error() -> None:
    head, images = trained(), unseen()
    (error, probability), (wrong, likely) = parts(head, images.good), parts(head, images.defective)
    inside = cells(images.masks, 4) > 0.5
    truth = torch.cat([torch.zeros_like(inside), inside]).flatten().numpy()

    def precision(good: torch.Tensor, bad: torch.Tensor) -> float:
        return float(average_precision_score(truth, torch.cat([good, bad]).flatten().numpy()))

    level, share = head.level, head.share
    fused = precision(*((1 - share) * e + share * level * p for e, p in ((error, probability), (wrong, likely))))
    assert fused - precision(error, wrong) >= 0.05


def gap(head: OneNipHead) -> float:
    """How much nearer to the good image a defect's features are once rebuilt, as a share of what they were away."""
    images = unseen()
    good, bad = features_of(head, images.good), features_of(head, images.defective)
    with torch.inference_mode():
        rebuilt = head.reconstructor.decode(head.reconstructor.encode(bad), head.prompts[products_of(images.good)])
    inside = (cells(images.masks, 16) > 0.5).flatten(1)
    before, after = ((one - good).norm(dim=2)[inside].mean() for one in (bad, rebuilt))
    return float(1 - after / before)


def test_defects_are_restored_towards_the_good_image() -> None:
    assert gap(trained()) > 0


@pytest.mark.slow
def test_restoring_comes_from_the_restoration_stream() -> None:
    without = OneNipMethod.fit(context(), SMALL.model_copy(update={"restore": 0.0}))
    assert gap(trained()) > gap(without)


def test_same_image_and_prompt_give_the_same_bits() -> None:
    head, good = trained(), unseen().good
    taps = [good.taps[name][:3].float() for name in TAPS]
    first, second = (head(*taps, torch.tensor([0, 0, 1]))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_level_comes_from_the_least_and_greatest_error_of_held_out_good_images() -> None:
    head, good = trained(), context().validation.good
    with torch.inference_mode():
        error = head.errors(features_of(head, good), head.prompts[products_of(good)])[0]
    mean = float(error.min() + error.max()) / 2
    assert error_level(head, good, CPU) == pytest.approx(mean, rel=1e-4)
    assert float(head.level) == pytest.approx(SMALL.level * mean, rel=1e-4)
    assert len(good) == HELD * len(PRODUCTS)


def test_head_has_a_prompt_for_each_product() -> None:
    head = trained()
    assert head.prompts.shape == (len(PRODUCTS), 36, SMALL.width)
    assert head.takes_product
    with torch.no_grad():
        own = head.reconstructor.encode(features_of(head, context().features))
    for product, prompt in enumerate(head.prompts):
        tokens = own[product * TRAIN : (product + 1) * TRAIN]
        nearest = (tokens - prompt).flatten(1).norm(dim=1)
        assert float(nearest.min()) < 1e-2 * float(nearest.max())


def test_prompt_is_the_medoid_of_its_own_product() -> None:
    network = PromptedReconstructor(grid=(4, 4), channels=3, width=8, layers=1, heads=2, hidden=8, neighbours=3).eval()
    network.initialise(torch.Generator().manual_seed(0))
    base = torch.randn(2, 16, 3, generator=torch.Generator().manual_seed(1))
    # Of each product five tiles along a line; the middle one is nearest to all.
    steps = torch.tensor([-2.0, 0.0, 1.0, 0.3, -0.7])
    tiles = torch.cat([one + 0.05 * steps[:, None, None] * torch.ones(16, 3) for one in base])
    products = torch.arange(2).repeat_interleave(5)
    found = choose_prompts(network, (tiles.half(), products), lambda x: x)
    with torch.no_grad():
        wanted = network.encode(tiles[[1, 6]].half().float())
    assert torch.allclose(found, wanted, atol=1e-5)


def test_each_step_takes_prompts_and_anomalies_of_the_same_products() -> None:
    products = torch.tensor([0, 0, 0, 1, 1, 2])
    clean = products[:, None, None].expand(-1, 4, 2).half()
    sources = torch.tensor([5, 3, 0, 1])
    material = Material(clean, products, clean[sources] + 10, torch.ones(4, 8, 8).half(), sources, (2, 2))
    seen = []
    for _, drawn in zip(
        range(20),
        batches(material, SMALL.model_copy(update={"batch_tiles": 4}), torch.Generator().manual_seed(0)),
        strict=False,
    ):
        n = len(drawn.prompt)
        assert torch.equal(drawn.prompt, drawn.target[:n])
        assert torch.equal(drawn.target, drawn.target[:n].repeat(2, 1, 1))
        assert torch.equal(drawn.features[:n], drawn.target[:n])
        assert torch.equal(drawn.features[n:], drawn.target[n:] + 10)
        assert not drawn.masks[:n].any()
        assert drawn.masks[n:].all()
        seen += drawn.target[:n, 0, 0].tolist()
    assert set(seen) == {0.0, 1.0, 2.0}


def test_few_pictures_leave_no_product_without_anomalies() -> None:
    given_ = context()
    config = SMALL.model_copy(update={"anomalies": 1})
    tokens, masks, sources = make_anomalies(given_, config, products_of(given_.features))
    assert sorted(products_of(given_.features)[sources].tolist()) == [0, 1, 2]
    assert tokens.shape == (3, 36, 192)
    assert masks.shape == (3, 24, 24)
    assert float(masks.max()) == 1
    assert all(float(mask.max()) > 0 for mask in masks)


def test_product_without_images_is_refused() -> None:
    given_ = context()
    with pytest.raises(DataError, match="fourth"):
        OneNipMethod.fit(replace(given_, products=(*PRODUCTS, "fourth")), SMALL)


def test_divergence_and_foreign_settings_are_usage_errors() -> None:
    config = SMALL.model_copy(update={"rate": 1e18, "steps": 20, "anomalies": 3, "clip": 1e9})
    with pytest.raises(UsageError, match="diverged"):
        OneNipMethod.fit(context(), config)
    with pytest.raises(UsageError, match="UniADConfig"):
        OneNipMethod.fit(context(), UniADMethod.config("quick"))
    with pytest.raises(UsageError, match="choose quick or full"):
        OneNipMethod.config("other")


def test_tensors_of_something_else_are_refused() -> None:
    tensors = {name: tensor.clone() for name, tensor in trained().state_dict().items()}
    head = OneNipMethod.build(SMALL, tensors)
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    for damage in (
        {"prompts": torch.zeros(3, 36, 7)},
        {"reconstructor.rows": torch.zeros(0)},
        {"more": torch.zeros(1)},
    ):
        with pytest.raises(DataError, match="no OneNIP head"):
            OneNipMethod.build(SMALL, tensors | damage)
    with pytest.raises(DataError, match="no OneNIP head"):
        OneNipMethod.build(OneNipConfig(), tensors)


@given(
    height=st.integers(16, 90),
    width=st.integers(16, 90),
    others=st.integers(0, 2),
    grey=st.booleans(),
    flat=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_pseudo_anomaly_changes_its_mask_and_nothing_else(
    *, height: int, width: int, others: int, grey: bool, flat: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), rng.integers(0, 256), np.uint8)
    if not flat:
        image = rng.integers(0, 256, (height, width, 1 if grey else 3)).astype(np.uint8).repeat(3 if grey else 1, 2)
    before = image.copy()
    made, mask = pseudo_anomaly(image, rng.integers(0, 256, (others, 40, 50, 3)).astype(np.uint8), rng)
    assert np.array_equal(image, before)
    assert mask.any()
    assert np.array_equal(made[~mask], image[~mask])
    assert np.abs(made[mask].astype(int) - image[mask]).mean() >= 6
