"""Which product a frame is judged as: by the recipe of its capture, however late; never as another one."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from edge.adaptation.follower import Follower
from edge.adaptation.guided import GuidedDetector
from edge.adaptation.look import Look
from edge.adaptation.settings import AdaptationSettings
from edge.errors import StoreError
from edge.frames import Frame, Prediction
from edge.products.book import RecipeBook
from edge.products.guide import ProductGuide
from edge.products.recipes import MAX_CHANGES, CameraProducts, RecipeHistory
from tests.edge.adaptation_values import reference

if TYPE_CHECKING:
    from edge.adaptation.guided import Guide, PendingSight, Seen

NAMES = ("product_0", "product_1", "product_2")
NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
SOON = 20.0
CHANGES = 40
# In memory, where there is such a place: thousands of recipes are kept here, and a disk would wait for each.
QUICK = "/dev/shm" if Path("/dev/shm").is_dir() else None


def frame(shown: int, captured_ns: int) -> Frame:
    return Frame(np.full((2, 2, 3), shown, np.uint8), "cam", 0, captured_ns, NOW)


class Camera:
    """A detector whose router, where it has one, sees what is in the image, and whose map is of the look's product."""

    products = NAMES

    def __init__(self, *, router: bool) -> None:
        self._router = router

    def predict(self, one: Frame, look: Look) -> Prediction:
        route = None
        if self._router:
            route = np.full(len(NAMES), -1, np.float32)
            route[one.image[0, 0, 0]] = 1
        return Prediction(
            np.zeros((1, 1), np.float32), one, 1, 1, moments_version=look.version, route=route,
            subclass=NAMES[look.expert],
        )  # fmt: skip

    def begin(self, one: Frame, look: Look) -> SimpleNamespace:
        return SimpleNamespace(frame=one, result=lambda: self.predict(one, look))


class JudgedByTheNewest(ProductGuide):
    """What a guide must not do: it takes the recipe at the moment of judging."""

    def look(self, _frame: Frame) -> Look:
        return super().look(frame(0, 2**62))

    def refusal(self, route: Any, _frame: Frame) -> str:
        return super().refusal(route, frame(0, 2**62))


@dataclass
class Line:
    """A camera on a line whose recipe changes while frames wait: real book, guide and way of looking, no engine."""

    folder: Path
    router: bool
    make: str
    clock: Any = field(default_factory=lambda: count(1).__next__)
    waiting: list[tuple[Frame, str]] = field(default_factory=list)
    begun: list[tuple[PendingSight, Frame, str]] = field(default_factory=list)
    recipe: str = ""
    wrong: list[str] = field(default_factory=list)
    judged: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Frames of a process die with it; recipes do not."""
        self.waiting.clear()
        self.begun.clear()
        book = RecipeBook(self.folder / "recipes.json", clock_ns=self.clock)
        self.book = book
        products = CameraProducts(lambda: NAMES, book.history("cam"), routed=len(NAMES))
        guide: Guide
        if self.make == "follower":
            guide = Follower(reference(len(NAMES)), AdaptationSettings(switch_frames=2), products=products)
        else:
            guide = (ProductGuide if self.make == "guide" else JudgedByTheNewest)(products)
        self.sight = GuidedDetector(Camera(router=self.router), guide)  # type: ignore[arg-type] (no engine)

    def capture(self, shown: int) -> None:
        self.waiting.append((frame(shown, self.clock()), self.recipe))

    def set(self, name: str) -> None:
        self.book.put(["cam"], name)
        self.recipe = name

    def begin(self) -> None:
        if self.waiting:
            one, recipe = self.waiting.pop(0)
            pending = self.sight.begin(one)
            assert pending is not None
            self.begun.append((pending, one, recipe))

    def finish(self) -> None:
        if self.begun:
            pending, one, recipe = self.begun.pop(0)
            self.check(pending.result(), one, recipe)

    def predict(self) -> None:
        if self.waiting:
            one, recipe = self.waiting.pop(0)
            self.check(self.sight.predict(one), one, recipe)

    def check(self, seen: Seen, one: Frame, recipe: str) -> None:
        if seen.refusal:
            return
        self.judged += 1
        shown = NAMES[one.image[0, 0, 0]] if self.router else recipe
        if seen.prediction.subclass != shown or recipe not in ("", shown):
            self.wrong.append(f"captured under {recipe!r}, shows {shown!r}, judged as {seen.prediction.subclass!r}")


SHOWN = st.integers(0, len(NAMES) - 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("capture"), SHOWN),
        st.tuples(st.just("set"), st.sampled_from(("", *NAMES))),
        st.tuples(st.sampled_from(("begin", "finish", "predict"))),
        st.tuples(st.just("restart")),
    ),
    max_size=40,
)


def go(steps: list[tuple[Any, ...]], *, router: bool, make: str) -> Line:
    with TemporaryDirectory(dir=QUICK) as folder:
        line = Line(Path(folder), router, make)
        for name, *values in steps:
            getattr(line, name)(*values)
        return line


@pytest.mark.parametrize("make", ["guide", "follower"])
@pytest.mark.parametrize("router", [True, False])
@settings(max_examples=50, deadline=None)
@given(steps=STEPS)
def test_no_frame_is_ever_judged_as_another_product(*, router: bool, make: str, steps: list[tuple[Any, ...]]) -> None:
    assert go(steps, router=router, make=make).wrong == []


@pytest.mark.parametrize("router", [True, False])
def test_a_recipe_taken_at_the_moment_of_judging_would_judge_a_frame_as_another_product(*, router: bool) -> None:
    """The property above is not empty: it finds what goes wrong where a look ignores its frame's capture."""
    quick = settings(phases=(Phase.generate,), database=None, max_examples=5000, deadline=None)
    steps = find(STEPS, lambda steps: bool(go(steps, router=router, make="control").wrong), settings=quick)
    assert go(steps, router=router, make="guide").wrong == []


