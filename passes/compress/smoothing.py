"""Outliers of a layer's inputs moved into weights, where a norm before makes it free.

before: x = norm(h; p),       y_i = W_i x
after:  x' = norm(h; p / s),  y_i = (W_i diag(s)) x'

The inputs of the layers become easier to round, and the model computes the same.
Source: SmoothQuant, Xiao et al. 2022 (arXiv 2211.10438).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from graphopt.passes.linear_layers import LinearLayer, linear_layer
from graphopt.passes.program import Program
from graphopt.passes.replaceability import replacement_refusal


@dataclass(frozen=True)
class SmoothingPlace:
    """A norm and the linear layers that read it, all of its readers.

    Attributes:
        norm: Name of the module whose parameters scale its outputs, channel by channel.
        layers: The linear layers by name.
    """

    norm: str
    layers: dict[str, LinearLayer]

    def factors(self, largest: Tensor, strength: float) -> Tensor:
        """Return s [channels], float64: `max |x|^strength / max |W|^(1 - strength)`.

        Args:
            largest: Largest absolute value of every input [channels].
            strength: How much of the inputs' spread goes to the weights, from 0 to 1.
        """
        columns = [layer.matrix.double().abs().amax(0) for layer in self.layers.values()]
        weights = torch.stack(columns).amax(0)
        inputs = largest.double().to(weights.device)
        found = inputs**strength / weights ** (1 - strength)
        usable = (inputs > 0) & (weights > 0) & torch.isfinite(found)
        middle = found[usable].log().mean().exp() if usable.any() else 1.0
        return torch.where(usable, found / middle, 1.0)

    def state(self, program: Program, factors: Tensor, without: str) -> dict[str, Tensor]:
        """Return the new values of the norm's parameters and of the other layers' weights."""
        module = program.module(self.norm)
        state = {
            f"{self.norm}.{key}": (value.detach() / factors).to(value.dtype)
            for key, value in module.named_parameters()
        }
        for name, layer in self.layers.items():
            if name != without:
                matrix = (layer.matrix * factors).to(layer.weight.dtype)
                value = matrix.t().contiguous() if layer.transposed else matrix
                state[f"{name}.{layer.weight_name}"] = value
        return state


def evening_factors(largest: Tensor, strength: float) -> Tensor:
    """Return s [channels], float64: `max |x|^strength`, around 1.

    Of the inputs alone, so that all layers that read the same divide it by the same.

    Args:
        largest: Largest absolute value of every input [channels].
        strength: How much of the inputs' spread goes to the weights, from 0 to 1.
    """
    found = largest.double() ** strength
    usable = (found > 0) & torch.isfinite(found)
    middle = found[usable].log().mean().exp() if usable.any() else 1.0
    return torch.where(usable, found / middle, 1.0)


def smoothed_by(program: Program, name: str, state: Mapping[str, Tensor]) -> Tensor:
    """Return the factors [channels] that new values of a norm move into a layer's weight."""
    norm = str(program.calls(name)[0].all_input_nodes[0].target)
    layer = linear_layer(program, name)
    assert layer is not None
    factors = torch.ones(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    if f"{norm}.weight" not in state:
        return factors
    for key, value in program.module(norm).named_parameters():
        new = state[f"{norm}.{key}"]
        factors = torch.where(new == 0, factors, value.detach() / new)
    return factors


def smoothing_place(program: Program, name: str) -> SmoothingPlace | str:
    """Return the place where the inputs of a linear layer can be smoothed, or why there is none."""
    call, *others = program.calls(name)
    source = call.all_input_nodes[0]
    if others:
        return "the layer is called several times"
    if source.op != "call_module":
        return "its input is not the output of a norm"
    norm = str(source.target)
    layers: dict[str, LinearLayer] = {}
    for reader in source.users:
        reason = _reader_refusal(program, reader, layers)
        if reason is not None:
            return reason
    width = next(iter(layers.values())).in_features
    if replacement_refusal(program, norm) is not None or not _scales(program.module(norm), width):
        return f"the parameters of {norm} do not scale its outputs alone"
    return SmoothingPlace(norm, layers)


def _reader_refusal(
    program: Program, reader: fx.Node, layers: dict[str, LinearLayer]
) -> str | None:
    """Take a reader of a norm as a linear layer, or say why that is not possible."""
    name = str(reader.target)
    layer = linear_layer(program, name) if reader.op == "call_module" else None
    if layer is None:
        return f"{reader.name}, which is no dense linear layer, reads the same"
    layers[name] = layer
    return replacement_refusal(program, name)


@torch.no_grad()
def _scales(module: nn.Module, width: int) -> bool:
    """Say whether scaling all parameters of a module scales its outputs, channel by channel."""
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    if not shapes or {*shapes} != {(width,)} or any(p.is_meta for p in module.parameters()):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, dtype=torch.float64, generator=generator)
    factors = torch.rand(width, dtype=torch.float64, generator=generator) + 0.5
    twin = copy.deepcopy(module).cpu().double().eval()
    before = twin(x)
    for parameter in twin.parameters():
        parameter.mul_(factors)
    after = twin(x)
    # Modules that compute in float32 whatever comes round to that.
    return before.shape == x.shape and torch.allclose(after, before * factors, rtol=1e-5, atol=1e-6)
