"""Linear layers as two thin ones.

before: y = W x + b
after:  y = up (down x) + b',  rank r < in * out / (in + out)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

from pydantic import Field
from torch import nn

from graphopt.kernels import LowRankLinear
from graphopt.passes.base import (
    Candidate,
    Change,
    Context,
    Cost,
    Miss,
    Pass,
    Proposal,
    State,
    replace_module,
)
from graphopt.passes.compress.layer_replacement import (
    LayerSizes,
    replaced_layer,
    replacement,
    timed,
)
from graphopt.passes.compress.levels import slower
from graphopt.passes.dense_form import dense_form, remember_dense
from graphopt.passes.details import read_details
from graphopt.passes.errors import PlanError, PreconditionError
from graphopt.passes.facts import facts_of, total_cost
from graphopt.passes.latest import latest
from graphopt.passes.linear_layers import LinearLayer, linear_layers
from graphopt.passes.output_heads import output_heads
from graphopt.passes.program import Program
from graphopt.passes.replaceability import left_dense
from graphopt.passes.uniform_share import largest_share
from graphopt.passes.whitening import Factors, Whitened, decomposed, whiten

_MOST_LEVELS = 8


class _Factorization(LayerSizes):
    """What `apply` and `restore` need."""

    rank: int = Field(ge=1)


@final
@dataclass(frozen=True, kw_only=True)
class FactorizeLowRank(Pass):
    """Replace linear layers by two factors where these need fewer operations.

    With calibration data the outputs are approximated best (whitened SVD on the inputs as they
    are now, SVD-LLM, arXiv 2403.07378), without it the weights (SVD). Output heads and tied
    layers stay dense. Where times are measured, only factors that are faster are kept.
    Cost: one SVD per layer, and with calibration one pass over its data per layer.

    Attributes:
        share: Share of a layer's operations to keep where the context has no budget.
        round_to: Ranks are a multiple of this.
    """

    name: ClassVar[str] = "factorize-low-rank"
    exact: ClassVar[bool] = False

    share: float = 0.5
    round_to: int = 8

    def requires(self, program: Program, context: Context) -> None:
        """Refuse options that no model can satisfy."""
        if not 0 < self.share <= 1 or self.round_to < 1:
            raise PreconditionError(
                f"{self.name} needs 0 < share <= 1 and round_to >= 1, got share={self.share}, "
                f"round_to={self.round_to}"
            )

    def propose(self, program: Program, context: Context) -> Proposal:
        """Propose the same share of operations for every layer that can be factorized."""
        candidates: list[Candidate] = []
        layers, misses = self._layers(program, context)
        for name, rank in self._ranks(program, context, layers).items():
            if rank is None:
                misses.append(self._miss(name, "all of it fits the budget"))
                continue
            candidate = self._candidate(program, name, layers[name], rank)
            if context.costs is not None:
                candidate, ratio = _measured(program, candidate, context)
                if ratio <= 1:
                    reason = f"rank {rank} measured {ratio:.2f}x, kept dense"
                    misses.append(self._miss(name, reason))
                    continue
            candidates.append(candidate)
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def offer(self, program: Program, context: Context) -> Proposal:
        """Offer ranks in even steps for every layer, from the highest that saves operations."""
        candidates: list[Candidate] = []
        layers, misses = self._layers(program, context)
        for name, layer in layers.items():
            if context.kept_share(0.0, name) == 1:
                misses.append(self._miss(name, "it is kept whole by a pattern"))
                continue
            refused: list[tuple[str, float]] = []
            for rank in self._levels(layer):
                candidate = self._candidate(program, name, layer, rank)
                if context.costs is not None:
                    candidate, ratio = _measured(program, candidate, context)
                    if ratio <= 1:
                        refused.append((f"rank {rank}", ratio))
                        continue
                candidates.append(candidate)
            if refused:
                misses.append(self._miss(name, slower(refused)))
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def reconstruct(self, program: Program, change: Change, state: State) -> State | None:
        """Return the product of the factors, and the bias."""
        _, layer = _checked(program, change)
        name = change.target
        product = state[f"{name}.up"].double() @ state[f"{name}.down"].double()
        matrix = product.to(state[f"{name}.up"].dtype)
        dense = {f"{name}.{layer.weight_name}": matrix.t() if layer.transposed else matrix}
        if layer.bias_name is not None:
            dense[f"{name}.{layer.bias_name}"] = state[f"{name}.bias"]
        return dense

    def settle(self, program: Program, candidate: Candidate, context: Context) -> Candidate:
        """Predict the error on the calibration data as it reaches the layer now."""
        if context.calibration is None:
            return candidate
        factors = _factors(program, candidate.change, context)
        return replace(candidate, predicted_error=factors.relative_error**0.5)

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return both factors and the bias."""
        factors = _factors(program, change, context)
        _, layer = _checked(program, change)
        name, dtype = change.target, layer.weight.dtype
        state = {f"{name}.down": factors.down.to(dtype), f"{name}.up": factors.up.to(dtype)}
        if layer.bias is not None:
            state[f"{name}.bias"] = factors.bias.to(layer.bias.dtype)
        return state

    def apply(self, program: Program, change: Change) -> None:
        """Put the two thin layers in the place of the dense one."""
        details, layer = _checked(program, change)
        weight = layer.weight
        factors = LowRankLinear(
            details.in_features,
            details.out_features,
            details.rank,
            details.bias,
            device="meta",
            dtype=weight.dtype,
        ).to_empty(device=weight.device)
        for parameter in (factors.down, factors.up):
            parameter.requires_grad_(weight.requires_grad)
        if factors.bias is not None and layer.bias is not None:
            factors.bias.requires_grad_(layer.bias.requires_grad)
        remember_dense(factors, layer)
        replace_module(program.model, change.target, factors.train(layer.module.training))
        program.changed()

    def restore(self, model: nn.Module, change: Change) -> None:
        """Put a dense layer back whose weight is the product of the factors."""
        details = read_details(_Factorization, change)
        factors = replacement(model, change, details, LowRankLinear, "factorized")
        product = factors.up.detach().double() @ factors.down.detach().double()
        dense = dense_form(factors).filled(
            product.to(factors.up.dtype), factors.bias, trained=factors.up.requires_grad
        )
        replace_module(model, change.target, dense.train(factors.training))

    def _miss(self, target: str, reason: str) -> Miss:
        return Miss(pass_name=self.name, target=target, reason=reason)

    def _layers(
        self, program: Program, context: Context
    ) -> tuple[dict[str, LinearLayer], list[Miss]]:
        """Return the layers that can be factorized, and why the others cannot."""
        misses: list[Miss] = []
        heads = output_heads(program)
        layers: dict[str, LinearLayer] = {}
        for name, layer in linear_layers(program):
            reason = self._refusal(program, context, name, layer, heads)
            if reason is None:
                layers[name] = layer
            else:
                misses.append(self._miss(name, reason))
        return layers, misses

    def _levels(self, layer: LinearLayer) -> list[int]:
        """Return the ranks to offer, highest first: at most eight even steps."""
        step = self.round_to
        while _full_rank(layer) / step > _MOST_LEVELS:
            step += self.round_to
        return list(range(step, math.ceil(_full_rank(layer)), step))[::-1]

    def _refusal(
        self,
        program: Program,
        context: Context,
        name: str,
        layer: LinearLayer,
        heads: frozenset[str],
    ) -> str | None:
        reason = left_dense(program, context, name, heads)
        if reason is None and self.round_to >= _full_rank(layer):
            reason = (
                f"rank {self.round_to} needs no fewer operations than "
                f"{layer.in_features} -> {layer.out_features} has"
            )
        return reason

    def _ranks(
        self, program: Program, context: Context, layers: Mapping[str, LinearLayer]
    ) -> dict[str, int | None]:
        """Return the rank of every layer at the largest share that meets the budget."""
        facts, total = facts_of(program), total_cost(program).flops
        flops = {name: facts.cost(program.calls(name)).flops for name in layers}

        def ranks(share: float) -> dict[str, int | None]:
            return {
                name: self._rank(layer, context.kept_share(share, name))
                for name, layer in layers.items()
            }

        def saved(share: float) -> float:
            return sum(
                flops[name] * (1 - rank / _full_rank(layers[name]))
                for name, rank in ranks(share).items()
                if rank is not None
            )

        if context.budget is None:
            return ranks(self.share)
        wanted = (1 - context.budget) * total
        return ranks(largest_share(lambda share: saved(share) >= wanted))

    def _rank(self, layer: LinearLayer, share: float) -> int | None:
        """Return the largest rank within a share of the operations, None for all of them."""
        if share == 1:
            return None
        rank = int(_full_rank(layer) * share + 1e-9) // self.round_to * self.round_to
        return max(rank, self.round_to)

    def _candidate(self, program: Program, name: str, layer: LinearLayer, rank: int) -> Candidate:
        before = facts_of(program).cost(program.calls(name))
        details = _Factorization(
            rank=rank,
            in_features=layer.in_features,
            out_features=layer.out_features,
            bias=layer.bias is not None,
        )
        removed = layer.weight.numel() - rank * (layer.in_features + layer.out_features)
        return Candidate(
            change=Change(
                pass_name=self.name,
                target=name,
                summary=f"{layer.in_features} -> {layer.out_features} at rank {rank}",
                details=details.model_dump(),
            ),
            before=before,
            after=Cost(
                flops=round(before.flops * rank / _full_rank(layer)),
                size_bytes=before.size_bytes - removed * layer.weight.element_size(),
                parameters=before.parameters - removed,
            ),
            exclusive=frozenset(
                f"{name}.{layer.weight_name} {claim}" for claim in ("structure", "format")
            ),
        )


