"""ProductGuide: says what each frame of a camera is judged as, where nobody follows what the camera shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge.adaptation.look import Look

if TYPE_CHECKING:
    from edge.frames import Frame
    from edge.products.recipes import CameraProducts, Route


class ProductGuide:
    """By the recipe, else by the router: a frame that shows another product than was guessed is judged again as that.

    Args:
        products: of the camera.
    """

    def __init__(self, products: CameraProducts) -> None:
        self._products = products
        # What the last frame showed: a guess that costs a second look where it is wrong.
        self._guess = 0

    def look(self, frame: Frame) -> Look:
        """How a frame is to be seen."""
        index = self._products.asked(frame).index
        return Look(self._guess if index is None else index)

    def rerouted(self, route: Route | None, frame: Frame) -> Look | None:
        """As what a frame is to be judged that the router decides about; None where it does not."""
        asked = self._products.asked(frame)
        if route is None or asked.problem or asked.index is not None:
            return None
        shown = self._products.shown(route)
        if shown is None:
            return None
        self._guess = shown
        return Look(shown)

    def refusal(self, route: Route | None, frame: Frame) -> str:
        """Why a frame must not be judged; empty where it may be."""
        return self._products.refusal(route, frame)
