"""A new net's first channels are trained alone at first; the others join later.

before: y = layer(x)
after:  y = gate(layer(x), entry=x)      in training of the first channels up to some progress,
                                         nobody reads the others; from then on of all
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from pydantic import Field
from torch import nn

from graphopt.kernels.width_gate import WidthGate, WidthGrowth
from graphopt.passes.axes import ChannelGroup, axes_of
from graphopt.passes.base import Candidate, Change, Context, Miss, Pass, Proposal, State
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import ConfigError, PlanError
from graphopt.passes.facts import facts_of
from graphopt.passes.least_squares import kept_group_count
from graphopt.passes.program import Program

from .block_gates import gate_name, insert_gate, remove_gate
from .first_channels import (
    calls_of,
    first_channels,
    form_refusal,
    training_refusal,
    trial_refusal,
)

_GATE = "width_gate"
_TARGET = "(channels)"
_MULTIPLE = 16  # what CPU kernels block channels by: fewer of them take as long

_Counts = list[tuple[ChannelGroup, int]]


class _Growth(Details):
    """What `apply` needs.

    Attributes:
        first: For every group, by its key, how many channels train from the beginning.
        gates: For every layer that holds channels of these the name of its gate.
        joins: Progress from which all channels take part.
    """

    first: dict[str, int] = Field(min_length=1)
    gates: dict[str, str] = Field(min_length=1)
    joins: float = Field(gt=0, lt=1)


@final
@dataclass(frozen=True, kw_only=True)
class GrowWidth(Pass):
    """Train the first channels of convolutions alone at first; the others then join, unread.

    Channels are found as coupled groups by dataflow: what makes them, norms, and what reads them.
    Of n channels the first `start * n`, a multiple of 16, train from the beginning, with all n from
    progress `joins` on. Until then the weights that read the others are 0, so that a checkpoint
    taken earlier is a net of the first channels in the full net's form. When they join, nothing
    changes at first, as nobody reads them yet.

    With half of the channels a convolution has a quarter of the operations. Parameters, optimizer
    and checkpoints are those of the full net all along.

    For nets with fresh weights only: channels count as trained, and are left alone, if none of
    their parameters has the same value everywhere, as a norm's weights of 1 have. That the first
    channels can be computed alone is tried; nets that take a mean over channels, such as layer
    norms do, are left as they are.

    Sources: see `WidthGate`; what it saves is in docs/training_frontier.md.

    Attributes:
        start: Share of the channels that train from the beginning, above 0 and below 1.
        joins: Progress at which the others join, above 0 and below 1.
    """

    name: ClassVar[str] = "grow-width"
    exact: ClassVar[bool] = False

    start: float = 0.5
    joins: float = 0.6

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 < self.start < 1 or not 0 < self.joins < 1:
            raise ConfigError(
                "grow-width takes a start and a progress to join at, both above 0 and below 1, got "
                f"start={self.start}, joins={self.joins}"
            )

    def propose(self, program: Program, context: Context) -> Proposal:
        """Find channels of which the first can be computed alone."""
        groups = [group for group in axes_of(program).groups() if group.kind == "channels"]
        if not groups:
            return Proposal(misses=(self._miss("(model)", "no convolution makes channels"),))
        found: _Counts = []
        misses: list[Miss] = []
        for group in groups:
            count = kept_group_count(group.size, self.start, _MULTIPLE)
            reason = form_refusal(program, group, count) or training_refusal(
                program, group, context
            )
            if reason is None:
                found.append((group, count))
            else:
                misses.append(self._miss(group.key, reason))
        found, failures = self._tried(program, found)
        misses.extend(failures)
        candidates = (self._candidate(program, found),) if found else ()
        return Proposal(candidates=candidates, misses=tuple(misses))

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return nothing: no value changes before the training."""
        return {}

    def reconstruct(self, program: Program, change: Change, state: State) -> State:
        """Return nothing: the parameters as they are compute the same."""
        return {}

    def apply(self, program: Program, change: Change) -> None:
        """Put a gate behind every layer that holds channels of the groups."""
        details = read_details(_Growth, change)
        counts = [(axes_of(program).group(key), count) for key, count in details.first.items()]
        for group, count in counts:
            reason = form_refusal(program, group, count) if count > 0 else "it would have none"
            if reason is not None:
                raise PlanError(f"the channels {group.key!r} cannot grow from {count}: {reason}")
        if details.gates != _gate_names(program, counts):
            raise PlanError(
                "the gates of the change do not fit the model's layers; was the plan edited or "
                "made for another model?"
            )
        first = first_channels(counts)
        growth = WidthGrowth(cuts=first.cuts, reads=first.reads, joins=details.joins)
        growth.attach(program.model)
        for node in calls_of(program, [group for group, _ in counts]):
            (entry,) = node.all_input_nodes
            layer = str(node.target)
            gate = WidthGate(growth=growth, layer=layer)
            insert_gate(program, node, entry, details.gates[layer], gate)
        program.changed()

    def restore(self, model: nn.Module, change: Change) -> None:
        """Take the gates away; channels that have not joined yet stay unread."""
        for name in read_details(_Growth, change).gates.values():
            remove_gate(model, name, WidthGate)

    def trains_only(self, change: Change) -> bool:
        """Say that evaluation is as before."""
        return True

    def _miss(self, target: str, reason: str) -> Miss:
        return Miss(pass_name=self.name, target=target, reason=reason)

    def _tried(self, program: Program, counts: _Counts) -> tuple[_Counts, list[Miss]]:
        """Return the groups that can grow together, and why others cannot."""
        if not counts or trial_refusal(program, first_channels(counts)) is None:
            return counts, []
        found: _Counts = []
        misses: list[Miss] = []
        for group, count in counts:
            reason = trial_refusal(program, first_channels([*found, (group, count)]))
            if reason is None:
                found.append((group, count))
            else:
                misses.append(self._miss(group.key, reason))
        return found, misses

    def _candidate(self, program: Program, counts: _Counts) -> Candidate:
        cost = facts_of(program).cost(calls_of(program, [group for group, _ in counts]))
        details = _Growth(
            first={group.key: count for group, count in counts},
            gates=_gate_names(program, counts),
            joins=self.joins,
        )
        kept, size = (sum(sizes) for sizes in zip(*((c, g.size) for g, c in counts), strict=True))
        return Candidate(
            change=Change(
                pass_name=self.name,
                target=_TARGET,
                summary=f"{kept} of {size} channels in {len(counts)} groups train from the "
                f"beginning, the others join at {self.joins:.0%} of the training",
                details=details.model_dump(mode="json"),
            ),
            before=cost,
            after=cost,
            predicted_error=0.0,
        )


def _gate_names(program: Program, counts: _Counts) -> dict[str, str]:
    """Return a gate's name for every layer."""
    names: dict[str, str] = {}
    for node in calls_of(program, [group for group, _ in counts]):
        names[str(node.target)] = gate_name(program, node, _GATE, set(names.values()))
    return names