def _measured(program: Program, candidate: Candidate, context: Context) -> tuple[Candidate, float]:
    """Return the candidate with its times, and how many times faster it is."""
    assert context.costs is not None
    details, layer = _checked(program, candidate.change)
    factors = LowRankLinear(
        details.in_features,
        details.out_features,
        details.rank,
        details.bias,
        device="meta",
        dtype=layer.weight.dtype,
    ).requires_grad_(layer.weight.requires_grad)
    return timed(program, candidate, layer, factors, context.costs, training=context.training)


def _factors(program: Program, change: Change, context: Context) -> Factors:
    """Return the best factors of a layer for its inputs, or for its weight without data."""
    details, layer = _checked(program, change)
    calibration = context.calibration
    key = f"{change.target} {id(calibration)}"
    if calibration is None:
        bare = latest(program, "decomposition", key, lambda: _decomposed(layer))
        return bare.factors(details.rank)

    def decompose() -> Whitened:
        nodes = [(node.all_input_nodes[0], -1) for node in program.calls(change.target)]
        statistics = calibration.statistics(program, list(dict.fromkeys(nodes)))
        if layer.bias is None:
            statistics = statistics.uncentered()
        return whiten(statistics, layer.matrix, layer.bias)

    return latest(program, "decomposition", key, decompose).factors(details.rank)


def _decomposed(layer: LinearLayer) -> Whitened:
    """Return a layer decomposed as if its inputs were white, around zero."""
    weight = layer.matrix.double()
    return decomposed(weight, layer.bias, weight.new_zeros(layer.in_features), None)


def _full_rank(layer: LinearLayer) -> float:
    """Return the rank at which the factors need as many operations as the layer."""
    return layer.weight.numel() / (layer.in_features + layer.out_features)


def _checked(program: Program, change: Change) -> tuple[_Factorization, LinearLayer]:
    """Return the checked details and the layer of a change.

    Raises:
        PlanError: if they do not fit each other.
    """
    details = read_details(_Factorization, change)
    layer = replaced_layer(program, change, details, "factorized")
    if details.rank >= _full_rank(layer):
        raise PlanError(
            f"{change.target} at rank {details.rank} would need no fewer operations than dense"
        )
    return details, layer
