"""Residual blocks that are left out: in some training steps, or for good.

before: x = x + f(x)
after:  x = gate(x + f(x), entry=x)      in training x alone, with a probability
or:     x = x                            the parameters of f are gone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import nn

from graphopt.kernels.layer_gate import LayerGate
from graphopt.passes.base import (
    Candidate,
    Change,
    Context,
    Cost,
    Miss,
    Pass,
    Proposal,
    State,
    shared_names,
)
from graphopt.passes.errors import ConfigError
from graphopt.passes.facts import attribute_of, facts_of, total_cost
from graphopt.passes.lazy_branches import only_for
from graphopt.passes.program import Program
from graphopt.passes.region_times import region_workload
from graphopt.passes.tokens import residual_stream

from .block_gates import gate_name, insert_gate, remove_gate
from .block_influence import block_influences
from .layer_changes import Freed, Removal, Skip, freed_parameters, read_change, remove_block
from .residual_blocks import (
    BLOCK_ORDER,
    ResidualBlock,
    escaping,
    find_blocks,
    kept_by_readers,
    refusal,
    residual_blocks,
)

_GATE = "layer_gate"


@final
@dataclass(frozen=True, kw_only=True)
class GateLayers(Pass):
    """Leave out whole residual blocks: at random while training, the least useful ones for good.

    Blocks are the regions of the residual stream: what lies between a value and the add that
    joins its result back in (attention and feed-forward each). What stands behind the add, such as
    the norm of a post-norm model, always runs.

    While training, block r of R is left out with probability `rate * (r / R) * time`, where time
    is 1 up to `plateau` and falls to 0 at the end of training; the first block always runs. All
    ranks draw alike, and evaluation is that of the plain model. What something outside of a block
    reads, such as keys and values for a cache, is computed in any case.

    With `remove`, that many blocks are removed instead: those whose result differs least from
    what they start from, 1 - cosine, on the calibration data or else the example. The model's own
    forward then has no parameters to run with, so calls unlike the captured one are refused.

    Sources: stochastic depth (arXiv 1603.09382), progressive layer dropping (2010.13369), block
    influence (ShortGPT, 2403.03853).

    Attributes:
        rate: Largest probability to leave a block out, in [0, 1).
        plateau: Progress up to which the probabilities stay, in [0, 1].
        seed: Seed of the draws, the same on all ranks.
        remove: Number of blocks to remove; 0 gates them.
    """

    name: ClassVar[str] = "gate-layers"
    exact: ClassVar[bool] = False

    rate: float = 0.2
    plateau: float = 0.5
    seed: int = 0
    remove: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.rate < 1 or not 0 <= self.plateau <= 1 or self.remove < 0:
            raise ConfigError(
                "gate-layers takes a rate from 0 to below 1, a plateau from 0 to 1 and a number of "
                f"blocks to remove from 0 on, got rate={self.rate}, plateau={self.plateau}, "
                f"remove={self.remove}"
            )

    def propose(self, program: Program, context: Context) -> Proposal:
        """Find the blocks of every chain; gate them by depth, or score them for removal."""
        blocks = list(residual_blocks(program))
        if not blocks:
            reason = residual_stream(program).reason or "its blocks have no parameters"
            return Proposal(misses=(self._miss("(model)", reason),))
        if self.remove:
            return self._removals(program, context, blocks)
        return self._skips(program, context, blocks)

    def offer(self, program: Program, context: Context) -> Proposal:
        """Offer the removal of each block that can go; to train without `remove`, the gates."""
        if context.training and not self.remove:
            return self.propose(program, context)
        free, misses = self._removable(program, context, list(residual_blocks(program)))
        candidates = [
            _timed(program, context, block, self._removal(program, block, freed, "removed"))
            for block, freed in free
        ]
        if not candidates and not misses:
            reason = residual_stream(program).reason or "its blocks have no parameters"
            misses = [self._miss("(model)", reason)]
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def reconstruct(self, program: Program, change: Change, state: State) -> State | None:
        """Return zeros for the parameters of a removed block, with which it adds 0."""
        details = read_change(change)
        if isinstance(details, Skip):
            return {}
        return {
            item.name: torch.zeros_like(attribute_of(program, item.name)) for item in details.freed
        }

    def trains_only(self, change: Change) -> bool:
        """Say whether the change is a gate, which always runs its block in evaluation mode."""
        return isinstance(read_change(change), Skip)

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return nothing: a gate has no values, and a removal leaves none."""
        return {}

    def apply(self, program: Program, change: Change) -> None:
        """Put a gate behind the block's add, or the block's entry in its place."""
        details = read_change(change)
        (region,) = find_blocks(program, [details.place], change)
        if isinstance(details, Skip):
            insert_gate(program, region.add, region.entry, details.gate, _gate(details))
        else:
            remove_block(program, region, details, change)
        program.changed()

    def restore(self, model: nn.Module, change: Change) -> None:
        """Take the gate away; or give a removed block parameters of zero, with which it adds 0."""
        details = read_change(change)
        if isinstance(details, Skip):
            remove_gate(model, details.gate, LayerGate)
            return
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for freed in details.freed:
            owner, _, attribute = freed.name.rpartition(".")
            dtype = getattr(torch, freed.dtype)
            value = nn.Parameter(
                torch.zeros(freed.shape, dtype=dtype, device=device), requires_grad=freed.trained
            )
            setattr(model.get_submodule(owner), attribute, value)

    def _miss(self, target: str, reason: str) -> Miss:
        return Miss(pass_name=self.name, target=target, reason=reason)

    def _skips(
        self, program: Program, context: Context, blocks: Sequence[ResidualBlock]
    ) -> Proposal:
        candidates: list[Candidate] = []
        misses: list[Miss] = []
        taken: set[str] = set()
        for number, block in enumerate(blocks):
            rate = self.rate * block.depth
            reason = _skip_refusal(program, context, block, rate)
            if reason is not None:
                misses.append(self._miss(block.name, reason))
                continue
            gate = gate_name(program, block.region.add, _GATE, taken)
            taken.add(gate)
            details = Skip(
                kind="skip",
                place=block.place,
                gate=gate,
                number=number,
                rate=rate,
                plateau=self.plateau,
                seed=self.seed,
            )
            cost = facts_of(program).cost(block.region.nodes)
            candidates.append(
                Candidate(
                    change=Change(
                        pass_name=self.name,
                        target=block.name,
                        summary=f"left out in up to {rate:.1%} of the training steps",
                        details=details.model_dump(mode="json"),
                    ),
                    before=cost,
                    after=cost,
                    predicted_error=0.0,
                )
            )
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def _removals(
        self, program: Program, context: Context, blocks: Sequence[ResidualBlock]
    ) -> Proposal:
        free, misses = self._removable(program, context, blocks)
        if not free:
            return Proposal(misses=tuple(misses))
        influences = block_influences(program, context, [block for block, _ in free])
        order = sorted(range(len(free)), key=influences.__getitem__)
        spare = _spare_flops(program, context)
        candidates: list[Candidate] = []
        for index in order:
            block, freed = free[index]
            text = f"influence {influences[index]:.3g}"
            if len(candidates) == self.remove or spare <= 0:
                limit = "the budget is met" if spare <= 0 else f"{self.remove} matter less"
                misses.append(self._miss(block.name, f"{text}, kept: {limit}"))
                continue
            candidate = self._removal(program, block, freed, f"removed, {text}")
            spare -= candidate.before.flops
            candidates.append(candidate)
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def _removable(
        self, program: Program, context: Context, blocks: Sequence[ResidualBlock]
    ) -> tuple[list[tuple[ResidualBlock, tuple[Freed, ...]]], list[Miss]]:
        """Return the blocks that can be removed with their parameters, and why others cannot."""
        misses: list[Miss] = []
        free: list[tuple[ResidualBlock, tuple[Freed, ...]]] = []
        for block in blocks:
            freed = freed_parameters(program, block.region)
            reason = _removal_refusal(program, context, block, freed)
            if reason is None:
                free.append((block, freed))
            else:
                misses.append(self._miss(block.name, reason))
        return free, misses

    def _removal(
        self, program: Program, block: ResidualBlock, freed: tuple[Freed, ...], summary: str
    ) -> Candidate:
        details = Removal(kind="remove", place=block.place, freed=freed)
        return Candidate(
            change=Change(
                pass_name=self.name,
                target=block.name,
                summary=summary,
                details=details.model_dump(mode="json"),
            ),
            before=facts_of(program).cost(only_for(block.region.add, block.region.entry)),
            after=Cost(flops=0, size_bytes=0, parameters=0),
            shared=frozenset({BLOCK_ORDER}),
            exclusive=frozenset(
                f"{item.name} {claim}" for item in freed for claim in ("structure", "format")
            ),
        )


