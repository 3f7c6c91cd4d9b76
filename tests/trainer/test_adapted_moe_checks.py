"""What Adapted-MoE is for, on generated webs: routing, refusal of the unknown, and adaptation that does no harm."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.trainer import adapted_webs as webs
from trainer.methods.adapted_moe.fit import AdaptedMoEConfig, AdaptedMoEMethod, ExpertKind
from trainer.methods.adapted_moe.model import TAP_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from trainer.methods.adapted_moe.model import AdaptedMoEHead
    from trainer.methods.base import Features

ROWS, CELLS = 96, 5
BANK = AdaptedMoEConfig(rows=ROWS, candidates=2000)
BUDGET = 0.05


@lru_cache(maxsize=6)
def fitted(config: AdaptedMoEConfig = BANK) -> AdaptedMoEHead:
    return AdaptedMoEMethod.fit(webs.context(), config)


@lru_cache(maxsize=1)
def plain() -> AdaptedMoEHead:
    """Return the same experts without adaptation."""
    head = AdaptedMoEMethod.build(BANK, fitted().state_dict())
    head.set_adaptation(own=0.0, scale=0.0)
    return head


@lru_cache(maxsize=40)
def taps(name: str, what: Callable[[webs.Images], webs.Images] | None = None) -> Features:
    images = webs.tests()[name]
    return webs.extract(images if what is None else what(images))


def judged(head: AdaptedMoEHead, of: Features) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return scores [n] and route [n, E]."""
    with torch.inference_mode():
        found = [head(*part) for part in of.batches(TAP_NAMES, 16, device=webs.CPU)]
    maps, route = torch.cat([one[0] for one in found]), torch.cat([one[2] for one in found])
    return maps.flatten(1).topk(CELLS, dim=1).values.mean(1).numpy(), route.numpy()


def routed_right(head: AdaptedMoEHead, what: Callable[[webs.Images], webs.Images] | None = None) -> float:
    right = [judged(head, taps(name, what))[1].argmax(1) == head.subclasses.index(name) for name in webs.KNOWN]
    return float(np.mean(right))


def auroc(head: AdaptedMoEHead, name: str, what: Callable[[webs.Images], webs.Images] | None = None) -> float:
    """Of good images, in the light of ``what``, against the same with defects."""

    def marred(images: webs.Images) -> webs.Images:
        found = webs.defective(images)
        return found if what is None else what(found)

    good, bad = judged(head, taps(name, what))[0], judged(head, defects(name, what, marred))[0]
    return float(roc_auc_score(np.r_[np.zeros(len(good)), np.ones(len(bad))], np.r_[good, bad]))


_DEFECTS: dict[tuple[str, object], Features] = {}


def defects(name: str, what: object, marred: Callable[[webs.Images], webs.Images]) -> Features:
    if (name, what) not in _DEFECTS:
        _DEFECTS[name, what] = webs.extract(marred(webs.tests()[name]))
    return _DEFECTS[name, what]


def false_alarms(head: AdaptedMoEHead, what: Callable[[webs.Images], webs.Images]) -> float:
    """Return the share of good images in another light above the threshold that is frozen in the old one."""
    frozen = np.quantile(np.concatenate([judged(head, taps(name))[0] for name in webs.KNOWN]), 1 - BUDGET)
    return float(np.mean([judged(head, taps(name, what))[0] > frozen for name in webs.KNOWN]))


def test_router_knows_its_sub_classes_good_and_defective() -> None:
    head = fitted()
    assert routed_right(head) >= 0.98
    assert routed_right(head, webs.defective) >= 0.95
    assert routed_right(head, webs.dimmed) >= 0.95


def test_router_refuses_an_unseen_product_and_hardly_a_known_one() -> None:
    head = fitted()
    refused = [judged(head, taps(name))[1].max(1) < 0 for name in webs.KNOWN]
    assert np.mean(refused) <= 0.05
    assert np.mean(judged(head, taps(webs.UNSEEN))[1].max(1) < 0) >= 0.80


@pytest.mark.parametrize("kind", [ExpertKind.BANK, pytest.param(ExpertKind.DISCRIMINATOR, marks=pytest.mark.slow)])
def test_experts_are_no_worse_than_one_model_of_as_many_rows(kind: ExpertKind) -> None:
    count = len(webs.KNOWN)
    head = fitted(BANK.model_copy(update={"experts": kind}))
    pooled = AdaptedMoEMethod.fit(
        replace(webs.context(), subclasses=None),
        BANK.model_copy(update={"experts": kind, "rows": count * ROWS, "candidates": count * BANK.candidates}),
    )
    routed = [auroc(head, name) for name in webs.KNOWN]
    assert np.mean(routed) >= np.mean([auroc(pooled, name) for name in webs.KNOWN])


def test_oracle_routing_gains_next_to_nothing() -> None:
    head = fitted()
    learned = np.mean([auroc(head, name) for name in webs.KNOWN])
    oracle = []
    for index, name in enumerate(webs.KNOWN):
        told = AdaptedMoEMethod.build(BANK, head.state_dict())
        told.route_centre.fill_(1e3)
        told.route_centre[index] = 0
        assert (judged(told, taps(name))[1].argmax(1) == index).all()
        oracle.append(auroc(told, name))
    assert np.mean(oracle) - learned <= 0.01


@pytest.mark.parametrize("what", [webs.darkened, webs.toned, webs.blurred])
def test_adaptation_takes_back_most_of_the_false_alarms_of_another_light(
    what: Callable[[webs.Images], webs.Images],
) -> None:
    without = false_alarms(plain(), what)
    assert without > 2 * BUDGET, "the shift must do harm for its cure to show"
    assert (without - false_alarms(fitted(), what)) / (without - BUDGET) >= 0.60


def test_adaptation_keeps_false_alarms_within_the_budget_under_a_dimmer_lamp() -> None:
    assert false_alarms(fitted(), webs.dimmed) <= BUDGET


def test_adaptation_does_no_harm_in_the_old_light() -> None:
    change = np.mean([auroc(fitted(), name) - auroc(plain(), name) for name in webs.KNOWN])
    assert change >= -0.005


def test_defects_that_cover_half_of_an_image_are_still_found() -> None:
    """What adaptation may hide: a defect that moves the image's own moments."""

    def covered(images: webs.Images) -> webs.Images:
        half = images.copy()
        half[:, :, : webs.SIDE // 2] = webs.defective(images, size=(0.8, 1.0), contrast=0.6)[:, :, : webs.SIDE // 2]
        noise = np.random.default_rng(0).normal(0, 20, half[:, :, : webs.SIDE // 2].shape)
        half[:, :, : webs.SIDE // 2] = np.clip(half[:, :, : webs.SIDE // 2] + noise, 0, 255).astype(np.uint8)
        return half

    found = []
    for head in (fitted(), plain()):
        pairs = [(judged(head, taps(name))[0], judged(head, taps(name, covered))[0]) for name in webs.KNOWN]
        found.append(np.mean([roc_auc_score(np.r_[np.zeros(len(g)), np.ones(len(b))], np.r_[g, b]) for g, b in pairs]))
    assert found[0] >= found[1] - 0.05
