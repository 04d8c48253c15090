"""Block-sparse layers become plain ONNX nodes, and the model does not notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from graphopt import export_onnx
from graphopt.export_forms import export_forms
from graphopt.kernels.block_layout import BlockLayout
from graphopt.kernels.block_sparse_linear import BlockSparseLinear
from graphopt.onnx_runtime import run, session
from graphopt.passes.errors import ExportError

_SHAPES = {"Concat", "Reshape", "Shape", "Squeeze", "Unsqueeze"}


def _sparse(in_features: int, out_features: int, tile: int) -> BlockSparseLinear:
    return BlockSparseLinear.from_dense(
        nn.Linear(in_features, out_features), block_out=tile, block_in=16
    )


class Block(nn.Module):
    """Attention and a feed-forward part, all of whose layers are block-sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.projections = _sparse(64, 192, 64)
        self.output = _sparse(64, 64, 32)
        self.feed_forward = nn.Sequential(_sparse(64, 128, 32), nn.GELU(), _sparse(128, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.projections(self.norm(x)).unflatten(-1, (3, 4, 16)).transpose(1, 3)
        query, key, value = heads.unbind(2)
        attended = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        result: Tensor = x + self.feed_forward(x)
        return result


class Shared(nn.Module):
    """One layer called twice, and one that holds the same parameters."""

    def __init__(self) -> None:
        super().__init__()
        mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
        self.first = BlockSparseLinear(BlockLayout.from_mask(mask, 16, 12))
        self.again = self.first
        self.tied = BlockSparseLinear(self.first.layout)
        self.tied.values, self.tied.bias = self.first.values, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.first(x) + self.again(2 * x) + self.tied(x.relu())
        return result


class _Fails(nn.Module):
    """A layer whose export form breaks when it is made, traced or compared."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def export_form(self) -> nn.Module:
        if self.when == "made":
            raise ValueError("no such form")
        return _Triples() if self.when == "compared" else nn.Linear(3, 3)


class _Triples(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


def _state(model: nn.Module) -> list[tuple[str, int, list[str], list[int]]]:
    """Return every module: itself, the names in it, and its tensors, by identity."""
    return [
        (name, id(module), sorted(vars(module)), [id(value) for value in _tensors(module)])
        for name, module in model.named_modules()
    ]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize(
    ("build", "example", "plain"),
    [
        (
            lambda: nn.Sequential(_sparse(64, 96, 48), nn.ReLU(), _sparse(96, 32, 32)),
            (4, 64),
            {"Gather", "MatMul", "Add", "Reshape", "Concat", "Relu"},
        ),
        (Block, (2, 5, 64), None),
        (Shared, (3, 48), {"Gather", "MatMul", "Add", "Expand", "Mul", "Relu"} | _SHAPES),
    ],
)
def test_models_become_plain_nodes(
    build: Callable[[], nn.Module], example: tuple[int, ...], plain: set[str] | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = build(), torch.randn(example)
    before, expected = _state(model), model(x)
    report = export_onnx(model, tmp_path / "model.onnx", x)
    assert _state(model) == before
    assert torch.equal(model(x), expected)
    assert report.verification.failure is None
    assert len(report.verification.shapes) >= 4
    sizes = {0: "batch", 1: "sequence"} if len(example) == 3 else {0: "batch"}
    assert list(report.dynamic.values()) == [sizes]
    proto = onnx.load(report.path)
    kinds = {node.op_type for node in proto.graph.node}
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    assert {"Gather", "MatMul"} <= kinds
    assert plain is None or kinds <= plain
    runtime = session(report.path, threads=1)
    for shape in ([1, *example[1:]], [7, *(size + 6 for size in example[1:-1]), example[-1]]):
        other = torch.randn(shape)
        found = run(runtime, {report.inputs[0]: other})[report.outputs[0]]
        exact = copy.deepcopy(model).double()(other.double())
        rounding = (model(other) - exact).abs().max()
        unit = torch.finfo(torch.float32).eps / 2 * exact.abs().max()
        assert (found - exact).abs().max() <= 17 * max(rounding, unit)


def test_the_file_holds_the_kept_blocks_once(tmp_path: Path) -> None:
    layer = _sparse(256, 256, 128)
    assert layer.bias is not None
    report = export_onnx(layer, tmp_path / "model.onnx", torch.randn(2, 256))
    tensors = onnx.load(report.path).graph.initializer
    floats = [tensor for tensor in tensors if tensor.data_type == onnx.TensorProto.FLOAT]
    stored = sum(numpy_helper.to_array(tensor).size for tensor in floats)
    assert stored == layer.values.numel() + layer.bias.numel()


def test_float64_is_exported_as_before(tmp_path: Path) -> None:
    layer, x = _sparse(64, 32, 32).double(), torch.randn(3, 64).double()
    report = export_onnx(layer, tmp_path / "model.onnx", x)
    assert report.verification.difference < 1e-13


@pytest.mark.parametrize("when", ["made", "traced", "compared"])
def test_a_failed_export_leaves_the_model_as_it_was(when: str, tmp_path: Path) -> None:
    model = nn.Sequential(_sparse(64, 32, 32), _Fails(when))
    before = _state(model)
    with pytest.raises(ExportError):
        export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 64), opset=20, dynamic={})
    assert _state(model) == before
    assert not list(tmp_path.iterdir())


def test_forms_are_called_through_hooks_and_forwards_come_back() -> None:
    layer, x = _sparse(64, 32, 32), torch.randn(2, 64)
    seen: list[Any] = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(module))
    own = layer.forward
    layer.forward = own  # type: ignore[method-assign]
    expected = layer(x)
    with export_forms(nn.ModuleList([layer, layer])):
        assert layer.forward is not own
        torch.testing.assert_close(layer(x), expected)
    assert layer.forward is own
    assert seen == [layer, layer]


def test_torch_export_keeps_the_operator() -> None:
    with torch.no_grad():
        program = torch.export.export(_sparse(64, 32, 32), (torch.randn(2, 64),))
    names = [str(node.target) for node in program.graph.nodes]
    assert "graphopt.block_sparse_linear.default" in names
    assert "aten.index_select.default" not in names
