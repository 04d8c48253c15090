"""Every error a user can cause, in one place to import from."""

from graphopt.passes.errors import (
    CaptureError,
    CheckpointError,
    ConfigError,
    ExportError,
    GraphoptError,
    InputError,
    MissingExtraError,
    PlanError,
    PreconditionError,
    VerificationError,
)

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "GraphoptError",
    "InputError",
    "MissingExtraError",
    "PlanError",
    "PreconditionError",
    "TrainingError",
    "VerificationError",
]


class TrainingError(GraphoptError):
    """A model cannot be trained as asked: its layers, its optimizer or its ranks do not fit."""
