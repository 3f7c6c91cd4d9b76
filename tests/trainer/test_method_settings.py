"""A method's settings, from the command line into the run and the state that a bundle stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploy.parity import LEAST_GOOD_IMAGES
from deploy.state import state_entries, stored_state
from edge.bundle import Preprocessing
from edge.errors import UsageError
from edge.memory.rows import RowsPrecision, decode_rows
from trainer.cli import _parse_settings
from trainer.data.conveyor import write_default
from trainer.fit import train
from trainer.runs import Run

if TYPE_CHECKING:
    from pathlib import Path


def quiet(_what: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    count = 2 * LEAST_GOOD_IMAGES
    folder = tmp_path_factory.mktemp("web")
    return write_default(folder, seed=4, kind="metal", train=count, test_good=2, test_defective=2, side=64)


def fit(data: Path, out: Path, settings: dict[str, str]) -> Run:
    small = Preprocessing(height=64, width=64)
    return train(
        method="memory", data=data, out=out, preprocessing=small, settings=settings, device="cpu", progress=quiet
    )


def test_settings_go_into_the_run_and_what_a_bundle_stores(data: Path, tmp_path: Path) -> None:
    fit(data, tmp_path / "run", {"rows": "80", "reduction": "kmeans", "rows_precision": "int8"})
    run = Run.load(tmp_path / "run")
    assert (run.record.config["rows"], run.record.config["reduction"]) == (80, "kmeans")
    assert len(run.head.get_buffer("bank_s8")) == 80
    assert {entry.stored for entry in state_entries(run.head)} == {RowsPrecision.INT8}
    stored = stored_state(run.head)
    floats = sum(run.head.get_buffer(name).numel() for name in run.head.state_names)
    assert sum(values.nbytes for values in stored.values()) < 0.35 * 4 * floats
    for name in run.head.state_names:
        assert np.array_equal(decode_rows(stored[name], stored[f"{name}.scale"]), run.head.get_buffer(name).numpy())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rouws": "80"}, "--set rouws: .*the settings of memory are rows, "),
        ({"rows": "many"}, "--set rows: "),
        ({"rows": "0"}, "--set rows: "),
        ({"reduction": "random"}, "--set reduction: .*coreset"),
    ],
)
def test_settings_that_are_none_are_refused(data: Path, tmp_path: Path, settings: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        fit(data, tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_settings_are_names_and_values() -> None:
    assert _parse_settings(["rows=5", "reduction=kmeans", "odd=a=b"]) == {
        "rows": "5",
        "reduction": "kmeans",
        "odd": "a=b",
    }
    for wrong in (["rows"], ["=5"], ["rows=5", "rows=6"]):
        with pytest.raises(UsageError, match=r"--set .*NAME=VALUE"):
            _parse_settings(wrong)
