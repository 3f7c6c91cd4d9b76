"""From torch modules to the two ONNX graphs of a bundle, byte for byte the same each time.

The one place in deploy that needs torch. It must not know what a method does, only the shape of a trunk and a head.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import helper

from edge.bundle import STRIDE_MULTIPLE
from edge.errors import DataError, EngineError, UsageError
from edge.inference.onnx_file import with_initialisers
from edge.inference.sessions import ANOMALY_MAP, EMBEDDING, IMAGE, PRODUCT, ROUTE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt
    from torch import nn

OPSET = 20
BATCH = "n"
# Raised when the bytes that this module writes change for equal weights: it is part of every trunk cache key.
EXPORTER_VERSION = 1
# float32 sums in another order: 1e-4 of a tap's largest value was never reached on Lite0 (worst measured 1e-5).
TAP_TOLERANCE = 1e-4

# A graph runs unattended for months: nothing in it may loop, branch or draw at random.
_FORBIDDEN_OPS = frozenset(
    {"If", "Loop", "Scan", "SequenceMap", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
     "Multinomial", "Bernoulli", "Dropout"}
)  # fmt: skip
_OUTPUTS = {
    (3,): (ANOMALY_MAP,),
    (3, 3): (ANOMALY_MAP, EMBEDDING),
    (3, 2): (ANOMALY_MAP, ROUTE),
    (3, 3, 2): (ANOMALY_MAP, EMBEDDING, ROUTE),
}
"""What a head returns, by its axes."""
_TRUNK_OPS = frozenset({"Conv", "Clip", "Add", "Pad", "Transpose", "Cast", "Sub", "Mul", "Div", "Identity"})


def export_trunk(trunk: nn.Module, path: Path, *, size: tuple[int, int]) -> str:
    """Write trunk.onnx.

    The module is traced at one size, batch norm folded into the convolutions, and N, H and W are made dynamic in the
    file; that is sound because only size-independent operators are allowed, and it is checked against torch at two
    other sizes. The written file is then the same bytes for the same weights, so its sha256 addresses it.

    Args:
        trunk: ``forward(image)``, uint8 [N, H, W, 3] RGB -> a tuple of float32 [N, C, h, w], one per name in its
            attribute ``tap_names``; for any H and W that are multiples of 32.
        path: file to write.
        size: (H, W) in pixels at which to trace, multiples of 32.

    Returns:
        The sha256 of the file, 64 hex digits.

    Raises:
        UsageError: the size is no multiple of 32.
        DataError: the module does not export to the allowed operators, or the file differs from the module.
    """
    if any(side < STRIDE_MULTIPLE or side % STRIDE_MULTIPLE for side in size):
        raise UsageError(f"trunk size {size}: height and width must be multiples of {STRIDE_MULTIPLE}")
    names = tuple(trunk.tap_names)
    trunk = trunk.eval()
    example = torch.zeros(2, *size, 3, dtype=torch.uint8)
    model = _onnx(trunk, (example,), inputs=(IMAGE,), outputs=names)
    _require_ops(model, allowed=_TRUNK_OPS, what="trunk")
    strides = {value.name: size[0] // value.type.tensor_type.shape.dim[2].dim_value for value in model.graph.output}
    _set_dims(model.graph.input[0], (BATCH, "height", "width", 3))
    for value in model.graph.output:
        channels = value.type.tensor_type.shape.dim[1].dim_value
        _set_dims(value, (BATCH, channels, f"height/{strides[value.name]}", f"width/{strides[value.name]}"))
    content = _write(model, path)
    for batch, height, width in ((1, size[0] + 32, size[1]), (3, size[0], size[1] + 64)):
        _check_trunk(trunk, content, names, (batch, height, width, 3))
    return hashlib.sha256(content).hexdigest()


def export_head(head: nn.Module, path: Path, *, tap_shapes: Mapping[str, Sequence[int]]) -> str:
    """Write head.onnx.

    The buffers in the head's ``state_names`` become float32 initialisers under exactly those names, in the module's
    own shape and layout: neither folded nor transposed, so that a box can put a new state in their place.

    Args:
        head: ``forward(*taps)`` -> ``(anomaly_map,)`` float32 [N, h, w], ``(anomaly_map, embedding)`` with
            embedding float32 [N, L, D], or either with a route float32 [N, E] behind it; attributes ``tap_names``,
            ``state_names``, ``map_stride``. One with ``takes_product`` also takes an int64 [N] after the taps, and
            may name in ``product_state`` the states whose first axis counts products.
        path: file to write.
        tap_shapes: shape [C, h, w] of each tap; N is dynamic in the file, h and w are not.

    Returns:
        The sha256 of the file, 64 hex digits.

    Raises:
        DataError: a tap has no shape, a state is no float32 buffer, the head returns something else, it uses an
            operator that branches or draws at random, or it cannot do with a state of one more product.
    """
    taps, states = tuple(head.tap_names), tuple(head.state_names)
    missing = [name for name in taps if name not in tap_shapes]
    if missing:
        raise DataError(f"head: no shape given for tap {', '.join(missing)}; the trunk gives {', '.join(tap_shapes)}")
    buffers = dict(head.named_buffers())
    for name in states:
        if name not in buffers or buffers[name].dtype != torch.float32:
            raise DataError(f"head: state {name!r} must be a float32 buffer of the module; register it as one")
    head = head.eval()
    generator = torch.Generator().manual_seed(0)
    examples = tuple(torch.rand((2, *tap_shapes[name]), generator=generator) for name in taps)
    inputs = taps
    if getattr(head, "takes_product", False):
        examples, inputs = (*examples, torch.zeros(2, dtype=torch.int64)), (*taps, PRODUCT)
    feed = {name: example.numpy() for name, example in zip(inputs, examples, strict=True)}
    with torch.no_grad():
        results = head(*examples)
    ranks = tuple(result.ndim for result in results) if isinstance(results, tuple) else ()
    if ranks not in _OUTPUTS:
        raise DataError(
            "head: forward must return (map [N, h, w],) or (map, embedding [N, L, D]), either with a route [N, E] "
            f"behind it, got ranks {list(ranks)}"
        )
    outputs = _OUTPUTS[ranks]
    model = _onnx(head, examples, inputs=inputs, outputs=outputs, dynamic_batch=True, states=states)
    _require_ops(model, allowed=None, what="head")
    _require_state(model, {name: tuple(buffers[name].shape) for name in states})
    content = _write(model, path)
    grown = tuple(getattr(head, "product_state", ()))
    if grown:
        _check_grown(content, {name: buffers[name].detach().cpu().numpy() for name in states}, grown, feed)
    return hashlib.sha256(content).hexdigest()


def export_fixed_trunk(trunk: nn.Module, path: Path, *, shape: Sequence[int]) -> str:
    """Write trunk.onnx of a trunk that is made for one size of input; N is dynamic in the file.

    Args:
        trunk: ``forward(image)``, float32 [N, ...] -> a tuple of float32 [N, C, h, w], one per name in its attribute
            ``tap_names``.
        path: file to write.
        shape: of one input.

    Returns:
        The sha256 of the file, 64 hex digits.

    Raises:
        DataError: the module does not export, or uses an operator that branches or draws at random.
        EngineError: the file differs from the module.
    """
    names, trunk = tuple(trunk.tap_names), trunk.eval()
    model = _onnx(trunk, (torch.zeros(2, *shape),), inputs=(IMAGE,), outputs=names, dynamic_batch=True)
    _require_ops(model, allowed=None, what="trunk")
    content = _write(model, path)
    for batch in (1, 3):
        example = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
        _compare_trunk(trunk, content, names, example)
    return hashlib.sha256(content).hexdigest()


def tap_shapes(trunk: nn.Module, shape: Sequence[int], dtype: str = "uint8") -> dict[str, tuple[int, ...]]:
    """Return the shape [C, h, w] of each tap for an input of ``shape``: (H, W) or (H, W, 3) of an image."""
    whole = (*shape, 3) if dtype == "uint8" and len(shape) == 2 else tuple(shape)  # noqa: PLR2004 (without channels)
    with torch.no_grad():
        taps = trunk.eval()(torch.zeros(1, *whole, dtype=getattr(torch, dtype)))
    return {name: tuple(tap.shape[1:]) for name, tap in zip(trunk.tap_names, taps, strict=True)}


def _onnx(
    module: nn.Module,
    examples: tuple[torch.Tensor, ...],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_batch: bool = False,
    states: Sequence[str] = (),
) -> onnx.ModelProto:
    shapes: Any = None
    if dynamic_batch:
        shapes = tuple({0: torch.export.Dim(BATCH)} for _ in examples)
        if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values()):
            shapes = (shapes,)
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # it names every operator of torchvision that is not installed
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, examples, dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, input_names=list(inputs),
                output_names=list(outputs), optimize=False, verbose=False,
            )  # fmt: skip
            _optimize(program, states)
    except torch.onnx.errors.OnnxExporterError as error:
        raise DataError(
            f"{type(module).__name__} cannot be exported to ONNX: {str(error).splitlines()[0]}; forward may use only "
            "operators with a fixed shape and no Python control flow on tensors"
        ) from error
    finally:
        exporter_log.setLevel(level)
    return _canonical(onnx_ir.to_proto(program.model))


def _optimize(program: torch.onnx.ONNXProgram, states: Sequence[str]) -> None:
    """Fold constants and batch norm, with the state hidden as inputs so that nothing is computed from it."""
    graph = program.model.graph
    hidden = {}
    for name in states:
        if name not in graph.initializers:
            raise DataError(f"head: state {name!r} is not used by forward; drop it from state_names")
        value = graph.initializers.pop(name)
        hidden[name] = (value, value.const_value)
        value.const_value = None
        graph.inputs.append(value)
    program.optimize()
    graph = program.model.graph
    for name, (_, tensor) in hidden.items():
        value = next(value for value in graph.inputs if value.name == name)
        graph.inputs.remove(value)
        value.const_value = tensor
        graph.initializers.add(value)


def _canonical(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop whatever depends on where and when the graph was made, and name nodes by the module they come from."""
    graph = model.graph
    counts: dict[str, int] = {}
    for node in graph.node:
        scope = _scope(node)
        stem = f"{scope}/{node.op_type}" if scope else node.op_type
        counts[stem] = counts.get(stem, -1) + 1
        node.name = f"{stem}_{counts[stem]}"
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    del graph.value_info[:]
    del graph.metadata_props[:], model.metadata_props[:]
    graph.doc_string = model.doc_string = ""
    graph.name = "graph"
    model.producer_name, model.producer_version = "lineward", ""
    initializers = sorted(graph.initializer, key=lambda tensor: tensor.name)
    del graph.initializer[:]
    graph.initializer.extend(initializers)
    return model


