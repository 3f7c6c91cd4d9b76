"""From a float32 graph to one static QDQ file that ONNX Runtime and OpenVINO both run in int8.

u8 activations, s8 weights per channel, Clip folded into the u8 range. It must not know what a method or product is.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from deploy.rounding import reround
from edge.errors import DataError
from edge.inference.sessions import IMAGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

Arrays = dict[str, "npt.NDArray[Any]"]

# Raised when equal inputs quantise to other files: it is part of every trunk cache key.
QUANTIZER_VERSION = 3
# A state's range is computed in the graph, but queries keep the range they were calibrated with, widened by this
# share at both ends.
QUERY_MARGIN = 0.05
_S8_MAX, _S7_MAX, _U8_MAX = 127, 63, 255


@dataclass(frozen=True, slots=True)
class TrunkQuantization:
    """How the shared trunk is quantised; one choice for every product.

    The defaults are what the parity gate needs on Lite0: with all 33 convolutions in int8 a memory detector lost up to
    0.022 I-AUROC on faint defects (brick, grass and gravel at 160 pixels), with the stem and block 0 in float32 and
    float32 taps at most 0.003. Block 0's projection in int8 would save 0.05 of 2.1 ms in OpenVINO (one thread, 224
    pixels) and costs 0.3 dB in the taps, but moved the scores of good cloth by 0.28 of their interquartile range
    instead of 0.04.

    Attributes:
        float_convs: so many convolutions, counted from the image, stay in float32.
        float_taps: taps leave the trunk in float32 as the last convolution computed them, not rounded to u8.
        reduce_range: weights of 7 bits, for processors without VNNI, whose 16-bit sums would saturate.
    """

    float_convs: int = 3
    float_taps: bool = True
    reduce_range: bool = False


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    def __init__(self, feeds: Iterator[Arrays]) -> None:
        self._feeds = feeds

    def get_next(self) -> Arrays | None:
        return next(self._feeds, None)


def quantize_trunk(
    source: Path,
    target: Path,
    canvases: npt.NDArray[np.uint8],
    *,
    options: TrunkQuantization | None = None,
    batch: int = 8,
) -> None:
    """Write trunk.int8.onnx.

    Args:
        source: trunk.onnx.
        target: file to write.
        canvases: uint8 [n, H, W, 3] RGB, a generic set: no product's own images.
        options: see :class:`TrunkQuantization`.
        batch: images run at once while ranges are measured.

    Raises:
        DataError: the set is empty or of another shape, or shows too little contrast to measure ranges.
    """
    options = options or TrunkQuantization()
    if canvases.ndim != 4 or canvases.dtype != np.uint8 or not len(canvases):  # noqa: PLR2004
        raise DataError(f"generic set is {canvases.dtype} {canvases.shape}, expected uint8 [n, H, W, 3] with n >= 1")
    model = onnx.load(source)
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    exclude = [node.name for node in convs[: options.float_convs]]
    overrides: dict[str, Any] = {}
    if not options.float_convs:
        # (x - 127) / 128 of a byte is a byte again: scale 1/128 and zero point 127 lose nothing, and no black or
        # white picture has to be in the set to say so.
        overrides[convs[0].input[0]] = [{"rmin": np.array(-127 / 128, np.float32), "rmax": np.array(1.0, np.float32)}]
    feeds = [{IMAGE: canvases[i : i + batch]} for i in range(0, len(canvases), batch)]
    _static(source, target, feeds, exclude=exclude, types=("Conv", "Add", "Clip"),
            overrides=overrides, reduce_range=options.reduce_range)  # fmt: skip
    if options.float_convs:
        _keep_normalisation(target)
    if options.float_taps:
        _unround_outputs(target)


def quantize_head(
    source: Path,
    target: Path,
    taps: Sequence[Mapping[str, npt.NDArray[np.float32]]],
    *,
    state_names: Sequence[str] = (),
    float_ops: Sequence[str] = (),
    reduce_range: bool = False,
) -> tuple[str, ...]:
    """Write head.int8.onnx: convolutions and matrix products in int8, everything else in float32.

    A product with a named state (a search in a bank) is quantised by the graph itself: the state stays a float32
    initialiser, its scale per row is computed from it by operators that an engine folds when it builds the session,
    so that a new state is quantised with its own range. Norms, minima and roots around it stay in float32.
    Convolutions with one output channel (logits, smoothing) stay in float32: they cost nothing and decide the score.

    Args:
        source: head.onnx.
        target: file to write.
        taps: batches of named taps float32 [N, C, h, w] from the int8 trunk, to measure ranges on: good
            images and some plain defects, so that what stands out is not cut off.
        state_names: initialisers that a box may replace.
        float_ops: names of submodules or initialisers whose operators stay in float32.
        reduce_range: weights of 7 bits.

    Returns:
        The names of the nodes that run in int8; empty where there is nothing to quantise (the file is then a copy).

    Raises:
        DataError: no batch is given.
    """
    if not taps:
        raise DataError("head: no calibration taps given; ranges cannot be measured")
    model = onnx.load(source)
    searches = _state_products(model, set(state_names), float_ops)
    dense = [
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "MatMul", "Gemm") and _is_dense(node, model) and not _is_kept(node, float_ops)
    ]
    if dense:
        _static(source, target, [dict(feed) for feed in taps], only=dense, types=("Conv", "MatMul", "Gemm"),
                reduce_range=reduce_range)  # fmt: skip
        quantized = onnx.load(target)
        _exact_for_others(quantized, set(dense))
    else:
        quantized = model
    if searches:
        queries = tuple(dict.fromkeys(node.input[0] for node in searches))
        ranges = _measure_ranges(source, queries, taps)
        for node in searches:
            _quantize_search(quantized, node.name, ranges[node.input[0]], _S7_MAX if reduce_range else _S8_MAX)
    _save(quantized, target)
    return (*dense, *(node.name for node in searches))


def _static(
    source: Path,
    target: Path,
    feeds: Sequence[Arrays],
    *,
    types: Sequence[str],
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    reduce_range: bool,
) -> None:
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)  # it advises a pre-processing that the exporter has done
    try:
        quantize_static(
            source, target, _Reader(iter(feeds)), quant_format=QuantFormat.QDQ, op_types_to_quantize=list(types),
            per_channel=True, reduce_range=reduce_range, activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8, nodes_to_quantize=list(only), nodes_to_exclude=list(exclude),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"TensorQuantOverrides": dict(overrides or {}), "MatMulConstBOnly": True},
        )  # fmt: skip
    finally:
        log.setLevel(level)
    model = onnx.load(target)
    reround(source, model, feeds, limit=_S7_MAX if reduce_range else _S8_MAX)
    _save(model, target)


def _save(model: onnx.ModelProto, path: Path) -> None:
    del model.graph.value_info[:], model.metadata_props[:]
    model.producer_name, model.producer_version = "lineward", ""
    initializers = sorted(model.graph.initializer, key=lambda tensor: tensor.name)
    del model.graph.initializer[:]
    model.graph.initializer.extend(initializers)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _keep_normalisation(path: Path) -> None:
    """Let OpenVINO normalise the image before a float stem as it does in a float32 graph.

    It takes Cast, Sub, Mul in a graph with int8 for a dequantisation, moves it behind the Transpose and then copies
    the image twice: 0.12 of 2.2 ms at 224 pixels. The floor of a whole number changes no value and stands in between.
    """
    model = onnx.load(path)
    graph = model.graph
    casts = [(index, node) for index, node in enumerate(graph.node) if node.op_type == "Cast"]
    for index, cast in reversed(casts):
        whole = f"{cast.output[0]}_whole"
        for node in graph.node:
            node.input[:] = [whole if name == cast.output[0] else name for name in node.input]
        graph.node.insert(index + 1, helper.make_node("Floor", [cast.output[0]], [whole], name=f"{cast.name}/whole"))
    _save(model, path)


def _unround_outputs(path: Path) -> None:
    """Let each graph output that went through Q and DQ leave as its producer computed it."""
    model = onnx.load(path)
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    for value in graph.output:
        last = producer[value.name]
        if last.op_type != "DequantizeLinear":
            continue
        rounded = producer[last.input[0]].input[0]
        source, exact = producer[rounded], value.name
        last.output[0] = f"{exact}_rounded"
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name == exact:
                    node.input[index] = f"{exact}_rounded"
                elif name == rounded:
                    node.input[index] = exact
        source.output[list(source.output).index(rounded)] = exact
    _save(model, path)


def _exact_for_others(model: onnx.ModelProto, dense: set[str]) -> None:
    """Let only the quantised products see rounded activations.

    The quantiser rounds a tensor for all who read it, and what a product gives as well: a residual sum, a norm, a mask
    or the difference that is the map would count in steps of 1/255 of a range that was measured for the product.
    """
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    exact = {
        node.output[0]: producer[node.input[0]].input[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in producer
    }
    for node in graph.node:
        if node.name not in dense and node.op_type != "DequantizeLinear":
            node.input[:] = [exact.get(name, name) for name in node.input]
    outputs = {value.name for value in graph.output}
    while True:
        read = {name for node in graph.node for name in node.input} | outputs
        unread = [node for node in graph.node if not read.intersection(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(tensors)


def _initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _is_kept(node: onnx.NodeProto, float_ops: Sequence[str]) -> bool:
    names = (node.name, *node.input)
    return any(name == op or name.startswith((f"{op}/", f"{op}.")) for op in float_ops for name in names)


def _is_dense(node: onnx.NodeProto, model: onnx.ModelProto) -> bool:
    weight = _initializers(model).get(node.input[1])
    if weight is None or len(weight.dims) < 2:  # noqa: PLR2004
        return False
    return int(weight.dims[0] if node.op_type == "Conv" else weight.dims[-1]) > 1


def _state_products(model: onnx.ModelProto, states: set[str], float_ops: Sequence[str]) -> list[onnx.NodeProto]:
    """Return the MatMul nodes whose right side is a state, as it is or transposed."""
    derived = set(states)
    for node in model.graph.node:
        if node.op_type in ("Transpose", "Identity") and node.input[0] in derived:
            derived.add(node.output[0])
    return [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in derived and not _is_kept(node, float_ops)
    ]


def _measure_ranges(
    source: Path, names: Sequence[str], taps: Sequence[Mapping[str, npt.NDArray[np.float32]]]
) -> dict[str, tuple[float, float]]:
    model = onnx.load(source)
    known = {value.name for value in model.graph.output}
    for name in names:
        if name not in known:
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    low, high = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for feed in taps:
        for name, value in zip(names, session.run(list(names), dict(feed)), strict=True):
            low[name], high[name] = min(low[name], float(value.min())), max(high[name], float(value.max()))
    return {name: (low[name], high[name]) for name in names}


def _quantize_search(model: onnx.ModelProto, name: str, span: tuple[float, float], weight_max: int) -> None:
    """Put QDQ pairs before both inputs of a MatMul with a state; the state's scale is computed in the graph."""
    graph = model.graph
    index = next(i for i, node in enumerate(graph.node) if node.name == name)
    node = graph.node[index]
    query, state = node.input
    spread = (span[1] - span[0]) * QUERY_MARGIN
    low, high = (span[0] - spread if span[0] < 0 else 0.0), span[1] + spread
    scale = max((high - low) / _U8_MAX, 1e-12)
    zero = int(np.clip(round(-low / scale), 0, _U8_MAX))

    def constant(suffix: str, value: npt.NDArray[Any]) -> str:
        graph.initializer.append(numpy_helper.from_array(value, f"{name}/{suffix}"))
        return f"{name}/{suffix}"

    def op(op_type: str, inputs: Sequence[str], suffix: str, **attributes: int) -> onnx.NodeProto:
        return helper.make_node(op_type, list(inputs), [f"{name}/{suffix}"], name=f"{name}/{suffix}", **attributes)

    q_scale, q_zero = constant("query_scale", np.float32(scale)), constant("query_zero", np.uint8(zero))
    # Reduce over the depth (axis 0 of [D, R]): one scale per row of the bank.
    axis = constant("axis", np.array([0], np.int64))
    per_unit = constant("unit", np.float32(1.0 / weight_max))
    tiny = constant("tiny", np.float32(1e-12))
    columns = _columns(model, state)
    zeros = constant("state_zero", np.zeros(columns, np.int8))
    nodes = [
        op("QuantizeLinear", (query, q_scale, q_zero), "query_u8"),
        op("DequantizeLinear", (f"{name}/query_u8", q_scale, q_zero), "query"),
        op("Abs", (state,), "abs"),
        op("ReduceMax", (f"{name}/abs", axis), "peak", keepdims=0),
        op("Max", (f"{name}/peak", tiny), "peak_safe"),
        op("Mul", (f"{name}/peak_safe", per_unit), "state_scale"),
        op("QuantizeLinear", (state, f"{name}/state_scale", zeros), "state_s8", axis=1),
        op("DequantizeLinear", (f"{name}/state_s8", f"{name}/state_scale", zeros), "state", axis=1),
    ]
    node.input[0], node.input[1] = f"{name}/query", f"{name}/state"
    following = list(graph.node)[index:]
    del graph.node[index:]
    graph.node.extend([*nodes, *following])


def _columns(model: onnx.ModelProto, name: str) -> int:
    """Return the last dimension of a state or of a transposed state."""
    tensors = _initializers(model)
    if name in tensors:
        return int(tensors[name].dims[-1])
    node = next(node for node in model.graph.node if name in node.output)
    return int(tensors[node.input[0]].dims[0])
