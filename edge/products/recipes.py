"""Which product a camera's recipe says that a frame shows, and whether the frame may be judged as that.

Decided by the moment of its capture, however late it is judged. It must not know files, commands or corrections.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.adaptation.routing import nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from edge.frames import Frame

    Route = npt.NDArray[np.float32]

MAX_CHANGES = 256
"""Changes that are remembered: frames are judged within seconds of their capture."""
_EVER = -(2**63)
_NO_RECIPE = "no recipe: which product it shows is not known, and the bundle has no router; send cmd/recipe"
_FORGOTTEN = "it was captured before the recipes that are remembered"


class RecipeHistory:
    """The recipes of one camera, and from which captured frame on each one holds. Safe to call from several threads.

    A change and a look at it exclude each other: whoever has looked up a frame before a change has a frame that was
    captured before it, so no frame is ever given the recipe after it and another one the recipe before.

    Args:
        clock_ns: monotonic, the one that frames are captured by.
    """

    def __init__(self, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._from_ns = [_EVER]
        self._names = [""]
        self._known = False

    @property
    def known(self) -> bool:
        """Whether anybody ever said anything, that the router is to choose included."""
        return self._known

    @property
    def now(self) -> str:
        """The recipe of a frame captured now; empty for none."""
        return self._names[-1]

    def begin_with(self, name: str) -> None:
        """Take the recipe of an earlier run, for every frame; nothing where one is known already."""
        with self._lock:
            if not self._known:
                self._names, self._from_ns, self._known = [name], [_EVER], True

    def set(self, name: str) -> int:
        """Have a recipe hold for frames that are captured from now on.

        Returns:
            From when on it holds, monotonic nanoseconds; that of the present one where it is the same.
        """
        with self._lock:
            self._known = True
            if self._names[-1] != name:
                # Inside the lock: see the class.
                self._from_ns.append(self._clock_ns())
                self._names.append(name)
                del self._from_ns[:-MAX_CHANGES], self._names[:-MAX_CHANGES]
            return self._from_ns[-1]

    def of(self, captured_ns: int) -> str | None:
        """Return the recipe that a frame was captured under, empty for none; None where it is not remembered."""
        with self._lock:
            index = bisect_right(self._from_ns, captured_ns) - 1
            return None if index < 0 else self._names[index]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the recipe says of one frame.

    Attributes:
        index: of the product that it is to be judged as; None where the router chooses.
        problem: why it may not be judged at all; empty where it may.
    """

    index: int | None = None
    problem: str = ""


class CameraProducts:
    """What a camera may be asked to judge, and what it is asked to.

    Args:
        names: of the products by index; those that the box added come behind the bundle's, which a router knows.
        history: the camera's recipes.
        routed: products that a router would know.
        unified: whether they are products: a frame that nobody says the product of is then not judged. Sub-classes of
            one product are judged all the same.
    """

    def __init__(
        self, names: Callable[[], Sequence[str]], history: RecipeHistory, *, routed: int, unified: bool = True
    ) -> None:
        self._names, self.history = names, history
        self._routed, self._unified = routed, unified

    @property
    def names(self) -> Sequence[str]:
        """Of the products, by index."""
        return self._names()

    def asked(self, frame: Frame | None = None) -> Asked:
        """Return what a frame is to be judged as.

        Args:
            frame: of the camera; None for one that is captured now.
        """
        names, unified = self._names(), self._unified
        if len(names) == 1 and not unified:
            return Asked(0)
        recipe = self.history.now if frame is None else self.history.of(frame.captured_ns)
        if recipe is None:
            return Asked(problem=_FORGOTTEN)
        if not recipe:
            return Asked(0 if len(names) == 1 else None)
        if recipe not in names:
            known = ", ".join(names)
            return Asked(problem=f"the recipe is {recipe}, which the bundle does not have; it has {known}")
        return Asked(names.index(recipe))

    def shown(self, route: Route) -> int | None:
        """Return the product that a router names; None where it names none, or is one of other products."""
        return nearest(route) if len(route) == self._routed else None

    def refusal(self, route: Route | None, frame: Frame | None = None) -> str:
        """Say why a frame must not be judged; empty where it may be.

        Args:
            route: float32 [E] of its prediction; None where the bundle has no router.
            frame: as in :meth:`asked`.
        """
        asked, names = self.asked(frame), self._names()
        # A router does not know what was added to its bundle.
        added = asked.index is not None and asked.index >= self._routed
        if asked.problem or added:
            return asked.problem
        if route is None or (self._routed == 1 and len(route) != 1):
            return _NO_RECIPE if asked.index is None and self._unified else ""
        shown = self.shown(route)
        if shown is None:
            known = ", ".join(name for name in names[: self._routed] if name)
            return f"unknown product: like {'none of ' + known if known else 'nothing that was trained on'}"
        if asked.index is not None and shown != asked.index:
            return f"it shows {names[shown]}, the recipe is {names[asked.index]}"
        return ""
