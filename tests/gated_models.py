"""Deeper models of the zoo, so that some blocks lie between the first and the last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from zoo import find_case, with_layers, without_dropout

from graphopt.kernels.token_routers import TokenGate


def deeper(name: str, layers: int = 3) -> nn.Module:
    """Return a transformers model of the zoo with more layers and without dropout, in training."""
    return without_dropout(with_layers(name, layers))


def call(name: str, length: int = 40, *, labels: bool = False) -> dict[str, Any]:
    """Return keyword arguments of a call with three rows."""
    _, kwargs = find_case(name).call(3, length, labels=labels)
    found: dict[str, Any] = kwargs
    return found


def gates(model: nn.Module) -> list[TokenGate]:
    """Return the gates of a model in order."""
    return [module for module in model.modules() if isinstance(module, TokenGate)]


class ChosenTokens(TokenGate):
    """Chooses given tokens [1 or batch, kept], or all of them one by one."""

    def __init__(self, index: Tensor | None = None) -> None:
        super().__init__(keep=1.0)
        self.index = index

    def share(self) -> float:
        return 1.0

    def forward(
        self,
        x: Tensor,
        score: Tensor | None,
        ids: Tensor | None,
        padding: Tensor | None,
        token_dim: int,
        batch_dim: int,
    ) -> Tensor:
        if self.index is not None:
            return self.index
        rows = 1 if score is None else x.shape[batch_dim]
        return torch.arange(x.shape[token_dim]).expand(rows, -1)


def choose(model: nn.Module, index: Tensor | None = None) -> None:
    """Let every gate of a model choose given tokens; None: all, taken out and put back."""
    holder = model.get_submodule("token_gates")
    assert isinstance(holder, nn.ModuleDict)
    for name in list(holder):
        gate = ChosenTokens(index)
        for vector, value in holder[name].named_parameters():
            gate.register_parameter(vector, nn.Parameter(value.detach()))
        holder[name] = gate
