"""What the tests take for the same trace, and what not."""

from __future__ import annotations

from typing import Any

import torch
from shared_traces import shared
from torch import nn

from graphopt.tracing import Trace, trace


class _Shifted(nn.Module):
    """Adds a constant that is no parameter."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.shift = torch.full((4,), shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x) + self.shift
        return result


def test_models_that_differ_in_parameters_only_share_a_trace() -> None:
    traced: list[Trace] = []

    def counted(model: nn.Module, arguments: dict[str, Any]) -> Trace:
        traced.append(trace(model, arguments))
        return traced[-1]

    once, call = shared(counted), {"x": torch.zeros(3, 4)}
    first = once(_Shifted(1.0), call)
    assert once(_Shifted(1.0), {"x": torch.ones(3, 4)}) is first
    assert once(_Shifted(2.0), call) is not first
    assert once(_Shifted(1.0), {"x": torch.zeros(2, 4)}) is not first
    frozen = _Shifted(1.0)
    frozen.layer.weight.requires_grad_(False)
    assert once(frozen, call) is not first
    other = _Shifted(1.0)
    other.layer.register_forward_hook(lambda *_: None)  # cannot be written
    assert once(other, call) is not once(other, call)
    assert len(traced) == 6
