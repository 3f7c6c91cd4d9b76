"""The trainer's verbs through the installed command: exit codes, one line that names the cure, nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge.bundle import Engine
from edge.cli import main
from edge.errors import UsageError
from trainer.cli import _parse_choice, _parse_crop, _parse_size, _parse_tiles, train

LINEWARD = str(Path(sys.executable).parent / "lineward")

CASES = {
    "train without data": (["train", "--data", "none", "--out", "out"], 3, "none: no such folder"),
    "train with an empty folder": (["train", "--data", "empty", "--out", "out"], 3, "the folder is empty"),
    "train an unknown method": (["train", "--data", "empty", "--out", "out", "--method", "x"], 2, "--method x"),
    "train an odd size": (["train", "--data", "empty", "--out", "out", "--size", "100"], 2, "height"),
    "train an unknown option": (["train", "--data", "empty", "--out", "out", "--epochs", "3"], 2, "--epochs"),
    "distil without a teacher": (["distill", "--data", "empty", "--out", "out"], 2, "--teacher"),
    "distil with odd rows": (
        ["distill", "--teacher", "empty", "--data", "empty", "--out", "out", "--rows", "8;9"],
        2,
        "--rows 8;9",
    ),
    "distil an empty folder": (
        ["distill", "--teacher", "empty", "--data", "empty", "--out", "out"],
        3,
        "the folder is",
    ),
    "evaluate nothing": (["evaluate", "--data", "empty"], 2, "exactly one of --run and --bundle"),
    "evaluate an unknown engine": (["evaluate", "--data", "empty", "--bundle", "x", "--engine", "y"], 2, "--engine y"),
    "evaluate without data": (["evaluate", "--run", "empty"], 2, "--data: missing"),
    "evaluate an unknown protocol": (["evaluate", "--protocol", "x"], 2, "--protocol x: unknown"),
    "evaluate a run under a protocol": (
        ["evaluate", "--protocol", "texture-ad", "--run", "empty"],
        2,
        "leave out --run",
    ),
    "evaluate methods without a protocol": (["evaluate", "--data", "empty", "--methods", "pbas"], 2, "--methods"),
    "evaluate an unknown method": (
        ["evaluate", "--protocol", "texture-ad", "--data", "empty", "--methods", "x"],
        2,
        "--method x",
    ),
    "evaluate by an unknown view": (
        ["evaluate", "--protocol", "texture-ad", "--data", "empty", "--by", "x"],
        2,
        "--by x",
    ),
    "evaluate too few numbers of generated images": (
        ["evaluate", "--protocol", "texture-ad", "--images", "4,4"],
        2,
        "--images 4,4: give three whole numbers",
    ),
    "evaluate generated images of no size": (
        ["evaluate", "--protocol", "texture-ad", "--side", "3"],
        2,
        "--side: side 3: outside 64..1024 pixels",
    ),
    "evaluate a folder with numbers of generated images": (
        ["evaluate", "--protocol", "texture-ad", "--data", "empty", "--images", "4,4,4"],
        2,
        "--images and --side are of generated images",
    ),
    "evaluate a comparison of one": (
        ["evaluate", "--protocol", "texture-ad", "--data", "empty", "--methods", "memory", "--compare", "pbas"],
        2,
        "--compare: name at least two",
    ),
    "evaluate an empty folder under a protocol": (
        ["evaluate", "--protocol", "texture-ad", "--data", "empty", "--methods", "memory"],
        3,
        "holds no <sub-class>/test",
    ),
    "export no run": (["export", "--run", "empty", "--out", "out"], 3, "run.json"),
    "verify no bundle": (["verify", "empty"], 3, "manifest.json"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_its_exit_code_and_names_the_cure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, code, message = CASES[case]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lineward", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    said = capsys.readouterr().err
    assert exited.value.code == code, said
    assert message in said
    assert [path.name for path in folder.iterdir()] == ["empty"]


@pytest.mark.parametrize("case", ["train an odd size", "verify no bundle"])  # a usage and an error, of two rooms
def test_installed_command_gives_the_same(folder: Path, case: str) -> None:
    arguments, code, message = CASES[case]
    result = subprocess.run([LINEWARD, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), ("224", (224, 224)), ("96x160", (96, 160)), ("64X32", (64, 32))]
)
def test_size_is_one_side_or_two(text: str | None, size: tuple[int, int] | None) -> None:
    assert _parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "a", "1.5", "64x", "64x32x1"])
def test_size_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--size"):
        _parse_size(text)


@pytest.mark.parametrize("text", ["", "3", "2x", "x2", "axb", "1x2x3"])
def test_tiles_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--tiles"):
        _parse_tiles(text)


def test_tiles_are_rows_and_columns() -> None:
    assert _parse_tiles("2x3") == (2, 3)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "a,b,c,d", "1.5,2,3,4"])
def test_crop_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--crop"):
        _parse_crop(text)


def test_crop_is_four_numbers() -> None:
    assert _parse_crop("10,20,300,400") == (10, 20, 300, 400)
    assert _parse_crop(None) is None


def test_choice_is_a_member_or_names_all_of_them() -> None:
    assert _parse_choice("engine", "openvino", Engine) is Engine.OPENVINO
    assert _parse_choice("engine", None, Engine) is None
    with pytest.raises(UsageError, match=r"--engine tensorrt.*onnxruntime, openvino"):
        _parse_choice("engine", "tensorrt", Engine)


def test_train_resize_unknown_is_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--resize area: unknown; choose one of linear, pyramid"):
        train(data=tmp_path, out=tmp_path / "run", resize="area")
