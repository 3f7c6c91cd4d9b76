"""The gate in front of the memory: a quantile of good scores or someone's word, never a ratio of scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import DataError
from edge.memory.gate import MIN_SCORES, FrameGate, GateSettings, Learn

SCORES = np.arange(1.0, 21.0)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(MIN_SCORES, 60),
    quantile=st.floats(0.05, 0.95),
    scale=st.floats(0.01, 100),
    shift=st.floats(-1000, 1000),
)
def test_the_share_of_good_frames_that_feed_is_the_quantile_whatever_the_scale(seed, n, quantile, scale, shift) -> None:
    scores = np.random.default_rng(seed).standard_normal(n) * scale + shift
    gate = FrameGate(scores, None, GateSettings(quantile=quantile))
    share = np.mean([gate.admits(score) for score in scores])
    assert quantile - 1e-6 <= share <= quantile + 1 / n + 1e-6


def test_groups_weigh_the_same() -> None:
    scores = np.r_[np.full(18, 1.0), 5.0, 9.0]
    groups = np.array(["one"] * 18 + ["two", "three"])
    assert FrameGate(scores, None).level == pytest.approx(1)
    assert FrameGate(scores, groups).level == pytest.approx(5)


def test_a_word_counts_more_than_a_score() -> None:
    gate = FrameGate(SCORES, None)
    assert not gate.admits(15)
    assert gate.admits(15, declared=True)
    assert gate.admits(3)
    assert not gate.admits(3, declared=False)


def test_what_was_not_judged_never_feeds() -> None:
    gate = FrameGate(SCORES, None)
    for score in (math.nan, math.inf, -math.inf):
        assert not gate.admits(score)
        assert not gate.admits(score, declared=True)


def test_only_a_declared_frame_feeds_where_scores_do_not_count() -> None:
    gate = FrameGate(np.array([]), None, GateSettings(learn=Learn.DECLARED))
    assert not gate.admits(-1e9)
    assert gate.admits(1e9, declared=True)
    assert not gate.admits(0, declared=False)


def test_nothing_feeds_where_learning_is_off() -> None:
    gate = FrameGate(np.array([]), None, GateSettings(learn=Learn.OFF))
    assert not gate.admits(-1e9)
    assert not gate.admits(-1e9, declared=True)


def test_too_few_scores_and_broken_ones_are_refused() -> None:
    with pytest.raises(DataError, match=f"{MIN_SCORES} are needed"):
        FrameGate(SCORES[: MIN_SCORES - 1], None)
    with pytest.raises(DataError, match="NaN or infinite"):
        FrameGate(np.r_[SCORES, np.nan], None)
    with pytest.raises(DataError, match="groups for"):
        FrameGate(SCORES, np.array(["a", "b"]))
