"""The doctor: each thing that can be wrong has a finding that names it and its cure, and spoils no other check."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import edge.doctor.cameras
import edge.doctor.engines
import edge.doctor.host
from edge.box import Box
from edge.bundle import Crop, Pooling, Preprocessing, Tiles
from edge.capture.aravis import Device
from edge.doctor.examine import examine
from edge.doctor.findings import Finding, Level, isolated
from edge.doctor.host import box_is_running, look_at_clock
from edge.doctor.sight import sight
from edge.errors import SettingsError
from edge.settings import load_settings
from tests.certificates import Authority
from tests.edge.tiny_bundle import good_frame, make_tiny_bundle, repack
from tests.edge.unified_bundle import make_product_file, make_unified_bundle
from tests.mosquitto_process import Mosquitto, free_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.bundle import Bundle

LINEWARD = [str(Path(sys.executable).parent / "lineward")]
Configure = Any


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.doctor.engines, "LOAD_S", 0.1)
    monkeypatch.setattr(edge.doctor.cameras, "FIRST_FRAME_S", 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good images."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        cv2.imwrite(str(images / f"{index}.png"), good_frame(index))
    return images


@pytest.fixture
def configure(tmp_path: Path, folder: Path, bundle: Bundle) -> Configure:
    def write(camera: dict[str, Any] | None = None, **changes: Any) -> Path:
        source = {"kind": "folder", "path": str(folder), "fps": 50}
        content = {
            "site": "plant", "box": "box1", "state_dir": "state", "bundle": str(bundle.path), "engine": "onnxruntime",
            "threads": 1, "broker": {"url": "mqtt://127.0.0.1:1"},
            "cameras": [{"name": "cam", "source": source} | (camera or {})], **changes,
        }  # fmt: skip
        path = tmp_path / "box.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def found(config: Path | None, check: str, subject: str | None = None, **options: Any) -> list[Finding]:
    findings = list(examine(config, seconds=0.2, **options))
    return [one for one in findings if one.check == check and subject in (None, one.subject)]


def levels(findings: list[Finding]) -> list[str]:
    return [one.level.value for one in findings]


def the(findings: list[Finding], level: str) -> Finding:
    """The one finding of a level; every one that is not ok has a cure."""
    (one,) = (one for one in findings if one.level.value == level)
    assert one.cure or level == "ok"
    return one


@pytest.mark.broker
def test_box_that_is_ready_has_no_failure(configure: Configure, mosquitto: Mosquitto) -> None:
    config = configure(broker={"url": mosquitto.url}, metrics={"port": free_port()})

    findings = list(examine(config, seconds=0.2))

    assert [one.line for one in findings if one.level is Level.FAIL] == []
    assert {one.check for one in findings} >= {
        "settings", "engine", "clock", "memory", "disk", "port", "broker", "camera", "exposure", "bundle", "moments",
        "threshold", "defect", "latency", "load",
    }  # fmt: skip
    assert not (config.parent / "state").exists()


def test_command_says_what_is_wrong_in_lines_or_json(configure: Configure, bundle: Bundle) -> None:
    command = [*LINEWARD, "doctor", "--config", str(configure()), "--seconds", "0.2"]

    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=False)

    assert shown.returncode == as_json.returncode == 4
    assert any(line.startswith("fail  broker port: ") and "  -> " in line for line in shown.stdout.splitlines())
    assert bundle.id in shown.stdout
    found = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert {one["level"] for one in found} == {"ok", "warn", "fail"}
    assert shown.stdout.splitlines()[-1].endswith("1 fail")


def test_machine_without_settings_can_be_looked_at() -> None:
    assert {one.check for one in examine(None)} == {"engine", "clock", "memory"}


@pytest.mark.parametrize("text", [None, "site: s\n", "site: [\n"])
def test_settings_that_cannot_be_read_leave_the_machine(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "box.yaml"
    if text is not None:
        path.write_text(text)

    findings = list(examine(path))

    assert findings[0].check == "settings"
    assert findings[0].level is Level.FAIL
    assert findings[0].cure
    assert {one.check for one in findings} == {"settings", "engine", "clock", "memory"}


def test_without_an_engine_everything_else_is_looked_at(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("edge.doctor.engines", "edge.inference.choice", "edge.inference.engines"):
        monkeypatch.setattr(f"{module}.available_engines", tuple)

    findings = list(examine(configure(), seconds=0.2))

    assert "pip install" in the([one for one in findings if one.check == "engine"], "fail").cure
    assert levels([one for one in findings if one.check == "bundle"]) == ["fail"]
    assert levels([one for one in findings if one.check == "camera"]) == ["ok"]


def test_damaged_bundle_is_named(configure: Configure, tmp_path: Path) -> None:
    broken = make_tiny_bundle(tmp_path / "broken")
    (broken.path / "trunk.onnx").write_bytes(b"")

    finding = the(found(configure(bundle=str(broken.path)), "bundle"), "fail")

    assert "trunk.onnx" in finding.text
    assert "fetch" in finding.cure


def test_moments_are_shown_and_named_where_they_do_not_fit(configure: Configure, tmp_path: Path) -> None:
    assert "cannot follow" in the(found(configure(), "moments"), "ok").text
    bundle = make_tiny_bundle(tmp_path / "bundle", moments=True)
    finding = the(found(configure(bundle=str(bundle.path)), "moments"), "ok")
    assert (finding.subject, finding.figures) == ("tiny", {"experts": 1})
    other = repack(bundle, subclasses=("day", "night"))
    finding = the(found(configure(bundle=str(other.path)), "moments"), "fail")
    assert "not float32 [2, channels]" in finding.text
    assert finding.cure == "export the bundle again"


def test_fallback_is_a_warning(configure: Configure, tmp_path: Path) -> None:
    fussy = make_tiny_bundle(tmp_path / "fussy")
    golden = fussy.manifest.golden.model_copy(
        update={"tolerance": fussy.manifest.golden.tolerance | {"onnxruntime_int8": -1.0}}
    )
    repack(fussy, golden=golden.model_dump())

    finding = the(found(configure(bundle=str(fussy.path)), "bundle"), "warn")

    assert "falls back" in finding.text
    assert finding.figures["precision"] == "float32"


def test_each_product_has_its_threshold_and_files_that_do_not_fit_are_found(
    configure: Configure, tmp_path: Path
) -> None:
    unified = make_unified_bundle(tmp_path / "unified")
    make_product_file(tmp_path / "grey.safetensors", unified, good_frame, name="grey")
    loose = {"mode": "triggered", "budget": {"false_nok_per_1000": 100}}
    config = configure(loose, bundle=str(unified.path), products=["grey.safetensors", "lost.safetensors"])

    assert "lost.safetensors" in the(found(config, "product"), "fail").text
    (products,) = found(config, "products")
    assert products.figures["products"] == ["dark", "bright", "grey"]
    thresholds = found(config, "threshold")
    assert levels(thresholds) == ["ok", "ok", "warn", "ok"]
    assert [one.text.partition(":")[0] for one in thresholds] == ["dark", "bright", "grey", "grey"]
    assert "its file has no scores" in thresholds[2].text


def test_budget_that_is_not_supported_is_a_warning(configure: Configure) -> None:
    assert "at best" in the(found(configure(), "threshold"), "warn").text
    loose = {"mode": "triggered", "budget": {"false_nok_per_1000": 100}}
    assert levels(found(configure(loose), "threshold")) == ["ok"]


def test_machine_that_is_too_slow_is_named(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.doctor.engines, "_rate_together", lambda _pairs: 55.0)
    assert "dropped" not in the(found(configure(), "load"), "warn").text

    monkeypatch.setattr(edge.doctor.engines, "_rate_together", lambda _pairs: 49.0)
    assert "frames will be dropped" in the(found(configure(), "load"), "fail").text

    monkeypatch.setattr(edge.doctor.engines, "_rate_together", lambda _pairs: 500.0)
    assert levels(found(configure(), "load")) == ["ok"]


def test_deadline_that_cannot_be_kept_is_named(configure: Configure) -> None:
    camera = {"mode": "triggered", "timeout_ms": 1e-6}

    assert "are allowed" in the(found(configure(camera), "latency"), "fail").text


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"kind": "folder", "path": "nowhere"}, "nowhere"),
        ({"kind": "camera", "device": 77}, "no frame within"),
        ({"kind": "video", "path": "box.yaml"}, "box.yaml"),
    ],
)
def test_camera_that_cannot_be_opened_is_named(source: dict[str, Any], words: str, configure: Configure) -> None:
    findings = found(configure({"source": source}), "camera", "cam")

    assert words in the(findings, "fail").text


def test_triggered_camera_is_fired_for_its_frames(configure: Configure, folder: Path) -> None:
    source = {"kind": "folder", "path": str(folder), "trigger": "software"}
    station = {"name": "gate", "cameras": ["cam"], "trigger": "mqtt"}
    config = configure({"mode": "triggered", "source": source}, stations=[station])

    finding = next(one for one in found(config, "camera", "cam"))

    assert (finding.level, finding.figures["frames"]) == (Level.OK, 3)


def test_camera_that_waits_for_its_trigger_is_no_failure(configure: Configure) -> None:
    source = {"kind": "genicam", "device": "nobody", "trigger": "hardware"}

    finding = the(found(configure({"mode": "triggered", "source": source}), "camera", "cam"), "warn")

    assert "without a trigger" in finding.text


def test_cameras_on_the_network_are_listed(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure({"source": {"kind": "genicam", "device": "nobody"}})
    devices: list[Device] = []
    monkeypatch.setattr("edge.capture.aravis.library", lambda: SimpleNamespace(devices=lambda: tuple(devices)))
    assert "no GigE" in the(found(config, "camera", "genicam"), "warn").text

    devices.append(Device("Maker-1", "1", "Maker", "Model", "10.0.0.7"))
    assert "'Maker-1' at 10.0.0.7" in the(found(config, "camera", "genicam"), "ok").text


def test_disabled_camera_is_no_failure(configure: Configure) -> None:
    camera = {"enabled": False, "source": {"kind": "folder", "path": "nowhere"}}

    assert [one.text for one in found(configure(camera), "camera")] == ["is disabled"]


@pytest.mark.parametrize(("value", "word"), [(255, "shorten"), (3, "light")])
def test_exposure_that_hides_defects_is_a_warning(value: int, word: str, configure: Configure, folder: Path) -> None:
    for file in folder.iterdir():
        cv2.imwrite(str(file), np.full((96, 96, 3), value, np.uint8))

    assert word in the(found(configure(), "exposure"), "warn").cure


def test_images_that_are_torn_are_counted(configure: Configure, folder: Path) -> None:
    (folder / "1.png").write_bytes(b"torn")

    assert "1 of 3 images" in the(found(configure(), "camera"), "warn").text


def test_region_beyond_the_frame_is_a_warning(configure: Configure) -> None:
    camera = {"region_of_interest": {"include": [{"x": 0, "y": 0, "w": 97, "h": 96}]}}

    assert "96 x 96" in the(found(configure(camera), "camera"), "warn").text


def test_frame_without_the_bundles_crop_is_a_failure(configure: Configure, tmp_path: Path) -> None:
    cropped = make_tiny_bundle(tmp_path / "cropped")
    preprocessing = cropped.manifest.preprocessing.model_copy(update={"crop": Crop(x=0, y=0, w=200, h=64)})
    repack(cropped, preprocessing=preprocessing.model_dump())

    assert "200 x 64" in the(found(configure(bundle=str(cropped.path)), "defect"), "fail").text


def test_mask_of_another_shape_is_a_failure(configure: Configure, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "mask.png"), np.full((480, 640), 255, np.uint8))
    camera = {"region_of_interest": {"mask": "mask.png"}}

    assert "640x480" in the(found(configure(camera), "threshold"), "fail").text


def test_smallest_defect_is_said_in_pixels_and_millimetres(configure: Configure, folder: Path) -> None:
    finding = the(found(configure(), "defect", scale=4.0), "ok")
    # A canvas of 64 pixels shows a frame of 96; a map cell is 8 canvas pixels.
    assert finding.figures == {"cell_px": [12.0, 12.0], "smallest_px": 24.0, "full_px": 36.0}
    assert "24 px (6 mm)" in finding.text

    for file in folder.iterdir():
        cv2.imwrite(str(file), good_frame(1, height=48, width=48))
    assert "smaller than what the network looks at" in the(found(configure(), "defect"), "warn").text


def step(findings: list[Finding], subject: str) -> Finding:
    (one,) = (one for one in findings if one.subject == subject)
    return one


def test_broker_without_a_name_or_a_listener_is_named(configure: Configure) -> None:
    unknown = found(configure(broker={"url": "mqtt://no-such-host.invalid"}), "broker")
    assert (unknown[-1].subject, unknown[-1].level) == ("name", Level.FAIL)

    refused = found(configure(), "broker")
    assert (refused[-1].subject, refused[-1].level) == ("port", Level.FAIL)


def test_listener_that_is_no_broker_is_named(configure: Configure) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"mqtt://127.0.0.1:{other.getsockname()[1]}"
        findings = found(configure(broker={"url": url, "connect_timeout_s": 0.3}), "broker")

    assert "no answer" in step(findings, "login").text


@pytest.mark.broker
def test_login_and_rights_at_the_broker(
    configure: Configure, make_mosquitto: Callable[..., Mosquitto], tmp_path: Path
) -> None:
    acl = "user right\ntopic write lineward/plant/box1/#\ntopic read lineward/plant/box1/cmd/+\n"
    broker = make_mosquitto(users={"right": "pw", "mute": "pw"}, acl=acl)
    password = tmp_path / "password"
    password.touch(0o600)

    def of(user: str, secret: str) -> list[Finding]:
        password.write_text(secret)
        section = {"url": broker.url, "username": user, "password_file": str(password)}
        return found(configure(broker=section), "broker")

    assert levels(of("right", "pw")) == ["ok"] * 5
    assert "password" in step(of("right", "wrong"), "login").cure
    mute = of("mute", "pw")
    assert step(mute, "publish").level is Level.FAIL
    assert "lineward/plant/box1/#" in step(mute, "publish").cure


@pytest.mark.broker
def test_certificates_are_looked_at(
    configure: Configure, make_mosquitto: Callable[..., Mosquitto], tmp_path: Path
) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs", "another authority")
    short, long, port = ours.issue("short", days=5), ours.issue("long", days=90), free_port()
    other = free_port()
    lines = [f"listener {port} 127.0.0.1", f"certfile {short.cert}", f"keyfile {short.key}",
             f"listener {other} 127.0.0.1", f"certfile {long.cert}", f"keyfile {long.key}"]  # fmt: skip
    plain = make_mosquitto(extra="\n".join(lines))

    def tls(at: int, authority: Authority) -> Finding:
        section = {"url": f"mqtts://localhost:{at}", "ca_file": str(authority.cert)}
        return step(found(configure(broker=section), "broker"), "tls")

    assert (tls(port, ours).level, tls(port, ours).cure) == (Level.WARN, "have it renewed")
    assert tls(other, ours).level is Level.OK
    assert "ca_file" in tls(port, theirs).text
    assert tls(plain.port, ours).level is Level.FAIL


def test_secret_that_all_can_read_is_a_failure(configure: Configure, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("pw")
    password.chmod(0o644)
    config = configure(broker={"url": "mqtt://127.0.0.1:1", "username": "u", "password_file": str(password)})

    assert "chmod 600" in the(found(config, "key"), "fail").cure


def test_fleet_keys_are_looked_at(configure: Configure, tmp_path: Path) -> None:
    federation = {
        "fleet": "f", "aggregator": "tcp://127.0.0.1:1", "key_file": str(tmp_path / "none.key_secret"),
        "aggregator_key_file": str(tmp_path / "none.key"),
    }  # fmt: skip

    assert "none.key_secret" in the(found(configure(memory={}, federation=federation), "key"), "fail").text


def test_state_folder_that_cannot_be_written_is_a_failure(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")

    assert "cannot be written" in the(found(configure(), "disk"), "fail").text


def test_disk_that_is_full_or_slow_is_named(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.doctor.host.shutil, "disk_usage", lambda _path: SimpleNamespace(free=2**20))
    assert "1 MiB are free" in the(found(configure(), "disk"), "fail").text
    monkeypatch.undo()

    monkeypatch.setattr(edge.doctor.host, "SYNC_P99_MS", 0.0)
    assert any("faster disk" in one.cure for one in found(configure(), "disk"))


def test_clock_that_lies_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    tomorrow = datetime.now(timezone.utc) + timedelta(days=1)
    assert levels(list(look_at_clock(tomorrow))) == ["fail"]
    for answer, level in ((True, "ok"), (False, "warn"), (None, "warn")):
        monkeypatch.setattr(edge.doctor.host, "clock_synchronised", lambda answer=answer: answer)
        assert levels(list(look_at_clock(None))) == [level]


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.doctor.host, "MEMORY_MIB", 10**9)

    assert levels(found(None, "memory")) == ["warn"]


def test_port_that_is_taken_is_a_failure(configure: Configure) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        config = configure(metrics={"port": other.getsockname()[1]})

        assert "another port" in the(found(config, "port"), "fail").cure


def test_running_box_is_known_and_left_alone(configure: Configure) -> None:
    config = configure(metrics={"port": free_port()})
    settings = load_settings(config)
    box = Box(settings)
    assert not box_is_running(settings)
    box.start()
    try:
        assert box_is_running(settings)
        findings = list(examine(config, seconds=0.2))
    finally:
        box.stop()

    assert levels([one for one in findings if one.check == "port"]) == ["ok"]
    assert any(one.check == "box" for one in findings)
    assert not box_is_running(settings)


def test_check_that_breaks_down_is_a_finding_without_secrets() -> None:
    def look() -> Any:
        yield Finding("x", "", Level.OK, "begun")
        raise RuntimeError("rtsp://u:pw@host")

    def refuse() -> Any:
        raise SettingsError("no; a; cure")
        yield

    broken = list(isolated("x", "", look))
    assert levels(broken) == ["ok", "fail"]
    assert "pw" not in broken[1].line
    (refused,) = isolated("x", "", refuse)
    assert (refused.text, refused.cure) == ("no; a", "cure")


@given(
    rows=st.integers(1, 3), cols=st.integers(1, 3), overlap=st.sampled_from([0, 32]), size=st.sampled_from([64, 128]),
    stride=st.sampled_from([4, 8, 16]), width=st.integers(16, 4000), height=st.integers(16, 4000),
    cells=st.integers(1, 40),
)  # fmt: skip
def test_square_of_the_size_said_fills_its_cells_wherever_it_lies(
    *, rows: int, cols: int, overlap: int, size: int, stride: int, width: int, height: int, cells: int
) -> None:
    preprocessing = Preprocessing(height=size, width=size, tiles=Tiles(rows=rows, cols=cols, overlap=overlap))
    manifest: Any = SimpleNamespace(preprocessing=preprocessing, map_stride=stride, pooling=Pooling(cells=cells))

    seen = sight(manifest, frame_width=width, frame_height=height)

    assert math.isclose(seen.cell_width * preprocessing.canvas_width / stride, width)
    assert math.isclose(seen.cell_height * preprocessing.canvas_height / stride, height)
    for start in np.linspace(0, 1, 7):
        for side, wanted in ((seen.smallest, 1), (seen.full, cells)):
            filled = [
                math.floor(start + side / cell + 1e-9) - math.ceil(start - 1e-9)
                for cell in (seen.cell_width, seen.cell_height)
            ]
            assert filled[0] * filled[1] >= wanted
    assert seen.enlarged == (width < preprocessing.canvas_width or height < preprocessing.canvas_height)


def test_nothing_is_opened_for_writing_by_the_doctor(configure: Configure, tmp_path: Path) -> None:
    config = configure()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    list(examine(config, seconds=0.2))

    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
