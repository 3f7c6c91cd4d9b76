"""Who sets recipes and what is answered: commands, a PLC's registers, followers that settle, files that are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from edge.alerts.command_messages import RecipeCommand
from edge.alerts.message import NoticeKind
from edge.frames import Decision
from edge.inspection.parts import Part, PartVerdict
from edge.inspection.registers import (
    MAX_STATIONS,
    NO_NUMBER,
    RECIPE,
    RECIPE_ANSWER,
    RECIPE_ANSWERS,
    RECIPE_WRITTEN,
    STATION_BASE,
    STATION_WORDS,
    TRIGGER_BASE,
    TRIGGER_WORDS,
    RecipeAnswer,
    Refused,
    Registers,
)
from edge.products.book import RecipeBook
from edge.products.part import MAX_WAITING, Recipes
from tests.edge.station_bench import EPOCH
from tests.plc import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edge.frames import JudgedFrame

BOTTLES, CABLES = "bottles", "cables"
SOON = 20.0


def detector(*products: str, router: bool = True, subclasses: tuple[str, ...] = ()) -> Any:
    manifest = SimpleNamespace(products=products, subclasses=products or subclasses)
    return SimpleNamespace(products=products, has_router=router, bundle=SimpleNamespace(manifest=manifest))


class Followers:
    """Cameras that follow their line, and settle at once."""

    def __init__(self, *names: str, against: str = "") -> None:
        self.names, self.against, self.settled = list(names), against, list[RecipeCommand]()

    def following(self) -> list[str]:
        return self.names

    def why_not(self, _command: RecipeCommand) -> str:
        return self.against or ("" if self.names else "no camera follows its line")

    def settle(self, command: RecipeCommand, done: Callable[[dict[str, Any]], None]) -> None:
        self.settled.append(command)
        done({"ok": True, "count": 1, "detail": {"moments": dict.fromkeys(self.names, 7)}})


class Bench:
    def __init__(self, path: Path, *followers: str, numbers: dict[int, str] | None = None, **cameras: Any) -> None:
        self.notices: list[tuple[NoticeKind, str]] = []
        self.followers = Followers(*followers)
        self.cameras = cameras
        self.book = RecipeBook(path)
        self.part = Recipes(
            self.book, cameras=lambda: self.cameras, followers=self.followers, numbers=numbers,
            notify=lambda kind, _s, text, **_: self.notices.append((kind, text)),
        )  # fmt: skip
        self.registers = Registers()
        self.registers.lay_out([("press", None), ("bench", None)])
        self.stations = {"press": ("one", "two"), "bench": ("three",)}

    def tell(self, recipe: str | None, camera: str | None = None) -> dict[str, Any]:
        answers: list[dict[str, Any]] = []
        self.part.obey(RecipeCommand(camera=camera, recipe=recipe), answers.append)
        (answer,) = answers
        return answer

    def recipes(self) -> dict[str, str]:
        return {name: self.book.of(name)[0] for name in self.cameras}

    def word(self, place: int, station: int = 0) -> int:
        found = self.registers.read(STATION_BASE + STATION_WORDS * station + place, 1)
        assert isinstance(found, list)
        return found[0]

    def write(self, number: int, station: int = 0) -> Refused | None:
        return self.registers.write(TRIGGER_BASE + TRIGGER_WORDS * station + RECIPE_WRITTEN, [number])

    def serve(self) -> None:
        self.part.serve(self.registers, lambda: self.stations)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    both = detector(BOTTLES, CABLES)
    return Bench(tmp_path / "recipes.json", one=both, two=both, three=detector(CABLES, BOTTLES), alone=detector())


def test_a_recipe_is_for_one_camera_or_for_all_that_have_products(bench: Bench) -> None:
    answer = bench.tell(CABLES, "two")
    assert (answer["ok"], answer["count"], answer["detail"]["cameras"]) == (True, 1, ["two"])
    assert answer["detail"]["recipe"] == CABLES
    assert answer["detail"]["since"].endswith("Z")
    assert bench.recipes() == {"one": "", "two": CABLES, "three": "", "alone": ""}

    assert bench.tell(BOTTLES)["detail"]["cameras"] == ["one", "two", "three"]
    assert bench.tell(None, "one")["detail"]["recipe"] is None
    assert bench.recipes() == {"one": "", "two": BOTTLES, "three": BOTTLES, "alone": ""}
    assert [kind for kind, _ in bench.notices] == [NoticeKind.RECIPE_SET] * 3
    assert "one: the router chooses the product from now on, by command" in bench.notices[-1][1]
    assert bench.part.of_cameras()["two"]["name"] == BOTTLES
    assert "alone" not in bench.part.of_cameras()
    assert bench.part.status()["products"] == {"one": [BOTTLES, CABLES], "two": [BOTTLES, CABLES],
                                               "three": [CABLES, BOTTLES]}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "camera", "reason"),
    [
        ("tiles", None, "camera one: its bundle has no product 'tiles'; it has: bottles, cables"),
        (BOTTLES, "alone", "camera 'alone' does not exist, or takes no recipe; those that do: one, two, three"),
        (BOTTLES, "nowhere", "camera 'nowhere' does not exist"),
    ],
)
def test_what_cannot_be_is_refused_as_a_whole(bench: Bench, recipe: str, camera: str | None, reason: str) -> None:
    bench.tell(BOTTLES, "one")
    answer = bench.tell(recipe, camera)
    assert not answer["ok"]
    assert reason in answer["reason"]
    assert bench.recipes()["one"] == BOTTLES
    assert bench.part.status()["counters"] == {"set": 1, "refused": 1}


def test_followers_settle_once_the_recipe_holds(tmp_path: Path) -> None:
    several, single = detector(BOTTLES, CABLES), detector()
    bench = Bench(tmp_path / "r.json", "one", "single", one=several, two=several, single=single)
    answer = bench.tell(CABLES)
    assert answer["detail"]["cameras"] == ["one", "two", "single"]
    assert (answer["count"], answer["detail"]["moments"]) == (3, {"one": 7, "single": 7})
    assert bench.recipes() == {"one": CABLES, "two": CABLES, "single": CABLES}
    assert bench.tell(BOTTLES, "two")["ok"]
    assert len(bench.followers.settled) == 1

    bench.followers.against = "camera single: its bundle has no sub-class"
    assert bench.tell(CABLES)["reason"] == bench.followers.against
    assert bench.recipes()["two"] == BOTTLES


def test_a_box_without_products_answers_as_its_followers_do(tmp_path: Path) -> None:
    assert Bench(tmp_path / "r.json", one=detector()).tell("x") == {"ok": False, "reason": "no camera follows its line"}


def test_a_recipe_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    bench = Bench(tmp_path / "file" / "r.json", one=detector(BOTTLES, CABLES))
    assert "cannot be kept" in bench.tell(BOTTLES)["reason"]
    bench.serve()
    bench.stations = {"press": ("one",)}
    assert bench.part.obey_register("press", 1) is RecipeAnswer.NOT_KEPT
    assert bench.recipes() == {"one": ""}
    assert any("cannot be read" in text for text in bench.part.warnings())


def test_what_lacks_a_recipe_or_has_an_unknown_one_is_warned_of_and_told_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "r.json", routed=detector(BOTTLES, CABLES), blind=detector(BOTTLES, CABLES, router=False))
    for _ in range(2):
        bench.part.look()
    text = "camera blind: nothing is judged: it has no recipe, and its bundle no router; send cmd/recipe"
    assert bench.notices == [(NoticeKind.RECIPE_UNKNOWN, text)]
    assert bench.tell(CABLES)["ok"]
    bench.part.look()
    assert bench.part.warnings() == []
    bench.cameras = {name: detector(BOTTLES, "tiles") for name in bench.cameras}
    bench.part.look()
    assert [kind for kind, _ in bench.notices[2:]] == [NoticeKind.RECIPE_UNKNOWN] * 2
    assert "blind: nothing is judged: the recipe is cables, which the bundle does not have" in bench.part.warnings()[0]


def test_a_camera_that_shows_an_unknown_product_is_told_of_once_and_once_more_when_it_ends(tmp_path: Path) -> None:
    both = detector(BOTTLES, CABLES)
    bench = Bench(tmp_path / "r.json", "follows", plain=both, follows=both)

    def show(route: list[float], decision: Decision, times: int) -> None:
        for camera in bench.cameras:
            frame = SimpleNamespace(camera=camera, captured_ns=1)
            prediction = SimpleNamespace(route=np.asarray(route, np.float32))
            for _ in range(times):
                bench.part.observe(cast("JudgedFrame", SimpleNamespace(
                    frame=frame, prediction=prediction, verdict=SimpleNamespace(decision=decision)
                )))  # fmt: skip
                bench.part.look()

    show([-1, -1], Decision.NOT_JUDGED, 4)
    assert bench.notices == []
    show([-1, -1], Decision.NOT_JUDGED, 20)
    text = "unknown product: like none of bottles, cables"
    assert bench.notices == [(NoticeKind.PRODUCT_UNKNOWN, f"camera plain: {text}")]
    assert bench.part.warnings() == [f"plain: {text}"]
    show([1, -1], Decision.OK, 20)
    assert bench.notices[1:] == [(NoticeKind.PRODUCT_UNKNOWN, "camera plain: its product is known again")]
    assert bench.part.warnings() == []


def test_refused_files_are_told_once_and_warned_of_until_others_are_given(bench: Bench) -> None:
    bench.part.refuse_files(["a: torn"])
    bench.part.refuse_files(["a: torn", "b: foreign"])
    assert [text for _, text in bench.notices] == ["a: torn", "b: foreign"]
    assert bench.part.warnings() == ["product file refused: a: torn", "product file refused: b: foreign"]
    bench.part.refuse_files([])
    assert bench.part.warnings() == []


def test_a_plc_chooses_by_number_and_reads_what_became_of_it(bench: Bench) -> None:
    bench.serve()
    bench.part.start()
    try:
        assert bench.write(2) is None
        wait_for(lambda: bench.word(RECIPE_ANSWERS) == 1)
        assert (bench.word(RECIPE), bench.word(RECIPE_ANSWER)) == (2, RecipeAnswer.IN_FORCE)
        assert bench.recipes() == {"one": CABLES, "two": CABLES, "three": "", "alone": ""}
        # The numbers of a station are those of its cameras' bundle.
        assert bench.write(2, station=1) is None
        wait_for(lambda: bench.word(RECIPE_ANSWERS, 1) == 1)
        assert bench.recipes()["three"] == BOTTLES
        # An unknown number leaves the product as it is.
        assert bench.write(9) is None
        wait_for(lambda: bench.word(RECIPE_ANSWERS) == 2)
        assert (bench.word(RECIPE), bench.word(RECIPE_ANSWER)) == (2, RecipeAnswer.UNKNOWN_NUMBER)
        assert bench.recipes()["one"] == CABLES
        assert "number 9 in its recipe register is refused" in bench.notices[-1][1]
        assert "1 bottles, 2 cables" in bench.notices[-1][1]
        # 0 leaves it to the router, and what a command says is shown too.
        assert bench.write(0) is None
        wait_for(lambda: bench.word(RECIPE_ANSWERS) == 3)
        assert (bench.word(RECIPE), bench.recipes()["one"]) == (0, "")
        assert bench.part.command(RecipeCommand(camera="one", recipe=BOTTLES)) is None
        wait_for(lambda: bench.word(RECIPE) == NO_NUMBER)
        assert bench.part.command(RecipeCommand(camera="two", recipe=BOTTLES)) is None
        wait_for(lambda: bench.word(RECIPE) == 1)
        assert bench.registers.read(TRIGGER_BASE + RECIPE_WRITTEN, 1) == [0]
    finally:
        assert bench.part.stop(SOON)


def test_numbers_of_the_settings_replace_those_of_the_bundle(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "r.json", numbers={70: CABLES, 71: "tiles"}, one=detector(BOTTLES, CABLES))
    bench.serve()
    bench.stations = {"press": ("one",)}
    assert bench.part.obey_register("press", 70) is RecipeAnswer.IN_FORCE
    assert bench.part.obey_register("press", 2) is RecipeAnswer.UNKNOWN_NUMBER
    assert bench.part.obey_register("press", 71) is RecipeAnswer.NO_SUCH_PRODUCT
    assert bench.word(RECIPE) == 70
    bench.cameras = {"one": detector()}
    assert bench.part.obey_register("press", 0) is RecipeAnswer.NO_SUCH_PRODUCT


def test_a_plc_that_writes_in_every_cycle_changes_nothing(bench: Bench) -> None:
    bench.serve()
    bench.part._put_down(["one", "two"], CABLES, "test")
    for cycle in range(3):
        assert bench.write(2) is None
        assert (bench.word(RECIPE_ANSWERS), bench.word(RECIPE_ANSWER)) == (cycle + 1, RecipeAnswer.IN_FORCE)
    assert bench.part._waiting.empty()
    # An earlier answer is not taken for that of a number still being done.
    bench.write(1)
    assert bench.word(RECIPE_ANSWER) == RecipeAnswer.NONE


def test_a_station_that_cannot_be_shown_is_answered_and_the_next_number_holds(bench: Bench) -> None:
    failures = [RuntimeError("at the start of the change"), RuntimeError("at its end")]

    def stations() -> dict[str, tuple[str, ...]]:
        if bench.part.status()["counters"]["refused"] and failures:
            raise failures.pop()
        return bench.stations

    bench.part.serve(bench.registers, stations)
    bench.part.start()
    assert bench.write(9) is None
    wait_for(lambda: bench.word(RECIPE_ANSWERS) == 1)
    wait_for(lambda: not failures)
    assert bench.write(2) is None
    wait_for(lambda: bench.word(RECIPE_ANSWER) == RecipeAnswer.IN_FORCE)
    assert bench.word(RECIPE) == 2
    assert bench.part.stop(SOON)


def test_no_part_is_announced_while_its_product_changes(bench: Bench) -> None:
    announced: list[int] = []

    def trigger(number: int, _counter: int) -> str:
        announced.append(number)
        return ""

    bench.registers.lay_out([("press", trigger), ("bench", trigger)])
    bench.serve()
    bench.write(1)
    assert bench.registers.write(TRIGGER_BASE, [0, 5, 1]) is Refused.BUSY
    assert bench.registers.write(TRIGGER_BASE + TRIGGER_WORDS, [0, 6, 1]) is None, "another station goes on"
    bench.registers.show_recipe("press", 1, RecipeAnswer.IN_FORCE)
    assert bench.registers.write(TRIGGER_BASE, [0, 5, 1]) is None
    assert announced == [6, 5]


def test_more_numbers_than_can_wait_are_refused_and_hold_nothing_up(bench: Bench) -> None:
    bench.serve()
    for number in range(1, MAX_WAITING + 1):
        assert bench.write(number) is None
    before = bench.word(RECIPE_ANSWERS)
    assert bench.write(1) is None
    assert (bench.word(RECIPE_ANSWERS), bench.word(RECIPE_ANSWER)) == (before + 1, RecipeAnswer.BUSY)
    answer = bench.part.command(RecipeCommand(id="x", recipe=BOTTLES))
    assert answer is not None
    assert (answer["ok"], answer["id"]) == (False, "x")


def test_registers_without_anybody_who_chooses_are_none() -> None:
    registers = Registers()
    registers.lay_out([("press", None)])
    place = TRIGGER_BASE + RECIPE_WRITTEN
    assert registers.write(place, [1]) is Refused.ADDRESS
    assert registers.read(place, 1) is Refused.ADDRESS
    registers.on_recipe(lambda _station, _number: True)
    assert registers.write(place, [1]) is None
    assert registers.read(place, 1) == [1]
    for address, values in ((place, [1, 2]), (place - 1, [1]), (place + TRIGGER_WORDS, [1]),
                            (TRIGGER_BASE + TRIGGER_WORDS * MAX_STATIONS + RECIPE_WRITTEN, [1])):  # fmt: skip
        assert registers.write(address, values) is Refused.ADDRESS
    verdict = PartVerdict(Part(0, "0", None, 0, EPOCH, None), Decision.OK, 0, "", (), 0)  # type: ignore[arg-type] (unread)
    registers.verdict("press", verdict, 1.0)
    assert registers.read(STATION_BASE + RECIPE, 1) == [0]
