"""What a recovery did: how far the model was from the dense one before, on the way, and after."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from graphopt.errors import CheckpointError

_ATTRIBUTE = "_graphopt_recovery"


@dataclass(frozen=True)
class Judgement:
    """How far a model is from its teacher on held-out batches.

    Attributes:
        drift: ||out' - out|| / ||out|| over what is read of the outputs, in the worst batch.
        cosine: Mean cosine of the outputs' rows.
        score: The user's score, higher is better; None without one.
    """

    drift: float
    cosine: float
    score: float | None = None

    def better_than(self, other: Judgement) -> bool:
        """Say whether this is the better of two: a higher score or, without one, less drift."""
        if self.score is not None and other.score is not None:
            return self.score > other.score
        return self.drift < other.drift

    def __str__(self) -> str:
        """Return the numbers."""
        score = "" if self.score is None else f", score {self.score:g}"
        return f"drift {self.drift:.3g}, cosine {self.cosine:.5f}{score}"


@dataclass(frozen=True)
class RecoveryPoint:
    """A moment of a recovery at which the model was judged.

    Attributes:
        seconds: Time spent until then.
        steps: Training steps until then.
        phase: "layer-wise" or "end-to-end".
        loss: Mean training loss since the point before; NaN without a step.
        judgement: How far the model was from its teacher.
    """

    seconds: float
    steps: int
    phase: str
    loss: float
    judgement: Judgement


@dataclass(frozen=True)
class RecoveryReport:
    """What `recover` did.

    Attributes:
        before: The model that came.
        after: The model that was returned: the best of all points.
        seconds: Time spent, evaluations included.
        steps: Training steps.
        stopped: Why it ended: "time", "steps", "no improvement" or "interrupted".
        sites: Where hidden values were compared, by module name.
        history: The points in order.
    """

    before: Judgement
    after: Judgement
    seconds: float
    steps: int
    stopped: str
    sites: tuple[str, ...]
    history: tuple[RecoveryPoint, ...]

    def __str__(self) -> str:
        """Return one line."""
        return (
            f"{self.before} -> {self.after} after {self.steps} steps in {self.seconds / 60:.1f} "
            f"minutes ({self.stopped})"
        )


def recovery_of(model: nn.Module) -> RecoveryReport | None:
    """Return what `recover` did to a model that it returned, None for any other model."""
    report: RecoveryReport | None = getattr(model, _ATTRIBUTE, None)
    return report


def attach(model: nn.Module, report: RecoveryReport) -> None:
    """Remember a report on the model; copies of the model keep it."""
    setattr(model, _ATTRIBUTE, report)


def points_state(points: list[RecoveryPoint]) -> list[dict[str, Any]]:
    """Return points as plain values."""
    return [asdict(point) for point in points]


def points_from(state: Any) -> list[RecoveryPoint]:
    """Return the points of `points_state`.

    Raises:
        CheckpointError: if they are not such.
    """
    names = {item.name for item in fields(RecoveryPoint)}
    try:
        if any(set(item) != names for item in state):
            raise ValueError("other fields")
        return [
            RecoveryPoint(**{**item, "judgement": Judgement(**item["judgement"])}) for item in state
        ]
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"the history of a recovery is damaged: {error}") from error
