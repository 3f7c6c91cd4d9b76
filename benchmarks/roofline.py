"""How much of the machine's matrix-product rate does the trunk reach, and the search of the head beside it?

The rate is measured in the same run, by the fastest of OpenVINO's matrix product, its 1x1 convolution and numpy's
product, in the same precision and on as many threads. All take turns, so that other work slows all.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino
from openvino import opset13
from threadpoolctl import threadpool_limits

from benchmarks._setting import Goal, add_bundle_option, bundle_for, frames_1080p, heading, print_goals, spread
from edge.bundle import Engine, Precision
from edge.inference.engines import supports
from edge.inference.onnx_file import with_initialisers
from edge.inference.openvino_session import core
from edge.inference.preprocessing import cut_tiles, to_canvas
from edge.inference.search_blocks import block_searches
from edge.inference.sessions import ANOMALY_MAP, IMAGE, graph_file
from edge.inference.state import stored_state

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from edge.bundle import Bundle

    Arrays = Mapping[str, npt.NDArray[Any]]

GOALS = {Precision.FLOAT32: 0.7, Precision.BFLOAT16: 0.55, Precision.INT8: 0.38}
# Square enough for every cache blocking, small enough for a turn of a few milliseconds.
MATRIX, CHANNELS, SIDE, CHAIN = 1024, 256, 56, 4
_LEVELS, _RANGE = 256, 2.0
_TRUNK, _HEAD, _WHOLE_HEAD = "trunk", "search", "head"


@dataclass(frozen=True, slots=True)
class Work:
    """Something that computes.

    Attributes:
        run: computes once.
        giga_operations: multiplications and additions of matrix products and convolutions, in 1e9.
    """

    run: Callable[[], object]
    giga_operations: float


class Compiled:
    """A graph as the box compiles it, with the engine's own counters.

    Args:
        model: not compiled yet.
        precision: numerics.
        threads: of the one stream.
        feeds: inputs by name.
    """

    def __init__(self, model: openvino.Model, precision: Precision, threads: int, feeds: Arrays) -> None:
        self.giga_operations = sum(operations(node) for node in model.get_ordered_ops()) / 1e9
        config = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision is Precision.BFLOAT16 else "f32",
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERF_COUNT": True,
        }  # fmt: skip
        self.compiled = core().compile_model(model, "CPU", config)
        self._request = self.compiled.create_infer_request()
        # A shared tensor does not hold its array: what takes that memory next would be computed with.
        self._feeds = feeds
        for name, value in feeds.items():
            self._request.set_tensor(name, openvino.Tensor(value, shared_memory=True))

    def run(self) -> None:
        """Run once."""
        self._request.infer()

    def outputs(self, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Return copies of the last outputs."""
        return {name: self._request.get_tensor(name).data.copy() for name in names}

    def layers(self, runs: int) -> list[tuple[str, str, str, float]]:
        """Return name, kind, implementation and least milliseconds of every layer that ran, the slowest first."""
        least: dict[tuple[str, str, str], float] = defaultdict(lambda: float("inf"))
        for _ in range(runs):
            self.run()
            for one in self._request.get_profiling_info():
                key = (one.node_name, one.node_type, one.exec_type)
                least[key] = min(least[key], one.real_time.total_seconds() * 1000)
        return sorted(((*key, ms) for key, ms in least.items() if ms > 0), key=lambda row: -row[3])

    def precisions(self) -> set[str]:
        """Return what the products and convolutions of the executed graph compute in, such as ``u8`` or ``f32``."""
        found = set()
        for node in self.compiled.get_runtime_model().get_ops():
            info = {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
            if info["layerType"] in ("Convolution", "FullyConnected", "MatMul"):
                found.add(info["runtimePrecision"])
        return found


def operations(node: openvino.Node) -> float:
    """Multiplications and additions of one node; 0 of everything but products and convolutions."""
    kind = node.get_type_name()
    if kind not in ("Convolution", "GroupConvolution", "MatMul"):
        return 0.0
    out = np.prod([float(size) for size in node.get_output_shape(0)])
    if kind == "MatMul":
        left, transposed = node.get_input_shape(0), node.get_attributes()["transpose_a"]
        return 2.0 * out * left[-2 if transposed else -1]
    weights = [float(size) for size in node.get_input_shape(1)]
    # [out, in, ...] or, in groups, [groups, out, in, ...].
    return 2.0 * out * float(np.prod(weights[2 if kind == "GroupConvolution" else 1 :]))


def _rounded(node: Any, precision: Precision, largest: float) -> Any:  # noqa: ANN401 (openvino has no types)
    if precision is not Precision.INT8:
        return node
    low, high = np.float32(0), np.float32(largest)
    return opset13.fake_quantize(node, low, high, low, high, _LEVELS)


def _weights(shape: tuple[int, ...], precision: Precision) -> Any:  # noqa: ANN401 (openvino has no types)
    rng = np.random.default_rng(0)
    if precision is not Precision.INT8:
        return opset13.constant(rng.uniform(0, _RANGE / np.prod(shape[1:]), shape).astype(np.float32))
    whole = opset13.convert(opset13.constant(rng.integers(-127, 128, shape, dtype=np.int8)), "f32")
    return opset13.multiply(whole, np.full((shape[0], *[1] * (len(shape) - 1)), 1e-4, np.float32))


def product_model(kind: str, precision: Precision) -> tuple[openvino.Model, dict[str, npt.NDArray[np.float32]]]:
    """Return a chain of matrix products or 1x1 convolutions, whose activations stay in int8 where asked for.

    Args:
        kind: ``matmul`` or ``convolution``.
        precision: numerics.
    """
    shape = (MATRIX, MATRIX) if kind == "matmul" else (1, CHANNELS, SIDE, SIDE)
    given = opset13.parameter(list(shape), openvino.Type.f32, name="x")
    given.output(0).set_names({"x"})
    node = _rounded(given, precision, _RANGE)
    for _ in range(CHAIN):
        if kind == "matmul":
            node = opset13.matmul(node, _weights((MATRIX, MATRIX), precision), transpose_a=False, transpose_b=True)
        else:
            weights = _weights((CHANNELS, CHANNELS, 1, 1), precision)
            node = opset13.convolution(node, weights, [1, 1], [0, 0], [0, 0], [1, 1])
        node = _rounded(opset13.relu(node), precision, _RANGE)
    values = np.random.default_rng(1).uniform(0, _RANGE, shape).astype(np.float32)
    return openvino.Model([node], [given], kind), {"x": values}


def products(precision: Precision, threads: int) -> dict[str, Work]:
    """Return what measures the machine's rate in a precision."""
    found = {}
    for kind in ("matmul", "convolution"):
        one = Compiled(*_with_feeds(product_model(kind, precision), precision, threads))
        if precision is Precision.INT8 and not one.precisions() <= {"u8", "i8"}:
            raise SystemExit(f"OpenVINO ran the {kind} in {one.precisions()} instead of int8; the rate would be wrong")
        found[f"OpenVINO {kind}"] = Work(one.run, one.giga_operations)
    if precision is Precision.FLOAT32:
        left = np.random.default_rng(2).uniform(0, 1, (MATRIX, MATRIX)).astype(np.float32)
        out = np.empty_like(left)

        def multiply() -> None:
            with threadpool_limits(threads, "blas"):
                for _ in range(CHAIN):
                    np.matmul(left, left, out=out)

        found["numpy"] = Work(multiply, CHAIN * 2 * MATRIX**3 / 1e9)
    return found


def _with_feeds(
    made: tuple[openvino.Model, dict[str, npt.NDArray[np.float32]]], precision: Precision, threads: int
) -> tuple[openvino.Model, Precision, int, Arrays]:
    return made[0], precision, threads, made[1]


def graphs(bundle: Bundle, precision: Precision, threads: int) -> dict[str, Compiled]:
    """Compile trunk and head as the box does: pruned, of one shape, with the state inside."""
    manifest = bundle.manifest
    preprocessing = manifest.preprocessing
    tiles = cut_tiles(to_canvas(frames_1080p(1, seed=9)[0], preprocessing), preprocessing).copy()
    trunk = Compiled(
        _read(graph_file(bundle, manifest.trunk, precision), {}, manifest.taps, {IMAGE: tiles}),
        precision, threads, {IMAGE: tiles},
    )  # fmt: skip
    trunk.run()
    taps = trunk.outputs(manifest.taps)
    head = Compiled(
        _read(graph_file(bundle, manifest.head, precision), stored_state(bundle), (ANOMALY_MAP,), taps),
        precision, threads, taps,
    )  # fmt: skip
    return {_TRUNK: trunk, _WHOLE_HEAD: head}


def _read(path: Path, state: Arrays, outputs: Sequence[str], feeds: Arrays) -> openvino.Model:
    model = core().read_model(with_initialisers(path.read_bytes(), state))
    for port, result in list(zip(model.outputs, model.get_results(), strict=True)):
        if not port.get_names() & set(outputs):
            model.remove_result(result)
    model.reshape({name: list(value.shape) for name, value in feeds.items()})
    block_searches(model)
    return model


def rates(work: Mapping[str, Work], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Let everything run in turns; returns the best rate of each turn in 1e9 operations a second."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for one in work.values():
        one.run()
    for index in range(rounds):
        for name in list(work) if index % 2 == 0 else reversed(list(work)):
            best, end = float("inf"), time.perf_counter() + seconds
            while True:
                start = time.perf_counter()
                work[name].run()
                now = time.perf_counter()
                best = min(best, now - start)
                if now >= end:
                    break
            found[name].append(work[name].giga_operations / best)
    return found


def measure(bundle: Bundle, precision: Precision, threads: int, *, rounds: int, seconds: float) -> list[Goal]:
    """Print the rates and the slowest layers of one precision; returns the shares."""
    made = graphs(bundle, precision, threads)
    machine = products(precision, threads)
    work = {**machine, **{name: Work(one.run, one.giga_operations) for name, one in made.items()}}
    found = rates(work, rounds=rounds, seconds=seconds)
    limits = [max(found[name][index] for name in machine) for index in range(rounds)]
    peak = max(limits)
    print(f"{precision.value}, {threads} thread(s)\n")
    print("| computes | 1e9 operations | ms best | 1e9 operations/s best | median | of the best rate |")
    print("|---|---|---|---|---|---|")
    for name, values in found.items():
        giga, best = work[name].giga_operations, max(values)
        print(
            f"| {name} | {giga:.3f} | {1000 * giga / best:.2f} | {best:.0f} | {np.median(values):.0f} | "
            f"{best / peak:.2f} |"
        )
    print()
    if threads == 1:
        for name, one in made.items():
            _print_layers(f"{name}, {precision.value}", one.layers(20 * rounds))
    # Turn beside turn for the spread; the best turn of each for the share: a bound is what nobody slowed down.
    pairs = [a / b for a, b in zip(found[_TRUNK], limits, strict=True)]
    share = max(found[_TRUNK]) / peak
    search, beside = _search_ms(made[_WHOLE_HEAD], 20 * rounds)
    label = f"{precision.value}, {threads} thread(s)"
    goals = [Goal(f"trunk, {label}", share, GOALS[precision], True, f"best over best; turn by turn {spread(pairs)}")]
    if search > 0:
        giga = made[_WHOLE_HEAD].giga_operations
        goals.append(
            Goal(f"{_HEAD} of the head, {label}", giga / (search / 1000) / peak, float("nan"), True,
                 f"products {search:.2f} ms of {search + beside:.2f} ms in the head's layers")
        )  # fmt: skip
    return goals


def _search_ms(head: Compiled, runs: int) -> tuple[float, float]:
    """Least milliseconds of the head's products and convolutions, and of everything else in it."""
    layers = head.layers(runs)
    products_ms = sum(ms for _, kind, _, ms in layers if kind in ("MatMul", "FullyConnected", "Convolution"))
    return products_ms, sum(row[3] for row in layers) - products_ms


def _print_layers(title: str, layers: Sequence[tuple[str, str, str, float]], *, top: int = 8) -> None:
    total = sum(row[3] for row in layers)
    print(f"{title}: {total:.2f} ms in {len(layers)} layers, the slowest (the engine's counters, least of all runs)\n")
    print("| layer | kind | implementation | ms | share |\n|---|---|---|---|---|")
    for name, kind, how, ms in layers[:top]:
        print(f"| {name} | {kind} | {how} | {ms:.3f} | {ms / total:.0%} |")
    print()


def main(argv: Sequence[str] | None = None) -> list[Goal]:
    """Measure and print; about two minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_bundle_option(parser)
    parser.add_argument("--rounds", type=int, default=12, help="turns of each candidate")
    parser.add_argument("--seconds", type=float, default=0.2, help="length of a turn")
    parser.add_argument("--tiny", action="store_true", help="two short turns, to see that it runs")
    options = parser.parse_args(argv)
    rounds, seconds = (2, 0.01) if options.tiny else (options.rounds, options.seconds)
    heading("roofline")
    goals: list[Goal] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = bundle_for(options.bundle, Path(folder))
        for precision in (Precision.FLOAT32, Precision.BFLOAT16, Precision.INT8):
            if not supports(Engine.OPENVINO, precision):
                print(f"{precision.value}: this processor has none\n")
                continue
            for threads in (1, 2):
                goals += measure(bundle, precision, threads, rounds=rounds, seconds=seconds)
    print_goals(goals)
    return goals


if __name__ == "__main__":
    main()
