"""PTB-XL by its protocol, on a made-up set of the same files: what is learned from, what is judged, what is refused."""

import json
import re

import numpy as np
import pytest

from deploy.parity import ParityRules
from deploy.progress import no_progress
from edge.bundle import Precision
from edge.cli import main
from edge.errors import DataError
from trainer.data.signals import EcgLike
from trainer.signals.evaluate import evaluate_signal
from trainer.signals.export import export_signal_run
from trainer.signals.ptbxl import prepare, read_entries, records
from trainer.signals.reading import test_part as labelled_part
from trainer.signals.reading import training_part
from trainer.signals.runs import SignalRun

wfdb = pytest.importorskip("wfdb", reason="the package wfdb (extra signals) writes and reads the records")


pytestmark = pytest.mark.usefixtures("one_thread")


LEADS = ("I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")
STATEMENTS = ",description,diagnostic_class\nNORM,normal,NORM\nIMI,infarction,MI\nSR,sinus rhythm,\n"
SMALL = {"segments": "16", "local": "8", "width": "16", "depth": "1", "heads": "2", "steps": "60", "passes": "4",
         "loss_gate": "9"}  # fmt: skip
RULES = ParityRules(good_samples=30, defect_samples=30, flipped=1.0, auroc_drop=1.0, shift=50.0)


def write_record(folder, name, *, seed, ectopic=0.0, rate_hz=500.0):
    samples = EcgLike(channels=12, rate_hz=rate_hz, ectopic=ectopic).recording(10, seed=seed).samples
    folder.mkdir(parents=True, exist_ok=True)
    wfdb.wrsamp(name, fs=rate_hz, units=["mV"] * 12, sig_name=list(LEADS), p_signal=samples.T.astype(float),
                fmt=["16"] * 12, write_dir=str(folder))  # fmt: skip


def write_set(folder, counts, *, records=True):
    """Write so many records of each fold and statements, numbered from 1."""
    rows, number = ["ecg_id,patient_id,scp_codes,strat_fold,filename_lr,filename_hr"], 0
    for (fold, codes), count in counts.items():
        for _ in range(count):
            number += 1
            name = f"{number:05d}_hr"
            rows.append(f'{number},{number},"{codes}",{fold},records100/00000/{name},records500/00000/{name}')
            if records:
                write_record(folder / "records500" / "00000", name, seed=number, ectopic=0.5 * ("IMI" in codes))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ptbxl_database.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "scp_statements.csv").write_text(STATEMENTS, encoding="utf-8")


NORMAL, INFARCTION, NOTHING = "{'SR': 0.0, 'NORM': 100.0}", "{'IMI': 80.0, 'NORM': 20.0}", "{'SR': 0.0}"


@pytest.fixture(scope="module")
def ptbxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "ptb-xl"
    write_set(folder, {(9, NORMAL): 24, (3, NORMAL): 40, (2, INFARCTION): 2, (10, NORMAL): 5, (10, INFARCTION): 5,
                       (10, NOTHING): 1})  # fmt: skip
    return folder


