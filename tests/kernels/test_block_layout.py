"""The block format: packing is exact, its size is the theory's, bad indices are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.kernels import BlockLayout

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@st.composite
def layouts(draw: st.DrawFn) -> BlockLayout:
    tiles, groups = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    bits = draw(st.lists(st.booleans(), min_size=tiles * groups, max_size=tiles * groups))
    bits[draw(st.integers(0, len(bits) - 1))] = True
    mask = torch.tensor(bits).view(tiles, groups)
    return BlockLayout.from_mask(mask, draw(st.integers(1, 7)), draw(st.integers(1, 7)))


def numbers(layout: BlockLayout, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a matrix whose elements are all different, as far as the dtype can tell them apart."""
    size = layout.out_features * layout.in_features
    return torch.arange(1, size + 1).to(dtype).view(layout.out_features, layout.in_features)


@settings(deadline=None)
@given(layouts(), st.sampled_from(DTYPES))
def test_packing_and_unpacking_keep_every_bit(layout: BlockLayout, dtype: torch.dtype) -> None:
    matrix = numbers(layout, dtype)
    values = layout.pack(matrix)
    assert values.shape == (layout.blocks, layout.block_out, layout.block_in)
    assert values.is_contiguous()
    kept = layout.mask().repeat_interleave(layout.block_out, 0)
    kept = kept.repeat_interleave(layout.block_in, 1)
    unpacked = layout.unpack(values)
    assert torch.equal(unpacked, torch.where(kept, matrix, torch.zeros_like(matrix)))
    assert torch.equal(layout.pack(unpacked), values)


@settings(deadline=None)
@given(layouts(), st.sampled_from(DTYPES))
def test_its_size_is_values_and_two_indices(layout: BlockLayout, dtype: torch.dtype) -> None:
    values = layout.pack(numbers(layout, dtype))
    stored = (values, layout.rows, layout.columns)
    assert layout.size_bytes(dtype) == sum(t.numel() * t.element_size() for t in stored)
    elements = layout.out_features * layout.in_features
    assert layout.density == pytest.approx(values.numel() / elements)


@settings(deadline=None)
@given(layouts())
def test_a_mask_and_its_layout_are_the_same_thing(layout: BlockLayout) -> None:
    again = BlockLayout.from_mask(layout.mask(), layout.block_out, layout.block_in)
    assert torch.equal(again.rows, layout.rows)
    assert torch.equal(again.columns, layout.columns)
    counts = layout.mask().sum(1)
    assert torch.equal(layout.blocks_per_row_tile, counts)
    assert layout.is_balanced == bool((counts == counts[0]).all())


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.floats(0.01, 1), st.integers(0, 9))
def test_every_row_tile_keeps_its_highest_scores(
    tiles: int, groups: int, density: float, seed: int
) -> None:
    scores = torch.rand(tiles, groups, generator=torch.Generator().manual_seed(seed))
    layout = BlockLayout.from_scores(scores, density, 4, 2)
    keep = max(1, round(density * groups))
    assert layout.blocks_per_row_tile.tolist() == [keep] * tiles
    mask = layout.mask()
    for row, kept in zip(scores, mask, strict=True):
        dropped = row[~kept]
        assert not len(dropped) or row[kept].min() >= dropped.max()


def test_unbalanced_scores_compete_with_each_other() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 2.0, 3.0, 4.0]])
    layout = BlockLayout.from_scores(scores, 0.5, 4, 2, balanced=False)
    assert layout.blocks_per_row_tile.tolist() == [4, 0]
    assert not layout.is_balanced
    assert BlockLayout.from_scores(scores, 0.5, 4, 2).mask().tolist() == [
        [True, True, False, False],
        [False, False, True, True],
    ]


def test_ties_keep_the_first_blocks() -> None:
    layout = BlockLayout.from_scores(torch.ones(2, 4), 0.5, 4, 2)
    assert layout.columns.tolist() == [0, 1, 0, 1]


def indices(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (indices(0, 2), indices(0, 0), r"rows from 0 to 1, got 0 to 2"),
        (indices(0, -1), indices(0, 0), r"rows from 0 to 1, got -1 to 0"),
        (indices(0, 1), indices(0, 3), r"columns from 0 to 2, got 0 to 3"),
        (indices(1, 0), indices(0, 0), r"ordered by row tile"),
        (indices(0, 0), indices(1, 1), r"distinct blocks"),
        (indices(0, 0), indices(2, 1), r"ordered by row tile"),
        (indices(0), indices(0, 1), r"got 1 and 2"),
        (indices(), indices(), r"one or more blocks, got 0 and 0"),
        (indices(0).long(), indices(0), r"rows as int32 \[blocks\], got torch.int64 \[1\]"),
        (indices(0), indices(0)[None], r"columns as int32 \[blocks\], got torch.int32 \[1, 1\]"),
    ],
)
def test_bad_indices_are_refused(rows: Tensor, columns: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockLayout(8, 6, 4, 2, rows, columns)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 6, 3, 2), "divide the output size 8, got blocks of 3"),
        ((8, 6, 4, 4), "divide the input size 6, got blocks of 4"),
        ((8, 6, 0, 2), "divide the output size 8, got blocks of 0"),
    ],
)
def test_blocks_that_do_not_divide_are_refused(
    sizes: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BlockLayout(*sizes, indices(0), indices(0))


def test_what_does_not_fit_is_refused() -> None:
    layout = BlockLayout(8, 6, 4, 2, indices(0, 1), indices(1, 2))
    with pytest.raises(ValueError, match=r"a matrix \[8, 6\], got \[6, 8\]"):
        layout.pack(torch.zeros(6, 8))
    with pytest.raises(ValueError, match=r"values \[2, 4, 2\], got \[2, 2, 4\]"):
        layout.unpack(torch.zeros(2, 2, 4))
    with pytest.raises(ValueError, match=r"a bool mask .* got torch.float32 \[2, 3\]"):
        BlockLayout.from_mask(torch.ones(2, 3), 4, 2)
    for density in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match="a density above 0 and at most 1"):
            BlockLayout.from_scores(torch.ones(2, 3), density, 4, 2)
    with pytest.raises(ValueError, match="got NaN"):
        BlockLayout.from_scores(torch.tensor([[1.0, float("nan")]]), 0.5, 4, 2)
