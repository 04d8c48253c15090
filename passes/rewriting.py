"""Changes made on a program one after the other; what does not fit or hold is taken back."""

from __future__ import annotations

import torch

from .base import Candidate, Context, Miss, Pass
from .errors import PlanError
from .guard import GIVEN_UP, GuardCheck
from .plan import ChangeRecord, change_record
from .program import Program
from .replay import load_state
from .snapshot import Snapshot
from .verifier import observe, relative_error


class Rewriting:
    """Makes the changes of passes on one program and measures what each does to the outputs."""

    def __init__(self, program: Program, check: GuardCheck | None) -> None:
        """Hold the program and what must hold after every approximate change."""
        self._program = program
        self._check = check
        self._numeric = not any(p.is_meta for p in program.model.parameters())
        self._outputs: list[torch.Tensor] | None = None

    def make(
        self, step: Pass, candidate: Candidate, context: Context, *, optional: bool
    ) -> ChangeRecord | Miss:
        """Make a change; return its record, or why it was not made.

        Args:
            step: The pass.
            candidate: What it would change.
            context: What it may know.
            optional: Whether a change that no longer fits the program is left out; otherwise it is
                an error.

        Raises:
            PlanError: if the change does not fit the program and is not optional.
        """
        before = self._run()
        checked = self._check is not None and not step.exact
        snapshot = Snapshot(self._program) if optional or checked else None
        try:
            settled = make_change(step, self._program, candidate, context)
        except PlanError as error:
            if snapshot is None or not optional:
                raise
            snapshot.restore()
            return _miss(step, candidate, str(error))
        if self._check is not None and snapshot is not None and checked:
            verdict = self._check.check(self._program)
            if not verdict.ok:
                snapshot.restore()
                return _miss(step, candidate, GIVEN_UP + verdict.sentence)
        after = self._outputs = self._observed()
        measured = max(map(relative_error, after, before), default=0.0) if self._numeric else None
        return change_record(settled, settled.change, measured)

    def forget(self) -> None:
        """Measure against the program as it is now: somebody else changed it."""
        self._outputs = None

    def _run(self) -> list[torch.Tensor]:
        if self._outputs is None:
            self._outputs = self._observed()
        return self._outputs

    def _observed(self) -> list[torch.Tensor]:
        if not self._numeric:
            return []
        return list(observe(self._program, training=False, gradients=False).outputs)


def make_change(step: Pass, program: Program, candidate: Candidate, context: Context) -> Candidate:
    """Settle, transfer and apply a candidate; return it as settled."""
    settled = step.settle(program, candidate, context)
    state = step.transfer(program, settled.change, context)
    step.apply(program, settled.change)
    load_state(program, state)
    return settled


def _miss(step: Pass, candidate: Candidate, reason: str) -> Miss:
    return Miss(pass_name=step.name, target=candidate.change.target, reason=reason)
