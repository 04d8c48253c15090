"""What the CUDA key of the operators over rows runs: interpreted kernels, memory full of NaN."""

import warnings
from itertools import product

import pytest
import torch
from torch import Tensor

from graphopt.kernels.gpu import row_dispatch, row_launch, token_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
NAN = float("nan")


def by_hand(base: Tensor | None, index: Tensor, rows: Tensor, size: int) -> Tensor:
    result = torch.zeros(size, *rows.shape[1:], dtype=rows.dtype) if base is None else base.clone()
    for place, row in zip(index.tolist(), rows, strict=True):
        result[place] = row
    return result


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    assert found.is_contiguous()
    types = row_launch.ITEM_TYPES[wanted.element_size()]
    return torch.equal(found.view(types), wanted.contiguous().view(types))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the kernels that were called, in order."""
    calls: list[str] = []
    for name in ("gather", "combine"):
        original = getattr(row_launch, name)

        def noting(*args: object, name: str = name, original: object = original) -> object:
            calls.append(name)
            assert callable(original)
            return original(*args)

        monkeypatch.setattr(row_launch, name, noting)
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(19,), (1,), (37, 64), (300, 3, 5), (5, 4100)])
def test_rows_arrive_to_the_last_bit(
    dtype: torch.dtype, shape: tuple[int, ...], launched: list[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    size = shape[0]
    order = torch.randperm(size, generator=generator)
    for taken in {1, size // 2, size}:
        index = order[:taken]
        rows = row_dispatch.gather_rows(x, index)
        assert same_bits(rows, torch.stack([x[i] for i in index]) if taken else x[:0])
        found = row_dispatch.scatter_rows(rows, index, size)
        assert same_bits(found, by_hand(None, index, rows, size))
        new = -rows - 1
        found = row_dispatch.combine_rows(x, index, new)
        assert same_bits(found, by_hand(x, index, new, size))
    assert set(launched) == {"gather", "combine"}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_masks_and_positions_are_rows_too(dtype: torch.dtype, launched: list[str]) -> None:
    x = torch.randint(0, 2, (9, 17)).to(dtype)
    index = torch.tensor([8, 0, 3])
    wanted = torch.stack([x.view(torch.uint8)[i] for i in index])
    if dtype == torch.int64:
        wanted = torch.stack([x[i] for i in index])
    found = row_dispatch.gather_rows(x, index)
    assert found.dtype == dtype
    assert torch.equal(found.view(wanted.dtype), wanted)
    assert launched[-1] == "gather"


def test_tensors_as_they_come() -> None:
    """Transposed, sliced, expanded, at an odd address; the index too."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(12, 40, generator=generator)
    index = torch.tensor([[7, 1], [2, 1], [5, 1], [0, 1]])[:, 0]
    for x in (
        wide[:, 3:20],
        wide.t()[:20],
        wide[:1].expand(20, 40),
        wide[:, :1],
        wide[:, 5],
        wide.flatten()[1:301].view(20, 15),
        wide.view(12, 4, 10).transpose(1, 2),
    ):
        size = x.shape[0]
        rows = torch.stack([x[i] for i in index])
        assert same_bits(row_dispatch.gather_rows(x, index), rows)
        apart = torch.stack([rows, rows], -1)[..., 0]
        found = row_dispatch.scatter_rows(apart, index, size)
        assert same_bits(found, by_hand(None, index, rows, size))
        found = row_dispatch.combine_rows(x, index, -apart)
        assert same_bits(found, by_hand(x, index, -rows, size))


