"""The option of compressing passes that says how they score: by magnitude, or by OBS with data."""

from __future__ import annotations

from graphopt.passes.base import Context
from graphopt.passes.errors import PreconditionError

_SCORES = ("auto", "magnitude", "obs")


def check_scores(pass_name: str, scores: str, context: Context) -> None:
    """Refuse an unknown way to score, and OBS without data.

    Raises:
        PreconditionError: in a sentence.
    """
    if scores not in _SCORES:
        raise PreconditionError(
            f"{pass_name} scores by 'auto', 'magnitude' or 'obs', got {scores!r}"
        )
    if scores == "obs" and context.calibration is None:
        raise PreconditionError(
            f"{pass_name} with scores='obs' needs calibration data; pass calibration=..."
        )
