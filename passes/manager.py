"""Runs a pipeline over a program: propose, settle, transfer, apply, verify; and replays plans."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .allocation.sources import SolvedSource, Source, UniformSource
from .base import Candidate, Context, Cost, Miss, Pass, Proposal
from .budget import Budget
from .errors import ConfigError, VerificationError
from .facts import total_cost
from .guard import GIVEN_UP, Guard, GuardCheck
from .plan import (
    ChangeRecord,
    GuardRecord,
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
from .registry import format_pipeline
from .replay import apply_plan, bisect, load_state
from .rewriting import Rewriting, make_change
from .snapshot import Snapshot, twin_of
from .structure import flatten
from .verifier import Verifier

__all__ = ["PassManager", "Progress", "apply_plan", "bisect", "load_state"]

_logger = logging.getLogger(__name__)

_WEAKER = 2
"""Weaker levels of a change that are tried where the guard refuses it, each of half the drift."""

Progress = Callable[[str, int, int], None]
"""Called with a label, steps done and steps in all."""


@dataclass(kw_only=True)
class PassManager:
    """A pipeline and how to run it.

    Attributes:
        passes: In order.
        context: What the passes may know; its budget is set from the one of the pipeline.
        budget: What the pipeline as a whole may leave; None takes the context's share of the FLOPs.
        allocation: "uniform" (every pass spends the same share everywhere, the budget is one of
            FLOPs) or "solver" (see `allocation`).
        guard: What the result must satisfy; changes that violate it are taken back.
        guard_batches: Batches to check the guard on; None takes the example.
        seed: Orders equally good choices of the solver.
        store: Directory that keeps what the solver measured, to go on after a stop.
        limit: Accept only this many changes in all.
        verify: Check after every pass; a failure rolls back that pass and raises.
        progress: Told about every change.
    """

    passes: Sequence[Pass]
    context: Context
    budget: Budget | None = None
    allocation: str = "uniform"
    guard: Guard | None = None
    guard_batches: Iterable[Mapping[str, Any]] | None = None
    seed: int = 0
    store: Path | None = None
    limit: int | None = None
    verify: bool = True
    progress: Progress | None = None
    _changes: list[ChangeRecord] = field(default_factory=list)
    _misses: list[MissRecord] = field(default_factory=list)
    _notes: list[str] = field(default_factory=list)
    _verdict: GuardRecord | None = None

    def propose(self, program: Program) -> Plan:
        """Return what would change, changing nothing.

        Changes that need no data, those of exact passes and those for training only, are made on a
        twin. With "uniform", later passes do not see the others, and their candidates for a module
        that an earlier one already claims are left out. With "solver", they are what a run would
        choose. Details that need data are not decided, and no guard is checked.
        """
        before = after = total_cost(program)
        current = twin_of(program)
        for step in self.passes:
            step.note_unread(current)
        self._set_units(current)
        source = self._source(program, before, self.guard)
        claimed: dict[str, str] = {}
        steps = self._runnable(program)
        for place, step in enumerate(steps):
            proposal, context = source.proposal(place, current, after.flops)
            self._misses.extend(miss_record(miss) for miss in proposal.misses)
            for candidate in proposal.candidates:
                owner = candidate.change.target
                taken = not source.optional and claimed.get(owner, step.name) != step.name
                if self._is_full() or taken:
                    continue
                self._changes.append(change_record(candidate, candidate.change, None))
                after = _without(after, candidate)
                if step.exact or step.trains_only(candidate.change):
                    make_change(step, current, candidate, context)
                else:
                    claimed[owner] = step.name
            refresh(current)
        before, after = source.totals(before, after, None)
        return self._plan(program, before, after, source.notes(before, after))

    def run(self, program: Program) -> Plan:
        """Change the program; return the plan of what was accepted.

        Raises:
            PreconditionError: if a pass cannot run on this program.
            ConfigError: if the budget and the allocation do not go together.
            VerificationError: if a pass broke the model; that pass is rolled back, and the
                error names a directory with the plan to reproduce it.
        """
        before = total_cost(program)
        for step in self.passes:
            step.note_unread(program)
        self._set_units(program)
        check = self._guard_check(program)
        source = self._source(program, before, self.guard if check is None else check.prepared)
        verifier = Verifier(program, training=self.context.training) if self.verify else None
        rewriting = Rewriting(program, check)
        undo: list[tuple[int, Snapshot]] = []
        for place, step in enumerate(self._runnable(program)):
            if step.exact and check is not None and check.exact_refusal is not None:
                reason = GIVEN_UP + check.exact_refusal
                miss = Miss(pass_name=step.name, target="(model)", reason=reason)
                self._misses.append(miss_record(miss))
                continue
            proposal, context = source.proposal(place, program, total_cost(program).flops)
            self._misses.extend(miss_record(miss) for miss in proposal.misses)
            snapshot = Snapshot(program)
            accepted = len(self._changes)
            try:
                self._make(step, proposal, context, rewriting, source)
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
            last = [(accepted, snapshot)]
            if step.exact:
                self._undo_violations(program, check, last, rewriting)
            undo.extend(last)
        self._undo_violations(program, check, undo, rewriting)
        if check is not None:
            self._verdict = check.record(check.check(program))
        before, after = source.totals(before, total_cost(program), program)
        return self._plan(program, before, after, source.notes(before, after))

    def _set_units(self, program: Program) -> None:
        """Let losses be in the units of what the guard allows."""
        program.compares_outputs = self.guard is not None and self.guard.compares_outputs

    def _source(self, program: Program, dense: Cost, guard: Guard | None) -> Source:
        """Return where the changes come from, with a guard that knows what the dense model does.

        Raises:
            ConfigError: if there is no such allocation, or the budget does not go with it.
        """
        if self.allocation == "uniform":
            return UniformSource(self._runnable_passes(), self.context, self.budget, dense)
        if self.allocation != "solver":
            raise ConfigError(f"allocation must be 'uniform' or 'solver', got {self.allocation!r}")
        return SolvedSource(
            passes=self._runnable_passes(),
            context=self.context,
            budget=self.budget,
            guard=guard,
            dense=twin_of(program),
            seed=self.seed,
            store=self.store,
            progress=self.progress,
        )

    def _guard_check(self, program: Program) -> GuardCheck | None:
        """Return what must hold, None where there is no guard or no numbers to check."""
        if self.guard is None:
            return None
        if any(parameter.is_meta for parameter in program.model.parameters()):
            self._notes.append("the guard was not checked: the weights are on the meta device")
            return None
        batches = [program.example] if self.guard_batches is None else self.guard_batches
        return self.guard.prepare(program, batches)

    def _undo_violations(
        self,
        program: Program,
        check: GuardCheck | None,
        undo: list[tuple[int, Snapshot]],
        rewriting: Rewriting,
    ) -> None:
        """Take passes back, the last one first, until the guard holds."""
        while check is not None and undo and self._changes:
            verdict = check.check(program)
            if verdict.ok:
                return
            accepted, snapshot = undo.pop()
            snapshot.restore()
            rewriting.forget()
            for record in self._changes[accepted:]:
                reason = GIVEN_UP + verdict.sentence
                miss = Miss(pass_name=record.pass_name, target=record.target, reason=reason)
                self._misses.append(miss_record(miss))
            del self._changes[accepted:]

    def _runnable(self, program: Program) -> list[Pass]:
        """Return the passes that can run; note the others.

        Raises:
            PreconditionError: if one cannot run on this program.
        """
        reason = "its result must not be trained, and the recipe trains"
        steps = self._runnable_passes()
        for step in self.passes:
            if step not in steps:
                miss = Miss(pass_name=step.name, target="(model)", reason=reason)
                self._misses.append(miss_record(miss))
        for step in steps:
            step.requires(program, self.context)
        return steps

    def _runnable_passes(self) -> list[Pass]:
        return [s for s in self.passes if not (s.inference_only and self.context.training)]

    def _is_full(self) -> bool:
        return self.limit is not None and len(self._changes) >= self.limit

    def _make(
        self,
        step: Pass,
        proposal: Proposal,
        context: Context,
        rewriting: Rewriting,
        source: Source,
    ) -> None:
        for number, candidate in enumerate(proposal.candidates):
            if self._is_full():
                break
            optional = source.optional and not step.exact
            made = rewriting.make(step, candidate, context, optional=optional)
            weaker: Candidate | None = candidate
            for _ in range(_WEAKER):
                refused = isinstance(made, Miss) and made.reason.startswith(GIVEN_UP)
                weaker = source.milder(weaker) if refused and weaker is not None else None
                if weaker is None:
                    break
                made = rewriting.make(step, weaker, context, optional=optional)
            if isinstance(made, Miss):
                self._misses.append(miss_record(made))
            else:
                self._changes.append(made)
                _logger.info("%s: %s %s", step.name, made.target, made.summary)
            if self.progress:
                self.progress(step.name, number + 1, len(proposal.candidates))

    def _plan(
        self, program: Program, before: Cost, after: Cost | None, notes: Sequence[str] = ()
    ) -> Plan:
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
            totals=(
                None
                if after is None
                else Totals(before=cost_record(before), after=cost_record(after))
            ),
            guard=self._verdict,
            notes=(*program.notes, *self._notes, *notes, *self._guard_note()),
        )

    def _guard_note(self) -> list[str]:
        """Say that the guard left nothing, or nothing but exact changes, if so."""
        given_up = [miss for miss in self._misses if miss.reason.startswith(GIVEN_UP)]
        approximate = {step.name for step in self.passes if not step.exact}
        if self.guard is None or not given_up:
            return []
        if not self._changes:
            return [f"no change satisfies the guard ({self._asked()}): the model is unchanged"]
        if any(record.pass_name in approximate for record in self._changes):
            return []
        return [
            f"no approximate change satisfies the guard ({self._asked()}): only exact ones are "
            "made, and what the model computes is unchanged"
        ]

    def _asked(self) -> str:
        """Return the guard's limits as they were asked for."""
        assert self.guard is not None
        limits = {
            "max_drift": self.guard.max_drift,
            "min_cosine": self.guard.min_cosine,
            "max_drop": None if self.guard.score is None else self.guard.max_drop,
        }
        return ", ".join(f"{name}={value:g}" for name, value in limits.items() if value is not None)

    def _write_reproducer(self, program: Program) -> Path:
        directory = Path(tempfile.mkdtemp(prefix="graphopt-failure-"))
        plan = self._plan(program, total_cost(program), None)
        (directory / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        (directory / "seed.txt").write_text("0\n", encoding="utf-8")
        return directory


def _without(cost: Cost, candidate: Candidate) -> Cost:
    """Return what is left of a cost if a candidate saves what it says."""
    before, after = candidate.before, candidate.after
    return replace(
        cost,
        flops=cost.flops - (before.flops - after.flops),
        size_bytes=cost.size_bytes - (before.size_bytes - after.size_bytes),
        parameters=cost.parameters - (before.parameters - after.parameters),
    )
