"""ONNX Runtime's providers: asked for by name, never replaced in silence. No GPU is needed or used here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edge.bundle import Bundle, Engine, Precision
from edge.errors import EngineError
from edge.inference.detector import Detector
from edge.inference.engines import open_graph
from edge.inference.onnxruntime_session import Accelerator, Provider, providers_of
from tests.edge.tiny_bundle import make_tiny_bundle

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
EVERY = [TENSORRT, CUDA, CPU]
FLOAT16 = Accelerator(Provider.TENSORRT, float16=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("providers") / "bundle")


def test_cpu_is_named_alone() -> None:
    assert providers_of(Accelerator(), Precision.INT8, EVERY) == [CPU]


def test_cuda_computes_float32_in_float32() -> None:
    found = providers_of(Accelerator(Provider.CUDA), Precision.FLOAT32, EVERY)
    assert found == [(CUDA, {"use_tf32": "0"}), CPU]


@pytest.mark.parametrize("float16", [True, False])
def test_tensorrt_says_its_precision_and_keeps_its_engines(*, float16: bool) -> None:
    wanted = Accelerator(Provider.TENSORRT, float16=float16, cache=Path("/state/engines"))
    (name, options), cuda, cpu = providers_of(wanted, Precision.FLOAT32, EVERY)
    assert (name, cuda[0], cpu) == (TENSORRT, CUDA, CPU)
    assert options == {
        "trt_fp16_enable": "1" if float16 else "0",
        "trt_engine_cache_enable": "1", "trt_engine_cache_path": "/state/engines",
        "trt_timing_cache_enable": "1", "trt_timing_cache_path": "/state/engines",
    }  # fmt: skip


def test_tensorrt_without_cuda_falls_to_the_processor_node_by_node() -> None:
    found = providers_of(FLOAT16, Precision.FLOAT32, [TENSORRT, CPU])
    assert [one if isinstance(one, str) else one[0] for one in found] == [TENSORRT, CPU]


@pytest.mark.parametrize("provider", [Provider.CUDA, Provider.TENSORRT])
def test_provider_that_is_not_built_in_or_not_of_that_precision_is_refused(provider: Provider) -> None:
    with pytest.raises(EngineError, match=rf"has no {provider.full_name} \(it has {CPU}\).*provider: cpu"):
        providers_of(Accelerator(provider), Precision.FLOAT32, [CPU])
    with pytest.raises(EngineError, match="runs the float32 files only, not int8; set precision: float32"):
        providers_of(Accelerator(provider), Precision.INT8, EVERY)


def test_provider_belongs_to_onnxruntime(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="cuda belongs to ONNX Runtime; set engine: onnxruntime"):
        open_graph(bundle.file("trunk.onnx"), engine=Engine.OPENVINO, precision=Precision.FLOAT32, threads=1,
                   accelerator=Accelerator(Provider.CUDA))  # fmt: skip


class Gpu:
    """ONNX Runtime as on a machine with a GPU: the processor computes, with the error that float16 is given.

    Attributes:
        starts: providers whose libraries load.
        error: relative, of outputs in float16.
        asked: the first provider and its options, per session.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.starts: tuple[str, ...] = (TENSORRT, CUDA, CPU)
        self.error = 0.0
        self.asked: list[tuple[str, dict[str, str]]] = []
        real = onnxruntime.InferenceSession

        def session(model: bytes, options: Any, *, providers: list[Any]) -> Any:
            named = [(one, {}) if isinstance(one, str) else one for one in providers]
            self.asked.append(named[0])
            used = [name for name, _ in named if name in self.starts]
            float16 = used[0] == TENSORRT and named[0][1].get("trt_fp16_enable") == "1"
            return _Session(real(model, options, providers=[CPU]), used, self.error if float16 else 0.0)

        monkeypatch.setattr(onnxruntime, "InferenceSession", session)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(EVERY))


class _Session:
    def __init__(self, real: Any, used: list[str], error: float) -> None:
        self._real, self._used, self._error = real, used, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return self._used

    def run(self, names: Any, feeds: Any) -> list[np.ndarray]:
        return [value * np.float32(1 + self._error) for value in self._real.run(names, feeds)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_tensorrt_in_float16_within_the_tolerance_judges(bundle: Bundle, gpu: Gpu, tmp_path: Path) -> None:
    gpu.error = 1e-4
    wanted = Accelerator(Provider.TENSORRT, float16=True, cache=tmp_path / "engines")
    status = Detector.open(bundle, accelerator=wanted, threads=1).status
    assert (status.engine, status.precision) == (Engine.ONNXRUNTIME, Precision.FLOAT32)
    assert (status.accelerator, status.fallback_reason) == ("tensorrt float16", "")
    assert {name for name, _ in gpu.asked} == {TENSORRT}
    assert (tmp_path / "engines").is_dir()


def test_float16_that_misses_the_golden_scores_becomes_float32(bundle: Bundle, gpu: Gpu) -> None:
    gpu.error = 0.5
    status = Detector.open(bundle, accelerator=FLOAT16, threads=1).status
    assert status.accelerator == "tensorrt"
    assert "onnxruntime float32 tensorrt float16 misses the golden scores by" in status.fallback_reason


def test_provider_that_cannot_start_makes_way_for_the_next_one_visibly(bundle: Bundle, gpu: Gpu) -> None:
    gpu.starts = (CUDA, CPU)
    status = Detector.open(bundle, accelerator=FLOAT16, threads=1).status
    assert status.accelerator == "cuda"
    assert status.fallback_reason.count("TensorrtExecutionProvider could not start, ONNX Runtime took CUDA") == 2
    gpu.starts = (CPU,)
    status = Detector.open(bundle, accelerator=FLOAT16, threads=1).status
    assert (status.engine, status.accelerator) == (Engine.ONNXRUNTIME, "cpu")
    assert "CUDAExecutionProvider could not start, ONNX Runtime took CPU" in status.fallback_reason
    assert not Detector.open(bundle, engine=Engine.ONNXRUNTIME, threads=1).status.fallback_reason


def test_folder_for_engines_that_cannot_be_made_is_named(bundle: Bundle, gpu: Gpu, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wanted = Accelerator(Provider.TENSORRT, cache=tmp_path / "file" / "engines")
    status = Detector.open(bundle, accelerator=wanted, threads=1).status
    assert status.accelerator == "cuda"
    assert "engines: cannot be made" in status.fallback_reason
    assert gpu.asked[-1][0] == CUDA
