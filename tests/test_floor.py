"""The floor of the house: imports point one way, nothing unsafe is loaded, and a box lives without the other rooms."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import cv2
import pytest
from packaging.requirements import Requirement

from deploy.embedded_broker import EmbeddedBroker
from tests.edge.tiny_bundle import defective_frame, good_frame, make_tiny_bundle
from tests.edge.tiny_memory import make_memory_bundle

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("edge", "deploy", "trainer")
FORBIDDEN = {
    "edge": {"deploy", "trainer", "torch", "onnx", "onnxscript", "sklearn", "skimage", "matplotlib", "amqtt"},
    "deploy": {"trainer"},
}
UNSAFE_PACKAGES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
SOURCES = [path for room in (*ROOMS, "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))]


def imported_packages(tree: ast.AST) -> set[str]:
    """Return the top-level packages that a module imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                names.add(str(argument.value))
    return {name.split(".")[0] for name in names}


def unsafe_loads(tree: ast.AST) -> list[str]:
    """Return the calls and imports that can run code hidden in data."""
    found = [f"import {name}" for name in sorted(imported_packages(tree) & UNSAFE_PACKAGES)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            name in {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or (name.endswith("np.load") and keywords.get("allow_pickle", "False") != "False")
            or keywords.get("shell") == "True"
        ):
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_imports_point_one_way(room: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): sorted(bad)
        for path in (ROOT / room).rglob("*.py")
        if (bad := imported_packages(ast.parse(path.read_text())) & FORBIDDEN[room])
    }

    assert wrong == {}


def test_nothing_unsafe_is_loaded() -> None:
    wrong = {str(path.relative_to(ROOT)): bad for path in SOURCES if (bad := unsafe_loads(ast.parse(path.read_text())))}

    assert wrong == {}


