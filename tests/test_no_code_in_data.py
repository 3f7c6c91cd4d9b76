"""Data stays data: no module of ours reads bytes in a way that can run what they say (pickle, eval, unsafe YAML)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("edge", "deploy", "trainer", "benchmarks")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "builtins.eval",
    "builtins.exec",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "pandas.read_pickle",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.load_all",
    "yaml.load",
}
UNSAFE_LOADERS = {"Loader", "UnsafeLoader", "FullLoader", "CLoader", "CUnsafeLoader", "CFullLoader", "BaseConstructor"}


def names_of(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for: ``np`` -> ``numpy``, ``load`` -> ``torch.load``."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                names[one.asname or one.name.partition(".")[0]] = one.name if one.asname else one.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for one in node.names:
                names[one.asname or one.name] = f"{node.module}.{one.name}"
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return "?"


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((one.value for one in call.keywords if one.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def problem_of(call: ast.Call, name: str) -> str:
    opaque = any(one.arg is None for one in call.keywords)  # **options may say anything
    if name == "torch.load" and (opaque or not is_constant(keyword(call, "weights_only"), True)):
        return "torch.load without weights_only=True"
    if name == "numpy.load":
        allow = keyword(call, "allow_pickle")
        third = call.args[2] if len(call.args) > 2 else None
        if opaque or any(given is not None and not is_constant(given, False) for given in (allow, third)):
            return "numpy.load that may unpickle"
    if name in CALLS:
        return name
    return ""


def problems(source: str) -> list[str]:
    tree = ast.parse(source)
    names, found = names_of(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [one.name for one in node.names if one.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = dotted(node.func, names)
            if name in {"__import__", "importlib.import_module"} and any(
                isinstance(one, ast.Constant) and one.value in MODULES for one in node.args
            ):
                found.append(name)
            elif problem := problem_of(node, name):
                found.append(problem)
        elif isinstance(node, (ast.Attribute, ast.Name)) and dotted(node, names) in {
            f"yaml.{loader}" for loader in UNSAFE_LOADERS
        }:
            found.append(dotted(node, names))
    return found


def test_modules_run_nothing_that_they_read() -> None:
    found = {str(path.relative_to(ROOT)): problems(path.read_text(encoding="utf-8")) for path in FILES}

    assert {path: reasons for path, reasons in found.items() if reasons} == {}


def test_every_room_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ROOMS)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import joblib.memory",
        "from marshal import loads",
        "import importlib; importlib.import_module('dill')",
        "__import__('shelve')",
        "eval('1')",
        "exec(text)",
        "compile(text, '', 'exec')",
        "import builtins; builtins.eval('1')",
        "import yaml; yaml.load(text)",
        "from yaml import load; load(text)",
        "import yaml as y; y.unsafe_load(text)",
        "import yaml\nclass L(yaml.FullLoader): ...",
        "import torch; torch.load(path)",
        "import torch as t; t.load(path, weights_only=False)",
        "from torch import load as read; read(path, weights_only=flag)",
        "import torch; torch.load(path, **options)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "from numpy import load; load(path, None, True)",
        "import numpy; numpy.load(path, allow_pickle=flag)",
        "import numpy as np; np.load(path, **options)",
        "def inner():\n    import cloudpickle",
    ],
)
def test_check_finds(source: str) -> None:
    assert problems(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re; re.compile('x')",
        "model.eval()",
        "import ast; ast.literal_eval(text)",
        "import yaml; yaml.safe_load(text)",
        "import yaml\nclass L(yaml.SafeLoader): ...",
        "import torch; torch.load(path, weights_only=True)",
        "import numpy as np; np.load(path)",
        "import numpy as np; np.load(path, allow_pickle=False)",
        "import json; json.load(file)",
    ],
)
def test_check_leaves_alone(source: str) -> None:
    assert problems(source) == []