def lineward(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["lineward", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0


def test_one_command_trains_on_the_set_and_one_judges_fold_ten(ptbxl, tmp_path, monkeypatch):
    run = tmp_path / "run"
    options = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    assert lineward(monkeypatch, "train", "--modality", "signal", "--method", "mmae_ecg", "--data", ptbxl, "--out", run,
                    "--device", "cpu", *options) == 0  # fmt: skip
    record = SignalRun.load(run).record
    assert (record.signal.window, record.signal.rate_hz, record.signal.channels) == (4800, 500.0, LEADS)
    assert record.train_windows == 51  # of 64 normal records of folds 1 to 9, a fifth is held out
    bundle = export_signal_run(run, tmp_path / "bundle", rules=RULES, progress=no_progress)
    found = evaluate_signal(run=None, bundle=bundle.path, data=ptbxl, precision=Precision.FLOAT32)
    assert (~found.windows.anomalous).sum() == found.windows.anomalous.sum() == 5
    report, figures = tmp_path / "r.html", tmp_path / "f.json"
    assert lineward(monkeypatch, "evaluate", "--bundle", bundle.path, "--data", ptbxl, "--report", report,
                    "--json", figures, "--picture", tmp_path / "p.png") == 0  # fmt: skip
    written = json.loads(figures.read_text())
    assert written["point_auroc"] is None
    assert 0 <= written["window_auroc"] <= 1
    assert any("whole recordings" in note for note in written["notes"])
    text = report.read_text()
    assert "whole recordings" in text
    assert not re.search(r"NaN|nan", text)


def test_labels_are_of_records_and_those_that_validate_are_of_the_last_folds(ptbxl):
    learned, judged = training_part(ptbxl), labelled_part(ptbxl)
    assert [one.name for one in learned[-24:]] == [f"{number:05d}" + "_hr" for number in range(1, 25)]
    assert not any(one.anomalous.any() for one in learned)
    assert [bool(one.anomalous.all()) for one in judged] == [False] * 5 + [True] * 5
    assert not any(one.placed for one in judged)
    assert all(one.part(0, 0.5).placed is False for one in judged)


def _without_database_column(folder):
    path = folder / "ptbxl_database.csv"
    path.write_text(path.read_text().replace("strat_fold", "fold"), encoding="utf-8")


def _with_a_short_row(folder):
    with (folder / "ptbxl_database.csv").open("a", encoding="utf-8") as file:
        file.write("99\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "scp_statements.csv").unlink(), r"scp_statements\.csv: cannot be read"),
        (_without_database_column, "lack the column 'strat_fold'"),
        (_with_a_short_row, "not those of PTB-XL"),
        (lambda folder: (folder / "ptbxl_database.csv").write_bytes(b"\xff\xfe\x00"), "not those of PTB-XL"),
        (lambda folder: (folder / "records500/00000/00001_hr.hea").unlink(), r"00001_hr\.hea: missing.*records500"),
        (lambda folder: (folder / "records500/00000/00001_hr.dat").unlink(), r"00001_hr\.hea: is no recording"),
        (lambda folder: (folder / "records500/00000/00001_hr.dat").write_bytes(b"x"), "00001_hr"),
        (lambda folder: (folder / "records500/00000/00001_hr.hea").write_bytes(b""), "00001_hr"),
        (lambda folder: (folder / "records500/00000/00001_hr.hea").write_bytes(b"\x00 nonsense\n"), "00001_hr"),
        (lambda folder: (folder / "records500/00000/00001_hr.hea").write_bytes(b"x 12 500 5000\n"), "00001_hr"),
        (lambda folder: write_record(folder / "records500/00000", "00001_hr", seed=1, rate_hz=100.0), "100 Hz.*500 Hz"),
    ],
)
def test_a_set_that_is_not_whole_is_refused_by_name(tmp_path, damage, said):
    write_set(tmp_path, {(1, NORMAL): 1})
    training_part(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=said):
        training_part(tmp_path)


def test_a_set_without_a_record_to_judge_is_refused(tmp_path):
    write_set(tmp_path, {(1, NORMAL): 1, (10, NOTHING): 1})
    with pytest.raises(DataError, match="no record of the folds"):
        labelled_part(tmp_path)


def test_ptbxl_is_split_by_fold_and_first_superclass(tmp_path):
    (tmp_path / "scp_statements.csv").write_text(
        ",description,diagnostic_class\nNORM,n,NORM\nIMI,i,MI\nSR,sinus rhythm,\n", encoding="utf-8"
    )
    (tmp_path / "ptbxl_database.csv").write_text(
        "ecg_id,scp_codes,strat_fold,filename_hr\n"
        "1,\"{'SR': 0.0, 'NORM': 100.0}\",3,records500/1\n"
        "2,\"{'IMI': 50.0, 'NORM': 100.0}\",3,records500/2\n"
        "3,\"{'NORM': 80.0, 'IMI': 15.0}\",10,records500/3\n"
        "4,\"{'SR': 0.0}\",10,records500/4\n",
        encoding="utf-8",
    )
    entries = read_entries(tmp_path)
    assert [one.superclass for one in entries] == ["NORM", "MI", "NORM", ""]
    assert [one.learned for one in entries] == [True, False, False, False]
    assert [one.judged for one in entries] == [False, False, True, False]
    raw = EcgLike(channels=12, rate_hz=500.0).recording(10, seed=1)
    (tmp_path / "records500").mkdir()
    for entry in entries:
        (tmp_path / f"{entry.file}.hea").touch()
    found = dict(records(tmp_path, lambda one: one.learned or one.judged, lambda _: raw))
    assert [one.anomalous.any() for one in found.values()] == [False, False]
    with pytest.raises(DataError, match="PTB-XL"):
        read_entries(tmp_path / "nowhere")


def test_ptbxl_records_lose_baseline_and_hum_and_fill_their_range():
    time = np.arange(5000) / 500
    beat = np.sin(2 * np.pi * 8 * time)
    dirty = np.stack([beat + 3 + 2 * np.sin(2 * np.pi * 0.1 * time) + 0.5 * np.sin(2 * np.pi * 100 * time), 0 * time])
    found = prepare(dirty)
    assert found.shape == (2, 4800)
    assert (found[0].min(), found[0].max()) == (-1.0, 1.0)
    assert np.corrcoef(found[0], beat[100:4900])[0, 1] > 0.98
    assert not found[1].any()
    with pytest.raises(DataError, match="shorter"):
        prepare(dirty[:, :1000])
