"""The memory's sites: what good parts show at each place, and that a displaced part stands out only through them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.methods.base import Features
from trainer.methods.memory.sites import TAP_NAMES, SiteModel, fit_sites
from trainer.methods.patches import enlarge

CPU = torch.device("cpu")
CHANNELS = (5, 6, 7)


def part(count: int, seed: int, noise: float = 0.2) -> Features:
    """Images of one part: the same pattern at the same place, with noise."""
    pattern = [torch.randn(c, 16 // k, 24 // k, generator=torch.Generator().manual_seed(k)) for c, k in
               zip(CHANNELS, (1, 2, 4), strict=True)]  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    taps = {
        name: one + noise * torch.randn(count, *one.shape, generator=generator)
        for name, one in zip(TAP_NAMES, pattern, strict=True)
    }
    return Features(taps, 1, np.arange(count).astype(np.str_))


def fitted(features: Features, components: int = 18, seed: int = 0) -> SiteModel:
    generator = torch.Generator().manual_seed(seed)
    return fit_sites(features, components=components, share=0.3, generator=generator, device=CPU)


def judge(model: SiteModel, features: Features) -> torch.Tensor:
    with torch.inference_mode():
        return model(*(features.taps[name] for name in TAP_NAMES))


def test_residual_equals_whitening_of_the_joined_taps() -> None:
    model, features = fitted(part(12, 0)), part(3, 1)
    s4, s8, s16 = (features.taps[name] for name in TAP_NAMES)
    joined = torch.cat([s4, enlarge(s8, 2), enlarge(enlarge(s16, 2), 2)], 1)
    weight = torch.cat([model.get_submodule(f"project_{name}").weight for name in TAP_NAMES], 1)
    bias = model.get_submodule("project_s4").bias
    expected = torch.nn.functional.conv2d(joined, weight, bias) - enlarge(model.means, 2)
    torch.testing.assert_close(model.residual(s4, s8, s16), expected, rtol=1e-4, atol=1e-4)


def test_good_sites_of_unseen_images_lie_about_one_away() -> None:
    model = fitted(part(24, 0))
    assert float(judge(model, part(24, 1)).mean()) == pytest.approx(1.0, rel=0.1)


def test_displaced_part_stands_out() -> None:
    model, good = fitted(part(24, 0)), part(8, 1)
    moved = Features({name: tap.roll(2, 3) for name, tap in good.taps.items()}, 1, good.groups)
    assert float(judge(model, moved).mean()) > 2 * float(judge(model, good).mean())


def test_site_that_varies_on_good_parts_is_judged_mildly() -> None:
    features = part(24, 0)
    generator = torch.Generator().manual_seed(9)
    features.taps["s4"][:, :, :, :8] += 2.0 * torch.randn(24, 5, 16, 8, generator=generator)
    scale = fitted(features).scale
    assert float(scale[:, 1:7].mean()) > 1.3 * float(scale[:, 10:].mean())


def test_fewer_components_are_the_leading_ones() -> None:
    many, few = fitted(part(12, 0)), fitted(part(12, 0), components=4)
    for name in TAP_NAMES:
        assert torch.equal(
            many.get_submodule(f"project_{name}").weight[-4:], few.get_submodule(f"project_{name}").weight
        )


def test_same_seed_same_bits_and_too_many_components_are_all() -> None:
    first, again = fitted(part(12, 0)).state_dict(), fitted(part(12, 0), components=500).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_identical_images_stay_finite() -> None:
    one = part(1, 0)
    same = Features(
        {name: tap.expand(4, -1, -1, -1).clone() for name, tap in one.taps.items()}, 1, np.array(list("abcd"))
    )
    assert bool(torch.isfinite(judge(fitted(same), part(2, 1))).all())
