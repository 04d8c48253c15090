"""Dead code elimination along the token axis: compute only the positions that somebody reads.

before: every layer, norm and head at all tokens, then `hidden[:, 0]` or a loss at labelled tokens
after:  from the last attention on, the queries, the feed-forward layer, norms and the head at those
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx, nn

from graphopt.passes.base import Candidate, Change, Context, Miss, Pass, Proposal, State
from graphopt.passes.demand import demands, label_demands
from graphopt.passes.demanded_graph import run_demanded
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import ConfigError
from graphopt.passes.facts import total_cost
from graphopt.passes.labelled_graph import run_labelled
from graphopt.passes.packed_graph import is_packed
from graphopt.passes.packing import packing_of
from graphopt.passes.program import Program
from graphopt.passes.program_times import compare_programs
from graphopt.passes.propagation import refresh
from graphopt.passes.row_places import RowPlaces, row_places
from graphopt.passes.snapshot import copied_graph
from graphopt.passes.structure import Container, Leaf, Structure
from graphopt.passes.unread import output_rows

_TARGET = "(tokens)"


class _Dropped(Details):
    """What `apply` needs.

    Attributes:
        outputs: Names of the outputs that are read; none means all.
    """

    outputs: tuple[str, ...]


@final
@dataclass(frozen=True, kw_only=True)
class DropDeadTokens(Pass):
    """Compute queries, attention outputs, feed-forward layers, norms and heads at read tokens only.

    What is read is found from the outputs backwards: a token that the model selects (the first,
    the last, the last that is no padding), or those with a label that a loss does not ignore.
    Where times are measured, it is kept only if it is faster.

    Attributes:
        outputs: Names of the outputs that are read, separated by spaces: "loss" in training.
            Others come back with zeros where nothing needs them. Empty: all are read.
    """

    name: ClassVar[str] = "drop-dead-tokens"
    exact: ClassVar[bool] = True

    outputs: str = ""

    def note_unread(self, program: Program) -> None:
        """Note the outputs that the user does not read."""
        names = _output_names(program)
        wanted = self.outputs.split()
        unknown = [name for name in wanted if name not in names]
        if wanted and len(unknown) == len(wanted):
            raise ConfigError(
                f"the outputs that are read must be among {', '.join(dict.fromkeys(names))}, got "
                f"{unknown[0]!r}; call the model with labels in the example if it is the loss"
            )
        _note(program, wanted)

    def propose(self, program: Program, context: Context) -> Proposal:
        """Follow the demand of the outputs; measure what it saves."""
        self.note_unread(program)
        pattern = context.ignored_by(_TARGET)
        if pattern is not None:
            return self._refusal(f"ignored by the pattern {pattern!r}")
        twin = program.of_copy(program.model)
        twin.graph = copied_graph(program.graph)
        twin.changed()
        done = list(_drop(twin))
        if not done:
            return self._refusal(_reason(program))
        refresh(twin)
        before, after = total_cost(program), total_cost(twin)
        candidate = Candidate(
            change=Change(
                pass_name=self.name,
                target=_TARGET,
                summary="; ".join(done),
                details=_Dropped(outputs=tuple(self.outputs.split())).model_dump(mode="json"),
            ),
            before=before,
            after=after,
            predicted_error=0.0,
        )
        numeric = not any(parameter.is_meta for parameter in program.model.parameters())
        if context.costs is None or not numeric:
            return Proposal(candidates=(candidate,))
        what = f"{candidate.change.summary}: {before.flops} to {after.flops} flops"
        times = compare_programs(context.costs, program, twin, what, training=context.training)
        if times.ratio <= 1:
            return self._refusal(f"measured {times.ratio:.2f}x, all tokens are kept")
        return Proposal(candidates=(candidate.timed(times),))

    def _refusal(self, reason: str) -> Proposal:
        return Proposal(misses=(Miss(pass_name=self.name, target=_TARGET, reason=reason),))

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Change no values."""
        return {}

    def apply(self, program: Program, change: Change) -> None:
        """Compute what is read only; a call in which all is read stays as it is."""
        details = read_details(_Dropped, change)
        output_rows(program)
        _note(program, details.outputs)
        for _ in _drop(program):
            pass

    def restore(self, model: nn.Module, change: Change) -> None:
        """Do nothing: modules are as they were."""
        read_details(_Dropped, change)


def _drop(program: Program) -> Iterator[str]:
    """Rewrite one demand after the other; say what was done."""
    while (done := _drop_positions(program) or _drop_unlabelled(program)) is not None:
        program.changed()
        refresh(program)
        yield done


def _drop_positions(program: Program) -> str | None:
    for places in _all_places(program):
        for demand in demands(program, places):
            where = demand.positions
            text = "one token of each sample"
            if where.index is None and (where.start, where.stop) != (-1, None):
                text = f"tokens [{where.start or 0}:{'' if where.stop is None else where.stop}]"
            source = demand.source.name
            run_demanded(program, demand)
            return f"{len(demand.nodes)} operations at {text} of {source}"
    return None


def _drop_unlabelled(program: Program) -> str | None:
    for places in _all_places(program):
        for demand in label_demands(program, places):
            packing = packing_of(program, places, within=demand.nodes)
            if packing.flops:
                run_labelled(program, places, demand, packing)
                return f"{len(packing.nodes)} operations at tokens with a label"
    return None


def _all_places(program: Program) -> Iterator[RowPlaces]:
    """Yield where the rows of the busiest stream and of every sequence input lie."""
    sequences = [n.name for n in program.placeholders if n.meta["val"].dim() > 1]
    for source in (None, *sequences):
        places = row_places(program, source)
        if places is not None:
            yield places


def _reason(program: Program) -> str:
    """Say which output reads everything."""
    if is_packed(program):
        return "real tokens are packed already; put drop-dead-tokens before pack-tokens"
    places = row_places(program)
    if places is None:
        return "no stream of tokens was found"
    (outputs,) = program.result.args
    assert isinstance(outputs, (tuple, list))
    for name, node in zip(_output_names(program), outputs, strict=True):
        if isinstance(node, fx.Node) and places.token_dims(node):
            return (
                f"the output {name} is returned at every token; if only the loss is read, say so "
                'with the option outputs="loss"'
            )
    return "every token is read: no output selects positions or ignores labels"


def _note(program: Program, outputs: Any) -> None:
    names = _output_names(program)
    if not set(outputs) & set(names):
        return
    (nodes,) = program.result.args
    assert isinstance(nodes, (tuple, list))
    program.unread_outputs = frozenset(
        position
        for position, (name, node) in enumerate(zip(names, nodes, strict=True))
        if name not in outputs and isinstance(node, fx.Node) and _is_tensor(node)
    )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _output_names(program: Program) -> list[str]:
    """Return, for every output tensor, the name of the part of the result that it belongs to."""
    names: dict[int, str] = {}

    def visit(item: Structure, name: str) -> None:
        if isinstance(item, Leaf):
            names[item.index] = name or "output"
        else:
            for position, child in enumerate(getattr(item, "children", ())):
                own = str(position)
                if isinstance(item, Container) and _is_named(item):
                    own = str(item.context[position])
                visit(child, name or own)

    visit(program.outputs, "")
    return [names[index] for index in sorted(names)]


def _is_named(item: Container) -> bool:
    keys = item.context
    return isinstance(keys, (list, tuple)) and len(keys) == len(item.children)
