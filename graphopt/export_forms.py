"""What a module says it is to an exporter: its operator in plain torch, for the time of a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class HasExportForm(Protocol):
    """A module whose operator an exported format does not have."""

    def export_form(self) -> nn.Module:
        """Return a module, called the same way, made of operations that every format has."""


@contextmanager
def export_forms(model: nn.Module) -> Iterator[None]:
    """Let every module that has an export form compute by it; afterwards all is as before.

    Only the calls are redirected: modules, hooks, parameters and attributes stay in their places,
    wherever the model's code holds them.
    """
    forms = {
        module: module.export_form()
        for module in model.modules()
        if isinstance(module, HasExportForm)
    }
    before = {module: vars(module).get("forward") for module in forms}
    try:
        for module, form in forms.items():
            vars(module)["forward"] = form
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward
