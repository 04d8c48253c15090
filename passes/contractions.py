"""Where a parameter consumes channels: its weight as a matrix that can be fitted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .axes import Member
from .program import Program
from .unfold import Unfold

_BIAS_POSITIONS = {
    torch.ops.aten.linear.default: 2,
    torch.ops.aten.addmm.default: 0,
    torch.ops.aten.conv2d.default: 2,
    torch.ops.aten.mm.default: None,
    torch.ops.aten.matmul.default: None,
}


@dataclass(frozen=True)
class Contraction:
    """A linear layer or a convolution, seen from the channels it consumes.

    Attributes:
        parameter: Its weight.
        dim: The weight's dimension of consumed channels.
        bias: Its bias, None if it has none that is its own.
        inputs: The graph nodes whose values it consumes, with their channel dimension.
        unfold: For a convolution, how its input becomes rows.
        window: Columns of the matrix per consumed channel.
    """

    parameter: str
    dim: int
    bias: str | None
    inputs: tuple[tuple[fx.Node, int], ...]
    unfold: Unfold | None
    window: int

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as [outputs, channels * window]."""
        rest = [i for i in range(weight.dim()) if i != self.dim]
        if self.unfold:
            return weight.reshape(weight.shape[0], -1)
        return weight.permute(*rest, self.dim).reshape(-1, weight.shape[self.dim])

    def weight(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return a matrix [outputs, kept channels * window] as a weight like another one."""
        if self.unfold:
            return matrix.reshape(like.shape[0], -1, *like.shape[2:]).to(like)
        rest = [size for i, size in enumerate(like.shape) if i != self.dim]
        return matrix.reshape(*rest, -1).movedim(-1, self.dim).to(like).contiguous()

    def columns(self, channels: Iterable[int]) -> torch.Tensor:
        """Return the matrix columns of some channels, in their order."""
        return torch.tensor(
            [c * self.window + offset for c in channels for offset in range(self.window)]
        )


def contraction_of(program: Program, member: Member) -> Contraction | None:
    """Return the contraction of a consumer, None if it has no form that can be fitted."""
    operations = [operation_of(node, member.parameter) for node in member.nodes]
    first = operations[0] if operations else None
    if first is None or not member.inputs or any(op is None for op in operations):
        return None
    if first.target not in _BIAS_POSITIONS:
        return None
    if any(operation.target is not first.target for operation in operations if operation):
        return None
    unfold, window = None, 1
    if first.target is torch.ops.aten.conv2d.default:
        weight = next(n for n in first.all_input_nodes if n.target == member.parameter)
        settings = _convolution_settings(first, weight.meta["val"])
        if settings is None or member.dim != 1:
            return None
        unfold = Unfold(str(sorted(settings.items())), settings)
        window = settings["kernel_size"][0] * settings["kernel_size"][1]
    return Contraction(member.parameter, member.dim, _bias(first), member.inputs, unfold, window)


def operation_of(node: fx.Node, parameter: str) -> fx.Node | None:
    """Return the ATen operation, in the graph or in a leaf call, that reads a parameter."""
    body: fx.Graph | None = node.meta.get("body")
    candidates = [node] if body is None else list(body.nodes)
    for candidate in candidates:
        if candidate.op == "call_function" and any(
            used.op == "get_attr" and used.target == parameter for used in candidate.all_input_nodes
        ):
            return candidate
    return None


def _bias(operation: fx.Node) -> str | None:
    position = _BIAS_POSITIONS[operation.target]  # type: ignore[index]
    if position is None:
        return None
    bias: Any = operation.kwargs.get("bias")
    if position < len(operation.args):
        bias = operation.args[position]
    return str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def _convolution_settings(operation: fx.Node, weight: torch.Tensor) -> dict[str, Any] | None:
    names = [argument.name for argument in operation.target._schema.arguments]  # type: ignore[union-attr]
    values = {**dict(zip(names, operation.args, strict=False)), **operation.kwargs}
    if values.get("groups", 1) != 1:
        return None
    settings: dict[str, Any] = {"kernel_size": tuple(weight.shape[2:])}
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value: Any = values.get(name, default)
        settings[name] = _pair(value)
    return settings


def _pair(value: Any) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * 2 if len(values) == 1 else values