def _gate(details: Skip) -> LayerGate:
    return LayerGate(
        rate=details.rate, plateau=details.plateau, seed=details.seed, number=details.number
    )


def _timed(
    program: Program, context: Context, block: ResidualBlock, candidate: Candidate
) -> Candidate:
    """Return the removal of a block with the time that the block takes alone."""
    if context.costs is None:
        return candidate
    region = block.region
    work = region_workload(program, [*only_for(region.add, region.entry), region.add])
    time = context.costs.latency(work, training=context.training)
    return replace(
        candidate,
        before=candidate.before.timed(time.latency_ms, time.source),
        after=candidate.after.timed(0.0, time.source),
    )


def _skip_refusal(
    program: Program, context: Context, block: ResidualBlock, rate: float
) -> str | None:
    """Say why a region cannot be left out in training, None if it can."""
    reason = refusal(program, context, block)
    if reason is not None:
        return reason
    if block.first:
        return "the first block always runs"
    if not rate:
        return "the rate is 0"
    return kept_by_readers(program, block)


def _removal_refusal(
    program: Program, context: Context, block: ResidualBlock, freed: Sequence[Freed]
) -> str | None:
    """Say why a region cannot be removed, None if it can."""
    reason = refusal(program, context, block)
    if reason is not None:
        return reason
    if block.region.escapes:
        return escaping(block.region)
    if {item.name for item in freed} < {*block.place.weights}:
        return "its parameters are also read outside"
    for item in freed:
        others = [name for name in shared_names(program.model, item.name) if name != item.name]
        if others:
            return f"{item.name} is tied to {others[0]}"
    if any(parameter.is_meta for parameter in program.model.parameters()):
        return "its influence is not known: parameters on the meta device have no values"
    return None


def _spare_flops(program: Program, context: Context) -> float:
    """Return how many operations the budget wants to be gone."""
    if context.budget is None:
        return float("inf")
    return total_cost(program).flops * (1 - context.budget)
