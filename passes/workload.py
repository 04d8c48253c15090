"""What is timed: a module with the inputs it runs on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .memory_order import memory_order


@dataclass(frozen=True, eq=False)
class Workload:
    """A module and its inputs; what is on the meta device stands for random values.

    Attributes:
        module: Called with the inputs; stays as it is, copies run.
        inputs: Tensors, mostly on the meta device: floating-point ones become random, others 0.
    """

    module: nn.Module
    inputs: tuple[torch.Tensor, ...]

    @classmethod
    def of_shape(cls, module: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> Workload:
        """Return a module on one input of a shape."""
        return cls(module, (torch.empty(tuple(shape), dtype=dtype, device="meta"),))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating-point tensor among inputs and parameters."""
        tensors = (*self.inputs, *self.module.parameters())
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    def signature(self, *, training: bool) -> str:
        """Return module, sizes, types and memory orders as text: equal ones cost the same."""
        tensors = [
            f"{name}:{_form(tensor)}{':trained' * tensor.requires_grad}"
            for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers())
        ]
        kind = type(self.module)
        text = " ".join(str(self.module).split())
        inputs = ", ".join(map(_form, self.inputs))
        mode = "training step" if training else "inference"
        return (
            f"{kind.__module__}.{kind.__qualname__} {text} {' '.join(tensors)} "
            f"on {inputs} in a {mode}"
        )

    def on(self, device: torch.device, *, training: bool) -> Workload:
        """Return a copy on a device, in a mode; in training its inputs want gradients."""
        inputs = tuple(
            _filled(value, device).requires_grad_(training and value.is_floating_point())
            for value in self.inputs
        )
        return Workload(_materialized(self.module, device).train(training), inputs)


def stand_in(value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor on the meta device that stands for a value of a program at another shape.

    Its dimensions lie in memory as the value's do: a convolution over channels that come last
    takes another time than over images that lie one channel after the other.

    Args:
        value: A fake tensor of the program.
        shape: As many sizes as the value has.
    """
    return torch.empty_permuted(tuple(shape), memory_order(value), dtype=value.dtype, device="meta")


def _form(value: torch.Tensor) -> str:
    """Return shape and type as text, and the order in memory where it is not that of the shape."""
    order = memory_order(value)
    ordered = order == sorted(order)
    return f"{list(value.shape)}:{value.dtype}{'' if ordered else f' in memory {order}'}"


def _filled(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not value.is_meta:
        return value.detach().to(device, copy=True)
    made = torch.zeros_like(value, device=device)
    return made.normal_() if value.is_floating_point() else made


def _materialized(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy on a device; what is on the meta device gets small random values."""
    twin = copy.deepcopy(module)
    tensors = (*twin.parameters(), *twin.buffers())
    if device.type == "meta" or not any(tensor.is_meta for tensor in tensors):
        return twin.to(device)
    twin = twin.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02).abs_()
            else:
                tensor.zero_()
    return twin
