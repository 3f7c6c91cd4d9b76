"""The router's training: a centre loss that acts, one gradient for a whole batch, one schedule of steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainer.methods.adapted_moe.experts import DiscriminatorSchedule, discriminator_expert
from trainer.methods.adapted_moe.model import LEAK, closeness
from trainer.methods.adapted_moe.routing import LAST_RATE, RouterSpace, Schedule, accumulate, learn, scatter

D, CLASSES, EACH = 12, 4, 40
SCHEDULE = Schedule(steps=150, rate=1e-2, batch=64, micro_batch=64, centre_weight=0.1)


def points(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return four overlapping classes, elongated so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    stretch = torch.linspace(0.3, 3, D)
    means = torch.randn(CLASSES, D, generator=generator)
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    return means[labels] + torch.randn(len(labels), D, generator=generator) * stretch, labels


def start(of: tuple[torch.Tensor, torch.Tensor]) -> RouterSpace:
    return RouterSpace.closed_form(*of, CLASSES, 0.3)


def trained(schedule: Schedule) -> RouterSpace:
    space = start(points())
    learn(space, *points(), schedule=schedule, generator=torch.Generator().manual_seed(0))
    return space


def test_centre_loss_gathers_classes_and_moves_centres() -> None:
    x, labels = points()
    with_loss, without = trained(SCHEDULE), trained(replace(SCHEDULE, centre_weight=0.0))
    unseen, their = points(seed=0)[0] + 0.01, labels
    with torch.no_grad():
        assert scatter(with_loss.embed(x), labels) < scatter(without.embed(x), labels)
        assert scatter(with_loss.embed(unseen), their) < scatter(without.embed(unseen), their)
        assert (with_loss.centres - start(points()).centres).norm(dim=1).min() > 1e-2
        assert (closeness(with_loss.embed(x), with_loss.centres).argmax(1) == labels).float().mean() > 0.9


def test_centre_loss_alone_has_a_gradient_for_layer_and_centres() -> None:
    x, labels = points()
    space = start(points())
    space.losses(x, labels)[1].backward()
    own = space.centres.grad
    assert own is not None
    # d(1/2 |v - c|^2 / D) / dc, summed over the class.
    with torch.no_grad():
        v = space.embed(x)
        expected = torch.stack([(space.centres[k] - v[labels == k]).sum(0) for k in range(CLASSES)]) / D
    assert torch.allclose(own, expected, atol=1e-4)
    assert space.embed.weight.grad is not None
    assert float(space.embed.weight.grad.norm()) > 0


@pytest.mark.parametrize("micro_batch", [8, 7, 64])
def test_accumulated_gradient_is_that_of_the_whole_batch(micro_batch: int) -> None:
    x, labels = (part[:64] for part in points())
    whole = start(points())
    routing, centre = whole.losses(x, labels)
    ((routing + 0.1 * centre) / 64).backward()
    parts = start(points())
    accumulate(parts, x, labels, micro_batch=micro_batch, centre_weight=0.1)
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert float((one.grad - two.grad).abs().max()) <= 1e-5


def test_micro_batches_change_memory_not_the_result() -> None:
    one, other = trained(replace(SCHEDULE, steps=20)), trained(replace(SCHEDULE, steps=20, micro_batch=8))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_learning_rate_follows_one_cosine_over_the_steps_whatever_the_batch() -> None:
    for micro_batch in (64, 8):
        schedule = replace(SCHEDULE, steps=21, micro_batch=micro_batch)
        rates = learn(start(points()), *points(), schedule=schedule, generator=torch.Generator().manual_seed(0))
        assert rates[0] == pytest.approx(SCHEDULE.rate)
        assert rates[10] == pytest.approx(SCHEDULE.rate * (1 + LAST_RATE) / 2)
        assert rates[-1] == pytest.approx(LAST_RATE * SCHEDULE.rate)
        assert rates == sorted(rates, reverse=True)


def test_no_steps_keep_the_closed_form() -> None:
    space = trained(replace(SCHEDULE, steps=0))
    for one, two in zip(space.parameters(), start(points()).parameters(), strict=True):
        assert torch.equal(one, two)


def rows(seed: int = 1) -> torch.Tensor:
    """Return rows near a plane of the sphere."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(600, D, generator=generator) * torch.tensor([1.0] * 4 + [0.05] * (D - 4))
    return flat / flat.norm(dim=1, keepdim=True)


def away() -> torch.Tensor:
    """Return rows off the plane."""
    x = rows(2) + torch.randn(600, D, generator=torch.Generator().manual_seed(3)) * 0.3
    return x / x.norm(dim=1, keepdim=True)


def test_discriminator_tells_rows_of_its_sub_class_from_others() -> None:
    schedule = DiscriminatorSchedule(hidden=32, steps=200, rate=5e-3, batch=256, noise=0.5, margin=0.5)
    found = discriminator_expert(rows(), schedule=schedule, generator=torch.Generator().manual_seed(0))

    def judge(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.leaky_relu(x @ found["hidden_weight"] + found["hidden_bias"], LEAK)
        return -(hidden @ found["logit_weight"])

    scores = torch.cat([judge(rows(2)), judge(away())])
    ranks = scores.argsort().argsort().double()
    auroc = (ranks[600:].sum() - 600 * 599 / 2) / 600**2
    assert float(auroc) > 0.9