@pytest.mark.parametrize("make", ["guide", "follower"])
def test_frames_are_judged_as_the_recipe_says(tmp_path: Path, make: str) -> None:
    """Nor is it empty in that nothing is ever judged."""
    line = Line(tmp_path, router=False, make=make)
    for name in (*NAMES, NAMES[0]):
        line.set(name)
        line.capture(0)
        line.predict()
    assert (line.judged, line.wrong) == (4, [])


def test_a_frame_begun_before_the_recipe_changed_is_judged_as_the_former_product(tmp_path: Path) -> None:
    line = Line(tmp_path, router=False, make="guide")
    line.set(NAMES[0])
    line.capture(0)
    line.capture(0)
    line.begin()
    line.set(NAMES[1])
    line.capture(0)
    (pending, _, _), (late, _), (new, _) = line.begun[0], *line.waiting
    assert pending.result().prediction.subclass == NAMES[0]
    assert line.sight.predict(late).prediction.subclass == NAMES[0]
    assert line.sight.predict(new).prediction.subclass == NAMES[1]


def test_a_look_that_was_taken_while_the_recipe_changed_is_what_it_always_will_be() -> None:
    history, stop, looks = RecipeHistory(), threading.Event(), list[tuple[int, str | None]]()

    def look() -> None:
        while not stop.is_set():
            captured = time.monotonic_ns()
            looks.append((captured, history.of(captured)))

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + SOON
    for name in range(CHANGES):
        seen = len(looks)
        history.set(str(name))
        while len(looks) == seen:
            assert time.monotonic() < deadline
    stop.set()
    for thread in threads:
        thread.join(SOON)
    assert len({name for _, name in looks}) > CHANGES // 2
    assert [history.of(captured) for captured, _ in looks] == [name for _, name in looks]


def test_frames_of_before_what_is_remembered_are_judged_as_nothing() -> None:
    clock = count(1).__next__
    history = RecipeHistory(clock_ns=clock)
    products = CameraProducts(lambda: ("a", "b"), history, routed=2)
    first = clock()
    for index in range(MAX_CHANGES):
        assert products.asked(frame(0, first)).problem == ""
        history.set("ab"[index % 2])
    assert "before the recipes that are remembered" in products.refusal(None, frame(0, first))
    assert products.asked(frame(0, clock())).problem == ""


