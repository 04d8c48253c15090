"""The dense layer that a module took the place of, kept without values to make it again."""

from __future__ import annotations

from torch import nn

from .errors import PlanError
from .linear_layers import LinearLayer

_ATTRIBUTE = "_graphopt_dense_form"


def remember_dense(module: nn.Module, layer: LinearLayer) -> None:
    """Note which dense layer a module replaces: its class and settings, no values.

    It is not a submodule: parameters, `state_dict` and hooks of the model do not see it.
    """
    vars(module)[_ATTRIBUTE] = layer.emptied()


def dense_form(module: nn.Module) -> LinearLayer:
    """Return the dense layer that a module replaces, on the meta device.

    Raises:
        PlanError: if none was noted.
    """
    layer = vars(module).get(_ATTRIBUTE)
    if not isinstance(layer, LinearLayer):
        raise PlanError(f"{type(module).__name__} does not replace a dense layer of this model")
    return layer
