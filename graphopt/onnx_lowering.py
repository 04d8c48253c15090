"""Operators that runtimes are fast at, in place of equal ones that they are slow at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

_ORDER_ONLY = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that keep every element of an index."""


def lower_for_runtimes(model: onnx_ir.Model) -> None:
    """Rewrite a model in place; what it computes stays the same.

    * A sum before a layer norm is written as Sum: of Add and LayerNormalization ONNX Runtime makes
      SkipLayerNormalization, whose loops are not vectorised (1.31: 5 to 7 times slower than the
      two apart, at widths from 384 to 3072).
    * Rows that are written into zeros at places found by NonZero, as packed tokens are put back,
      are gathered instead: a fifth of a packed MiniLM's time in OpenVINO 2026.4 was ScatterND.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    _keep_sums_apart(model.graph)
    _gather_written_rows(model.graph)
    RemoveUnusedNodesPass()(model)


def _keep_sums_apart(graph: onnx_ir.Graph) -> None:
    import onnx_ir

    for node in graph:
        total = node.outputs[0]
        # ONNX Runtime has Sum on CPUs for these two types only.
        if (
            node.op_type == "Add"
            and total.dtype in (onnx_ir.DataType.FLOAT, onnx_ir.DataType.DOUBLE)
            and any(reader.op_type == "LayerNormalization" for reader, _ in total.uses())
        ):
            node.op_type = "Sum"


@dataclass(frozen=True)
class _WrittenRows:
    """Rows [rows, width...] that go to different places [rows, 1] in zeros of a shape."""

    rows: onnx_ir.Value
    dtype: onnx_ir.DataType
    width: tuple[int, ...]
    places: onnx_ir.Value
    shape: onnx_ir.Value


def _gather_written_rows(graph: onnx_ir.Graph) -> None:
    """Replace zeros with rows scattered into them by a gather from the rows and one of zeros."""
    writer = _Writer(graph)
    sources: dict[tuple[onnx_ir.Value, onnx_ir.Value], onnx_ir.Value] = {}
    for node in list(graph):
        written = _written_rows(node) if node.op_type == "ScatterND" else None
        if written is None:
            continue
        writer.place = node
        key = (written.shape, written.places)
        if key not in sources:
            sources[key] = writer.row_sources(*key)
        zero = writer.constant(np.zeros((1, *written.width), written.dtype.numpy()))
        rows = writer.add("Concat", [written.rows, zero], written.dtype, axis=0)
        result = writer.add("Gather", [rows, sources[key]], written.dtype, axis=0)
        result.shape = node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _written_rows(node: onnx_ir.Node) -> _WrittenRows | None:
    """Return what a ScatterND writes, if it writes whole rows to different places in zeros.

    Places that NonZero found in one dimension differ, so that writing and adding are the same.
    """
    zeros, places, rows = node.inputs
    shape = None if zeros is None else _shape_of_zeros(zeros)
    if shape is None or places is None or rows is None or not _are_different(places):
        return None
    if places.shape is None or len(places.shape) != 2 or rows.dtype is None or rows.shape is None:
        return None
    width = tuple(size for size in rows.shape[1:] if isinstance(size, int))
    if len(width) != len(rows.shape) - 1:
        return None
    return _WrittenRows(rows, rows.dtype, width, places, shape)


def _shape_of_zeros(value: onnx_ir.Value) -> onnx_ir.Value | None:
    """Return the shape of a tensor that is made of zeros, None for any other value."""
    maker = value.producer()
    if maker is None or maker.op_type not in ("ConstantOfShape", "Expand"):
        return None
    if maker.op_type == "Expand":
        scalar = maker.inputs[0]
        fill = None if scalar is None else scalar.const_value
        if fill is None or fill.size != 1 or np.any(fill.numpy()):
            return None
        return maker.inputs[1]
    attribute = maker.attributes.get("value")
    filled = attribute is not None and np.any(attribute.as_tensor().numpy())
    return None if filled else maker.inputs[0]


def _are_different(places: onnx_ir.Value) -> bool:
    """Say whether indices were found by NonZero in one dimension."""
    found = places.producer()
    while found is not None and found.op_type in _ORDER_ONLY:
        source = found.inputs[0]
        found = None if source is None else source.producer()
    if found is None or found.op_type != "NonZero" or found.inputs[0] is None:
        return False
    flags = found.inputs[0].shape
    return flags is not None and len(flags) == 1


class _Writer:
    """Adds nodes before a place in a graph, and constants, each under a new name."""

    place: onnx_ir.Node

    def __init__(self, graph: onnx_ir.Graph) -> None:
        self.graph = graph
        self.names = (f"lowered_{index}" for index in range(2**31))

    def row_sources(self, shape: onnx_ir.Value, places: onnx_ir.Value) -> onnx_ir.Value:
        """Return for every row of the result the row it comes from; one past the last for none."""
        import onnx_ir

        kind = onnx_ir.DataType.INT64
        first, one = self.constant(np.array([0])), self.constant(np.array([1]))
        total = self.add("Slice", [shape, first, one], kind)
        flat = self.add("Reshape", [places, self.constant(np.array([-1]))], kind)
        count = self.add("Shape", [flat], kind)
        limits = [self.constant(np.array(0)), self.add("Squeeze", [count], kind)]
        numbers = self.add("Range", [*limits, self.constant(np.array(1))], kind)
        nowhere = self.add("Expand", [count, total], kind)
        return self.add("ScatterND", [nowhere, places, numbers], kind)

    def constant(self, array: np.typing.NDArray[np.generic]) -> onnx_ir.Value:
        import onnx_ir

        tensor = onnx_ir.tensor(array)
        value = onnx_ir.Value(
            name=next(self.names),
            shape=onnx_ir.Shape(array.shape),
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def add(
        self,
        operator: str,
        inputs: list[onnx_ir.Value],
        dtype: onnx_ir.DataType,
        **attributes: int,
    ) -> onnx_ir.Value:
        import onnx_ir

        node = onnx_ir.node(operator, inputs, attributes)
        self.graph.insert_before(self.place, node)
        result = node.outputs[0]
        result.name, result.type = next(self.names), onnx_ir.TensorType(dtype)
        return result
