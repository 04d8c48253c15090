"""Rows taken out and put back: the public functions and the operators, against a loop over rows."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from graphopt.kernels import combine_rows, gather_rows, scatter_rows

OPERATORS = torch.ops.graphopt
FORMS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "public": (gather_rows, scatter_rows, combine_rows),
    "operators": (OPERATORS.gather_rows, OPERATORS.scatter_rows, OPERATORS.combine_rows),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
NAN = float("nan")


def gathered(x: Tensor, index: Tensor) -> Tensor:
    result = torch.zeros(len(index), *x.shape[1:], dtype=x.dtype)
    for place, row in enumerate(index.tolist()):
        result[place] = x[row]
    return result


def combined(base: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    result = base.clone()
    for place, row in enumerate(index.tolist()):
        result[row] = rows[place]
    return result


@pytest.fixture(params=FORMS)
def forms(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], ...]:
    return FORMS[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 33), (7, 3, 5)])
@pytest.mark.parametrize("index", [[], [4], [5, 0, 3], [6, 5, 4, 3, 2, 1, 0]])
def test_rows(
    forms: tuple[Callable[..., Tensor], ...],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    index: list[int],
) -> None:
    gather, scatter, combine = forms
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    numbers = torch.tensor(index, dtype=torch.int64)
    rows = gather(x, numbers)
    assert rows.dtype == dtype
    assert torch.equal(rows, gathered(x, numbers))
    assert torch.equal(scatter(rows, numbers, 7), combined(torch.zeros_like(x), numbers, rows))
    assert torch.equal(combine(x, numbers, -rows), combined(x, numbers, -rows))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_masks_and_positions(forms: tuple[Callable[..., Tensor], ...], dtype: torch.dtype) -> None:
    gather, scatter, combine = forms
    x = torch.arange(12).view(6, 2).remainder(3).to(dtype)
    index = torch.tensor([5, 1])
    rows = gather(x, index)
    assert torch.equal(rows, gathered(x, index))
    assert torch.equal(scatter(rows, index, 6), combined(torch.zeros_like(x), index, rows))
    assert torch.equal(combine(x, index, rows.flip(0)), combined(x, index, rows.flip(0)))


def test_tensors_as_they_come(forms: tuple[Callable[..., Tensor], ...]) -> None:
    gather, scatter, combine = forms
    wide = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[7, 1], [2, 1], [5, 1]])[:, 0]
    for x in (wide[:, 3:20], wide.t()[:20], wide[:1].expand(20, 40), wide[:, 5]):
        rows = gather(x, index)
        assert rows.is_contiguous()
        assert torch.equal(rows, gathered(x, index))
        apart = torch.stack([rows, rows], -1)[..., 0]
        wanted = combined(torch.zeros(len(x), *x.shape[1:]), index, rows)
        assert torch.equal(scatter(apart, index, len(x)), wanted)
        assert torch.equal(combine(x, index, -apart), combined(x, index, -rows))


def test_nan_stays_in_its_row(forms: tuple[Callable[..., Tensor], ...]) -> None:
    """Forward and backward: neither rows nor gradients of rows that are not taken are read."""
    gather, scatter, combine = forms
    x = torch.ones(6, 4)
    x[[1, 4]] = NAN
    index = torch.tensor([0, 3, 5])
    rows = gather(x, index)
    assert torch.equal(rows, torch.ones(3, 4))
    assert not scatter(rows, index, 6).isnan().any()
    assert not combine(x, torch.tensor([1, 4, 2]), rows).isnan().any()
    gradient = torch.ones(6, 4)
    gradient[[1, 4]] = NAN
    base = x.clone().requires_grad_()
    part = torch.ones(2, 4, requires_grad=True)
    combine(base, torch.tensor([1, 4]), part).backward(gradient)
    assert base.grad is not None
    assert part.grad is not None
    assert torch.equal(base.grad, combined(gradient, torch.tensor([1, 4]), torch.zeros(2, 4)))
    assert part.grad.isnan().all()
    part = torch.ones(3, 4, requires_grad=True)
    scatter(part, index, 6).backward(gradient)
    assert torch.equal(part.grad, torch.ones(3, 4))  # type: ignore[arg-type]


def test_gradients(forms: tuple[Callable[..., Tensor], ...]) -> None:
    gather, scatter, combine = forms
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    rows = torch.randn(3, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    index = torch.tensor([4, 0, 5])
    for function, operands in (
        (lambda x: gather(x, index).sin(), (x,)),
        (lambda rows: scatter(rows, index, 6).sin(), (rows,)),
        (lambda x, rows: combine(x, index, rows).sin(), (x, rows)),
        (lambda rows: combine(x.detach(), index, rows).sin(), (rows,)),
        (lambda x: combine(x, index, rows.detach()).sin(), (x,)),
    ):
        assert gradcheck(function, operands)
        assert gradgradcheck(function, operands)


@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 3)])
def test_operators_are_sound(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    rows = torch.randn(2, *shape[1:], requires_grad=True)
    index = torch.tensor([4, 1])
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (OPERATORS.gather_rows.default, (x, index)),
        (OPERATORS.scatter_rows.default, (rows, index, 6)),
        (OPERATORS.combine_rows.default, (x, index, rows)),
        (OPERATORS.combine_rows.default, (turned, index, rows)),
    ]
    for operator, arguments in calls:
        opcheck(operator, arguments)


def test_operands_that_do_not_fit_are_refused() -> None:
    x, index = torch.zeros(5, 3), torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match=r"their numbers \[taken\] in int64.*int32"):
        OPERATORS.gather_rows(x, index.int())
    with pytest.raises(RuntimeError, match="one number for every row, got 2 for"):
        OPERATORS.scatter_rows(x, index, 9)
    with pytest.raises(RuntimeError, match=r"rows like those of \[5, 3\].*got \[2, 4\]"):
        OPERATORS.combine_rows(x, index, torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match=r"float32, got .* in torch\.float64"):
        OPERATORS.combine_rows(x, index, torch.zeros(2, 3, dtype=torch.float64))


def test_functions_compile_with_any_sizes() -> None:
    def through(x: Tensor, index: Tensor) -> Tensor:
        rows = gather_rows(x, index)
        return combine_rows(x, index, rows.sin()) + scatter_rows(rows, index, x.shape[0])

    torch._dynamo.reset()
    compiled = torch.compile(through, fullgraph=True, dynamic=True, backend="aot_eager")
    for size, width in ((6, 4), (9, 5), (3, 2)):
        x = torch.randn(size, width, requires_grad=True)
        index = torch.tensor([2, 0])
        found, wanted = compiled(x, index), through(x, index)
        torch.testing.assert_close(found, wanted)
        (a,) = torch.autograd.grad(found.square().sum(), x)
        (b,) = torch.autograd.grad(wanted.square().sum(), x)
        torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Packed(torch.nn.Module):
    """Rows that are not zero, through the functions or the operators."""

    def __init__(self, forms: tuple[Callable[..., Tensor], ...]) -> None:
        super().__init__()
        self.forms = forms

    def forward(self, x: Tensor) -> Tensor:
        gather, scatter, combine = self.forms
        index = x[:, 0].nonzero().flatten()
        rows = gather(x, index)
        return combine(x, index, rows.exp()) + scatter(rows, index, x.shape[0])


def test_counts_that_depend_on_data_are_exported(
    forms: tuple[Callable[..., Tensor], ...],
) -> None:
    rows = torch.export.Dim("rows", min=2)
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0], [4.0, 5.0], [0.0, 0.0]])
    program = torch.export.export(Packed(forms), (x,), dynamic_shapes=({0: rows},), strict=False)
    other = torch.cat([x, x[:2] + 1])
    assert torch.equal(program.module()(other), Packed(forms)(other))


def test_the_operators_run_on_cuda_devices_and_plain_torch_is_exported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which of the two is called is decided before anything is computed: fake tensors show it."""
    from torch._subclasses import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        found: ClassVar[list[str]] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.found.append(func.name())
            return func(*args, **(kwargs or {}))

    def called(device: str) -> set[str]:
        Names.found.clear()
        with FakeTensorMode(), Names():  # type: ignore[no-untyped-call]
            x = torch.empty(4, 2, device=device)
            index = torch.empty(3, dtype=torch.int64, device=device)
            rows = gather_rows(x, index)
            combine_rows(x, index, rows)
            scatter_rows(rows, index, 4)
        return {name for name in Names.found if name.startswith("graphopt::")}

    all_three = {f"graphopt::{name}_rows" for name in ("gather", "scatter", "combine")}
    assert called("cuda") == all_three
    assert called("cpu") == set()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert called("cuda") == set()
