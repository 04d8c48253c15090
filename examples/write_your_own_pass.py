"""A pass of your own, in one file: replace GELU by its tanh approximation.

    python examples/write_your_own_pass.py

A pass proposes; the manager verifies. This one is approximate (`exact = False`), so the verifier
checks shapes, finite outputs and gradients, and the plan records the measured error.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import nn

import graphopt
from graphopt.passes.base import (
    Candidate,
    Change,
    Context,
    Miss,
    Pass,
    Proposal,
    State,
    replace_module,
)
from graphopt.passes.facts import module_costs
from graphopt.passes.program import Program
from graphopt.passes.registry import register
from graphopt.runtime import installation_of


@register
@final
@dataclass(frozen=True, kw_only=True)
class ApproximateGelu(Pass):
    """Replace exact GELU modules by the tanh form.

    before: y = x Phi(x)
    after:  y = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    """

    name: ClassVar[str] = "approximate-gelu"
    exact: ClassVar[bool] = False

    def propose(self, program: Program, context: Context) -> Proposal:
        """Propose every GELU module that is not ignored."""
        candidates, misses = [], []
        for node, module in program.leaf_calls(nn.GELU):
            name = str(node.target)
            if context.ignored_by(name):
                misses.append(Miss(pass_name=self.name, target=name, reason="ignored"))
            elif isinstance(module, nn.GELU) and module.approximate == "none":
                cost = module_costs(program)[name]
                change = Change(pass_name=self.name, target=name, summary="erf -> tanh")
                candidates.append(Candidate(change=change, before=cost, after=cost))
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return nothing: there are no weights."""
        return {}

    def apply(self, program: Program, change: Change) -> None:
        """Put the other module in place."""
        replace_module(program.model, change.target, nn.GELU(approximate="tanh"))
        program.changed()

    def restore(self, model: nn.Module, change: Change) -> None:
        """Put the exact module back."""
        replace_module(model, change.target, nn.GELU())


def main() -> None:
    """Run the pass on a small network and print what it did."""
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    fast = graphopt.optimize(model, torch.randn(4, 32), recipe=[ApproximateGelu()])
    installation = installation_of(fast)
    assert installation is not None
    for change in installation.plan.changes:
        sys.stdout.write(f"{change.target}: {change.summary}, error {change.measured_error:.1e}\n")


if __name__ == "__main__":
    main()
