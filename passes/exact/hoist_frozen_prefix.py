"""Prepare what depends on inputs and frozen parameters only for being computed once per sample.

before: every epoch runs embeddings and frozen layers again, with other dropout masks
after:  they run in evaluation mode, so a `PrefixCache` may look their result up

The program computes what the model computes with its frozen part in evaluation mode: outputs and
gradients are unchanged but for the dropout of frozen layers in training, which is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import nn

from graphopt.passes.base import Candidate, Change, Context, Miss, Pass, Proposal, State
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import PlanError
from graphopt.passes.evaluation_form import fix_evaluation_mode, follows_mode
from graphopt.passes.facts import facts_of, total_cost
from graphopt.passes.frozen_prefix import FrozenPrefix, frozen_prefix, mixes_samples
from graphopt.passes.program import Program, compile_values, shape_of

_TARGET = "(prefix)"
_MARK = "frozen prefix"


class _Hoist(Details):
    """What `apply` needs.

    Attributes:
        frozen: Names of the parameters that the prefix may read: those that are not trained.
        fixed: Number of operations that followed the mode and are fixed in evaluation mode.
    """

    frozen: tuple[str, ...] = Field(min_length=1)
    fixed: int = Field(ge=0)


@final
@dataclass(frozen=True, kw_only=True)
class HoistFrozenPrefix(Pass):
    """Split off the part of the graph that training does not change.

    Frozen is what has `requires_grad=False` when the model is optimized; a name in `ignore` counts
    as trained. Nothing moves in the graph; `graphopt.training.PrefixCache` runs the two parts.
    """

    name: ClassVar[str] = "hoist-frozen-prefix"
    exact: ClassVar[bool] = True

    def propose(self, program: Program, context: Context) -> Proposal:
        """Find the prefix; say why there is none worth keeping."""
        parameters = dict(program.model.named_parameters())
        misses: list[Miss] = []
        frozen: list[str] = []
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                continue
            pattern = context.ignored_by(name)
            if pattern is None:
                frozen.append(name)
            else:
                misses.append(self._miss(name, f"ignored by the pattern {pattern!r}"))
        refusal, prefix = self._refusal(program, frozen, context)
        if refusal is not None:
            if not misses:
                misses.append(self._miss(_TARGET, refusal))
            return Proposal(misses=tuple(misses))
        assert prefix is not None
        return Proposal(
            candidates=(self._candidate(program, frozen, prefix),), misses=tuple(misses)
        )

    def _refusal(
        self, program: Program, frozen: list[str], context: Context
    ) -> tuple[str | None, FrozenPrefix | None]:
        """Say why nothing is hoisted, or return what is."""
        if any(node.meta.get(_MARK) for node in program.graph.nodes):
            return "its frozen prefix is split off already", None
        if not frozen:
            return (
                "no parameter is frozen; set requires_grad=False on embeddings and first layers, "
                "for instance those that graphopt.training.choose_frozen_depth names"
            ), None
        if not any(parameter.requires_grad for parameter in program.model.parameters()):
            return "every parameter is frozen, so nothing is trained", None
        prefix = frozen_prefix(program, frozen)
        if not prefix.values:
            return (
                "no result of the frozen part has one row for each sample and costs more to "
                "compute than to read"
            ), None
        if not any(parameter.is_meta for parameter in program.model.parameters()):
            mixed = mixes_samples(program, prefix)
            if mixed is not None:
                return f"the value {mixed} of a sample depends on other samples of its batch", None
            slower = _measured(program, prefix, context)
            if slower is not None:
                return slower, None
        return None, prefix

    def _miss(self, target: str, reason: str) -> Miss:
        return Miss(pass_name=self.name, target=target, reason=reason)

    def _candidate(self, program: Program, frozen: list[str], prefix: FrozenPrefix) -> Candidate:
        fixed = sum(follows_mode(program, node) for node in prefix.nodes)
        share = prefix.flops / max(total_cost(program).flops, 1)
        summary = f"{share:.0%} of the forward FLOPs depend on inputs and frozen parameters only"
        if fixed:
            summary += "; dropout and batch statistics of that part are off in training"
        cost = facts_of(program).cost(prefix.nodes)
        details = _Hoist(frozen=tuple(frozen), fixed=fixed)
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

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return nothing: no value changes."""
        return {}

    def apply(self, program: Program, change: Change) -> None:
        """Fix the prefix in evaluation mode."""
        prefix = frozen_prefix(program, frozen_names(program, change))
        fix_evaluation_mode(program, prefix.nodes)
        for node in program.graph.nodes:
            if node in prefix.nodes:
                node.meta[_MARK] = True
        program.changed()

    def trains_only(self, change: Change) -> bool:
        """Say that evaluation mode is left as it is where something followed the mode."""
        return read_details(_Hoist, change).fixed > 0

    def restore(self, model: nn.Module, change: Change) -> None:
        """Do nothing: the modules are what they were."""


def frozen_names(program: Program, change: Change) -> tuple[str, ...]:
    """Return the parameters that a change counts as frozen.

    Raises:
        PlanError: if the model has no such parameters.
    """
    details = read_details(_Hoist, change)
    known = {name for name, _ in program.model.named_parameters(remove_duplicate=False)}
    unknown = [name for name in details.frozen if name not in known]
    if unknown:
        raise PlanError(
            f"the model has no parameter {unknown[0]!r} that the plan counts as frozen; is this "
            "plan for another model?"
        )
    return details.frozen


def _measured(program: Program, prefix: FrozenPrefix, context: Context) -> str | None:
    """Say that reading the values back is not faster than computing them, None if it is."""
    if context.costs is None:
        return None
    run = compile_values(program, prefix.values)
    tensors = program.few_rows()
    with torch.no_grad():
        stored = [value.to(torch.bfloat16) for value in run(program.model, *tensors)]
    key = f"frozen prefix {prefix.flops} FLOPs to {[shape_of(node) for node in prefix.values]}"

    def compute() -> None:
        with torch.no_grad():
            run(program.model, *tensors)

    def read() -> None:
        for value in stored:
            value.float()

    times = context.costs.measure(key, compute, read)
    if times.ratio > 1:
        return None
    return f"reading its result measured {times.ratio:.2f}x of computing it, kept"
