"""The identity of an embedding space: rows of two ids are never mixed. It must not know how rows are used."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import onnx
from onnx import numpy_helper

from edge.bundle import Precision, sha256_file
from edge.inference.sessions import EMBEDDING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edge.bundle import Inputs


def embedding_ids(
    trunk_files: Mapping[Precision, Path], head: Path, states: Sequence[str], preprocessing: Inputs
) -> dict[Precision, str]:
    """Return the id of the embedding space of each precision.

    The sha256 of: the trunk file that runs, the part of the head that projects taps to rows, the preprocessing, and
    the class of numerics. A bank of other rows, or of another number of rows, is in the same space.

    Args:
        trunk_files: the trunk file of each precision.
        head: head.onnx, the float32 file: embeddings leave an int8 head before anything is rounded in it.
        states: names of the state's initialisers.
        preprocessing: the manifest's.
    """
    projection = _projection(head, set(states))
    names = {Precision.FLOAT32: "f32", Precision.BFLOAT16: "bf16", Precision.INT8: "int8"}
    return {
        precision: hashlib.sha256(
            "\n".join([sha256_file(path), projection, preprocessing.model_dump_json(), names[precision]]).encode()
        ).hexdigest()
        for precision, path in trunk_files.items()
    }


def _projection(head: Path, states: set[str]) -> str:
    """Hash what computes the embedding; all of a head that gives none.

    The exporter numbers values over the whole graph, so a product's setting behind the embedding renames what lies
    before it: values count by their order, only inputs and outputs of the graph by their names.
    """
    graph = onnx.load(head).graph
    outputs = [value.name for value in graph.output]
    wanted = {EMBEDDING} if EMBEDDING in outputs else set(outputs)
    used: list[onnx.NodeProto] = []
    for node in reversed(graph.node):  # in topological order, so one pass backwards finds every ancestor
        if not wanted.isdisjoint(node.output):
            wanted.update(node.input)
            used.append(node)
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in states}
    public = {*(value.name for value in graph.input), *outputs, *states, ""}
    names: dict[str, str] = {}
    digest = hashlib.sha256()
    for node in reversed(used):
        for name in (*node.input, *node.output):
            if name in names:
                continue
            names[name] = name if name in public else f"#{len(names)}"
            if name in tensors:
                values = numpy_helper.to_array(tensors[name])
                digest.update(f"{names[name]} {values.dtype} {values.shape}".encode())
                digest.update(values.tobytes())
        node.name = ""
        node.input[:], node.output[:] = [names[name] for name in node.input], [names[name] for name in node.output]
        digest.update(node.SerializeToString(deterministic=True))
    return digest.hexdigest()
