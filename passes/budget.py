"""How much a model may cost: a share or an amount of one resource."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from .base import Cost
from .errors import ConfigError

Resource: TypeAlias = Literal["flops", "latency", "parameters", "bytes"]

_UNITS: dict[str, tuple[Resource, float]] = {
    "ms": ("latency", 1.0),
    "s": ("latency", 1e3),
    "flops": ("flops", 1.0),
    "mflops": ("flops", 1e6),
    "gflops": ("flops", 1e9),
    "tflops": ("flops", 1e12),
    "parameters": ("parameters", 1.0),
    "kparameters": ("parameters", 1e3),
    "mparameters": ("parameters", 1e6),
    "bytes": ("bytes", 1.0),
    "kb": ("bytes", 1e3),
    "mb": ("bytes", 1e6),
    "gb": ("bytes", 1e9),
    "kib": ("bytes", 2**10),
    "mib": ("bytes", 2**20),
    "gib": ("bytes", 2**30),
}
_AMOUNT = re.compile(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*(%?)\s*([a-z ]*)")
_EXAMPLES = "'60%', '60% latency', '12ms', '5M parameters', '40MB' or '2 GFLOPs'"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one forward pass at the example's sizes may cost.

    Attributes:
        resource: FLOPs, measured milliseconds, parameters, or bytes of the parameters.
        amount: A share of the dense model's in (0, 1], or an amount in units of the resource.
        relative: Whether it is a share.
    """

    resource: Resource
    amount: float
    relative: bool

    def allowed(self, dense: Cost) -> float:
        """Return the amount for a dense model of this cost."""
        return self.amount * spent(dense, self.resource) if self.relative else self.amount

    def __str__(self) -> str:
        """Return the budget as `parse_budget` reads it."""
        if self.relative:
            return f"{100 * self.amount:.12g}% {self.resource}"
        unit = "ms" if self.resource == "latency" else self.resource
        return f"{self.amount:.12g} {unit}"


def spent(cost: Cost, resource: Resource) -> float:
    """Return how much of a resource something costs.

    Raises:
        ValueError: if that is a latency, and none was measured.
    """
    if resource == "latency":
        if cost.latency_ms is None:
            raise ValueError("no latency was measured")
        return cost.latency_ms
    return float(
        {"flops": cost.flops, "parameters": cost.parameters, "bytes": cost.size_bytes}[resource]
    )


def parse_budget(value: float | str | Budget | None) -> Budget | None:
    """Return a budget: 0.6 and "60%" are shares of the FLOPs, "60% latency" or "12ms" of the time.

    Raises:
        ConfigError: if it is none, with examples of what is.
    """
    if value is None or isinstance(value, Budget):
        return value
    text = str(value).strip().lower()
    found = _AMOUNT.fullmatch(text)
    problem = ConfigError(f"a budget is a share or an amount such as {_EXAMPLES}, got {value!r}")
    if found is None:
        raise problem
    number, percent, unit = found.groups()
    unit = unit.replace(" ", "")
    try:
        amount = float(number)
    except ValueError as error:
        raise problem from error
    if percent or not unit or (unit in get_args(Resource) and amount <= 1):
        if unit and unit not in get_args(Resource):
            raise ConfigError(
                f"a budget's share is of {', '.join(get_args(Resource))}, got {value!r}"
            )
        share = amount / 100 if percent else amount
        if not 0 < share <= 1:
            raise ConfigError(f"the budget must be above 0 and at most 1 (100%), got {value!r}")
        return Budget(
            resource=_UNITS[unit or "flops"][0] if unit != "latency" else "latency",
            amount=share,
            relative=True,
        )
    if unit not in _UNITS or amount <= 0:
        raise problem
    resource, factor = _UNITS[unit]
    return Budget(resource=resource, amount=amount * factor, relative=False)
