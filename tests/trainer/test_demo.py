from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

from deploy.evaluation import Evaluation, ScoredImage
from deploy.evaluation import Subject as Evaluated
from deploy.metrics import PixelMetrics
from edge.alerts.message import Alert
from edge.errors import DataError, UsageError
from edge.judgement.threshold import Threshold
from edge.settings import load_settings
from tests.edge.tiny_bundle import make_tiny_bundle
from trainer.demo import MARKER, Subject, affordable_alpha, alert_line, box_settings, demo, prepare_folder
from trainer.evaluation.live import Replay
from trainer.evaluation.replay import Span
from trainer.evaluation.stream import Stream
from trainer.evaluation.summary import Demonstration, frames_per_second, summary_table

if TYPE_CHECKING:
    from pathlib import Path

    from edge.bundle import Bundle


def alert(**changes: Any) -> Alert:
    values = {
        "epoch": "0" * 16, "seq": 1, "ts": "2026-01-01T00:00:00Z", "site": "s", "box": "b", "uptime_ms": 5,
        "camera": "cam-1", "camera_seq": 1, "product": "p", "bundle": {"id": "x", "method": "m"}, "memory": {},
        "score": 4.0, "threshold": 2.0, "p_value": 0.01, "p_value_floor": 0.01, "event_id": "a" * 32, "phase": "new",
        "peak_score": 4.0, "frames": 1, "regions": [{"x": 3, "y": 4, "w": 10, "h": 20, "area": 9, "peak": 5.0}],
    }  # fmt: skip
    return Alert.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("demo") / "bundle")


def subject(folder: Path, *, parts: bool) -> Subject:
    stream = Stream(folder / "stream", ("", "hole", ""))
    return Subject("tile", folder, folder / "data", stream, parts=parts)


def evaluation(*, masks: bool) -> Evaluation:
    images = tuple(
        ScoredImage(f"{i}.png", "hole" if bad else "good", bad, float(i), str(i)) for i, bad in enumerate([False, True])
    )
    pixels = PixelMetrics(auroc=0.9, aupro=0.8, regions=1, good_pixels=9, anomalous_pixels=1) if masks else None
    threshold = Threshold(0.5, 0.1, 9, 9, budget_supported=True, smallest_supported_alpha=0.1, method="empirical")
    return Evaluation(Evaluated("tile", "memory", "openvino", "int8"), threshold, images, pixels, np.ones(2), 0.0)


def test_threshold_asks_for_no_more_than_calibration_supports(bundle: Bundle) -> None:
    assert affordable_alpha(bundle, parts=True) == 0.05
    assert affordable_alpha(bundle, parts=False) == pytest.approx(1 / 41)  # 40 groups


def test_folder_of_an_earlier_demo_is_emptied(tmp_path: Path) -> None:
    out = prepare_folder(tmp_path / "out")
    (out / "run").mkdir()
    (out / "run" / "run.json").write_text("{}")

    prepare_folder(out)

    assert [entry.name for entry in out.iterdir()] == [MARKER]


def test_links_in_the_folder_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "keep.png").touch()
    out = prepare_folder(tmp_path / "out")
    (out / "stream").symlink_to(tmp_path / "images")

    prepare_folder(out)

    assert (tmp_path / "images" / "keep.png").exists()
    assert not (out / "stream").exists()


def test_folder_that_no_demo_wrote_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").touch()

    with pytest.raises(UsageError, match="no demo wrote"):
        prepare_folder(tmp_path)

    assert [entry.name for entry in tmp_path.iterdir()] == ["precious.txt"]


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()

    with pytest.raises(UsageError, match="cannot be written"):
        prepare_folder(tmp_path / "out")


def test_missing_data_is_refused_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        demo(data=tmp_path / "nothing", out=tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "example", "said"), [(None, ["silk"], "silk: unknown"), ("x", ["cloth"], "one of them")]
)
def test_examples_are_refused_before_a_folder_is_touched(
    tmp_path: Path, data: str | None, example: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        demo(data=None if data is None else tmp_path / data, out=tmp_path / "out", example=example)

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parts", [True, False])
def test_box_settings_are_accepted_and_ask_for_the_budget(tmp_path: Path, bundle: Bundle, *, parts: bool) -> None:
    settings = box_settings(subject(tmp_path, parts=parts), bundle, alpha=0.05)
    (tmp_path / "box.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    camera = load_settings(tmp_path / "box.yaml").cameras[0]

    assert 1 / 20 <= camera.alpha < 1 / 19.9
    assert camera.events.enter_hits == (1 if parts else 3)


def test_alert_line_tells_the_truth_of_its_frame(tmp_path: Path) -> None:
    stream = subject(tmp_path, parts=True).stream

    assert alert_line(alert(), stream).endswith("truth: hole")
    assert "10x20 at 3,4" in alert_line(alert(), stream)
    assert alert_line(alert(camera_seq=2, regions=[], score=None), stream).endswith("truth: good")
    assert alert_line(alert(phase="end", camera_seq=2), stream).split() == ["end", "frame", "2"]
    assert len(alert_line(alert(score=-123.456, threshold=-234.567, camera_seq=9999), stream)) <= 80


def test_events_last_from_new_to_end_or_to_the_last_frame() -> None:
    other = "b" * 32
    result = Replay(
        alerts=[
            alert(camera_seq=3),
            alert(camera_seq=5, phase="update"),
            alert(camera_seq=8, phase="end"),
            alert(camera_seq=9, event_id=other),
        ],
        received_ms=[1.0, 2.0, 3.0, 4.0],
    )

    assert result.events(20) == (Span(3, 8), Span(9, 20))
    assert result.latency_ms().tolist() == [1.0, 4.0]


@pytest.mark.parametrize(("parts", "first", "found"), [(True, 1, "1 of 1"), (True, 2, "0 of 1"), (False, 2, "1 of 1")])
def test_event_of_a_web_may_begin_after_its_defect_has_left(
    tmp_path: Path, *, parts: bool, first: int, found: str
) -> None:
    result = Replay(alerts=[alert(camera_seq=first), alert(camera_seq=2, phase="end")], received_ms=[1.0, 2.0])
    stream = subject(tmp_path, parts=parts).stream

    rows = dict(Demonstration("tile", parts, stream, evaluation(masks=True), result, 100.0).rows())

    assert rows["  defects found"] == found
    assert rows["  false alarms"].startswith("0" if found == "1 of 1" else "1")
    assert rows["latency p50 / p99, frame to verdict"] == "-"
    assert rows["  of alerts, frame to subscriber"] == "1.0 / 1.0 ms"


def test_summary_has_a_column_per_product_and_says_where_masks_are_missing(tmp_path: Path) -> None:
    stream = subject(tmp_path, parts=True).stream
    shown = [Demonstration(str(m), True, stream, evaluation(masks=m), Replay(), 1.0) for m in (True, False)]

    table = summary_table(shown)
    cells = [list(column.cells) for column in table.columns]

    row = cells[0].index("P-AUROC")
    assert (cells[1][row], cells[2][row]) == ("0.9000", "no masks")


def test_replay_without_alerts_has_no_events() -> None:
    assert Replay().events(5) == ()
    assert Replay().latency_ms().size == 0


def test_speed_is_measured_on_the_stream(tmp_path: Path, bundle: Bundle) -> None:
    import cv2

    from tests.edge.tiny_bundle import good_frame

    folder = tmp_path / "stream"
    folder.mkdir()
    cv2.imwrite(str(folder / "0.png"), good_frame(0))

    assert frames_per_second(bundle, folder, seconds=0.05) > 1
