"""What is derived from tensors follows every change of them and does not keep them alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graphopt.kernels.derived import derived


def doubled(first: Tensor, second: Tensor) -> Tensor:
    return derived("doubled", (first, second), lambda: first.detach() * 2 + second.detach())


def set_in_place(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor[-1, -1] += 1


def copy_into_data(tensor: Tensor) -> None:
    tensor.data.copy_(torch.rand_like(tensor))


def replace_data(tensor: Tensor) -> None:
    tensor.data = torch.rand_like(tensor)


def change_one_row_of_data(tensor: Tensor) -> None:
    tensor.data[2] += 1


@pytest.mark.parametrize(
    "change", [set_in_place, copy_into_data, replace_data, change_one_row_of_data]
)
@pytest.mark.parametrize("changed", [0, 1])
def test_a_change_is_seen(change: Callable[[Tensor], None], changed: int) -> None:
    tensors = (torch.nn.Parameter(torch.rand(4, 3)), torch.nn.Parameter(torch.rand(4, 3)))
    first = doubled(*tensors)
    assert doubled(*tensors) is first
    change(tensors[changed])
    expected = tensors[0].detach() * 2 + tensors[1].detach()
    assert torch.equal(doubled(*tensors), expected)


def test_it_ends_with_the_first_tensor() -> None:
    source = torch.rand(4, 3)
    other = torch.rand(4, 3)
    result = weakref.ref(doubled(source, other))
    assert result() is not None
    del source
    gc.collect()
    assert result() is None


def test_tensors_of_inference_mode_have_no_version_and_are_sampled() -> None:
    with torch.inference_mode():
        source, other = torch.rand(4, 3), torch.rand(4, 3)
        first = doubled(source, other)
        assert doubled(source, other) is first
        source.mul_(2)
        assert doubled(source, other) is not first
