"""The settings reference as Markdown, made from the pydantic models: ``python -m deploy.reference > docs/settings.md``.

It knows how a model describes itself, not what its settings do.
"""

from __future__ import annotations

import sys
import types
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from edge.settings import BoxSettings

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "multiple_of": "multiple of", "min_length": "length ≥"}
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}


def settings_reference(model: type[BaseModel], *, title: str, intro: str) -> str:
    """Describe a settings model and the models inside it.

    Args:
        model: the root; its sections follow in the order of its fields.
        title: the heading.
        intro: a paragraph below it.

    Returns:
        Markdown with one table per section: key, type and bounds, default, description.
    """
    return "\n".join([f"# {title}", "", intro, "", *_section(model, ())])


def _section(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    doc = (model.__doc__ or "").strip().splitlines()
    heading = f"## `{'.'.join(path)}`" if path else "## Top level"
    lines = [heading, "", *([doc[0], ""] if doc else []), "| key | value | default | meaning |", "|---|---|---|---|"]
    below: list[str] = []
    for key, field in model.model_fields.items():
        nested, suffix = _nested(field.annotation)
        meaning = " ".join(part for part in (_bold(field.title), field.description or "") if part)
        value = "section" if nested else _value(field)
        if nested and suffix:
            value = "list of sections" if suffix == "[]" else "sections by name"
        lines.append(f"| `{key}` | {_cell(value)} | {_cell(_default(field, nested))} | {_cell(meaning)} |")
        if nested:
            below += ["", *_section(nested, (*path, key + suffix))]
    return [*lines, *below]


def _nested(annotation: Any) -> tuple[type[BaseModel] | None, str]:  # noqa: ANN401 (annotations are of any type)
    """Return the model inside an annotation, and ``[]`` or ``.<name>`` for a list or mapping of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType, Annotated):
        found = [_nested(argument) for argument in arguments]
        return next((pair for pair in found if pair[0]), (None, ""))
    if origin in (list, tuple):
        return _nested(arguments[0])[0], "[]"
    if origin is dict:
        return _nested(arguments[1])[0], ".<name>"
    return None, ""


def _value(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(constraint, name)}"
        for constraint in field.metadata
        for name, sign in _BOUNDS.items()
        if getattr(constraint, name, None) is not None
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:  # noqa: ANN401 (annotations are of any type)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments if argument is not type(None))
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if origin is dict:
        return f"{_type(arguments[1])} by name"
    return f"list of {_type(arguments[0])}" if origin is not None else _plain(annotation)


def _plain(kind: type) -> str:
    if issubclass(kind, Enum):
        return " or ".join(f"`{member.value}`" for member in kind)
    return "path" if issubclass(kind, PurePath) else _NAMES.get(kind, kind.__name__.lower())


def _default(field: FieldInfo, nested: type[BaseModel] | None) -> str:
    if field.is_required():
        return "**required**"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None or default is PydanticUndefined:
        return "none"
    if nested:
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    several = default if isinstance(default, (list, tuple)) else (default,)
    shown = ", ".join(f"`{one.value if isinstance(one, Enum) else one}`" for one in several)
    return shown if default not in ("", (), [], {}) else "empty"


def _bold(title: str | None) -> str:
    return f"**{title.rstrip('.')}.**" if title else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def box_settings_page() -> str:
    """Return docs/settings.md."""
    intro = (
        "One YAML file, given to `lineward run --config FILE`. Unknown keys are refused. This page is made from the "
        "models in `edge/` by `make docs`; a test keeps it current."
    )
    return settings_reference(BoxSettings, title="Settings of a box", intro=intro) + "\n"


if __name__ == "__main__":
    sys.stdout.write(box_settings_page())
