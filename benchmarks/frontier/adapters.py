"""LoRA, a control for fine-tuning: low-rank additions to frozen layers (arXiv 2106.09685)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SCALE = 2.0


class Adapted(nn.Module):
    """y = W x + b + s B A x with W and b frozen; B is zero at first."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [..., output] of inputs [..., input]."""
        result: Tensor = torch.add(self.linear(hidden), self.up(self.down(hidden)), alpha=_SCALE)
        return result


def adapt(model: nn.Module, rank: int, adapted: tuple[str, ...], trained: tuple[str, ...]) -> None:
    """Freeze a model but for some modules, and add adapters to layers.

    Args:
        model: The model, changed in place.
        rank: Width of the adapters.
        adapted: Last parts of the names of the linear layers that get one.
        trained: First parts of the names of the parameters that are trained beside them.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(module, nn.Linear) and last in adapted:
            setattr(model.get_submodule(parent), last, Adapted(module, rank))
