"""A new model's layers are left out at first, and join later as copies of those that trained.

before: x = x + f(x)
after:  x = gate(x + f(x), entry=x)      in training x alone up to some progress, f's weights 0;
                                         from then on x + f(x), f from the weights of a block below
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import fx, nn

from graphopt.kernels.depth_gate import DepthGate, is_untrained
from graphopt.kernels.resolution_gate import ResolutionGate
from graphopt.passes.axis_flow import arguments_of
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
from graphopt.passes.errors import ConfigError
from graphopt.passes.facts import attribute_of, facts_of
from graphopt.passes.program import Program
from graphopt.passes.tokens import residual_stream

from .block_gates import gate_name, insert_gate, remove_gate
from .layer_changes import freed_parameters
from .repeated_blocks import ordered_weights, repeated_layers
from .residual_blocks import BlockPlace, ResidualBlock, find_blocks, kept_by_readers, refusal

_GATE = "depth_gate"
_TARGET = "(layers)"


class _Later(Details):
    """A block that joins later.

    Attributes:
        place: Which block.
        gate: Name of the gate to add to the model.
        own: Names of the block's parameters.
        donor: Names of those that are copied into them.
    """

    place: BlockPlace
    gate: str
    own: tuple[str, ...] = Field(min_length=1)
    donor: tuple[str, ...] = Field(min_length=1)


class _Growth(Details):
    """What `apply` needs.

    Attributes:
        blocks: The blocks that join later, in graph order.
        joins: Progress from which they take part.
    """

    blocks: tuple[_Later, ...] = Field(min_length=1)
    joins: float = Field(gt=0, lt=1)


@final
@dataclass(frozen=True, kw_only=True)
class GrowDepth(Pass):
    """Train the first layers alone at first; the others then join as copies of these.

    Layers are what a residual stream repeats (attention and feed-forward, or one block), found by
    their operations and shapes. Of n layers the first `start * n`, at least one, train from the
    beginning; layer i joins at progress `joins` with the weights of layer i modulo that. Until then
    its weights are 0, so that a checkpoint taken earlier is a model of the first layers in the full
    model's form; to be trained further, it has to go on with the gates.

    For models with fresh weights only: a block counts as trained, and is left alone, if none of its
    parameters has the same value everywhere, as a norm's weights of 1 or a bias of 0 have. A block
    that keeps running statistics, as batch norms do, is left alone too: it would join without any,
    and on a CNN with batch norms growing lost more than it saved (docs/training_frontier.md). So is
    a model whose images are small at first (`ramp-resolution` before this): both together lost.

    Source: G_stack (arXiv 2405.15319); progressive stacking (Gong et al., ICML 2019).

    Attributes:
        start: Share of the layers that train from the beginning, above 0 and below 1.
        joins: Progress at which the others join, above 0 and below 1.
    """

    name: ClassVar[str] = "grow-depth"
    exact: ClassVar[bool] = False

    start: float = 0.25
    joins: float = 0.7

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 < self.start < 1 or not 0 < self.joins < 1:
            raise ConfigError(
                "grow-depth takes a start and a progress to join at, both above 0 and below 1, got "
                f"start={self.start}, joins={self.joins}"
            )

    def propose(self, program: Program, context: Context) -> Proposal:
        """Find the layers that repeat; gate all but the first."""
        if any(isinstance(part, ResolutionGate) for part in program.model.modules()):
            both = "its images are small at first already, and both together learned less"
            return Proposal(misses=(self._miss("(model)", both),))
        layers = repeated_layers(program)
        if not layers:
            found = residual_stream(program).reason or "no residual block follows one like it"
            return Proposal(misses=(self._miss("(model)", found),))
        kept = max(1, int(self.start * len(layers)))
        later: list[_Later] = []
        gated: list[ResidualBlock] = []
        misses: list[Miss] = []
        for index in range(kept, len(layers)):
            for block, donor in zip(layers[index], layers[index % kept], strict=True):
                reason = _refusal(program, context, block)
                if reason is not None:
                    misses.append(self._miss(block.name, reason))
                    continue
                gated.append(block)
                later.append(
                    _Later(
                        place=block.place,
                        gate=gate_name(
                            program, block.region.add, _GATE, {item.gate for item in later}
                        ),
                        own=ordered_weights(program, block),
                        donor=ordered_weights(program, donor),
                    )
                )
        if not later:
            return Proposal(misses=tuple(misses))
        summary = (
            f"{kept} of {len(layers)} layers train from the beginning, {len(later)} blocks of the "
            f"others join at {self.joins:.0%} of the training as their copies"
        )
        candidate = self._candidate(program, gated, later, summary)
        return Proposal(candidates=(candidate,), misses=tuple(misses))

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return nothing: no value changes before the training."""
        return {}

    def reconstruct(self, program: Program, change: Change, state: State) -> State:
        """Return nothing: the parameters as they are compute the same."""
        return {}

    def apply(self, program: Program, change: Change) -> None:
        """Put a gate behind every block's add."""
        details = read_details(_Growth, change)
        regions = find_blocks(program, [block.place for block in details.blocks], change)
        # The last one first: behind a gate, the next block starts from that and not from the add.
        for block, region in reversed([*zip(details.blocks, regions, strict=True)]):
            gate = DepthGate(own=block.own, donor=block.donor, joins=details.joins)
            gate.attach(program.model)
            insert_gate(program, region.add, region.entry, block.gate, gate)
        program.changed()

    def restore(self, model: nn.Module, change: Change) -> None:
        """Take the gates away; a block that has not joined yet keeps weights of 0."""
        for block in read_details(_Growth, change).blocks:
            remove_gate(model, block.gate, DepthGate)

    def trains_only(self, change: Change) -> bool:
        """Say that evaluation is as before."""
        return True

    def _miss(self, target: str, reason: str) -> Miss:
        return Miss(pass_name=self.name, target=target, reason=reason)

    def _candidate(
        self,
        program: Program,
        gated: Sequence[ResidualBlock],
        later: Sequence[_Later],
        summary: str,
    ) -> Candidate:
        cost = facts_of(program).cost([node for block in gated for node in block.region.nodes])
        details = _Growth(blocks=tuple(later), joins=self.joins)
        return Candidate(
            change=Change(
                pass_name=self.name,
                target=_TARGET,
                summary=summary,
                details=details.model_dump(mode="json"),
            ),
            before=cost,
            after=cost,
            predicted_error=0.0,
        )


