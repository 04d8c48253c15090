"""What an optimized model must still do, on batches that it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from .drift import Output, deviation, observed_outputs
from .errors import ConfigError, InputError
from .plan import GuardRecord
from .program import Program
from .verifier import rounding_bound

GIVEN_UP = "given up: "
"""How the reason of a miss begins whose change was made and taken back because of the guard."""

_REFERENCE_BYTES = 2**28
"""Outputs of the dense model to keep; of models with very large ones, fewer batches count."""


@dataclass(frozen=True)
class Verdict:
    """What a guard found.

    Attributes:
        ok: Whether all that it asks for holds.
        sentence: What was found, or, if something does not hold, what.
        drift: Relative error of the outputs (see `Deviation`).
        cosine: Mean cosine of the outputs' rows (see `Deviation`).
        score: The user's score, None if there is none or it failed.
    """

    ok: bool
    sentence: str
    drift: float
    cosine: float
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How far an optimized model may be from the dense one.

    Attributes:
        max_drift: Largest relative error of the outputs, ||out' - out|| / ||out||, in any batch.
        min_cosine: Smallest mean cosine of the outputs' rows.
        score: Measures a program, higher is better.
        max_drop: How much lower than the dense model's the score may be.
        observe: Returns the outputs that are compared, of a program and a batch.
    """

    max_drift: float | None = None
    min_cosine: float | None = None
    score: Callable[[Program], float] | None = None
    max_drop: float = 0.0
    observe: Callable[[Program, Mapping[str, Any]], list[Output]] = observed_outputs

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: if one makes no sense, or nothing is asked for.
        """
        if self.max_drift is None and self.min_cosine is None and self.score is None:
            raise ConfigError("a guard needs max_drift, min_cosine or a score")
        if self.max_drift is not None and not _number(self.max_drift, "max_drift") >= 0:
            raise ConfigError(f"max_drift must be at least 0, got {self.max_drift!r}")
        if self.min_cosine is not None and not -1 <= _number(self.min_cosine, "min_cosine") <= 1:
            raise ConfigError(f"min_cosine must be between -1 and 1, got {self.min_cosine!r}")
        if self.score is not None and not callable(self.score):
            raise ConfigError(
                f"score must be a function that takes the model and returns a number, got "
                f"{type(self.score).__name__}"
            )
        if not _number(self.max_drop, "max_drop") >= 0:
            raise ConfigError(f"max_drop must be at least 0, got {self.max_drop!r}")

    @property
    def compares_outputs(self) -> bool:
        """Whether outputs are compared with the dense model's, not a score alone."""
        return self.max_drift is not None or self.min_cosine is not None

    def prepare(self, program: Program, batches: Iterable[Mapping[str, Any]]) -> GuardCheck:
        """Remember what the dense program does.

        Args:
            program: The program before any change, with real parameters.
            batches: Canonical arguments of the model's forward, not used for calibration. As many
                count as have outputs that fit in memory, at least one.

        Raises:
            InputError: if there is no batch, or one does not fit the program.
            ConfigError: if the score fails on the dense model, naming it.
        """
        references: list[tuple[Mapping[str, Any], list[Output]]] = []
        kept_bytes = 0
        for batch in batches:
            outputs = self.observe(program, batch)
            kept_bytes += sum(output.value.nbytes for output in outputs)
            if references and kept_bytes > _REFERENCE_BYTES:
                break
            references.append((batch, outputs))
        if not references:
            raise InputError("the guard has no batch to check on; pass at least one")
        score = None if self.score is None else self._score(program)
        if isinstance(score, str):
            raise ConfigError(f"{score} on the dense model, so it cannot guard anything")
        return GuardCheck(self, tuple(references), score, rounding_bound(program))

    def prepared(self, program: Program, batches: Iterable[Mapping[str, Any]]) -> PreparedGuard:
        """Return the same guard, which keeps to what this program does now."""
        return self.prepare(program, batches).prepared

    def _score(self, program: Program) -> float | str:
        """Return the score, or a sentence that says how it failed."""
        assert self.score is not None
        name = score_name(self.score)
        try:
            value: Any = self.score(program)
        except Exception as error:  # whatever the user's code raises
            reason = f": {str(error).splitlines()[0]}" if str(error) else ""
            return f"the score {name} raised {type(error).__name__}{reason}"
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        try:
            number = float(value)
        except (TypeError, ValueError):
            return f"the score {name} returned {type(value).__name__}, not a number,"
        if math.isnan(number):
            return f"the score {name} returned NaN"
        return number


