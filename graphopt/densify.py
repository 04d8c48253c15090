"""An optimized model as an ordinary dense one again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from graphopt.passes.errors import CheckpointError, PlanError
from graphopt.passes.registry import pass_named

from .files import new_directory, write_tensors
from .hugging_face import copy_companions, is_rebuildable, source_directory
from .runtime import installation_of, uninstall
from .sources import origin_of

WEIGHTS_FILE = "model.safetensors"
_CONSTANTS = "_graphopt_constant_"


def densify(model: nn.Module) -> nn.Module:
    """Return a dense model of the original class that computes the same in evaluation mode.

    The changes are undone in reverse order on a copy: removed channels come back as zeros, factors
    are multiplied. It costs what the original cost.

    Raises:
        PlanError: if the model is not optimized, or a change cannot be undone, with the reason.
    """
    installation = installation_of(model)
    if installation is None:
        raise PlanError(f"{type(model).__name__} is not optimized, so there is nothing to densify")
    dense = copy.deepcopy(model)
    uninstall(dense)
    for name, plan in {"": installation.plan, **installation.plan.parts}.items():
        for record in reversed(plan.changes):
            pass_named(record.pass_name).restore(dense.get_submodule(name), record.change)
    for module in dense.modules():
        for name in [name for name in module._buffers if name.startswith(_CONSTANTS)]:
            delattr(module, name)
    return dense


def save_dense(
    model: nn.Module, directory: str | Path, *, source: str | Path | None = None
) -> None:
    """Write an ordinary dense checkpoint: a Hugging Face directory, or `model.safetensors`.

    Args:
        model: A dense model, or an optimized one, which is densified first.
        directory: A new or empty directory.
        source: Directory whose tokenizer and similar files are copied; found by itself for a model
            that was read from a directory.

    Raises:
        PlanError: if the model cannot be made dense.
        CheckpointError: if the directory cannot be written.
    """
    dense: Any = densify(model) if installation_of(model) is not None else model
    with new_directory(Path(directory)) as target:
        if is_rebuildable(dense, type(dense)):
            dense.save_pretrained(target)
            companions = Path(source) if source else companions_of(dense)
            if companions is not None:
                copy_companions(companions, target, skip=frozenset({"plan.json", "graphopt.json"}))
        else:
            write_tensors(target / WEIGHTS_FILE, stored_tensors(dense)[0])


def companions_of(model: nn.Module) -> Path | None:
    """Return the directory with a model's tokenizer and similar files, None if not known."""
    origin = origin_of(model)
    return origin.directory if origin and origin.directory else source_directory(model)


def stored_tensors(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Return parameters and persistent buffers to store, and for tied names the stored one.

    Raises:
        CheckpointError: if tensors overlap in memory without being the same.
    """
    hidden = {
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules(remove_duplicate=False)
        for buffer in module._non_persistent_buffers_set
    }
    tensors: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, value in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        if name in hidden:
            continue
        if value.is_meta:
            raise CheckpointError(f"{name} is on the meta device and has no values to save")
        if id(value) in first:
            aliases[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = value
    return tensors, aliases
