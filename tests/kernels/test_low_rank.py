"""`LowRankLinear` against the dense product that it stands for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from graphopt.kernels import LowRankLinear, low_rank_linear_reference


def module_and_input(
    shape: tuple[int, ...], rank: int, dtype: torch.dtype, *, bias: bool = True
) -> tuple[LowRankLinear, Tensor]:
    module = LowRankLinear(shape[-1], 5, rank, bias, dtype=dtype)
    return module, torch.randn(shape, dtype=dtype, requires_grad=True)


def wide(module: LowRankLinear, x: Tensor) -> list[Tensor]:
    """Return the input and the parameters in float64, as leaves."""
    tensors = [x, module.down, module.up, *([] if module.bias is None else [module.bias])]
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7), (2, 1, 3, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_dense_product(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    module, x = module_and_input(shape, 3, dtype, bias=bias)
    leaves = wide(module, x)
    wide_x, down, up = leaves[:3]
    expected = low_rank_linear_reference(wide_x, down, up, leaves[3] if bias else None)
    actual = module(x)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    expected.sum().backward()
    actual.sum().backward()
    # Each value is a chain of sums of at most 7 and 3 terms over magnitudes of order 1, and
    # gradients sum over at most 6 rows: 64 roundings bound all of them.
    atol = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)
    parameters = [x, module.down, module.up, *([module.bias] if bias else [])]
    for parameter, leaf in zip(parameters, leaves, strict=True):
        assert parameter is not None
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), leaf.grad, rtol=0, atol=atol)


def test_gradients_are_the_numerical_ones() -> None:
    module, x = module_and_input((3, 7), 2, torch.float64)
    assert module.bias is not None

    def run(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        values = {"down": down, "up": up, "bias": bias}
        result = torch.func.functional_call(module, values, (x,))
        assert isinstance(result, Tensor)
        return result

    assert torch.autograd.gradcheck(run, (x, module.down, module.up, module.bias))


def test_it_holds_the_factors_and_nothing_else() -> None:
    module, x = module_and_input((3, 7), 2, torch.float32)
    assert {k: list(v.shape) for k, v in module.state_dict().items()} == {
        "down": [2, 7],
        "up": [5, 2],
        "bias": [5],
    }
    other = LowRankLinear(7, 5, 2)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), module(x))
    assert twin.down is not module.down
    torch.testing.assert_close(module.weight, module.up @ module.down)


def test_new_parameters_vary_like_those_of_a_linear_layer() -> None:
    weight = LowRankLinear(256, 256, 64).weight
    # 65536 products of standard deviation (3 * 256) ** -0.5, correlated through 64 ranks: the
    # variance of their mean square is about 4 / (256 * 64) of its square.
    assert weight.square().mean().item() * 3 * 256 == pytest.approx(1, abs=6 * (4 / 2**14) ** 0.5)


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_cannot_be_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"a rank from 1 to 5, got {rank}"):
        LowRankLinear(7, 5, rank)


def test_it_exports_as_two_products() -> None:
    module, x = module_and_input((3, 7), 2, torch.float32)
    rows = torch.export.Dim("rows")
    exported = torch.export.export(module, (x.detach(),), dynamic_shapes=((rows, None),))
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert names == ["aten.linear.default", "aten.linear.default"]
    other = torch.randn(6, 7)
    assert torch.equal(exported.module()(other), module(other))


def test_it_compiles_in_one_graph() -> None:
    module, x = module_and_input((3, 7), 2, torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