def test_without_recipe_and_router_nothing_is_judged_and_the_reason_names_the_cure() -> None:
    history = RecipeHistory()
    products = CameraProducts(lambda: ("a", "b"), history, routed=2)
    assert "send cmd/recipe" in products.refusal(None)
    assert products.refusal(np.float32([1, -1])) == ""
    assert "none of a, b" in products.refusal(np.float32([-1, -1]))
    history.set("b")
    assert products.refusal(None) == ""
    assert products.refusal(np.float32([1, -1])) == "it shows a, the recipe is b"
    history.set("c")
    assert "which the bundle does not have; it has a, b" in products.refusal(np.float32([1, -1]))


def test_a_router_has_no_say_of_a_product_that_was_added_behind_its_own() -> None:
    history, names = RecipeHistory(), ["a", "b"]
    products = CameraProducts(lambda: names, history, routed=2)
    guide = ProductGuide(products)
    history.set("c")
    now = frame(0, time.monotonic_ns())
    assert "does not have" in guide.refusal(np.float32([1, -1]), now)
    names.append("c")
    assert guide.look(now) == Look(2)
    assert guide.rerouted(np.float32([1, -1]), now) is None
    assert guide.refusal(np.float32([-1, -1]), now) == ""
    follower = Follower(reference(2), AdaptationSettings(), products=products)
    assert follower.look(now) == Look(2)
    follower.reset("c")
    assert follower.refusal(np.float32([1, -1]), now) == ""
    again = Follower(reference(2), AdaptationSettings(), follower.state(), products=products)
    assert again.recipe == "c"


def test_a_sub_class_of_one_product_needs_no_recipe() -> None:
    products = CameraProducts(lambda: ("a", "b"), RecipeHistory(), routed=2, unified=False)
    assert products.refusal(None) == ""


def test_recipes_survive_a_restart_and_hold_for_every_frame_of_it(tmp_path: Path) -> None:
    path = tmp_path / "recipes.json"
    book = RecipeBook(path)
    assert book.of("cam") == ("", None)
    recipe = book.put(["cam", "other"], "bottle")
    assert recipe.since_ns <= time.monotonic_ns()
    book.put(["other"], "")

    again = RecipeBook(path)
    assert again.of("cam")[0] == "bottle"
    assert (again.history("cam").of(-(2**60)), again.history("cam").known) == ("bottle", True)
    assert (again.history("other").now, again.history("other").known) == ("", True)
    assert again.history("third").known is False
    assert again.damage == ""


KEYS = st.sampled_from(("schema", "cameras", "cam", "recipe", "since"))
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5), lambda one: st.dictionaries(KEYS, one, max_size=3), max_leaves=6
)


@settings(max_examples=50, deadline=None)
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_damaged_file_is_put_aside_and_said(content: bytes) -> None:
    with TemporaryDirectory(dir=QUICK) as folder:
        path = Path(folder) / "recipes.json"
        path.write_bytes(content)
        book = RecipeBook(path)
        assert "give them again" in book.damage
        assert book.of("cam") == ("", None)
        book.put(["cam"], "bottle")
        assert RecipeBook(path).of("cam")[0] == "bottle"
        assert [one.read_bytes() for one in Path(folder).glob("recipes.json.damaged-*")] == [content]


def test_a_recipe_that_cannot_be_kept_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    book = RecipeBook(tmp_path / "file" / "recipes.json")
    assert book.damage != ""
    with pytest.raises(StoreError, match="cannot be kept"):
        book.put(["cam"], "bottle")
    assert book.history("cam").now == ""


def test_recipe_is_on_disk_before_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book, seen = RecipeBook(tmp_path / "recipes.json"), list[str]()
    change = RecipeHistory.set

    def spy(self: RecipeHistory, name: str) -> int:
        seen.append(json.loads((tmp_path / "recipes.json").read_text())["cameras"]["cam"]["recipe"])
        return change(self, name)

    monkeypatch.setattr(RecipeHistory, "set", spy)
    book.put(["cam"], "bottle")
    assert seen == ["bottle"]
