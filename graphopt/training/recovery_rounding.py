"""Quantized layers that can be trained: float weights, computed with as the integers compute."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphopt.kernels.quantized_linear import QuantizedLinear
from graphopt.kernels.quantized_weights import largest_integer
from graphopt.passes.base import replace_module


class RoundedLinear(nn.Module):
    """A float layer that gives what its quantized one would, with the gradients of a float one.

    Scales and the ranges of inputs stay, so a weight that nothing moved has the integers it had.

    Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013
    (straight-through estimator).

    Args:
        quantized: The layer; it takes the float weight, rounded, at every call.

    Attributes:
        weight: [out_features, in_features].
        bias: [out_features] or None, the quantized layer's own.
    """

    def __init__(self, quantized: QuantizedLinear) -> None:
        super().__init__()
        # Not a submodule: its tensors follow from the weight.
        self._quantized = [quantized]
        self.weight = nn.Parameter(quantized.weight.detach().clone())
        self.bias = quantized.bias

    def settle(self) -> QuantizedLinear:
        """Give the quantized layer the weight as it is now; return it."""
        (layer,) = self._quantized
        scales = layer.scales.reshape(layer.out_features, -1, 1)
        largest = largest_integer(layer.bits)
        weight = layer.rounded_weight(self.weight.detach())
        groups = weight.unflatten(1, (scales.shape[1], -1))
        lowest = -largest - (layer.bits == 4)
        integers = (groups / scales).round_().clamp_(lowest, largest).flatten(1)
        layer.set_integers(integers.to(torch.int8), layer.scales)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        with torch.no_grad():
            result: Tensor = self.settle()(x)
        if torch.is_grad_enabled():
            smooth = functional.linear(x, self.weight.to(x.dtype), self.bias)
            result = smooth + (result.to(smooth.dtype) - smooth).detach()
        return result


@contextmanager
def trainable_rounding(model: nn.Module) -> Iterator[None]:
    """Let quantized layers be trained; at the end they are themselves again, with what came of it.

    After an error they are as they were.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantizedLinear)
    ]
    before = {id(layer): copy.deepcopy(layer.state_dict()) for _, layer in layers}
    rounded = {id(layer): RoundedLinear(layer) for _, layer in layers}
    for name, layer in layers:
        replace_module(model, name, rounded[id(layer)].train(layer.training))
    try:
        yield
        for item in rounded.values():
            item.settle()
    except BaseException:
        for _, layer in layers:
            layer.load_state_dict(before[id(layer)])
        raise
    finally:
        for name, layer in layers:
            replace_module(model, name, layer)
