from __future__ import annotations

from enum import Enum
from pathlib import Path

from pydantic import BaseModel, Field

from deploy.reference import box_settings_page, settings_reference

ROOT = Path(__file__).resolve().parents[2]


class Colour(str, Enum):
    RED = "red"
    BLUE = "blue"


class Lamp(BaseModel):
    """A lamp.

    Not shown.
    """

    colour: Colour = Field(Colour.RED, title="Colour", description="Of its light | or none.")


class Hall(BaseModel):
    """A hall."""

    name: str = Field(description="Unique.")
    height: float | None = Field(None, gt=0, le=20)
    ceiling: Lamp | None = None
    lamps: tuple[Lamp, ...] = ()
    rooms: dict[str, Lamp] = {}
    tags: list[str] = []
    walls: tuple[Colour, ...] = (Colour.RED, Colour.BLUE)


def page() -> str:
    return settings_reference(Hall, title="Halls", intro="What they hold.")


def test_each_key_has_a_row_with_type_bounds_and_default() -> None:
    assert "| `name` | text | **required** | Unique. |" in page()
    assert "| `height` | number, > 0, ≤ 20 | none |" in page()
    assert "| `tags` | list of text | empty |" in page()
    assert "| `walls` | list of `red` or `blue` | `red`, `blue` |" in page()


def test_enumerations_show_their_values_and_pipes_are_escaped() -> None:
    assert "| `colour` | `red` or `blue` | `red` | **Colour.** Of its light \\| or none. |" in page()


def test_sections_follow_with_the_path_to_them() -> None:
    for heading in ("## Top level", "## `ceiling`", "## `lamps[]`", "## `rooms.<name>`"):
        assert heading in page().splitlines()
    assert "Not shown" not in page()


def test_settings_page_is_current() -> None:
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == box_settings_page(), "run: make docs"
