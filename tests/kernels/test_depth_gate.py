"""The gate by itself: what it does at which progress."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.kernels.depth_gate import DepthGate, is_untrained


class Pair(nn.Module):
    """A donor and a block."""

    def __init__(self) -> None:
        super().__init__()
        self.donor, self.block = nn.LayerNorm(4), nn.LayerNorm(4)
        nn.init.normal_(self.donor.weight)


def pair() -> tuple[Pair, DepthGate]:
    """Return a model and the gate of its block."""
    torch.manual_seed(0)
    model = Pair()
    gate = DepthGate(
        own=("block.weight", "block.bias"), donor=("donor.weight", "donor.bias"), joins=0.5
    )
    gate.attach(model)
    return model, gate


def test_a_block_is_left_out_and_joins_once() -> None:
    model, gate = pair()
    x = torch.randn(3, 4)
    gate.advance(0, 0.1)
    assert torch.equal(gate.run(x, lambda: x + model.block(x)), x)
    assert not model.block.weight.any()
    gate.advance(1, 0.5)
    joined = gate.run(x, lambda: x + model.block(x))
    assert torch.equal(joined, x + model.donor(x))
    nn.init.zeros_(model.block.weight)
    gate.advance(2, 0.6)
    gate.run(x, lambda: x)
    assert not model.block.weight.any()


class Reads(TorchDispatchMode):
    """Counts how often a value decides what Python does, for which it waits for the device."""

    count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


def test_a_block_that_is_left_out_is_looked_at_only_where_it_was_written_to() -> None:
    model, gate = pair()
    x = torch.randn(3, 4)
    gate.advance(0, 0.1)
    gate.run(x, lambda: x)
    with Reads() as reads:  # type: ignore[no-untyped-call]
        gate.run(x, lambda: x)
        assert reads.count == 0
        nn.init.normal_(model.block.weight)
        nn.init.normal_(model.block.bias)
        assert torch.equal(gate.run(x, lambda: 2 * x), 2 * x)
        assert reads.count > 0


def test_evaluation_runs_the_block_and_changes_nothing() -> None:
    model, gate = pair()
    gate.eval()
    gate.advance(0, 0.1)
    x = torch.randn(3, 4)
    assert torch.equal(gate.run(x, lambda: 2 * x), 2 * x)
    assert model.block.weight.all()


def test_other_shapes_are_an_error_of_one_sentence() -> None:
    model, gate = pair()
    x = torch.randn(3, 4)
    gate.advance(0, 0.1)
    gate.run(x, lambda: x)
    model.donor.weight = nn.Parameter(torch.ones(3))
    gate.advance(1, 0.9)
    with pytest.raises(RuntimeError, match=r"block\.weight \[4\] was to begin as a copy"):
        gate.run(x, lambda: x)


def test_what_counts_as_untrained() -> None:
    assert is_untrained([torch.randn(4), torch.ones(4)])
    assert not is_untrained([torch.randn(4), torch.ones(1)])
