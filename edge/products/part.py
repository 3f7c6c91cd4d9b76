"""Recipes: which product each camera of a box runs, by command or by a PLC's register; a part of the box.

What a frame is judged as is the camera's products'; moments that settle anew under a recipe are the adaptation's.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from edge.alerts.command_messages import RecipeCommand
from edge.alerts.message import NoticeKind, Severity
from edge.alerts.topics import RECIPE_VERB
from edge.alerts.wire import format_utc
from edge.errors import StoreError
from edge.frames import Decision
from edge.inspection.registers import NO_NUMBER, RecipeAnswer
from edge.products.guide import ProductGuide
from edge.products.recipes import CameraProducts
from edge.products.unknown import UnknownProducts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from edge.alerts.message import AnyMessage
    from edge.alerts.publisher import Publisher
    from edge.frames import JudgedFrame
    from edge.inference.detector import Detector
    from edge.products.book import Recipe, RecipeBook

_LOG = logging.getLogger(__name__)
# Between looks at what has changed around the recipes: a bundle may have been switched.
LOOK_S = 0.5
MAX_WAITING = 16
_MAX_REASON = 500


class Followers(Protocol):
    """The followers of cameras, as :class:`~edge.adaptation.part.Adaptation` has them."""

    def following(self) -> Sequence[str]:
        """Names of the cameras that follow their line."""

    def why_not(self, command: RecipeCommand) -> str:
        """Why a recipe cannot be followed; empty where it can."""

    def settle(self, command: RecipeCommand, done: Callable[[dict[str, Any]], None]) -> None:
        """Have cameras settle under a recipe that holds already."""


class Stations(Protocol):
    """The registers of a box's stations, as :class:`~edge.inspection.registers.Registers` has them."""

    def on_recipe(self, choose: Callable[[str, int], bool]) -> None:
        """Have numbers handed on."""

    def show_recipe(self, station: str, number: int, answer: RecipeAnswer | None = None) -> None:
        """Show which recipe a station runs."""


class _Written(NamedTuple):
    station: str
    number: int


