"""Runs a pipeline over a program: propose, settle, transfer, apply, verify; and replays plans."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .base import Candidate, Context, Miss, Pass, set_tensor
from .errors import VerificationError
from .facts import total_cost
from .plan import (
    ChangeRecord,
    InputRecord,
    MissRecord,
    Plan,
    Totals,
    change_record,
    cost_record,
    miss_record,
)
from .program import Program, shape_of
from .propagation import refresh
from .registry import format_pipeline, pass_named
from .snapshot import Snapshot
from .structure import flatten
from .verifier import Verifier, observe, relative_error

_logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a label, steps done and steps in all."""


@dataclass(kw_only=True)
class PassManager:
    """A pipeline and how to run it.

    Attributes:
        passes: In order.
        context: What the passes may know; the budget is for the pipeline as a whole.
        limit: Accept only this many changes in all.
        verify: Check after every pass; a failure rolls back that pass and raises.
        progress: Told about every change.
    """

    passes: Sequence[Pass]
    context: Context
    limit: int | None = None
    verify: bool = True
    progress: Progress | None = None
    _changes: list[ChangeRecord] = field(default_factory=list)
    _misses: list[MissRecord] = field(default_factory=list)

    def propose(self, program: Program) -> Plan:
        """Return what would change, changing nothing: the first pass's candidates stand.

        Passes propose for the program as it is; candidates of later passes for a module that an
        earlier one already claims are left out. Details that need data are not decided.
        """
        before = total_cost(program)
        after_flops, after_bytes, after_parameters = (
            before.flops,
            before.size_bytes,
            before.parameters,
        )
        claimed: dict[str, str] = {}
        for step in self._runnable(program):
            share = after_flops / max(before.flops, 1)
            context = self._remaining(share)
            if not step.exact and context is None:
                self._misses.append(_budget_met(step))
                continue
            proposal = step.propose(program, context or self.context)
            self._misses.extend(miss_record(miss) for miss in proposal.misses)
            for candidate in proposal.candidates:
                owner = candidate.change.target
                if claimed.setdefault(owner, step.name) != step.name or self._is_full():
                    continue
                self._changes.append(change_record(candidate, candidate.change, None))
                after_flops -= candidate.before.flops - candidate.after.flops
                after_bytes -= candidate.before.size_bytes - candidate.after.size_bytes
                after_parameters -= candidate.before.parameters - candidate.after.parameters
        after = replace(
            before, flops=after_flops, size_bytes=after_bytes, parameters=after_parameters
        )
        return self._plan(program, Totals(before=cost_record(before), after=cost_record(after)))

    def run(self, program: Program) -> Plan:
        """Change the program; return the plan of what was accepted.

        Raises:
            PreconditionError: if a pass cannot run on this program.
            VerificationError: if a pass broke the model; that pass is rolled back, and the
                error names a directory with the plan to reproduce it.
        """
        before = total_cost(program)
        for step in self.passes:
            step.note_unread(program)
        verifier = Verifier(program, training=self.context.training) if self.verify else None
        for step in self._runnable(program):
            context = self._remaining(total_cost(program).flops / max(before.flops, 1))
            if not step.exact and context is None:
                self._misses.append(_budget_met(step))
                continue
            snapshot = Snapshot(program)
            accepted = len(self._changes)
            try:
                self._run_pass(step, program, context or self.context)
                if len(self._changes) == accepted:
                    continue
                if verifier is None:
                    refresh(program)
                else:
                    made = self._changes[accepted:]
                    trains_only = all(step.trains_only(record.change) for record in made)
                    verifier.check(step.name, exact=step.exact, trains_only=trains_only)
            except VerificationError as error:
                path = self._write_reproducer(program)
                snapshot.restore()
                raise VerificationError(f"{error}; rolled back; the plan is in {path}") from error
            except BaseException:
                snapshot.restore()
                raise
        after = total_cost(program)
        return self._plan(program, Totals(before=cost_record(before), after=cost_record(after)))

    def _runnable(self, program: Program) -> list[Pass]:
        steps = []
        for step in self.passes:
            if step.inference_only and self.context.training:
                self._misses.append(
                    miss_record(
                        Miss(
                            pass_name=step.name,
                            target="(model)",
                            reason="its result must not be trained, and the recipe trains",
                        )
                    )
                )
                continue
            step.requires(program, self.context)
            steps.append(step)
        return steps

    def _remaining(self, share: float) -> Context | None:
        """Return the context with the budget relative to what is left, None if it is met."""
        if self.context.budget is None:
            return self.context
        if share <= self.context.budget * (1 + 1e-9):
            return None
        return replace(self.context, budget=self.context.budget / share)

    def _is_full(self) -> bool:
        return self.limit is not None and len(self._changes) >= self.limit

    def _run_pass(self, step: Pass, program: Program, context: Context) -> None:
        proposal = step.propose(program, context)
        self._misses.extend(miss_record(miss) for miss in proposal.misses)
        numeric = not any(p.is_meta for p in program.model.parameters())
        outputs = _outputs(program) if numeric and proposal.candidates else []
        for number, candidate in enumerate(proposal.candidates):
            if self._is_full():
                break
            settled = self._make(step, program, candidate, context)
            error = None
            if numeric:
                current = _outputs(program)
                error = max(map(relative_error, current, outputs), default=0.0)
                outputs = current
            self._changes.append(change_record(settled, settled.change, error))
            _logger.info("%s: %s %s", step.name, settled.change.target, settled.change.summary)
            if self.progress:
                self.progress(step.name, number + 1, len(proposal.candidates))

    def _make(
        self, step: Pass, program: Program, candidate: Candidate, context: Context
    ) -> Candidate:
        settled = step.settle(program, candidate, context)
        state = step.transfer(program, settled.change, context)
        step.apply(program, settled.change)
        load_state(program, state)
        return settled

    def _plan(self, program: Program, totals: Totals | None) -> Plan:
        tensors, _ = flatten(program.example)
        return Plan(
            model_class=type(program.model).__name__,
            pipeline=format_pipeline(self.passes),
            inputs=tuple(
                InputRecord(name=node.name, shape=shape_of(node), dtype=str(tensor.dtype))
                for node, tensor in zip(program.placeholders, tensors, strict=True)
            ),
            constants={
                name: value
                for name, value in program.example.items()
                if isinstance(value, (bool, int, float, str))
            },
            modes=tuple(sorted(program.modes)),
            changes=tuple(self._changes),
            misses=tuple(self._misses),
            totals=totals,
            notes=(*program.notes, *self._budget_note(totals)),
        )

    def _budget_note(self, totals: Totals | None) -> list[str]:
        """Say where the budget is not met, with what was reached."""
        if totals is None:
            return []
        share = totals.after.flops / max(totals.before.flops, 1)
        if self.context.budget is None or share <= self.context.budget * (1 + 1e-9):
            return []
        return [
            f"the budget of {self.context.budget:.1%} of the forward FLOPs is not met: "
            f"{share:.1%} are left; see the misses for what could not change"
        ]

    def _write_reproducer(self, program: Program) -> Path:
        directory = Path(tempfile.mkdtemp(prefix="graphopt-failure-"))
        plan = self._plan(program, None)
        (directory / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        (directory / "seed.txt").write_text("0\n", encoding="utf-8")
        return directory


def apply_plan(program: Program, plan: Plan, *, limit: int | None = None) -> None:
    """Make a plan's changes in a program: structure only, also on meta parameters.

    Args:
        program: A fresh capture of the model the plan was made for.
        plan: The plan.
        limit: Apply only this many changes.

    Raises:
        PlanError: if the plan does not fit the model.
        ConfigError: if it names an unknown pass.
    """
    previous: str | None = None
    for record in plan.changes[:limit]:
        if previous not in (None, record.pass_name):
            refresh(program)
        pass_named(record.pass_name).apply(program, record.change)
        previous = record.pass_name
    if previous is not None:
        refresh(program)


def load_state(program: Program, state: dict[str, torch.Tensor]) -> None:
    """Give parameters and buffers of a program's model new values, by name; tied ones stay tied."""
    for name, value in state.items():
        parent, _, attribute = name.rpartition(".")
        old = getattr(program.module(parent), attribute)
        value = value.to(old.device, old.dtype)
        others = [
            other
            for other, tensor in [
                *program.model.named_parameters(remove_duplicate=False),
                *program.model.named_buffers(remove_duplicate=False),
            ]
            if tensor is old and other != name
        ]
        set_tensor(program.model, name, value)
        new = getattr(program.module(parent), attribute)
        for other in others:
            parent_name, _, other_attribute = other.rpartition(".")
            setattr(program.module(parent_name), other_attribute, new)
    program.changed()


def bisect(is_good: Callable[[int], bool], changes: int) -> int | None:
    """Return the number of the first change that breaks something, None if none does.

    Args:
        is_good: Says whether the first N changes together are fine; `is_good(0)` must hold.
        changes: Changes in all.
    """
    if is_good(changes):
        return None
    low, high = 0, changes
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_good(middle) else (low, middle)
    return high


def _outputs(program: Program) -> list[torch.Tensor]:
    return list(observe(program, training=False, gradients=False).outputs)


def _budget_met(step: Pass) -> MissRecord:
    return miss_record(
        Miss(pass_name=step.name, target="(model)", reason="earlier passes already met the budget")
    )
