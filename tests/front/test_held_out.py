"""Held-out batches: disjoint from the others, whatever the source does when it is read again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from graphopt.datasets import open_batches
from graphopt.held_out import Split, split
from graphopt.passes.errors import InputError

Batch = dict[str, Any]


def batches(count: int, rows: int = 2) -> list[Batch]:
    return [{"x": torch.arange(rows) + rows * index} for index in range(count)]


def values(found: Any) -> list[int]:
    """Return all samples of some batches, in order."""
    return [int(value) for batch in found for value in batch["x"].flatten()]


class Counted:
    """Batches that count how often they are read."""

    def __init__(self, items: list[Batch]) -> None:
        self.items = items
        self.read = 0

    def __iter__(self) -> Iterator[Batch]:
        for item in self.items:
            self.read += 1
            yield item


@pytest.mark.parametrize(
    ("count", "held"), [(2, 1), (3, 1), (4, 1), (7, 1), (8, 2), (21, 5), (64, 16), (200, 16)]
)
def test_the_last_quarter_is_held_out_up_to_sixteen(count: int, held: int) -> None:
    found = split(batches(count))
    assert len(found.held_out) == held
    assert values(found.fitted) + values(found.held_out) == list(range(2 * count))
    assert values(found.fitted) == values(found.fitted)
    assert found.note is None


def test_one_batch_is_divided_by_rows() -> None:
    batch = {"x": torch.arange(6), "shared": torch.ones(1, 6), "scale": torch.tensor(2.0), "k": 3}
    found = split([batch])
    assert found.fitted is not None
    (fitted,) = found.fitted
    (held_out,) = found.held_out
    assert (fitted["x"].tolist(), held_out["x"].tolist()) == ([0, 1, 2, 3, 4], [5])
    for part in (fitted, held_out):
        assert part["shared"].shape == (1, 6)
        assert (part["scale"].item(), part["k"]) == (2.0, 3)


@pytest.mark.parametrize(("rows", "by_rows"), [(1, True), (6, False)])
def test_a_batch_that_cannot_be_divided_is_used_twice_and_says_so(rows: int, by_rows: bool) -> None:
    found = split(batches(1, rows), by_rows=by_rows)
    assert values(found.fitted) == values(found.held_out) == list(range(rows))
    assert found.note == "the guard was checked on the calibration data: one batch is all"


def test_a_loader_that_shuffles_is_kept_so_that_the_parts_stay_apart() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.arange(64))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    found = split(open_batches(loader, model_arguments=["x"]))
    first, again, held_out = values(found.fitted), values(found.fitted), values(found.held_out)
    assert first == again
    assert sorted(first + held_out) == list(range(64))
    assert len(held_out) == 16


def test_a_steady_source_is_read_once_and_not_kept() -> None:
    source = Counted(batches(8))
    found = split(source)
    assert source.read == 8 + 1
    assert not isinstance(found.fitted, list)
    assert values(found.fitted) == list(range(12))
    assert source.read == 8 + 1 + 6


def test_a_generator_is_read_by_open_batches_once() -> None:
    def stream() -> Iterator[Tensor]:
        for item in batches(4):
            yield item["x"]

    found: Split = split(open_batches(stream(), model_arguments=["x"]))
    assert values(found.fitted) + values(found.held_out) == list(range(8))


def test_no_batch_is_an_error() -> None:
    with pytest.raises(InputError, match="holds no batch"):
        split([])