def _scope(node: onnx.NodeProto) -> str:
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = ast.literal_eval(entry.value)
            # The last scope is the operator itself, the first the root module.
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def _write(model: onnx.ModelProto, path: Path) -> bytes:
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString(deterministic=True)
    path.write_bytes(content)
    return content


def _set_dims(value: onnx.ValueInfoProto, dims: Sequence[str | int]) -> None:
    dtype = value.type.tensor_type.elem_type
    value.CopyFrom(helper.make_tensor_value_info(value.name, dtype, list(dims)))


def _require_ops(model: onnx.ModelProto, *, allowed: frozenset[str] | None, what: str) -> None:
    ops = {node.op_type for node in model.graph.node}
    wrong = ops & _FORBIDDEN_OPS if allowed is None else ops - allowed
    if wrong:
        raise DataError(f"{what}: operator {', '.join(sorted(wrong))} is not allowed in the graph; rewrite forward")


def _require_state(model: onnx.ModelProto, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {tensor.name: (tuple(tensor.dims), tensor.data_type) for tensor in model.graph.initializer}
    for name, shape in expected.items():
        if found.get(name) != (shape, onnx.TensorProto.FLOAT):
            raise DataError(f"head: state {name!r} is {found.get(name)} in the graph, expected float32 {shape}")


def _check_grown(
    content: bytes,
    states: Mapping[str, npt.NDArray[np.float32]],
    grown: Sequence[str],
    feed: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Make sure that a state of one more product leaves the others' maps alone, and gives the same for a copy."""
    foreign = sorted(set(grown) - set(states))
    if foreign:
        raise DataError(f"head: product_state names {', '.join(foreign)}, not in state_names; add it there")
    counts = {len(states[name]) for name in grown}
    if len(counts) != 1:
        raise DataError(f"head: states of {', '.join(grown)} count {sorted(counts)} products; give each as many rows")
    count = counts.pop()
    more = {name: np.concatenate([states[name], states[name][:1]]) for name in grown}
    wanted, same, copied = (
        _map_of(with_initialisers(content, state, more_rows=grown), {**feed, PRODUCT: np.full(2, product, np.int64)})
        for state, product in (({}, 0), (more, 0), (more, count))
    )
    error = max(float(np.abs(other - wanted).max()) for other in (same, copied))
    if not error <= TAP_TOLERANCE * float(np.abs(wanted).max()):
        raise DataError(
            "head: its map depends on how many products its state has rows for; choose rows by index_select alone"
        )


def _map_of(content: bytes, feed: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    import onnxruntime  # noqa: PLC0415 (only a head of several products is run here)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        return np.asarray(session.run([ANOMALY_MAP], {name: feed[name] for name in names})[0])
    except Exception as error:  # the engine has no error of its own that is public
        raise DataError(
            f"head: does not run with a state of one more product ({str(error).splitlines()[0]}); choose rows by "
            "index_select alone"
        ) from error


def _check_trunk(trunk: nn.Module, content: bytes, names: Sequence[str], shape: tuple[int, ...]) -> None:
    _compare_trunk(trunk, content, names, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def _compare_trunk(trunk: nn.Module, content: bytes, names: Sequence[str], image: npt.NDArray[Any]) -> None:
    import onnxruntime  # noqa: PLC0415 (exporting a head needs no engine)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = trunk(torch.from_numpy(image))
    for name, wanted, got in zip(names, expected, session.run(list(names), {IMAGE: image}), strict=True):
        error = float(np.abs(got - wanted.numpy()).max() / max(float(wanted.abs().max()), 1e-12))
        if got.shape != tuple(wanted.shape) or not error <= TAP_TOLERANCE:
            raise EngineError(
                f"trunk: tap {name} of the written graph differs from torch by {error:.2e} of its largest value at "
                f"{image.shape[1]}x{image.shape[2]} (limit {TAP_TOLERANCE}); it must compute the same at every size"
            )