class Recipes:
    """Obeys ``cmd/recipe`` and recipe registers in a thread of its own, and tells which recipes cannot hold.

    Args:
        book: of recipes.
        cameras: the detector of each enabled camera at the moment, by its name.
        followers: cameras that follow their line.
        notify: raises a notice.
        numbers: names of products by the number that a PLC writes; by their order in the bundle, from 1, where empty.
    """

    name = "recipes"

    def __init__(
        self,
        book: RecipeBook,
        *,
        cameras: Callable[[], Mapping[str, Detector]],
        followers: Followers,
        notify: Callable[..., None],
        numbers: Mapping[int, str] | None = None,
    ) -> None:
        self._book, self._cameras, self._followers, self._notify = book, cameras, followers, notify
        self._numbers = dict(numbers or {})
        self._registers: Stations | None = None
        self._stations: Callable[[], Mapping[str, Sequence[str]]] = dict
        self._answer: Callable[..., None] = _nobody
        self._waiting: queue.Queue[RecipeCommand | _Written | None] = queue.Queue(MAX_WAITING)
        self._counts = dict.fromkeys(("set", "refused"), 0)
        self._told: dict[str, str] = {}
        self._unknown = UnknownProducts()
        self._refused_files: tuple[str, ...] = ()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def attach(self, publisher: Publisher) -> None:
        """Have commands brought, and answers taken."""
        self._answer = publisher.answer
        publisher.on_command(RECIPE_VERB, self.command)

    def serve(self, registers: Stations, stations: Callable[[], Mapping[str, Sequence[str]]]) -> None:
        """Have PLCs choose recipes.

        Args:
            registers: of the stations.
            stations: the cameras of each at the moment, by its name.
        """
        self._registers, self._stations = registers, stations
        registers.on_recipe(self._write)

    def products(self, camera: str, detector: Detector) -> CameraProducts:
        """Return what a camera may be asked to judge under the bundle that judges it from now on."""
        manifest = detector.bundle.manifest
        if manifest.products:
            return CameraProducts(lambda: detector.products, self._book.history(camera), routed=len(manifest.products))
        names = manifest.subclasses or ("",)
        return CameraProducts(lambda: names, self._book.history(camera), routed=len(names), unified=False)

    def guide(self, camera: str, detector: Detector) -> ProductGuide | None:
        """Make the guide of a camera that does not follow its line; None where its bundle is for one product."""
        return ProductGuide(self.products(camera, detector)) if detector.products else None

    def observe(self, judged: JudgedFrame) -> None:
        """Take note of whether a frame showed a product that may be judged; in the camera's thread, never waits."""
        frame, prediction = judged.frame, judged.prediction
        if prediction is None:
            return
        refusal = ""
        if judged.verdict.decision is Decision.NOT_JUDGED:
            detector = self._cameras().get(frame.camera)
            if detector is None or not detector.products:
                return
            products = self.products(frame.camera, detector)
            asked = products.asked(frame)
            if asked.problem or (asked.index is None and prediction.route is None):
                # Nothing was looked at: that it lacks a recipe is told by itself.
                return
            refusal = products.refusal(prediction.route, frame)
        self._unknown.count(frame.camera, refusal)

    def refuse_files(self, refused: Sequence[str]) -> None:
        """Warn of files whose products could not be added, until others are given; each is told once."""
        for text in refused:
            if text not in self._refused_files:
                self._notify(NoticeKind.PRODUCT_REFUSED, Severity.WARNING, text[:1000])
        self._refused_files = tuple(refused)

    def command(self, command: AnyMessage) -> dict[str, Any] | None:
        """Take a command; the answer follows. Never waits."""
        assert isinstance(command, RecipeCommand)
        if self._put(command):
            return None
        return {"ok": False, "id": command.id, "reason": "too many recipes are being set; send it again"}

    def start(self) -> None:
        """Begin to obey."""
        if self._book.damage:
            self._notify(NoticeKind.RECIPE_DAMAGED, Severity.ALARM, self._book.damage[:1000])
        self._show()
        self._thread = threading.Thread(target=self._run, name="recipes", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Begin to end; what waits is not done."""
        self._stopping.set()

    def stop(self, timeout: float) -> bool:
        """End within ``timeout`` seconds."""
        self._stopping.set()
        self._put(None)
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def status(self) -> dict[str, Any]:
        """What may run where; empty where no bundle has several products and no recipe was ever given."""
        cameras = self.of_cameras()
        if not cameras and not self._refused_files:
            return {}
        products = {name: list(one.products) for name, one in self._cameras().items() if one.products}
        return {
            "cameras": cameras, "products": products, "counters": dict(self._counts),
            "refused_files": list(self._refused_files),
        }  # fmt: skip

    def of_cameras(self) -> dict[str, dict[str, Any]]:
        """Return the recipe of each camera that may have one, and since when it holds, as JSON values."""
        found = {}
        for camera, detector in self._cameras().items():
            name, since = self._book.of(camera)
            if detector.products or name:
                found[camera] = {"name": name or None, "since": None if since is None else format_utc(since)}
        return found

    def warnings(self) -> list[str]:
        """What an operator should know now."""
        found = [f"{camera}: {text}" for camera, text in sorted(self._problems().items())]
        found += [f"{camera}: {text}" for camera, text in self._unknown.lasting().items()]
        found += [f"product file refused: {text}" for text in self._refused_files]
        return found + ([self._book.damage] if self._book.damage else [])

    def look(self) -> None:
        """Tell once which recipes cannot hold, and show a PLC those that do."""
        problems = self._problems()
        for camera, text in problems.items():
            if self._told.get(camera) != text:
                self._notify(
                    NoticeKind.RECIPE_UNKNOWN, Severity.WARNING, f"camera {camera}: {text}", camera=camera,
                    recipe=self._book.of(camera)[0] or None,
                )  # fmt: skip
        self._told = problems
        self._tell_unknown()
        self._show()

    def obey(self, command: RecipeCommand, done: Callable[[dict[str, Any]], None]) -> None:
        """Have a recipe hold at cameras, at all that are meant or at none.

        Args:
            command: what is asked.
            done: called once with the fields of the command's result, at once or later.
        """
        following, cameras = set(self._followers.following()), self._cameras()
        meant = [
            name for name, one in cameras.items()
            if command.camera in (None, name) and (one.products or name in following)
        ]  # fmt: skip
        name = command.recipe or ""
        reason = self._why_not(command, meant, following, cameras)
        if reason:
            self._counts["refused"] += 1
            done({"ok": False, "reason": reason[:_MAX_REASON]})
            return
        try:
            recipe = self._put_down(meant, name, "command")
        except StoreError as error:
            self._counts["refused"] += 1
            done({"ok": False, "reason": str(error)[:_MAX_REASON]})
            return
        detail = {"cameras": meant, "recipe": name or None, "since": format_utc(recipe.since)}
        if not following.intersection(meant):
            done({"ok": True, "count": len(meant), "detail": detail})
            return

        def settled(values: dict[str, Any]) -> None:
            more = values.get("detail", {})
            done({**values, "count": len(meant) if values["ok"] else 0, "detail": {**more, **detail}})

        self._followers.settle(command, settled)

    def obey_register(self, station: str, number: int) -> RecipeAnswer:
        """Have the product of a number hold at a station's cameras, at all of them or at none."""
        cameras, detectors = self._stations().get(station, ()), self._cameras()
        its = {camera: detectors[camera] for camera in cameras if camera in detectors}
        table = self._table(its.values())
        if number and number not in table:
            known = ", ".join(f"{one} {name}" for one, name in sorted(table.items())) or "none"
            return self._refuse(station, number, RecipeAnswer.UNKNOWN_NUMBER, f"numbers here are: {known}")
        name = table[number] if number else ""
        lacking = [camera for camera, one in its.items() if not one.products or (name and name not in one.products)]
        if lacking or not its:
            text = f"{', '.join(lacking) or 'no camera'} does not have product {name!r}"
            return self._refuse(station, number, RecipeAnswer.NO_SUCH_PRODUCT, text)
        change = [camera for camera in its if not self._holds(camera, name)]
        if not change:
            return RecipeAnswer.IN_FORCE
        try:
            self._put_down(change, name, f"register of station {station}")
        except StoreError as error:
            return self._refuse(station, number, RecipeAnswer.NOT_KEPT, str(error))
        for camera in set(self._followers.following()).intersection(change):
            self._followers.settle(RecipeCommand(camera=camera, recipe=name or None), _log_settled)
        return RecipeAnswer.IN_FORCE

    def _tell_unknown(self) -> None:
        # Of a camera that follows its line the adaptation tells it.
        following = set(self._followers.following())
        own = {camera for camera, one in self._cameras().items() if one.products and camera not in following}
        for camera, refusal in self._unknown.turns(own):
            self._notify(
                NoticeKind.PRODUCT_UNKNOWN, Severity.ALARM if refusal else Severity.INFO,
                f"camera {camera}: {refusal or 'its product is known again'}"[:1000], camera=camera,
                lasting=bool(refusal), recipe=self._book.of(camera)[0] or None,
            )  # fmt: skip

    def _why_not(
        self, command: RecipeCommand, meant: Sequence[str], following: set[str], cameras: Mapping[str, Detector]
    ) -> str:
        takers = [name for name, one in cameras.items() if one.products or name in following]
        if not meant and takers:
            return f"camera {command.camera!r} does not exist, or takes no recipe; those that do: {', '.join(takers)}"
        for camera in meant:
            known = cameras[camera].products
            if command.recipe and known and command.recipe not in known:
                return f"camera {camera}: its bundle has no product {command.recipe!r}; it has: {', '.join(known)}"
        return self._followers.why_not(command) if not meant or following.intersection(meant) else ""

    def _put_down(self, cameras: Sequence[str], name: str, by: str) -> Recipe:
        recipe = self._book.put(cameras, name)
        self._show()
        self._counts["set"] += 1
        runs = f"{name} runs" if name else "the router chooses the product"
        self._notify(
            NoticeKind.RECIPE_SET, Severity.INFO, f"{', '.join(cameras)}: {runs} from now on, by {by}",
            cameras=list(cameras), recipe=name or None, since=format_utc(recipe.since),
        )  # fmt: skip
        return recipe

    def _refuse(self, station: str, number: int, answer: RecipeAnswer, why: str) -> RecipeAnswer:
        self._counts["refused"] += 1
        text = f"station {station}: number {number} in its recipe register is refused, the recipe stays: {why}"
        self._notify(NoticeKind.RECIPE_REFUSED, Severity.WARNING, text[:1000], station=station, number=number)
        return answer

    def _holds(self, camera: str, name: str) -> bool:
        history = self._book.history(camera)
        return history.known and history.now == name

    def _table(self, detectors: Iterable[Detector]) -> dict[int, str]:
        if self._numbers:
            return self._numbers
        names = next((one.products for one in detectors if one.products), ())
        return dict(enumerate(names, 1))

    def _problems(self) -> dict[str, str]:
        """Why cameras cannot judge by their recipes, or lack one that they need."""
        found = {}
        for camera, detector in self._cameras().items():
            if not detector.products:
                continue
            asked = self.products(camera, detector).asked()
            if asked.problem:
                found[camera] = f"nothing is judged: {asked.problem}; send cmd/recipe"
            elif asked.index is None and not detector.has_router:
                found[camera] = "nothing is judged: it has no recipe, and its bundle no router; send cmd/recipe"
        return found

    def _show(self, only: str = "", answer: RecipeAnswer | None = None) -> None:
        if self._registers is None:
            return
        detectors = self._cameras()
        for station, cameras in self._stations().items():
            if only in ("", station):
                numbers = {name: number for number, name in self._table(
                    detectors[camera] for camera in cameras if camera in detectors
                ).items()}  # fmt: skip
                names = {self._book.of(camera)[0] for camera in cameras}
                name = names.pop() if len(names) == 1 else None
                number = 0 if name == "" else NO_NUMBER if name is None else numbers.get(name, NO_NUMBER)
                self._registers.show_recipe(station, number, answer)

    def _write(self, station: str, number: int) -> bool:
        """Of the PLC's server; returns at once."""
        return self._put(_Written(station, number))

    def _put(self, one: RecipeCommand | _Written | None) -> bool:
        try:
            self._waiting.put_nowait(one)
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                one = self._waiting.get(timeout=LOOK_S)
            except queue.Empty:
                one = None
            if self._stopping.is_set():
                return
            if one is not None:
                self._do(one)
            try:
                self.look()
            except Exception:  # noqa: BLE001 (the thread's rim: the next look may succeed)
                _LOG.exception("recipes could not be looked after")

    def _do(self, one: RecipeCommand | _Written) -> None:
        if isinstance(one, RecipeCommand):
            try:
                self.obey(one, lambda values: self._answer(RECIPE_VERB, id=one.id, **values))
            except Exception as error:  # noqa: BLE001 (whoever asked gets an answer)
                _LOG.exception("%s failed", RECIPE_VERB)
                self._answer(RECIPE_VERB, id=one.id, ok=False, reason=f"{type(error).__name__}, see the log")
            return
        answer = RecipeAnswer.NOT_KEPT
        try:
            answer = self.obey_register(one.station, one.number)
        except Exception:  # noqa: BLE001 (as above)
            _LOG.exception("the recipe register of station %s failed", one.station)
        try:
            self._show(one.station, answer)
        except Exception:  # noqa: BLE001 (as above: without an answer the station would stay busy and take no part)
            _LOG.exception("the recipe of station %s cannot be shown", one.station)
            assert self._registers is not None
            self._registers.show_recipe(one.station, NO_NUMBER, answer)


def _log_settled(values: dict[str, Any]) -> None:
    if not values["ok"]:
        _LOG.warning("the recipe holds, but moments do not settle: %s", values["reason"])


def _nobody(*_: object, **__: object) -> None:
    """Answer nobody: no publisher is attached."""
