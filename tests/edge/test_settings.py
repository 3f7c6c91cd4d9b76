"""The box's YAML file: what it may say and how it is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edge.bundle import Engine
from edge.errors import SettingsError
from edge.judgement.region_of_interest import Polygon, Rectangle
from edge.settings import BoxSettings, Mode, load_settings, settings_schema

if TYPE_CHECKING:
    from pydantic import BaseModel


def content(**changes: object) -> dict[str, Any]:
    return {
        "site": "plant",
        "box": "box1",
        "state_dir": "state",
        "bundle": "bundles/one",
        "cameras": [{"name": "cam1", "source": {"kind": "folder", "path": "images"}}],
        **changes,
    }


def write(folder: Path, values: object) -> Path:
    path = folder / "box.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def refusal(folder: Path, values: object) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(write(folder, values))
    message = str(caught.value)
    assert message.startswith(str(folder / "box.yaml"))
    assert "\n" not in message
    return message


def camera(**changes: object) -> dict[str, object]:
    return {"name": "cam1", "source": {"kind": "folder", "path": "images"}, **changes}


def test_minimal_file_has_defaults(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, content()))

    assert settings.cameras[0].mode is Mode.STREAM
    assert settings.engine is None
    assert settings.broker.port == 1883


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    values = content(broker={"url": "mqtts://h", "ca_file": "ca.pem", "username": "u", "password_file": "/etc/pw"})

    settings = load_settings(write(tmp_path, values))

    assert settings.bundle == tmp_path / "bundles/one"
    assert settings.state_dir == tmp_path / "state"
    assert settings.cameras[0].source.path == str(tmp_path / "images")
    assert settings.broker.ca_file == tmp_path / "ca.pem"
    assert settings.broker.password_file == Path("/etc/pw")


def test_bundle_may_be_left_out_where_every_entry_names_its_own(tmp_path: Path) -> None:
    spindle = {"name": "spindle", "source": {"kind": "signal_tcp", "url": "tcp://h:1"}, "bundle": "bundles/spindle"}
    values = content(
        cameras=[camera(name="off", enabled=False, bundle="off"), camera(bundle="bundles/two")], signals=[spindle]
    )
    del values["bundle"]

    settings = load_settings(write(tmp_path, values))

    # What the box says of itself is of the first one that judges.
    assert settings.bundle == tmp_path / "bundles/two"
    assert [one.bundle for one in settings.cameras[1:]] == [tmp_path / "bundles/two", tmp_path / "bundles/spindle"]
    del spindle["bundle"]
    assert "signal 'spindle' names no bundle and the box has none" in refusal(tmp_path, values)
    values["cameras"] = [camera()]
    assert "camera 'cam1' names no bundle and the box has none; add `bundle`" in refusal(tmp_path, values)
    values |= {"cameras": [camera(bundle="one")], "signals": [], "memory": {}}
    assert "memory is that of the box's bundle, and there is none; add `bundle`" in refusal(tmp_path, values)


def test_everything_can_be_given(tmp_path: Path) -> None:
    values = content(
        engine="openvino",
        precision="int8",
        threads=2,
        cameras=[
            camera(
                mode="triggered",
                region_of_interest={
                    "include": [{"x": 1, "y": 2, "w": 3, "h": 4}],
                    "exclude": [{"points": [[0, 0], [1, 0], [0, 1]]}],
                },
                budget={"false_nok_per_1000": 5},
                events={"enter_hits": 1, "enter_window": 2},
                threshold={"value": 1.5, "bundle_id": "a" * 64},
            )
        ],
    )

    settings = load_settings(write(tmp_path, values))

    one = settings.cameras[0]
    assert settings.engine is Engine.OPENVINO
    assert one.alpha == pytest.approx(0.005)
    assert one.region_of_interest.include == (Rectangle(x=1, y=2, w=3, h=4),)
    assert one.region_of_interest.exclude == (Polygon(points=((0, 0), (1, 0), (0, 1))),)


def test_stream_budget_uses_the_frame_rate(tmp_path: Path) -> None:
    for frame_rate, fps, expected in ((None, None, 25), (None, 10, 10), (5, 10, 5)):
        source = {"kind": "folder", "path": "images", **({"fps": fps} if fps else {})}
        settings = load_settings(write(tmp_path, content(cameras=[camera(source=source, frame_rate=frame_rate)])))

        assert settings.cameras[0].alpha == pytest.approx(3 / (expected * 3600))


def test_budget_is_said_in_its_own_units(tmp_path: Path) -> None:
    for mode, text in (("triggered", "7 false NOK per 1,000"), ("stream", "7 false events per hour")):
        budget = {"false_nok_per_1000": 7, "false_events_per_hour": 7}
        one = load_settings(write(tmp_path, content(cameras=[camera(mode=mode, budget=budget)]))).cameras[0]

        assert one.budget_text(one.alpha) == text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (content(bundel="x"), "bundel: unknown key; did you mean 'bundle'?"),
        (content(cameras=[camera(soruce={})]), "cameras.0.soruce: unknown key; did you mean 'source'?"),
        (content(cameras=[camera(events={"enter_hit": 1})]), "did you mean 'enter_hits'?"),
        (content(cameras=[camera(zzz=1)]), "cameras.0.zzz: unknown key; valid keys here: adaptation, budget"),
        (content(adaptation={"bound": float("inf")}), "adaptation.bound: Input should be a finite number"),
        (content(broker={"pasword_file": "x"}), "broker.pasword_file: unknown key; did you mean 'password_file'?"),
        (
            content(cameras=[camera(region_of_interest={"include": [{"point": [[0, 0], [1, 1], [1, 0]]}]})]),
            "cameras.0.region_of_interest.include.0.point: unknown key; did you mean 'points'?",
        ),
        ({k: v for k, v in content().items() if k != "site"}, "site: is missing"),
        (content(threads="many"), "threads: "),
        (content(threads=-1), "threads: "),
        (content(engine="tensorflow"), "engine: "),
        (content(cameras=[]), "cameras: "),
        (content(cameras=[camera(), camera()]), "two cameras are named 'cam1'"),
        (content(cameras=[camera(name="a/b")]), "cameras.0.name: "),
        (content(cameras=[camera(name="cmd")]), "reserved"),
        (content(site="a+b"), "site: site 'a+b'"),
        (content(cameras=[camera(events={"enter_hits": 9})]), "enter_hits must not exceed enter_window"),
        (content(cameras=[camera(source={"kind": "folder"})]), "needs path"),
        ("", "holds no settings"),
        ("- 1\n- 2\n", "holds no settings"),
        ("site: [unclosed", "line 1"),
        ("site: a\nsite: b\n", "key 'site' is given twice"),
        ("site: !!python/object:os.system x\n", "could not determine a constructor"),
        (
            content(cameras=[camera(source={"kind": "folder", "path": "a", "trigger": "software"})]),
            "nothing fires it in mode stream",
        ),
    ],
)
def test_refused_file_names_key_and_cure(tmp_path: Path, values: object, words: str) -> None:
    assert words in refusal(tmp_path, values)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: cannot be read \(No such file"):
        load_settings(tmp_path / "none.yaml")


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "box.yaml"
    path.write_bytes(b"site: \xff\xfe")

    with pytest.raises(SettingsError, match="UTF-8"):
        load_settings(path)


def test_incomplete_shape_of_a_region_names_what_is_missing(tmp_path: Path) -> None:
    region = {"include": [{"x": 1}]}

    message = refusal(tmp_path, content(cameras=[camera(region_of_interest=region)]))

    assert "is missing; add it" in message
    assert "unknown key" not in message


def test_refusal_never_repeats_a_password(tmp_path: Path) -> None:
    source = {"kind": "camera", "url": "rtsp://user:s3cret@cam/1", "device": 0}

    message = refusal(tmp_path, content(cameras=[camera(source=source)]))
    other = refusal(tmp_path, content(broker={"url": "mqtt://user:s3cret@host"}))

    assert "s3cret" not in message + other


@given(text=st.text(max_size=200))
def test_any_text_is_settings_or_a_settings_error(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")

    with pytest.raises(SettingsError):
        load_settings(path)


def test_every_key_has_title_and_description() -> None:
    schema = json.loads(settings_schema())
    bare = [
        f"{name}.{key}"
        for name, definition in {"BoxSettings": schema, **schema["$defs"]}.items()
        for key, value in definition.get("properties", {}).items()
        if not value.get("description") or not value.get("title")
    ]

    assert bare == []


def test_every_settings_model_refuses_unknown_keys() -> None:
    def models(model: type[BaseModel]) -> set[type[BaseModel]]:
        from edge.settings import _models_in

        inner = {m for field in model.model_fields.values() for m in _models_in(field.annotation)}
        return {model} | {found for one in inner for found in models(one)}

    found = models(BoxSettings)

    assert len(found) >= 8
    assert all(model.model_config.get("extra") == "forbid" for model in found)


def test_reading_settings_loads_no_camera_library() -> None:
    script = "import sys, edge.settings; print([m for m in ('cv2', 'onnxruntime', 'openvino') if m in sys.modules])"

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)

    assert result.stdout.strip() == "[]"


def test_example_that_operators_copy_is_valid() -> None:
    settings = load_settings(Path(__file__).parents[2] / "deploy" / "box.example.yaml")

    assert [camera.mode for camera in settings.cameras] == [Mode.STREAM, Mode.TRIGGERED]
    assert settings.bundle == Path("/var/lib/lineward/bundles/current")