@dataclass(frozen=True)
class GuardCheck:
    """A guard that knows what the dense program does.

    Attributes:
        guard: What is asked for.
        references: The batches and the dense program's outputs for them.
        score: The dense program's score, None without one.
        rounding: Relative error that a reordered sum can cause in the program.
    """

    guard: Guard
    references: tuple[tuple[Mapping[str, Any], list[Output]], ...]
    score: float | None
    rounding: float

    @property
    def exact_refusal(self) -> str | None:
        """Why not even exact changes are allowed, None if they are.

        They reorder sums: equal on these batches, their results may still differ on others.
        """
        allowed = self.guard.max_drift
        if allowed is None or allowed >= self.rounding:
            return None
        return (
            f"rounding alone may cause a drift of {self.rounding:.1e}, "
            f"and no more than {allowed:g} is allowed"
        )

    @property
    def prepared(self) -> PreparedGuard:
        """The guard, which keeps to this dense program."""
        own = {item.name: getattr(self.guard, item.name) for item in fields(Guard)}
        return PreparedGuard(**own, made=self)

    def check(self, program: Program) -> Verdict:
        """Measure the program as it is now.

        The score is left out where drift or cosine fail already.
        """
        guard = self.guard
        found = deviation(
            (guard.observe(program, batch), outputs) for batch, outputs in self.references
        )
        facts = [f"drift {found.drift:.3g}", f"cosine {found.cosine:.5f}"]
        failures = []
        if guard.max_drift is not None and not found.drift <= guard.max_drift:
            failures.append(f"drift {found.drift:.3g} is above the {guard.max_drift:g} allowed")
        if guard.min_cosine is not None and not found.cosine >= guard.min_cosine:
            failures.append(
                f"cosine {found.cosine:.5f} is below the {guard.min_cosine:g} asked for"
            )
        score = None
        if guard.score is not None and not failures:
            score, sentence, fails = self.scored(program)
            (failures if fails else facts).append(sentence)
        return Verdict(
            ok=not failures,
            sentence="; ".join(failures or facts),
            drift=found.drift,
            cosine=found.cosine,
            score=score,
        )

    def scored(self, program: Program) -> tuple[float | None, str, bool]:
        """Return the score, a sentence about it, and whether it is too low; for guards with one."""
        guard = self.guard
        assert guard.score is not None
        assert self.score is not None
        score = guard._score(program)
        if isinstance(score, str):
            return None, score, True
        change = f"the score {score_name(guard.score)} went from {self.score:g} to {score:g}"
        if not score >= self.score - guard.max_drop:
            return score, f"{change}, a drop of more than the {guard.max_drop:g} allowed", True
        return score, change, False

    def record(self, verdict: Verdict) -> GuardRecord:
        """Return a verdict with what was asked for, as a plan stores it."""
        guard = self.guard
        return GuardRecord(
            max_drift=guard.max_drift,
            min_cosine=guard.min_cosine,
            max_drop=None if guard.score is None else guard.max_drop,
            score=None if guard.score is None else score_name(guard.score),
            batches=len(self.references),
            drift=verdict.drift,
            cosine=verdict.cosine,
            score_before=self.score,
            score_after=verdict.score,
        )


@dataclass(frozen=True, kw_only=True)
class PreparedGuard(Guard):
    """A guard prepared in advance: the dense model counts, also where it has been changed since.

    Attributes:
        made: What the dense model did.
    """

    made: GuardCheck

    def prepare(self, program: Program, batches: Iterable[Mapping[str, Any]]) -> GuardCheck:
        """Return what was prepared."""
        return self.made


def score_name(score: Callable[..., Any]) -> str:
    """Return what sentences call a score: the name of its function or class."""
    return getattr(score, "__name__", type(score).__name__)


def _number(value: Any, what: str) -> float:
    """Return a value as a finite number.

    Raises:
        ConfigError: if it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{what} must be a finite number, got {value!r}")
    return float(value)
