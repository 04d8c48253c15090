"""The dense model under an optimized one: how a checkpoint tells to build it again.

It is built on the meta device, so that no dense weights ever exist. What a description says is
data; only a function that the caller passes is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from graphopt.passes.errors import CheckpointError, GraphoptError

from .exported_archive import read_exported, write_structure
from .exported_model import model_of
from .files import inside
from .hugging_face import CONFIG_FILE, empty_model, is_rebuildable, write_config
from .module_tree import build, describe
from .plain_values import named_dtype
from .sources import Origin, call_factory, import_factory, origin_of, remember

BaseKind = Literal["hugging-face", "exported-program", "torch-modules", "factory", "given"]
Base = nn.Module | Callable[[], nn.Module] | str

STRUCTURE_FILE = "base.pt2"


def write_base(
    dense: nn.Module, cls: type[nn.Module], directory: Path, factory: str | None
) -> tuple[BaseKind, Any]:
    """Write what is needed to build the dense model again.

    Args:
        dense: The dense model; only its structure is read.
        cls: Its class as the user knows it.
        directory: Where to write.
        factory: `package.module:function` that makes it, if the caller said so.

    Returns:
        The kind of base, and for some kinds its description as JSON values.
    """
    origin = origin_of(dense)
    if origin is not None and origin.exported is not None:
        write_structure(origin.exported, directory / STRUCTURE_FILE)
        return "exported-program", None
    if is_rebuildable(dense, cls):
        write_config(dense, cls, directory)
        return "hugging-face", None
    try:
        return "torch-modules", describe(dense)
    except CheckpointError:
        factory = factory or (origin.factory if origin is not None else None)
        return ("factory" if factory else "given"), factory


def read_base(
    kind: BaseKind, description: Any, dtype: str | None, directory: Path, base: Base | None
) -> nn.Module:
    """Build the dense model of a checkpoint on the meta device.

    Args:
        kind: As `write_base` returned it.
        description: As `write_base` returned it.
        dtype: The dtype of its floating parameters, None if they have several.
        directory: The checkpoint.
        base: The caller's model, a function that makes it, or `package.module:function`.

    Raises:
        CheckpointError: if it cannot be built, with the line to write.
    """
    if base is not None:
        model = _given(base)
    elif kind == "hugging-face":
        inside(directory, CONFIG_FILE)
        model = empty_model(directory)
    elif kind == "exported-program":
        program = read_exported(inside(directory, STRUCTURE_FILE))
        model = model_of(program)
        remember(model, Origin("exported-program", exported=program))
    elif kind == "torch-modules":
        model = build(description)
    else:
        made = f"by {description}" if description else "in Python"
        raise CheckpointError(
            f"the model in {directory} was made {made}, and code that a file names is not run; "
            "pass base=, a function that makes the dense model (on the command line "
            f"--factory {description or 'package.module:function'})"
        )
    if dtype is not None:
        model.to(named_dtype(dtype))
    return meta_copy(model)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with every tensor on the meta device; no value is copied."""
    memo: dict[int, Any] = {}
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors.extend(value for value in vars(module).values() if isinstance(value, torch.Tensor))
    for value in tensors:
        empty = torch.empty_like(value, device="meta")
        memo[id(value)] = (
            nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
        )
    return copy.deepcopy(model, memo)


def _given(base: Base) -> nn.Module:
    if isinstance(base, nn.Module):
        return base
    name = base if isinstance(base, str) else getattr(base, "__name__", "base")
    function = import_factory(base) if isinstance(base, str) else base
    try:
        return call_factory(function, name, meta=True)
    except GraphoptError:
        return call_factory(function, name)  # some constructors compute with values
