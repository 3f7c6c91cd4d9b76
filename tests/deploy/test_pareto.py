"""The Pareto front: what dominates what, and what the page says of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deploy.pareto import ParetoPoint, pareto_front, pareto_html


def point(ms: float, auroc: float, *, name: str = "a", chosen: bool = False) -> ParetoPoint:
    return ParetoPoint(name, ms, ms, ms, auroc, 1000, "chosen" if chosen else "", chosen)


def test_front_leaves_out_what_is_slower_and_no_better() -> None:
    points = [point(3, 0.9), point(1, 0.7), point(2, 0.7), point(4, 0.8), point(2, 0.85)]
    assert [(one.milliseconds, one.image_auroc) for one in pareto_front(points)] == [(1, 0.7), (2, 0.85), (3, 0.9)]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_front_dominates_everything_else_and_nothing_in_itself(pairs: list[tuple[int, int]]) -> None:
    front = [(one.milliseconds, one.image_auroc) for one in pareto_front([point(a, b) for a, b in pairs])]
    assert front == sorted(set(front))
    for ms, auroc in pairs:
        assert any(a <= ms and b >= auroc for a, b in front)
    for one in front:
        assert not any(other != one and other[0] <= one[0] and other[1] >= one[1] for other in front)


def test_page_shows_every_candidate_once_and_escapes_names() -> None:
    shown = pareto_html([point(1, 0.7, name="<b>x"), point(2, 0.6, name="slow", chosen=True)], budget_ms=3)
    assert "<b>" not in shown
    assert shown.count("<tr>") == 3
    assert shown.count("&lt;b&gt;x</th>") == 1
    table = shown[shown.index("<tbody>") :]
    assert table.index("&lt;b&gt;x") < table.index("slow")
    assert table.count("<td>yes</td>") == table.count("<td>no</td>") == 1
