"""The search for the change that breaks a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphopt.passes.errors import VerificationError
from graphopt.passes.manager import bisect
from graphopt.passes.plan import ChangeRecord
from graphopt.passes.verifier import observe, relative_error

from .api import optimize, plan
from .capture import capture
from .runtime import installation_of


@dataclass(frozen=True)
class Finding:
    """Which change is to blame.

    Attributes:
        number: Its number, counted from 1; None if all changes together are fine.
        changes: Changes in all.
        target: The layer it rewrites, empty if there is none.
        pass_name: The pass that proposed it, empty if there is none.
        reason: What is wrong with it.
    """

    number: int | None
    changes: int
    target: str = ""
    pass_name: str = ""
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return the finding as one sentence."""
        if self.number is None:
            return f"all {self.changes} changes together are fine"
        return (
            f"change {self.number} of {self.changes} is the first bad one: {self.pass_name} on "
            f"{self.target}: {self.reason}"
        )


def first_bad_change(
    model: nn.Module, inputs: Any, options: Mapping[str, Any], max_error: float
) -> Finding:
    """Return the first change after which the model is wrong; the model stays as it is.

    Args:
        model: The dense model.
        inputs: Example inputs, None to infer them.
        options: Options of `graphopt.optimize`.
        max_error: Largest relative error of an output, in evaluation mode on the example, that
            is still fine. A change that the verifier refuses is bad at any error.
    """
    expected = observe(capture(model, inputs), training=False, gradients=False).outputs
    problems: dict[int, str] = {}
    made: dict[int, tuple[ChangeRecord, ...]] = {}

    def is_good(count: int) -> bool:
        try:
            result = optimize(model, inputs, **options, limit=count)
        except VerificationError as error:
            problems[count] = str(error)
            return False
        installation = installation_of(result)
        assert installation is not None
        assert installation.program is not None  # the whole model was captured above
        made[count] = installation.plan.changes
        actual = observe(installation.program, training=False, gradients=False).outputs
        difference = max(map(relative_error, actual, expected), default=0.0)
        problems[count] = f"the relative error of the outputs becomes {difference:.3g}"
        return difference <= max_error

    proposed = plan(model, inputs, **options).changes
    number = bisect(is_good, len(proposed))
    if number is None:
        return Finding(None, len(proposed))
    guilty = made.get(number, proposed)[number - 1]
    return Finding(number, len(proposed), guilty.target, guilty.pass_name, problems[number])
