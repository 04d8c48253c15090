"""Linear layers in integers, for deployment.

before: y = W x + b
after:  y = s (Q q(x)) + b',  Q integers with scales s, q(x) the input rounded to 8 bits
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import nn

from graphopt.kernels import QuantizedLinear
from graphopt.kernels.quantized_inputs import ACTIVATIONS
from graphopt.kernels.quantized_linear import GROUP_SIZES
from graphopt.kernels.quantized_weights import dequantize, unpack_integers
from graphopt.passes.base import (
    Candidate,
    Change,
    Context,
    Miss,
    Pass,
    Proposal,
    State,
    replace_module,
)
from graphopt.passes.compress.layer_replacement import replacement
from graphopt.passes.compress.layer_rounding import LayerRounding, round_layer
from graphopt.passes.compress.levels import slower
from graphopt.passes.compress.quantized_candidates import (
    Quantization,
    Scheme,
    candidate_of,
    checked,
    measured,
    new_layer,
    scheme_of,
)
from graphopt.passes.compress.smoothing import smoothed_by
from graphopt.passes.dense_form import dense_form, remember_dense
from graphopt.passes.details import read_details
from graphopt.passes.errors import PreconditionError
from graphopt.passes.facts import facts_of
from graphopt.passes.latest import latest
from graphopt.passes.linear_layers import LinearLayer, linear_layer, linear_layers
from graphopt.passes.output_heads import output_heads
from graphopt.passes.program import Program
from graphopt.passes.propagation import refresh
from graphopt.passes.replaceability import left_dense

_GROUP = 32
"""Group size of the 4-bit weights that are offered."""


@final
@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Pass):
    """Replace linear layers by ones with 8- or 4-bit weights, and mostly 8-bit inputs.

    The weight's scales are those of the smallest error. With calibration data its integers make up
    for each other's rounding (GPTQ, arXiv 2210.17323), the bias for the mean error, static ranges
    of inputs cover all that was seen, and where a norm before the layer allows it, outliers
    of the inputs move into the weights (SmoothQuant, arXiv 2211.10438) if that makes the predicted
    error smaller. Output heads, embeddings and tied layers stay dense. Where times are measured,
    only layers that are faster are kept. Operations stay as many: integers are counted as floats.

    Cost: with calibration two passes over its data per layer, and O(channels^3).

    Attributes:
        bits: Of a weight: 8 or 4.
        activations: How inputs are rounded: "dynamic" (per token), "dynamic-tensor" (per call),
            "static" (calibrated) or "none".
        group_size: Inputs that share a scale: 16 to 256, a power of two; 0 for all of an output.
        rounding: Whether integers make up for each other's rounding where there is data.
        smooth: Share of the spread of outliers that weights take over; 0 smooths nothing.
    """

    name: ClassVar[str] = "quantize-weights"
    exact: ClassVar[bool] = False
    inference_only: ClassVar[bool] = True

    bits: int = 8
    activations: str = "dynamic"
    group_size: int = 0
    rounding: bool = True
    smooth: float = 0.5

    def requires(self, program: Program, context: Context) -> None:
        """Refuse options that no model can satisfy."""
        if (
            self.bits not in (4, 8)
            or self.activations not in ACTIVATIONS
            or self.group_size not in (0, *GROUP_SIZES)
            or not 0 <= self.smooth <= 1
        ):
            raise PreconditionError(
                f"{self.name} needs bits 4 or 8, activations {', '.join(ACTIVATIONS)}, group_size "
                f"0 or {', '.join(map(str, GROUP_SIZES))} and 0 <= smooth <= 1, got "
                f"bits={self.bits}, activations={self.activations}, group_size={self.group_size}, "
                f"smooth={self.smooth}"
            )
        if self.group_size and self.activations in ("static", "dynamic-tensor"):
            raise PreconditionError(
                f"{self.name} knows groups with dynamic inputs or none, got group_size="
                f"{self.group_size} and activations={self.activations}"
            )
        if self.activations == "static" and context.calibration is None:
            raise PreconditionError(
                f"{self.name} with static activations needs calibration data: "
                "pass calibration=, or choose activations=dynamic"
            )

    def propose(self, program: Program, context: Context) -> Proposal:
        """Propose every layer in the options' scheme."""
        layers, misses = self._layers(program, context)
        candidates: list[Candidate] = []
        for name, layer in layers.items():
            candidate, ratio = self._candidate(program, context, name, layer, self._scheme)
            if ratio is None or ratio > 1:
                candidates.append(candidate)
            else:
                kind = scheme_of(candidate.change)
                misses.append(self._miss(name, f"{kind} measured {ratio:.2f}x, kept dense"))
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def offer(self, program: Program, context: Context) -> Proposal:
        """Offer 8 bits with dynamic and, with data, static inputs, and 4 bits for weights alone.

        Where the options ask for another scheme than the default, only that is offered.
        """
        layers, misses = self._layers(program, context)
        default = Scheme(bits=8, group_size=0, activations="dynamic")
        schemes = [self._scheme]
        if self._scheme == default:
            if context.calibration is not None:
                schemes.append(Scheme(bits=8, group_size=0, activations="static"))
            schemes.append(Scheme(bits=4, group_size=_GROUP, activations="none"))
        candidates: list[Candidate] = []
        for name, layer in layers.items():
            refused: list[tuple[str, float]] = []
            for scheme in schemes:
                candidate, ratio = self._candidate(program, context, name, layer, scheme)
                if ratio is None or ratio > 1:
                    candidates.append(candidate)
                else:
                    refused.append((str(scheme), ratio))
            misses += [self._miss(name, slower([item])) for item in refused]
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def reconstruct(self, program: Program, change: Change, state: State) -> State | None:
        """Return the numbers that the integers stand for.

        Their distance from the weight is that of the expected error, where inputs are rounded too.
        """
        details, layer = checked(program, change)
        name = change.target
        integers = unpack_integers(state[f"{name}.codes"], details.bits)
        matrix = dequantize(integers, state[f"{name}.scales"])
        matrix = matrix.to(layer.matrix) / smoothed_by(program, name, state)
        if details.activations == "static":
            matrix = matrix * state[f"{name}.input_multipliers"].to(matrix)
        matrix = layer.matrix + (matrix - layer.matrix) * details.error_growth
        matrix = matrix.to(layer.weight.dtype)
        dense = {f"{name}.{layer.weight_name}": matrix.t() if layer.transposed else matrix}
        if layer.bias_name is not None:
            dense[f"{name}.{layer.bias_name}"] = state[f"{name}.bias"]
        return dense

    def settle(self, program: Program, candidate: Candidate, context: Context) -> Candidate:
        """Take the layer's sizes as they are now and predict the error."""
        if linear_layer(program, candidate.change.target) is None:
            return candidate
        now = self.resized(program, candidate, context).change
        rounding = self._rounding(program, now, context)
        details = {**now.details, "error_growth": rounding.error_growth}
        return replace(
            candidate,
            change=replace(now, details=details, summary=now.summary + rounding.note),
            predicted_error=rounding.relative_error,
        )

    def resized(self, program: Program, candidate: Candidate, context: Context) -> Candidate:
        """Take the layer's sizes as they are now, and round nothing."""
        name = candidate.change.target
        layer = linear_layer(program, name)
        if layer is None:
            return candidate
        before = facts_of(program).cost(program.calls(name))
        now = candidate_of(self.name, name, layer, before, scheme_of(candidate.change))
        return replace(candidate, change=now.change)

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return integers, scales and bias, and a smoothed norm with its other readers."""
        return dict(self._rounding(program, change, context).state)

    def apply(self, program: Program, change: Change) -> None:
        """Put the quantized layer in the place of the dense one."""
        details, layer = checked(program, change)
        quantized = new_layer(details, layer).to_empty(device=layer.weight.device)
        remember_dense(quantized, layer)
        replace_module(program.model, change.target, quantized)
        # Later layers of this pass are analysed with this one in place.
        refresh(program)

    def restore(self, model: nn.Module, change: Change) -> None:
        """Put a dense layer of the original class back, with the numbers integers stood for."""
        details = read_details(Quantization, change)
        quantized = replacement(model, change, details, QuantizedLinear, "quantized")
        form = dense_form(quantized)
        matrix = quantized.weight.to(form.weight.dtype)
        dense = form.filled(matrix, quantized.bias, trained=form.weight.requires_grad)
        replace_module(model, change.target, dense.train(quantized.training))

    @property
    def _scheme(self) -> Scheme:
        """What the options ask for."""
        return Scheme(bits=self.bits, group_size=self.group_size, activations=self.activations)

    def _miss(self, target: str, reason: str) -> Miss:
        return Miss(pass_name=self.name, target=target, reason=reason)

    def _layers(
        self, program: Program, context: Context
    ) -> tuple[dict[str, LinearLayer], list[Miss]]:
        """Return the layers that can be quantized, and why others cannot."""
        layers: dict[str, LinearLayer] = {}
        misses: list[Miss] = []
        heads = output_heads(program)
        for name, layer in linear_layers(program):
            reason = left_dense(program, context, name, heads)
            if reason is None:
                layers[name] = layer
            else:
                misses.append(self._miss(name, reason))
        return layers, misses

    def _candidate(
        self,
        program: Program,
        context: Context,
        name: str,
        layer: LinearLayer,
        scheme: Scheme,
    ) -> tuple[Candidate, float | None]:
        """Return a candidate, and how many times faster it measured, None if it was not."""
        before = facts_of(program).cost(program.calls(name))
        candidate = candidate_of(self.name, name, layer, before, scheme)
        if context.costs is None:
            return candidate, None
        return measured(program, candidate, context.costs)

    def _rounding(self, program: Program, change: Change, context: Context) -> LayerRounding:
        """Return what a change makes of its layer, computed once for `settle` and `transfer`."""
        scheme = scheme_of(change)
        key = f"{self} at {change.target}: {scheme} with {id(context.calibration)}"

        def compute() -> LayerRounding:
            return round_layer(
                program, change, context, compensate=self.rounding, smooth=self.smooth
            )

        return latest(program, "rounded layer", key, compute)
