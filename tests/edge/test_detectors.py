"""Several bundles in one box: each opened once, each trunk compiled once, each camera given its own."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from edge.bundle import Bundle, Engine, Precision
from edge.errors import BundleError
from edge.inference import sessions
from edge.inference.detectors import Detectors
from edge.inference.onnxruntime_session import Accelerator, Provider
from edge.settings import BoxSettings
from tests.edge.tiny_bundle import make_tiny_bundle

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """Two products that share a trunk."""
    folder = tmp_path_factory.mktemp("detectors")
    return make_tiny_bundle(folder / "a", product="a"), make_tiny_bundle(folder / "b", product="b", state=False)


def settings(folder: Path, bundle: Path, cameras: dict[str, Any], **more: Any) -> BoxSettings:
    return BoxSettings.model_validate(
        {
            "site": "s", "box": "b", "state_dir": folder / "state", "bundle": bundle, "threads": 1,
            "engine": "openvino", "precision": "int8",
            "cameras": [
                {"name": name, "source": {"kind": "folder", "path": "/"}, **camera} for name, camera in cameras.items()
            ],
            **more,
        }
    )  # fmt: skip


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files of graphs that were compiled."""
    found: list[str] = []
    real = sessions.open_graph

    def counted(path: Path, **options: Any) -> Any:
        found.append(path.name)
        return real(path, **options)

    monkeypatch.setattr(sessions, "open_graph", counted)
    return found


def test_each_bundle_is_opened_once_and_each_trunk_compiled_once(
    bundles: tuple[Bundle, Bundle], tmp_path: Path, compiled: list[str]
) -> None:
    first, second = bundles
    link, copy = tmp_path / "link", tmp_path / "copy"
    link.symlink_to(second.path)
    shutil.copytree(second.path, copy)
    cameras = {"plain": {}, "named": {"bundle": first.path}, "other": {"bundle": second.path},
               "linked": {"bundle": link}, "copied": {"bundle": copy}}  # fmt: skip
    detectors = Detectors.open(settings(tmp_path, first.path, cameras))
    assert [one.bundle.manifest.product for one in detectors.all] == ["a", "b"]
    products = {name: detectors.of(name).bundle.manifest.product for name in cameras}
    assert products == {"plain": "a", "named": "a", "other": "b", "linked": "b", "copied": "b"}
    assert compiled.count("trunk.int8.onnx") == 1
    assert compiled.count("head.int8.onnx") == 2
    assert [name for name in cameras if detectors.shares_memory(name)] == ["plain", "named"]


def test_several_cameras_resize_on_one_thread_each(
    bundles: tuple[Bundle, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("edge.inference.detectors.cv2.setNumThreads", asked.append)
    monkeypatch.setattr("edge.inference.detectors.os.sched_getaffinity", lambda _: {0, 1, 2})
    Detectors.open(settings(tmp_path, bundles[0].path, {"x": {}}))
    assert asked == []
    Detectors.open(settings(tmp_path, bundles[0].path, {"x": {}, "y": {}}))
    assert asked == [1]


def test_bundle_of_a_disabled_camera_is_not_opened(bundles: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    cameras = {"on": {}, "off": {"bundle": tmp_path / "nothing", "enabled": False}}
    detectors = Detectors.open(settings(tmp_path, bundles[0].path, cameras))
    assert len(detectors.all) == 1
    with pytest.raises(KeyError):
        detectors.of("off")
    cameras["off"]["enabled"] = True
    with pytest.raises(BundleError, match="nothing: no such folder"):
        Detectors.open(settings(tmp_path, bundles[0].path, cameras))


def test_reuse_opens_only_what_is_new(bundles: tuple[Bundle, Bundle], tmp_path: Path, compiled: list[str]) -> None:
    link = tmp_path / "link"
    link.symlink_to(bundles[0].path)
    one = settings(tmp_path, link, {"x": {}})
    before = Detectors.open(one)
    del compiled[:]
    same = Detectors.open(one, reuse=before)
    assert same.default is before.default
    assert compiled == []
    link.unlink()
    link.symlink_to(bundles[1].path)
    switched = Detectors.open(one, reuse=before)
    assert switched.default.bundle.manifest.product == "b"
    assert compiled == ["head.int8.onnx"]
    other = Detectors.open(one.model_copy(update={"precision": Precision.FLOAT32}), reuse=switched)
    assert other.default is not switched.default
    assert other.default.status.precision is Precision.FLOAT32


def test_fallbacks_name_their_product(bundles: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    asked = {"engine": "onnxruntime", "precision": None, "provider": "cuda"}
    detectors = Detectors.open(
        settings(tmp_path, bundles[0].path, {"x": {}, "y": {"bundle": bundles[1].path}}, **asked)
    )
    for one in detectors:
        assert (one.status.engine, one.status.accelerator) == (Engine.ONNXRUNTIME, "cpu")
        assert "has no CUDAExecutionProvider" in one.status.fallback_reason
    assert detectors.fallback_reason.startswith("a: ")
    assert "; b: " in detectors.fallback_reason


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, Accelerator()),
        ({"provider": "cuda"}, Accelerator(Provider.CUDA)),
        ({"provider": "tensorrt", "precision": None}, Accelerator(Provider.TENSORRT, float16=True)),
        ({"provider": "tensorrt", "precision": "float32"}, Accelerator(Provider.TENSORRT)),
        (
            {
                "provider": "tensorrt",
                "precision": None,
                "memory": {},
                "federation": {"exchange": "/exchange", "fleet": "f"},
            },
            Accelerator(Provider.TENSORRT),
        ),
    ],
)
def test_tensorrt_computes_in_float16_unless_somebody_relies_on_float32(
    bundles: tuple[Bundle, Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
    expected: Accelerator,
) -> None:
    asked: list[Accelerator] = []

    def opened(*_: Any, accelerator: Accelerator, **__: Any) -> Any:
        asked.append(accelerator)
        raise BundleError("enough")

    monkeypatch.setattr("edge.inference.detectors.Detector.open", opened)
    with pytest.raises(BundleError, match="enough"):
        Detectors.open(settings(tmp_path, bundles[0].path, {"x": {}}, **({"engine": None} | more)))
    cache = tmp_path / "state" / "engines" if expected.provider is Provider.TENSORRT else None
    assert asked == [Accelerator(expected.provider, float16=expected.float16, cache=cache)]
