"""The blocks of a model in its module tree: layers of a transformer, stages of a net."""

from __future__ import annotations

from torch import nn


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the model's blocks: outermost elements of sequences of like modules."""
    names: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        children = list(module.named_children())
        classes = [type(child) for _, child in children if next(child.children(), None)]
        repeated = isinstance(module, (nn.ModuleList, nn.Sequential))
        for name, child in children:
            if repeated and classes.count(type(child)) > 1:
                names.append(prefix + name)
            else:
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return names