def test_a_process_has_one_openvino_core() -> None:
    """A signal would end a process that had two, see :func:`edge.inference.openvino_session.core`."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (*SOURCES, *sorted((ROOT / "tests").rglob("*.py")))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Core"
    ]

    assert [call.split(":")[0] for call in calls] == ["edge/inference/openvino_session.py"]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_unsafe_loads_are_recognised(line: str) -> None:
    assert unsafe_loads(ast.parse(line))


@pytest.mark.parametrize(
    "line", ["torch.load(p, weights_only=True)", "np.load(p, allow_pickle=False)", "yaml.safe_load(t)"]
)
def test_safe_loads_are_left_alone(line: str) -> None:
    assert unsafe_loads(ast.parse(line)) == []


def test_a_late_import_is_an_import() -> None:
    tree = ast.parse("def f():\n    import torch.nn\n    importlib.import_module('trainer.cli')")

    assert imported_packages(tree) == {"torch", "trainer"}


# --- a box that has nothing but its own floor -------------------------------------------------------------------


def runtime_distributions(*extras: str) -> set[str]:
    """Return the installed distributions that lineward with ``extras`` needs, themselves included, without lineward."""
    found: set[str] = set()
    queue = [("lineward", extras)]
    while queue:
        name, wanted = queue.pop()
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                continue
            needed = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if needed not in found:
                found.add(needed)
                queue.append((needed, tuple(requirement.extras)))
    return found


def link_distributions(names: set[str], target: Path) -> None:
    """Link the installed files of some distributions into another environment's site-packages."""
    for name in sorted(names):
        distribution = metadata.distribution(name)
        files = distribution.files or []
        tops = {file.parts[0] for file in files if ".." not in file.parts and file.parts[0] != "__pycache__"}
        for top in sorted(tops):
            link = target / top
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(top))))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with what is installed here; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def install_box(wheel: Path, environment: Path) -> Path:
    """Make an environment with the wheel, the base and box-cpu packages, and nothing else.

    Returns:
        The environment's folder. Its packages are links into this environment, so that none is downloaded.
    """
    venv.create(environment, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(environment / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    link_distributions(runtime_distributions("box-cpu"), site_packages(environment))
    return environment


@pytest.fixture(scope="module")
def bare_box(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_box(wheel, tmp_path_factory.mktemp("bare_box") / "venv")


@pytest.fixture(scope="module")
def edge_alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    environment = install_box(wheel, tmp_path_factory.mktemp("edge_alone") / "venv")
    for room in ("trainer", "deploy"):
        shutil.rmtree(site_packages(environment) / room)
    return environment


def site_packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))


def run_in(environment: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of an environment, away from the checkout and from this environment's variables."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "COV"))
    }
    command = [str(environment / "bin" / arguments[0]), *arguments[1:]]
    return subprocess.run(command, cwd=cwd, env=inherited, capture_output=True, text=True, timeout=120, check=False)


def test_box_has_no_torch(bare_box: Path, tmp_path: Path) -> None:
    for absent in ("torch", "onnx", "skimage", "openvino"):
        assert run_in(bare_box, "python", "-c", f"import {absent}", cwd=tmp_path).returncode == 1
    assert run_in(bare_box, "python", "-c", "import edge, numpy, cv2, onnxruntime", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("verb", ["train", "demo"])
def test_trainer_verb_names_the_extra(edge_alone: Path, tmp_path: Path, verb: str) -> None:
    result = run_in(edge_alone, "lineward", verb, cwd=tmp_path)

    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "lineward[" in result.stderr


def test_help_lists_the_verbs(edge_alone: Path, tmp_path: Path) -> None:
    result = run_in(edge_alone, "lineward", "--help", cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    for verb in ("run", "replay", "watch", "train"):
        assert re.search(rf"\b{verb}\b", result.stdout)


def test_verb_without_torch_names_the_extra(bare_box: Path, tmp_path: Path) -> None:
    result = run_in(bare_box, "lineward", "train", "--data", "x", "--out", "y", cwd=tmp_path)

    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "lineward[trainer]" in result.stderr


def test_box_judges_a_folder_alone(edge_alone: Path, tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path / "bundle")
    images = tmp_path / "images"
    images.mkdir()
    for index in range(6):
        image = defective_frame(index) if index in {2, 3, 4} else good_frame(index)
        cv2.imwrite(str(images / f"{index}.png"), image)
    found = tmp_path / "found.json"

    with EmbeddedBroker() as broker:
        result = run_in(
            edge_alone, "lineward", "replay", "--bundle", "bundle", "--source", "images", "--broker", broker.url,
            "--engine", "onnxruntime", "--mode", "triggered", "--false-nok-per-1000", "30", "--json", str(found),
            cwd=tmp_path,
        )  # fmt: skip

    assert result.returncode == 0, result.stderr
    summary = json.loads(found.read_text(encoding="utf-8"))
    decisions = {frame["name"]: frame["decision"] for frame in summary["results"]}
    assert {name for name, decision in decisions.items() if decision == "NOK"} == {"2.png", "3.png", "4.png"}
    assert (summary["published"], summary["unsent"], summary["lost"]) == (6, 0, 0)


def test_box_learns_and_changes_its_memory_alone(edge_alone: Path, tmp_path: Path) -> None:
    make_memory_bundle(tmp_path / "bundle")
    images = tmp_path / "images"
    images.mkdir()
    for index in range(80):
        cv2.imwrite(str(images / f"{index}.png"), good_frame(index))
    settings = {
        "site": "plant", "box": "box1", "state_dir": "state", "bundle": "bundle", "engine": "onnxruntime",
        "memory": {"every_s": 0.01, "ship_every_s": 1, "shadow_frames": 3, "shadow_s": 0, "drift_per_week": 1000},
        "cameras": [{"name": "cam", "source": {"kind": "folder", "path": "images", "fps": 20, "policy": "wait"}}],
    }  # fmt: skip

    with EmbeddedBroker() as broker:
        (tmp_path / "box.yaml").write_text(json.dumps(settings | {"broker": {"url": broker.url}}), encoding="utf-8")
        result = run_in(edge_alone, "lineward", "run", "--config", "box.yaml", cwd=tmp_path)

    assert result.returncode == 0, result.stderr
    assert "memory.switched: memory version 1 judges" in result.stderr
    assert list((tmp_path / "state" / "memory").rglob("in_force-float32.npz"))


# --- what a Jetson's Python can install -------------------------------------------------------------------------

# JetPack 6 is Ubuntu 22.04: CPython 3.10, glibc 2.35. pip matches platform tags exactly, so each is named.
JETSON_PLATFORMS = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 36))]


UNREACHABLE = re.compile(
    r"NewConnectionError|Max retries exceeded|Name or service not known|Connection (refused|reset)"
)


@pytest.mark.parametrize("extra", ["box-cpu", "box-openvino", "box-jetson"])
def test_extra_resolves_for_jetson_python(wheel: Path, tmp_path: Path, extra: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--retries", "1"]
    command += ["--python-version", "3.10", "--implementation", "cp"]
    command += [option for platform in JETSON_PLATFORMS for option in ("--platform", platform)]
    command += ["--target", str(tmp_path / "none"), "--report", str(tmp_path / "report.json"), f"{wheel}[{extra}]"]

    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)

    if result.returncode != 0 and UNREACHABLE.search(result.stderr):
        pytest.skip("no package index can be reached, so nothing can be resolved")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    names = {item["metadata"]["name"].lower() for item in report["install"]}
    assert "torch" not in names
    assert not any(name.startswith("nvidia") for name in names)
    if extra == "box-jetson":
        assert names.isdisjoint({"onnxruntime", "opencv-python-headless", "openvino"})
