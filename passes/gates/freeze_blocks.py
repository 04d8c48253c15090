"""The first blocks of a model, and what lies below them, are not trained.

before: every parameter is trained
after:  requires_grad=False up to a block; the backward pass ends there

Outputs stay the same. A training step saves the backward pass of the frozen part: two thirds of
its operations. For models that were trained before.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, final

from pydantic import Field
from torch import nn

from graphopt.passes.base import (
    Candidate,
    Change,
    Context,
    Miss,
    Pass,
    Proposal,
    State,
    shared_names,
)
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import ConfigError, PlanError
from graphopt.passes.facts import attribute_of, facts_of, total_cost
from graphopt.passes.frozen_depths import FrozenDepth, frozen_depths
from graphopt.passes.program import Program
from graphopt.passes.tokens import residual_stream

_TARGET = "(blocks)"


class _Freeze(Details):
    """What `apply` needs.

    Attributes:
        parameters: Names of the parameters that are trained before and not after.
    """

    parameters: tuple[str, ...] = Field(min_length=1)


@final
@dataclass(frozen=True, kw_only=True)
class FreezeBlocks(Pass):
    """Freeze the first blocks of the residual stream, the embeddings below them included.

    A parameter that is also read above them (a word table that is the output head too) would no
    longer be trained there either, so such models are left as they are. Names in `ignore` stay
    trained. `graphopt.training.choose_frozen_depth` finds the depth by a probe.

    Source: AutoFreeze (arXiv 2102.01386); that early layers move least in fine-tuning.

    Attributes:
        share: Share of the blocks to freeze, rounded down to whole blocks, below 1.
        depth: Number of blocks to freeze instead; 0 takes the share.
    """

    name: ClassVar[str] = "freeze-blocks"
    exact: ClassVar[bool] = False

    share: float = 0.67
    depth: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 < self.share < 1 or self.depth < 0:
            raise ConfigError(
                "freeze-blocks takes a share above 0 and below 1 and a depth of at least 0, got "
                f"share={self.share}, depth={self.depth}"
            )

    def propose(self, program: Program, context: Context) -> Proposal:
        """Find the place on the residual stream, and what is computed before it."""
        depths = frozen_depths(program)
        blocks = len(depths) - 1
        if not blocks:
            return self._refused(residual_stream(program).reason or "it has no residual stream")
        wanted = self.depth or int(self.share * blocks)
        if not 0 < wanted < blocks:
            return self._refused(f"{wanted} of {blocks} blocks cannot be frozen")
        frozen = depths[wanted]
        above = _read_above(program, frozen)
        if above is not None:
            return self._refused(f"{above}, a parameter of the first blocks, is also read above")
        trained = [name for name in frozen.parameters if attribute_of(program, name).requires_grad]
        if not trained:
            return self._refused(f"its first {wanted} blocks are frozen already")
        ignored = {name: context.ignored_by(name) for name in trained}
        misses = tuple(
            Miss(pass_name=self.name, target=name, reason=f"ignored by the pattern {pattern!r}")
            for name, pattern in ignored.items()
            if pattern is not None
        )
        names = tuple(name for name in trained if ignored[name] is None)
        found = (self._candidate(program, frozen, blocks, names),) if names else ()
        return Proposal(candidates=found, misses=misses)

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return nothing: no value changes."""
        return {}

    def reconstruct(self, program: Program, change: Change, state: State) -> State:
        """Return nothing: the parameters as they are compute the same."""
        return {}

    def apply(self, program: Program, change: Change) -> None:
        """Stop training the parameters."""
        _set_trained(program.model, change, False)

    def restore(self, model: nn.Module, change: Change) -> None:
        """Let the parameters be trained again."""
        _set_trained(model, change, True)

    def trains_only(self, change: Change) -> bool:
        """Say that evaluation is as before."""
        return True

    def _refused(self, reason: str) -> Proposal:
        return Proposal(misses=(Miss(pass_name=self.name, target=_TARGET, reason=reason),))

    def _candidate(
        self, program: Program, frozen: FrozenDepth, blocks: int, names: tuple[str, ...]
    ) -> Candidate:
        share = frozen.flops / max(total_cost(program).flops, 1)
        details = _Freeze(parameters=names)
        cost = facts_of(program).cost(frozen.nodes)
        return Candidate(
            change=Change(
                pass_name=self.name,
                target=_TARGET,
                summary=f"{frozen.depth} of {blocks} blocks: no backward pass through {share:.0%} "
                "of the forward FLOPs",
                details=details.model_dump(mode="json"),
            ),
            before=cost,
            after=cost,
            predicted_error=0.0,
        )


def _read_above(program: Program, frozen: FrozenDepth) -> str | None:
    """Return a frozen parameter that something above the frozen part reads, None if none is."""
    for node, found in facts_of(program).nodes.items():
        if node in frozen.nodes:
            continue
        for weight in found.weights:
            names = shared_names(program.model, weight)
            again = next((name for name in names if name in frozen.parameters), None)
            if again is not None:
                return again
    return None


def _set_trained(model: nn.Module, change: Change, trained: bool) -> None:
    """Put parameters that share their values in the place of others, wherever these are."""
    known = dict(model.named_parameters())
    for name in read_details(_Freeze, change).parameters:
        if name not in known:
            raise PlanError(f"the model has no parameter {name!r}, which the plan describes")
        parameter = copy.copy(known[name]).requires_grad_(trained)
        for other in shared_names(model, name):
            parent, _, attribute = other.rpartition(".")
            setattr(model.get_submodule(parent), attribute, parameter)