def _refusal(program: Program, context: Context, block: ResidualBlock) -> str | None:
    """Say why a block must take part from the beginning, None if it need not."""
    reason = refusal(program, context, block) or kept_by_readers(program, block)
    if reason is not None:
        return reason
    keeper = next(filter(_keeps_statistics, block.region.nodes), None)
    if keeper is not None:
        return f"{keeper.name} keeps running statistics, which a block that joins late would lack"
    freed = freed_parameters(program, block.region)
    if {item.name for item in freed} < {*block.place.weights}:
        return "its parameters are also read outside"
    for item in freed:
        others = [name for name in shared_names(program.model, item.name) if name != item.name]
        if others:
            return f"{item.name} is tied to {others[0]}"
        if not item.trained:
            return f"{item.name} is not trained"
    values = [attribute_of(program, item.name) for item in freed]
    if any(value.is_meta for value in values):
        return "parameters on the meta device have no values that show whether they were trained"
    if not is_untrained(values):
        return "its weights were trained: none of its parameters has the same value everywhere"
    return None


def _keeps_statistics(node: fx.Node) -> bool:
    """Say whether an operation, or one of the module that is called, has running statistics."""
    body: fx.Graph | None = node.meta.get("body")
    operations = [node] if body is None else body.nodes
    return any(
        arguments_of(operation).get("running_mean") is not None
        for operation in operations
        if isinstance(operation.target, torch._ops.OpOverload)
    )
