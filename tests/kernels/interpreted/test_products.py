"""The Triton kernels against float64, interpreted."""

from itertools import product

import numpy
import pytest
import torch

from graphopt.kernels.block_sparse_operator import ACTIVATIONS
from graphopt.kernels.gpu import launch
from graphopt.kernels.gpu.accuracy import PRODUCTS, Problem
from graphopt.kernels.gpu.self_test import run
from graphopt.kernels.gpu.tiles import Tile, find_tile

# One row of blocks is empty, one column too, and the last row is full.
MASK = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]]).bool()
DTYPES = {
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float16": (torch.float16, "half"),
    "bfloat16": (torch.bfloat16, "half"),
}
# Those of the presets, ones smaller than a step, and ones wider than any tile.
BLOCKS = [(128, 128), (64, 64), (128, 32), (16, 32), (32, 16), (64, 256), (256, 64)]


def tile_of(
    product: str, kind: str, block: tuple[int, int], tokens: int, name: str = "sm_80"
) -> Tile:
    operation = "weight_gradient" if product == "weight_gradient" else "multiply"
    side = block[1] if product == "input_gradient" else block[0]
    return find_tile(operation, kind, name, side, tokens)


def test_this_is_the_interpreter() -> None:
    assert launch.INTERPRETED


# The interpreter computes tf32 as float32: three blocks walk its tiles.
@pytest.mark.parametrize(
    ("name", "block"),
    [(name, block) for name in DTYPES for block in BLOCKS[: 3 if name == "tf32" else None]],
)
def test_products_are_exact_but_for_rounding(name: str, block: tuple[int, int]) -> None:
    dtype, kind = DTYPES[name]
    problem = Problem.random(MASK, block, 150, dtype)
    for wanted in PRODUCTS:
        found = run(problem, wanted, tile_of(wanted, kind, block, 150))
        assert found.dtype == dtype
        assert problem.excess(wanted, found) <= 1


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 64])
def test_few_tokens(tokens: int) -> None:
    for (dtype, kind), wanted in product(list(DTYPES.values())[::2], PRODUCTS[:2]):
        problem = Problem.random(MASK, (32, 64), tokens, dtype)
        tile = tile_of(wanted, kind, (32, 64), tokens)
        assert (tile.operation == "multiply_few_tokens") == (kind == "half" or tokens <= 16)
        assert problem.excess(wanted, run(problem, wanted, tile)) <= 1


def test_a_long_row_is_shared_out_among_programs() -> None:
    """Few tokens and one long row: programs add up float32 partial sums in a fixed order."""
    mask = torch.tensor([[0] * 24, [1] * 24]).bool()
    problem = Problem.random(mask, (16, 64), 3, torch.float16)
    tile = tile_of("forward", "half", (16, 64), 3)
    first, second = (run(problem, "forward", tile) for _ in range(2))
    assert problem.excess("forward", first) <= 1
    assert torch.equal(first, second)


def test_tokens_of_a_weight_gradient_are_shared_out_among_programs() -> None:
    problem = Problem.random(torch.tensor([[True, True, True]]), (64, 64), 1100, torch.bfloat16)
    tile = tile_of("weight_gradient", "half", (64, 64), 1100)
    first, second = (run(problem, "weight_gradient", tile) for _ in range(2))
    assert problem.excess("weight_gradient", first) <= 1
    assert torch.equal(first, second)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [9, 70])
def test_bias_and_activation_are_fused(activation: str, tokens: int) -> None:
    problem = Problem.random(MASK, (32, 32), tokens, torch.float32)
    tile = tile_of("forward", "ieee", (32, 32), tokens)
    # The exponential of a large number is infinity, as it should: its sigmoid is 0.
    with numpy.errstate(over="ignore"):
        found = run(problem, "forward", tile, activation)
    assert problem.excess("forward", found, activation=activation) <= 1
    others = [name for name in ACTIVATIONS if not name.startswith(activation[:4])]
    assert all(problem.excess("forward", found, activation=other) > 1 for other in others)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_nan_and_infinity_stay_in_their_tokens(activation: str) -> None:
    problem = Problem.random(MASK, (32, 32), 70, torch.float32)
    problem.x[3], problem.x[66] = float("nan"), float("nan")
    found = run(problem, "forward", tile_of("forward", "ieee", (32, 32), 70), activation)
    rows = found.isnan().any(1).nonzero().flatten()
    assert rows.tolist() == [3, 66]
    # The outputs of the empty row of blocks are the bias, whatever the input.
    assert not found[:, 32:64].isnan().any()


def test_no_token_is_read_beyond_the_last() -> None:
    """What lies behind the last row in memory may be NaN."""
    problem = Problem.random(MASK, (64, 64), 70, torch.float16)
    longer = torch.full((200, problem.x.shape[1]), float("nan"), dtype=torch.float16)
    longer[:70] = problem.x
    wider = torch.full((200, problem.gradient.shape[1]), float("nan"), dtype=torch.float16)
    wider[:70] = problem.gradient
    inside = Problem(
        layout=problem.layout,
        x=longer[:70],
        gradient=wider[:70],
        values=problem.values,
        bias=problem.bias,
    )
    for wanted in PRODUCTS:
        found = run(inside, wanted, tile_of(wanted, "half", (64, 64), 70))
        assert problem.excess(wanted, found) <= 1


def test_equal_calls_give_equal_bits() -> None:
    problem = Problem.random(MASK, (64, 64), 130, torch.float16)
    for wanted in PRODUCTS:
        tile = tile_of(wanted, "half", (64, 64), 130)
        assert torch.equal(run(problem, wanted, tile), run(problem, wanted, tile))


def test_the_largest_tiles() -> None:
    """They are for thousands of tokens; a few hundred show the same."""
    problem = Problem.random(MASK, (128, 32), 300, torch.float16)
    tile = find_tile("multiply", "half", "sm_90", 128, 8192)
    assert tile.span == 256
    assert problem.excess("forward", run(problem, "forward", tile)) <= 1


def test_a_wrong_result_exceeds_the_bound() -> None:
    problem = Problem.random(MASK, (64, 64), 70, torch.bfloat16)
    for wanted in PRODUCTS:
        found = run(problem, wanted, tile_of(wanted, "half", (64, 64), 70))
        wrong = found.clone()
        wrong.view(-1)[0] += 0.05 * found.float().std().to(found.dtype)
        assert problem.excess(wanted, wrong) > 1
