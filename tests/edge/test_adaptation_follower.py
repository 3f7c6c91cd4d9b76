"""A camera's follower: what teaches it, what stops it, which product it sees, and that it survives a restart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.adaptation.follower import Follower, Phase
from edge.adaptation.look import Look
from edge.adaptation.moments import IMAGE, Reference
from edge.adaptation.settings import AdaptationSettings
from edge.errors import AdaptationError
from edge.frames import Decision
from tests.edge.adaptation_values import judged, moments, reference, show

QUICK = AdaptationSettings(half_life=5, every_frames=2, settle_frames=4, window=10, freeze_rate=0.5, thaw_rate=0.2)
FIRST, SECOND = (1.0, -1.0), (-1.0, 1.0)


def follower(experts: int = 1, of: AdaptationSettings = QUICK) -> Follower:
    return Follower(reference(experts), of)


def light_of(one: Follower) -> float:
    return float(one.snapshot().moments.mean[IMAGE][0] - reference().moments[0].mean[IMAGE][0])


def test_it_begins_uncorrected_at_the_reference_and_measures() -> None:
    one = follower()
    assert one.look() == Look(expert=0, version=0, correction=None, measure=True)
    assert (one.phase, one.version, one.shift) == (Phase.FOLLOWING, 0, 0)


def test_it_follows_a_lamp_in_snapshots_of_growing_version() -> None:
    one, versions = follower(), []
    for _ in range(40):
        show(one, moments(light=6))
        versions.append(one.look().version)
    assert light_of(one) == pytest.approx(6, abs=0.4)
    assert sorted(versions) == versions
    steps = np.diff(versions)
    assert versions[-1] == one.version > 3
    # Not with every frame, and no longer where nothing changes.
    assert (steps[1:] + steps[:-1] <= 1).all()
    assert steps[-6:].sum() == 0


def test_where_nothing_changes_nothing_comes_into_force() -> None:
    one = follower()
    show(one, moments(), 100)
    assert one.version == 0
    assert one.look().correction is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-30, 30), st.booleans(), st.booleans()), max_size=60))
def test_frames_that_alarm_never_move_the_moments_while_following(stream: list[tuple[float, bool, bool]]) -> None:
    one, calm = follower(), follower()
    for light, nok, event in stream:
        decision = Decision.NOK if nok else Decision.OK
        before = one.state(), one.status()["frames"]["accepted"]
        one.take(judged(moments(light), decision=decision, alarmed=nok or event, version=one.look().version))
        if nok or event:
            assert one.status()["frames"]["accepted"] == before[1]
            assert one.shift == Follower(reference(), QUICK, before[0]).shift
        elif one.phase is Phase.FOLLOWING:
            show(calm, moments(light))
    if one.status()["frames"]["frozen"] == 0 and not any(nok for _, nok, _ in stream):
        assert one.shift == calm.shift


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(-400, 400), st.floats(0, 9), st.floats(-50, 50), st.booleans(), st.booleans()), max_size=40
    ),
    st.floats(0.3, 6),
)
def test_whatever_comes_what_is_in_force_stays_within_the_bound(
    stream: list[tuple[float, float, float, bool, bool]], bound: float
) -> None:
    one = follower(of=QUICK.model_copy(update={"bound": bound}))
    for light, gain, tap, nok, resets in stream:
        if resets:
            one.reset()
        show(one, moments(light, gain, tap), nok=nok)
        assert one.shift <= bound
        assert one.snapshot().shift <= bound


def test_a_sudden_change_freezes_it_and_nothing_is_learned_until_alarms_are_rare() -> None:
    one = follower()
    show(one, moments(), 20)
    show(one, moments(light=6), 4, nok=True)
    assert one.phase is Phase.FOLLOWING
    show(one, moments(light=6), 1, nok=True)
    assert one.phase is Phase.FROZEN
    assert not one.learning
    show(one, moments(light=6), 7)
    assert (one.phase, one.shift) == (Phase.FROZEN, 0)
    # Alarms at or below a fifth of the window, not just below a half, let it go on.
    show(one, moments(light=6), 1)
    assert one.phase is Phase.FOLLOWING
    assert one.shift > 0
    assert one.status()["frames"]["frozen"] == 8


def test_a_reset_goes_back_to_the_reference_and_corrects_from_the_first_frame() -> None:
    one = follower()
    show(one, moments(light=6), 40)
    show(one, moments(light=-6), 10, nok=True)
    before = one.version
    one.reset()
    assert (one.phase, one.shift, one.version) == (Phase.SETTLING, 0, before + 1)
    # The first frame's own moments are all there is.
    assert one.snapshot().own == 1
    assert one.look().correction is not None
    show(one, moments(light=-6), 1, nok=True)
    assert light_of(one) == pytest.approx(-6)
    assert one.snapshot().own == pytest.approx(1 / 2)
    show(one, moments(light=-6), 3, nok=True)
    assert (one.phase, one.snapshot().own) == (Phase.FOLLOWING, 0)
    assert light_of(one) == pytest.approx(-6)


def test_alarms_while_settling_freeze_it_once_it_has_settled() -> None:
    one = follower(of=QUICK.model_copy(update={"settle_frames": 8}))
    one.reset()
    show(one, moments(light=6), 7, nok=True)
    assert one.phase is Phase.SETTLING
    show(one, moments(light=6), 1, nok=True)
    assert one.phase is Phase.FROZEN


def test_frames_beyond_the_bound_do_not_settle_it() -> None:
    one = follower()
    one.reset()
    show(one, moments(light=500), 50)
    assert (one.phase, one.shift) == (Phase.SETTLING, 0)
    assert one.at_bound
    assert one.status()["frames"]["outside"] == 50


def test_what_stays_beyond_the_bound_is_no_longer_corrected_by_its_own_moments() -> None:
    one = follower()
    one.reset()
    show(one, moments(light=500), 9)
    assert one.snapshot().own == 1
    show(one, moments(light=500), 20)
    assert (one.snapshot().own, one.snapshot().shift, one.version) == (0, 0, 2)
    show(one, moments(light=6))
    assert one.snapshot().own == pytest.approx(1 / 2)
    assert light_of(one) == pytest.approx(6)


def test_frames_on_their_way_during_a_reset_do_not_count_after_it() -> None:
    one = follower()
    show(one, moments(light=6), 40)
    former = one.look().version
    one.reset()
    one.take(judged(moments(light=6), version=former))
    assert one.status()["frames"]["late"] == 1
    assert one.shift == 0


def test_a_frame_seen_through_the_snapshot_before_still_counts() -> None:
    one = follower()
    show(one, moments(light=6), 2)
    assert one.version == 1
    one.take(judged(moments(light=6), version=0))
    assert one.status()["frames"]["accepted"] == 3


def test_a_frame_seen_through_older_moments_does_not_count() -> None:
    one = follower()
    show(one, moments(light=6), 6)
    assert one.version > 1
    one.take(judged(moments(light=6), version=0))
    assert one.status()["frames"]["late"] == 1


def test_drift_is_told_with_hysteresis() -> None:
    one = follower(of=QUICK.model_copy(update={"drift": 1.0, "half_life": 40.0}))
    assert not one.drifting
    show(one, moments(light=9), 200)
    assert one.shift > 1
    assert one.drifting
    while one.shift > 0.95:
        show(one, moments())
    assert one.drifting
    show(one, moments(), 20)
    assert not one.drifting


def test_frames_that_were_not_judged_or_not_measured_teach_nothing() -> None:
    one = follower()
    one.take(judged(moments(light=6), decision=Decision.NOT_JUDGED))
    one.take(judged(None))
    frames = one.status()["frames"]
    assert (frames["not_judged"], frames["unmeasured"], frames["accepted"]) == (1, 1, 0)


def test_a_frame_of_another_product_is_seen_again_at_once_and_the_camera_changes_over_after_a_run() -> None:
    one = follower(2)
    assert one.rerouted(np.float32(FIRST)) is None
    look = one.rerouted(np.float32(SECOND))
    assert look is not None
    assert look.expert == 1
    for expected in (0, 0, 1):
        one.take(judged(moments(light=10), route=SECOND))
        assert one.look().expert == expected
    assert one.status()["subclass"] == "product_1"
    assert one.status()["switched"] == 1


def test_each_product_has_moments_of_its_own() -> None:
    one = follower(2)
    for _ in range(30):
        look = one.look() if one.look().expert == 0 else one.rerouted(np.float32(FIRST))
        assert look is not None
        one.take(judged(moments(light=6), route=FIRST, version=look.version))
    # The first was brighter by 6: the second, never seen yet, begins that much brighter than its own reference.
    look = one.rerouted(np.float32(SECOND))
    assert look is not None
    assert look.version == one.version
    assert one.snapshot().expert == 1
    assert light_of(one) == pytest.approx(16, abs=0.3)


def test_a_product_like_none_is_refused_and_teaches_nothing() -> None:
    one = follower(2)
    neither = (-0.5, -0.1)
    assert one.rerouted(np.float32(neither)) is None
    assert one.refusal(np.float32(neither)) == "unknown product: like none of product_0, product_1"
    assert one.refusal(np.float32([np.nan, 1])) != ""
    one.take(judged(moments(light=6), decision=Decision.NOT_JUDGED, route=neither))
    assert one.status()["frames"]["unknown"] == 1
    assert one.shift == 0
    assert one.refusal(np.float32(FIRST)) == ""
    assert one.refusal(None) == ""


def test_the_recipe_decides_and_another_product_is_refused() -> None:
    one = follower(2)
    one.reset("product_1")
    assert (one.look().expert, one.phase, one.recipe) == (1, Phase.SETTLING, "product_1")
    assert one.rerouted(np.float32(FIRST)) is None
    assert one.refusal(np.float32(FIRST)) == "it shows product_0, the recipe is product_1"
    assert one.refusal(np.float32(SECOND)) == ""
    for _ in range(9):
        one.take(judged(moments(), decision=Decision.NOT_JUDGED, route=FIRST, version=one.look().version))
    assert one.look().expert == 1
    assert one.status()["frames"]["other_product"] == 9
    one.reset("")
    assert one.refusal(np.float32(FIRST)) == ""


def test_a_recipe_without_a_router_chooses_the_moments() -> None:
    one = follower(2)
    one.reset("product_1")
    show(one, moments(light=16), 4)
    assert one.snapshot().expert == 1
    assert light_of(one) == pytest.approx(16)


def test_a_recipe_that_the_bundle_lacks_is_refused_and_changes_nothing() -> None:
    one = follower(2)
    with pytest.raises(AdaptationError, match="recipe 'nut' is none of the bundle's: product_0, product_1"):
        one.reset("nut")
    assert (one.phase, one.recipe) == (Phase.FOLLOWING, "")


def test_a_bundle_of_one_product_takes_any_recipe_and_settles() -> None:
    one = follower()
    one.reset("blue lamp")
    assert (one.phase, one.status()["recipe"]) == (Phase.SETTLING, "blue lamp")


def test_a_bundle_of_one_product_refuses_what_its_router_does_not_know() -> None:
    one = follower()
    assert one.refusal(np.float32([-1])).startswith("unknown product: like nothing")
    assert one.refusal(np.float32([0.5])) == ""
    assert one.refusal(np.float32([-1, -1])) == "", "a router of other sub-classes has no say"


steps = st.lists(
    st.one_of(
        st.tuples(st.floats(-20, 20), st.booleans(), st.sampled_from((FIRST, SECOND, (-1.0, -1.0)))),
        st.sampled_from((None, "product_0", "product_1", "")),
    ),
    max_size=40,
)


def play(one: Follower, stream: list[tuple[float, bool, tuple[float, float]] | str | None]) -> None:
    for step in stream:
        if step is None or isinstance(step, str):
            one.reset(step)
            continue
        light, nok, route = step
        look = one.rerouted(np.float32(route)) or one.look()
        decision = Decision.NOK if nok else Decision.OK
        one.take(judged(moments(light), decision=decision, version=look.version, route=route))


@settings(max_examples=60, deadline=None)
@given(steps, steps)
def test_after_a_restart_it_goes_on_as_if_there_had_been_none(before: list, after: list) -> None:
    one = follower(2)
    play(one, before)
    again = Follower(reference(2), QUICK, one.state())
    assert again.status() == one.status()
    assert again.look().version == one.look().version
    play(one, after)
    play(again, after)
    assert again.state() == one.state()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_state_is_refused(data: st.DataObject) -> None:
    one = follower(2)
    show(one, moments(light=6), 20)
    kept = bytearray(one.state())
    if data.draw(st.booleans()):
        kept = kept[: data.draw(st.integers(0, len(kept) - 1))]
    else:
        kept[data.draw(st.integers(0, len(kept) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(AdaptationError, match="damaged"):
        Follower(reference(2), QUICK, bytes(kept))


def test_the_state_of_another_bundle_is_refused() -> None:
    kept = follower().state()
    first = reference()
    others = (
        Reference(first.moments, (0.3,), first.subclasses),
        Reference((moments(tap=0.01),), first.usual, first.subclasses),
        Reference((moments(gain=1.01),), first.usual, first.subclasses),
    )
    for other in others:
        with pytest.raises(AdaptationError, match="another bundle"):
            Follower(other, QUICK, kept)


def test_a_restart_with_a_lower_bound_keeps_to_it() -> None:
    one = follower()
    show(one, moments(light=20), 100)
    lower = QUICK.model_copy(update={"bound": 1.0})
    assert one.shift > 1
    again = Follower(reference(), lower, one.state())
    assert again.shift <= 1
    assert again.snapshot().shift <= 1
    assert again.version == one.version + 1


def test_lower_bound_after_a_restart_takes_no_number_that_was_given_since_the_state_was_kept() -> None:
    one = follower()
    show(one, moments(light=20), 100)
    again = Follower(reference(), QUICK.model_copy(update={"bound": 1.0}), one.state(), given=5000)
    assert again.snapshot().version == again.version == again.look().version == 5001


def test_uncorrected_frames_of_the_bundle_before_teach_nothing() -> None:
    one = Follower(reference(), QUICK, given=7)
    one.part_from_former()
    one.take(judged(moments(light=20), version=0))
    assert one.status()["frames"]["late"] == 1
    show(one, moments(light=20), 1)
    assert one.status()["frames"]["accepted"] == 1