def test_no_rows_and_no_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    x, none = torch.randn(6, 5), torch.empty(0, dtype=torch.int64)
    assert same_bits(row_dispatch.scatter_rows(x[:0], none, 4), torch.zeros(4, 5))
    assert same_bits(row_dispatch.combine_rows(x, none, x[:0]), x)
    # A grid of no programs is an error on a device.
    monkeypatch.setattr(token_rows, "gather", None)
    monkeypatch.setattr(token_rows, "combine", None)
    assert row_dispatch.gather_rows(x, none).shape == (0, 5)
    flat = torch.empty(6, 0)
    assert row_launch.gather(flat, torch.tensor([2, 3])).shape == (2, 0)
    assert row_dispatch.scatter_rows(x[:0], none, 0).shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    x = torch.ones(8, 33, dtype=dtype)
    x[[1, 6]] = NAN
    index = torch.tensor([0, 6, 4])
    rows = row_dispatch.gather_rows(x, index)
    assert rows.isnan().any(1).tolist() == [False, True, False]
    combined = row_dispatch.combine_rows(x, torch.tensor([1, 2, 3]), rows)
    assert combined.isnan().any(1).nonzero().flatten().tolist() == [2, 6]
    found = row_dispatch.scatter_rows(rows, index, 8)
    assert found.isnan().any(1).nonzero().flatten().tolist() == [6]


def test_row_numbers_outside_are_neither_read_nor_written() -> None:
    memory = torch.full((30, 16), NAN)
    x = memory[10:20].fill_(1.0)
    index = torch.tensor([3, 10, -1])
    assert row_dispatch.gather_rows(x, index).sum(1).tolist() == [16, 0, 0]
    found = row_dispatch.combine_rows(x, index, torch.full((3, 16), 2.0))
    assert found.sum(1).tolist() == [32 if row == 3 else 16 for row in range(10)]


def test_gradients_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' gradients with the kernels under them, as on a device."""
    library = torch.library.Library("graphopt", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That the CPU kernels are replaced.
        for name in ("gather_rows", "scatter_rows", "combine_rows"):
            library.impl(name, getattr(row_dispatch, name), "CPU", allow_override=True)
    operators = torch.ops.graphopt
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(9, 21).to(dtype).requires_grad_()
        index = torch.tensor([6, 2, 7])
        weight = torch.randn(9, 21).to(dtype)
        rows = operators.gather_rows(x, index)
        (operators.combine_rows(x, index, rows * 2) * weight).sum().backward()
        wanted = weight.clone()
        wanted[index] *= 2
        assert x.grad is not None
        assert torch.equal(x.grad, wanted)
        part = x.detach()[index].requires_grad_()
        (operators.scatter_rows(part, index, 9) * weight).sum().backward()
        assert part.grad is not None
        assert torch.equal(part.grad, weight[index])
    library._destroy()


@pytest.mark.parametrize("product", ["gather", "combine"])
@pytest.mark.parametrize("fault", ["wrong", "raising"])
def test_a_kernel_that_fails_its_self_test_is_not_used(
    product: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(row_launch, product)

    def broken(*args: object) -> Tensor:
        if fault == "raising":
            raise OSError("no compiler for the launcher")
        result: Tensor = right(*args)
        return result + 1

    monkeypatch.setattr(row_launch, product, broken)
    row_dispatch.works.cache_clear()
    x, index = torch.randn(6, 40), torch.tensor([4, 1])
    match = "OSError: no compiler" if fault == "raising" else "moved rows elsewhere"
    with pytest.warns(RuntimeWarning, match=rf"failed their self-test on cpu.*{match}"):
        rows = row_dispatch.gather_rows(x, index)
    assert torch.equal(rows, x[index])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = row_dispatch.combine_rows(x, index, -rows)
    assert same_bits(found, by_hand(x, index, -rows, 6))
    row_dispatch.works.cache_clear()


def test_complex_numbers_are_moved_by_torch(launched: list[str]) -> None:
    x, index = torch.randn(6, 4, dtype=torch.complex64), torch.tensor([4, 1])
    assert torch.equal(row_dispatch.gather_rows(x, index), x[index])
    assert launched == []


def test_the_largest_item_and_the_narrowest_row_fit_their_tiles() -> None:
    for width, item_bytes in product((1, 7, 768, 100_000), (1, 2, 4, 8)):
        tile = row_launch.row_tile(width, item_bytes)
        assert tile.rows * tile.columns * item_bytes == 8192
