"""The block-sparse operators on the CPU against the dense reference, and as torch operators."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from graphopt.kernels import BlockLayout, block_sparse_linear, block_sparse_linear_reference
from graphopt.kernels.block_sparse_operator import ACTIVATIONS
from graphopt.kernels.cpu.routes import choose_route

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

MASKS = {
    "balanced": [[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]],
    "one dense row": [[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]],
    "empty row and column": [[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]],
    "everything": [[1, 1, 1, 1]] * 3,
    "one block": [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
}


def layout_of(pattern: str, block_out: int = 6, block_in: int = 5) -> BlockLayout:
    return BlockLayout.from_mask(torch.tensor(MASKS[pattern]).bool(), block_out, block_in)


def operands(
    layout: BlockLayout, tokens: int, dtype: torch.dtype, *, bias: bool = True, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    values = leaf(layout.blocks, layout.block_out, layout.block_in)
    vector = leaf(layout.out_features) if bias else None
    return leaf(tokens, layout.in_features), values, vector


def run(layout: BlockLayout, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    return block_sparse_linear(x, values, bias, layout.rows, layout.columns, layout.out_features)


def rounding_bound(dtype: torch.dtype, terms: int) -> float:
    """Bound a sum of products of numbers below 5, in float32 at least, stored in the dtype."""
    accumulated = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return 25 * terms * accumulated + 5 * math.sqrt(terms) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pattern", MASKS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
def test_outputs_and_gradients_are_those_of_the_dense_reference(
    tokens: int, pattern: str, bias: bool, dtype: torch.dtype
) -> None:
    layout = layout_of(pattern)
    leaves = operands(layout, tokens, dtype, bias=bias)
    wide = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
    assert wide[0] is not None
    assert wide[1] is not None
    expected = block_sparse_linear_reference(wide[0], wide[1], wide[2], layout)
    actual = run(layout, *leaves)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    bound = rounding_bound(dtype, layout.in_features + 1)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual.backward(weights)
    expected.backward(weights.double())
    bound = rounding_bound(dtype, max(tokens, layout.out_features))
    for leaf, reference in zip(leaves, wide, strict=True):
        if leaf is not None and reference is not None:
            assert leaf.grad is not None
            assert leaf.grad.dtype == dtype
            torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=0, atol=bound)
    for inference in (block_sparse_linear_inference(layout, *leaves) for _ in range(2)):
        torch.testing.assert_close(
            inference.double(),
            expected.detach(),
            rtol=0,
            atol=rounding_bound(dtype, layout.in_features + 1),
        )


def block_sparse_linear_inference(
    layout: BlockLayout, x: Tensor, values: Tensor, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    with torch.no_grad():
        return block_sparse_linear(
            x,
            values,
            bias,
            layout.rows,
            layout.columns,
            layout.out_features,
            activation,
            inference=True,
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("tiles", "tokens", "kept", "route"),
    [(9, 3, 2, "batched"), (9, 400, 2, "tiles"), (2, 3, 2, "tiles"), (3, 5, 4, "dense")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_inference_form_gives_the_same(
    dtype: torch.dtype, tiles: int, tokens: int, kept: int, route: str, bias: bool
) -> None:
    scores = torch.rand(tiles, 4, generator=torch.Generator().manual_seed(0))
    layout = BlockLayout.from_scores(scores, kept / 4, 16, 8)
    chosen = choose_route(dtype, tokens, tiles, layout.density, balanced=layout.is_balanced)
    written_in_place = dtype == torch.bfloat16 and tokens >= 256
    assert chosen == ("direct" if written_in_place else route)
    x, values, vector = operands(layout, tokens, dtype, bias=bias)
    expected = block_sparse_linear_reference(
        x.double(), values.double(), None if vector is None else vector.double(), layout
    )
    actual = block_sparse_linear_inference(layout, x, values, vector)
    bound = rounding_bound(dtype, layout.in_features + 1)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_fused_in_inference(activation: str) -> None:
    layout = layout_of("balanced")
    x, values, bias = operands(layout, 7, torch.float64)
    actual = block_sparse_linear_inference(layout, x, values, bias, activation)
    expected = block_sparse_linear_reference(x, values, bias, layout, activation)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_inputs_give_equal_bits(dtype: torch.dtype) -> None:
    layout = layout_of("one dense row", 32, 16)
    found = []
    for _ in range(2):
        leaves = operands(layout, 65, dtype)
        run(layout, *leaves).square().sum().backward()
        assert leaves[2] is not None
        output = block_sparse_linear_inference(layout, *leaves)
        found.append([output, *(leaf.grad for leaf in leaves if leaf is not None)])
    for first, second in zip(*found, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


@pytest.mark.parametrize("pattern", ["balanced", "empty row and column"])
def test_gradients_are_the_numerical_ones(pattern: str) -> None:
    layout = layout_of(pattern, 3, 2)
    leaves = [leaf for leaf in operands(layout, 4, torch.float64) if leaf is not None]

    def forward(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return run(layout, x, values, bias)

    assert torch.autograd.gradcheck(forward, leaves)


def test_only_wanted_gradients_are_computed() -> None:
    layout = layout_of("balanced")
    x, values, bias = operands(layout, 7, torch.float32)
    backward = 2 * 7 * values.numel()
    for wanted, flops in (([x], backward), ([values], backward), ([x, values], 2 * backward)):
        frozen = [leaf for leaf in (x, values) if all(leaf is not item for item in wanted)]
        for leaf in frozen:
            leaf.requires_grad_(False)
        output = run(layout, x, values, bias).sum()
        with FlopCounterMode(display=False) as counter:
            output.backward()
        assert counter.get_total_flops() == flops
        for leaf in frozen:
            leaf.requires_grad_()


def test_flops_are_those_of_the_stored_blocks() -> None:
    layout = layout_of("one dense row")
    leaves = operands(layout, 7, torch.float32)
    with FlopCounterMode(display=False) as counter:
        run(layout, *leaves)
    assert counter.get_total_flops() == 2 * 7 * leaves[1].numel()


def test_differentiating_twice_raises() -> None:
    layout = layout_of("balanced")
    leaves = operands(layout, 7, torch.float64)
    output = run(layout, *leaves).square().sum()
    (gradient,) = torch.autograd.grad(output, leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice; densify the layer"):
        gradient.sum().backward()


def test_the_operators_pass_the_checks_of_torch() -> None:
    layout = layout_of("balanced")
    x, values, bias = operands(layout, 7, torch.float32)
    indices = (layout.rows, layout.columns)
    operators = torch.ops.graphopt
    opcheck(operators.block_sparse_linear.default, (x, values, bias, *indices, 18))
    opcheck(operators.block_sparse_linear.default, (x, values, None, *indices, 18))
    gradient = torch.randn(7, 18)
    opcheck(
        operators.block_sparse_linear_input_gradient.default,
        (gradient, values.detach(), *indices, 20),
    )
    opcheck(
        operators.block_sparse_linear_weight_gradient.default,
        (gradient, x.detach(), *indices, 6, 5),
    )
    opcheck(
        operators.block_sparse_linear.default,
        (x.detach(), values.detach(), None, *indices, 18, "relu", True),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_operands_and_returns_float32_gradients(dtype: torch.dtype) -> None:
    layout = layout_of("balanced")
    leaves = operands(layout, 7, torch.float32)
    with torch.autocast("cpu", dtype):
        output = run(layout, *leaves)
        inference = block_sparse_linear_inference(layout, *leaves)
    assert output.dtype == inference.dtype == dtype
    cast = [None if leaf is None else leaf.detach().to(dtype) for leaf in leaves]
    assert cast[0] is not None
    assert cast[1] is not None
    assert torch.equal(output, run(layout, cast[0], cast[1], cast[2]))
    output.float().sum().backward()
    assert all(leaf is None or leaf.grad.dtype == torch.float32 for leaf in leaves)  # type: ignore[union-attr]


def test_autocast_leaves_float64_alone() -> None:
    layout = layout_of("balanced")
    leaves = operands(layout, 7, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(layout, *leaves).dtype == torch.float64


def test_operands_that_do_not_fit_are_refused() -> None:
    layout = layout_of("balanced")
    x, values, bias = operands(layout, 7, torch.float32)
    with pytest.raises(ValueError, match=r"one dtype, got torch.float64, torch.float32"):
        run(layout, x.double(), values, bias)
    with pytest.raises(ValueError, match=r"expected a bias \[18\], got \[5\]"):
        run(layout, x, values, torch.zeros(5))
    with pytest.raises(ValueError, match=r"x \[tokens, in_features\].* got \[1, 7, 20\]"):
        run(layout, x[None], values, bias)
    with pytest.raises(ValueError, match="expected one of none, relu"):
        block_sparse_linear_inference(layout, x, values, bias, "tan")
    with pytest.raises(ValueError, match="relu is fused in inference only"):
        block_sparse_linear(x, values, bias, layout.rows, layout.columns, 18, "relu")


def test_an_inference_product_runs_with_gradients_enabled_and_has_none() -> None:
    layout = layout_of("balanced")
    x, values, bias = operands(layout, 7, torch.float32)
    result = block_sparse_linear(x, values, bias, layout.rows, layout.columns, 18, inference=True)
    torch.testing.assert_close(result, run(layout, x, values, bias))
    with pytest.raises(RuntimeError, match="inference=True has no gradient"):
        result.sum().backward()
