"""Operators that runtimes are slow at are not in the files, and nothing else is replaced."""

from __future__ import annotations

import onnx_ir
import pytest
import torch
from torch import Tensor, nn

from graphopt.onnx_lowering import lower_for_runtimes
from graphopt.onnx_translation import quiet, translate


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x + self.linear(x))
        return result + x


class PutBack(nn.Module):
    """Takes the rows that a mask keeps, and puts them among zeros, made in two ways, or ones."""

    def __init__(self, filling: str, places: str = "nonzero") -> None:
        super().__init__()
        self.filling = filling
        self.places = places

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        made = {"zeros": x.new_zeros, "ones": x.new_ones}.get(self.filling)
        shape = (kept.shape[0], 3)
        result = x.new_full(shape, 0.0) if made is None else made(shape)
        if self.places == "any":
            return result.index_add(0, kept.long(), x)
        rows = torch.nonzero(kept).reshape(-1)
        torch._check(rows.shape[0] <= kept.shape[0])
        return result.index_add(0, rows, x.index_select(0, rows) * 2)


def lowered(model: nn.Module, *args: Tensor) -> tuple[onnx_ir.Model, onnx_ir.Model]:
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = tuple({0: batch} for _ in args)
    program = torch.export.export(model.eval(), args, dynamic_shapes=shapes, strict=False)
    with quiet():
        before = translate(program, None, None, 20)
    after = onnx_ir.from_proto(onnx_ir.to_proto(before))
    lower_for_runtimes(after)
    return before, after


def outputs(model: onnx_ir.Model, *args: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        onnx_ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [argument.name for argument in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, args, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def kinds(model: onnx_ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_sums_before_norms_are_kept_apart_and_others_left() -> None:
    model, x = Residual(), torch.randn(4, 6, 8)
    before, after = lowered(model, x)
    assert "Sum" not in kinds(before)
    assert kinds(after).count("Sum") == 1
    assert kinds(after).count("Add") == kinds(before).count("Add") - 1
    torch.testing.assert_close(outputs(after, x), model(x).detach())


def test_sums_of_types_that_onnx_runtime_cannot_sum_are_left() -> None:
    _, after = lowered(Residual().half(), torch.randn(4, 6, 8).half())
    assert "Sum" not in kinds(after)


@pytest.mark.parametrize("filling", ["zeros", "a scalar"])
@pytest.mark.parametrize("pattern", ["some", "none", "all"])
def test_rows_written_into_zeros_are_gathered(pattern: str, filling: str) -> None:
    kept = {
        "some": torch.tensor([True, False, False, True, True]),
        "none": torch.zeros(5, dtype=torch.bool),
        "all": torch.ones(5, dtype=torch.bool),
    }[pattern]
    x = torch.randn(5, 3)
    model = PutBack(filling)
    before, after = lowered(model, x, torch.tensor([True, False, True, False, True]))
    assert kinds(before).count("Gather") == kinds(after).count("Gather") - 1
    assert torch.equal(outputs(after, x, kept), model(x, kept))
    assert torch.equal(outputs(before, x, kept), model(x, kept))


@pytest.mark.parametrize(("filling", "places"), [("ones", "nonzero"), ("zeros", "any")])
def test_rows_that_may_meet_others_stay_scattered(filling: str, places: str) -> None:
    x, kept = torch.randn(5, 3), torch.tensor([True, False, True, True, False])
    model = PutBack(filling, places)
    before, after = lowered(model, x, kept)
    assert kinds(after).count("ScatterND") == kinds(before).count("ScatterND")
    torch.testing.assert_close(outputs(after, x, kept), model(x, kept))
