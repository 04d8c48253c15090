"""The tables that the Triton kernels walk, read back as the product they describe."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphopt.kernels import BlockLayout
from graphopt.kernels.gpu.derived import Derived
from graphopt.kernels.gpu.step_tables import (
    Steps,
    block_layout,
    forward_steps,
    gradient_slots,
    transposed_steps,
)


@st.composite
def layouts(draw: st.DrawFn) -> BlockLayout:
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    flat = draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    mask = torch.tensor(flat).view(shape)
    mask[0, 0] = True
    block = (draw(st.sampled_from([16, 32, 64])), draw(st.sampled_from([16, 32, 64])))
    return BlockLayout.from_mask(mask, *block)


def walked(
    steps: Steps, values: Tensor, size: tuple[int, int, int], strides: tuple[int, int]
) -> Tensor:
    """Return the matrix [inputs, outputs] that the kernel's addressing reads from the values."""
    inputs, width, step = size
    flat, k, n = values.flatten(), torch.arange(step), torch.arange(width)
    matrix = torch.zeros(inputs, steps.tiles * width)
    for tile in range(steps.tiles):
        for i in range(int(steps.starts[tile]), int(steps.starts[tile + 1])):
            dense, start = int(steps.dense[i]), int(steps.values[i])
            block = flat[start + k[:, None] * strides[0] + n * strides[1]]
            matrix[dense : dense + step, tile * width : (tile + 1) * width] += block
    return matrix


@given(layouts())
def test_steps_read_every_value_where_it_belongs(layout: BlockLayout) -> None:
    block_out, block_in = layout.block_out, layout.block_in
    values = torch.randn(layout.blocks, block_out, block_in)
    weight = layout.unpack(values)
    width, step = min(block_out, 32), min(block_in, 32)
    steps = forward_steps(layout.rows, layout.columns, layout, width, step)
    size = (layout.in_features, width, step)
    assert torch.equal(walked(steps, values, size, (1, block_in)), weight.t())
    width, step = min(block_in, 32), min(block_out, 32)
    steps = transposed_steps(layout.rows, layout.columns, layout, width, step)
    size = (layout.out_features, width, step)
    assert torch.equal(walked(steps, values, size, (block_in, 1)), weight)


@given(layouts())
def test_long_tiles_start_first_and_the_kernels_may_read_one_step_ahead(
    layout: BlockLayout,
) -> None:
    steps = forward_steps(layout.rows, layout.columns, layout, layout.block_out, 16)
    lengths = steps.starts.diff()
    assert sorted(steps.order.tolist()) == list(range(steps.tiles))
    assert (lengths[steps.order.long()].diff() <= 0).all()
    assert steps.longest == lengths.max()
    assert len(steps.dense) == len(steps.values) == steps.starts[-1] + 1
    assert all(table.dtype == torch.int32 for table in (steps.starts, steps.order, steps.dense))


@given(layouts(), st.sampled_from([16, 64, 128]), st.sampled_from([16, 32]))
def test_slots_cover_every_value_once(layout: BlockLayout, span: int, height: int) -> None:
    height, width = min(height, layout.block_out), min(layout.block_in, span)
    slots = gradient_slots(layout.rows, layout.columns, layout, height, span)
    weight = torch.randn(layout.out_features, layout.in_features)
    found = torch.full((layout.blocks * layout.block_out * layout.block_in,), float("nan"))
    at = torch.arange(height)[:, None] * layout.block_in + torch.arange(width)
    for group in range(slots.gradient_columns.numel()):
        top = int(slots.gradient_columns[group])
        for column, place in zip(slots.x_columns[group], slots.places[group], strict=True):
            if place >= 0:
                assert found[place + at].isnan().all()
                found[place + at] = weight[top : top + height, column : column + width]
    assert torch.equal(found.view(layout.blocks, layout.block_out, -1), layout.pack(weight))


def test_more_values_than_int32_counts_are_refused() -> None:
    rows = torch.zeros(1, dtype=torch.int32).expand(2**17)
    with pytest.raises(ValueError, match=r"fewer than 2147483648 stored values.*got 2147483648"):
        block_layout(rows, rows, 128, 128 * 2**17, (128, 128))


def test_what_is_derived_follows_its_tensors() -> None:
    kept: Derived[int] = Derived()
    computed = []

    def compute() -> int:
        computed.append(1)
        return len(computed)

    first, second = torch.zeros(3), torch.zeros(3)
    assert [kept.get((first, second), "a", compute) for _ in range(3)] == [1, 1, 1]
    assert kept.get((first, second), "b", compute) == 2
    # DistributedDataParallel writes equal buffers at every forward.
    second.copy_(torch.zeros(3))
    assert kept.get((first, second.clone()), "a", compute) == 1
    second.add_(1)
    assert kept.get((first, second), "a", compute) == 3
    assert kept.get((first, torch.full((3,), 2.0)), "a", compute) == 4
    first.data = torch.ones(3)
    assert kept.get((first, torch.full((3,), 2.0)), "a", compute) == 5


def test_what_is_derived_follows_tensors_that_count_no_changes() -> None:
    kept: Derived[Tensor] = Derived()
    with torch.inference_mode():
        uncounted = torch.zeros(3)
        first, second = (kept.get((uncounted,), "a", uncounted.clone) for _ in range(2))
        assert first is second
        uncounted.add_(1)
        assert torch.equal(kept.get((uncounted,), "a", uncounted.clone), torch.ones(3))


def test_what_is_derived_keeps_no_tensor_alive() -> None:
    kept: Derived[Tensor] = Derived()
    source = torch.zeros(3)
    kept.get((source,), "ones", lambda: torch.ones(3))
    assert len(kept._entries) == 1
    del source
    gc.collect()
    assert len(kept._entries) == 0
