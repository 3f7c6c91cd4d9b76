"""Round int8 weights so that a layer's output changes least, not so that each weight does.

Nearest rounding errors of a filter add up where its inputs are alike, as neighbouring pixels are; rounding one weight
after the other and letting the next ones make up for it (Frantar et al., GPTQ, 2023) removes most of that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import numpy.typing as npt

# Second moments of at most so many positions per layer and batch are enough: the largest has 864 inputs.
_POSITIONS = 1024
# Share of the mean diagonal added to it, as in the paper; keeps a layer with dead inputs solvable.
_DAMPING = 0.01


def reround(
    source: Path, quantized: onnx.ModelProto, feeds: Iterable[Mapping[str, npt.NDArray[Any]]], *, limit: int = 127
) -> int:
    """Choose the int8 weights of a QDQ graph anew, with its scales as they are.

    Args:
        source: the float32 graph that ``quantized`` was made from.
        quantized: changed in place; weights of a convolution ``w`` are its initialisers ``w_quantized`` int8
            [O, I / groups, k, k] and ``w_scale`` float32 [O].
        feeds: inputs of the graph, to measure what each layer sees.
        limit: largest integer weight, 63 for weights of 7 bits.

    Returns:
        How many convolutions were rounded anew. Grouped ones that are not depthwise keep their rounding.
    """
    model = onnx.load(source)
    known = {tensor.name: tensor for tensor in quantized.graph.initializer}
    floats = {tensor.name: tensor for tensor in model.graph.initializer}
    convs = [
        node
        for node in model.graph.node
        if node.op_type == "Conv"
        and f"{node.input[1]}_quantized" in known
        and _groups(node) in (1, floats[node.input[1]].dims[0])
    ]
    if not convs:
        return 0
    moments = _second_moments(model, convs, feeds)
    for node in convs:
        name = node.input[1]
        weight = numpy_helper.to_array(floats[name]).astype(np.float64)
        scale = numpy_helper.to_array(known[f"{name}_scale"]).astype(np.float64).reshape(-1)
        depthwise = _groups(node) > 1
        rows = weight.reshape(len(weight), 1, -1) if depthwise else weight.reshape(1, len(weight), -1)
        steps = np.broadcast_to(scale, len(weight)).reshape(rows.shape[:2])
        rounded = round_rows(rows, moments[node.name], steps, limit=limit).reshape(weight.shape)
        known[f"{name}_quantized"].CopyFrom(numpy_helper.from_array(rounded, f"{name}_quantized"))
    return len(convs)


def round_rows(
    rows: npt.NDArray[np.float64], moments: npt.NDArray[np.float64], steps: npt.NDArray[np.float64], *, limit: int
) -> npt.NDArray[np.int8]:
    """Round rows of weights to multiples of their step.

    Args:
        rows: float64 [G, R, d], R rows that see the same d inputs, in each of G groups.
        moments: float64 [G, d, d], mean products of those inputs.
        steps: float64 [G, R], > 0.
        limit: largest integer, 1..127.

    Returns:
        int8 [G, R, d] in -limit..limit, of low mean squared output error.
    """
    size = rows.shape[2]
    diagonal = np.einsum("gii->gi", moments).mean(1)
    damped = moments + (np.maximum(diagonal, 1e-12) * _DAMPING)[:, None, None] * np.eye(size)
    upper = np.swapaxes(np.linalg.cholesky(np.linalg.inv(damped)), 1, 2)
    left = rows.copy()
    result = np.empty(rows.shape, np.int8)
    for j in range(size):
        integers = np.clip(np.rint(left[:, :, j] / steps), -limit, limit)
        result[:, :, j] = integers.astype(np.int8)
        error = (left[:, :, j] - integers * steps) / upper[:, j, j, None]
        left[:, :, j + 1 :] -= error[:, :, None] * upper[:, j, None, j + 1 :]
    return result


def _groups(node: onnx.NodeProto) -> int:
    return int(_attribute(node, "group", 1))


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:  # noqa: ANN401 (an ONNX attribute is untyped)
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def _second_moments(
    model: onnx.ModelProto, convs: list[onnx.NodeProto], feeds: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> dict[str, npt.NDArray[np.float64]]:
    weights = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    outside = {value.name for value in (*model.graph.output, *model.graph.input)}
    names = list(dict.fromkeys(node.input[0] for node in convs))
    for name in names:
        if name not in outside:
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    inputs = {value.name for value in model.graph.input}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = [name for name in names if name not in inputs]
    generator = np.random.default_rng(0)
    sums: dict[str, npt.NDArray[np.float64]] = {}
    batches = 0
    for feed in feeds:
        values = {**feed, **(dict(zip(wanted, session.run(wanted, dict(feed)), strict=True)) if wanted else {})}
        batches += 1
        for node in convs:
            patches = _patches(values[node.input[0]], node, weights[node.input[1]][2:], generator)
            if _groups(node) > 1:  # [P, C, k * k] -> [C, k * k, k * k]
                by_channel = np.swapaxes(patches, 0, 1)
                moment = np.swapaxes(by_channel, 1, 2) @ by_channel
            else:
                flat = patches.reshape(len(patches), -1)
                moment = (flat.T @ flat)[None]
            sums[node.name] = sums.get(node.name, 0.0) + moment.astype(np.float64) / len(patches)
    return {name: total / batches for name, total in sums.items()}


def _patches(
    values: npt.NDArray[np.float32], node: onnx.NodeProto, kernel: tuple[int, int], generator: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Cut what the filter sees at random positions: float32 [P, C, k * k]."""
    top, left, bottom, right = _attribute(node, "pads", [0, 0, 0, 0])
    stride_y, stride_x = _attribute(node, "strides", [1, 1])
    padded = np.pad(values, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, tuple(kernel), axis=(2, 3))[:, :, ::stride_y, ::stride_x]
    n, channels, h, w = windows.shape[:4]
    count = min(_POSITIONS, n * h * w)
    chosen = generator.choice(n * h * w, count, replace=False)
    image, y, x = np.unravel_index(chosen, (n, h, w))
    return np.ascontiguousarray(windows[image, :, y, x]).reshape(count, channels, -1)
