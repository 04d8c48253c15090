"""The errors that a user can cause, from the middle layer upwards."""

from __future__ import annotations


class GraphoptError(Exception):
    """Base of every error a user can cause; its text is one sentence that says what to do."""


class CaptureError(GraphoptError):
    """A model could not be turned into a graph."""


class InputError(GraphoptError):
    """Example inputs are missing or do not fit the model's forward."""


class PreconditionError(GraphoptError):
    """A pass cannot run on this program at all."""


class PlanError(GraphoptError):
    """A plan does not fit the model it is applied to, or is not a valid plan."""


class VerificationError(GraphoptError):
    """A change broke the model: shapes, outputs or gradients are not what was promised."""


class ConfigError(GraphoptError):
    """An option, a recipe or a budget has a value that cannot be used."""


class CheckpointError(GraphoptError):
    """A checkpoint or another file is missing, damaged or not trustworthy."""


class ExportError(GraphoptError):
    """An export failed, or its outputs differ from the model's."""


class MissingExtraError(GraphoptError):
    """An optional dependency is not installed; the text names the extra to install."""
