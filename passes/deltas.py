"""What changes add to the parameters of the dense program, kept on disk and added for a while."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .base import Change, Context, Pass
from .facts import attribute_of
from .program import Program


def delta_of(
    program: Program, step: Pass, change: Change, context: Context
) -> dict[str, torch.Tensor] | None:
    """Return what a settled change adds to parameters, by name; None if no parameters do that."""
    state = step.transfer(program, change, context)
    dense = step.reconstruct(program, change, state)
    if dense is None:
        return None
    deltas = {}
    for name, value in dense.items():
        parameter = attribute_of(program, name).detach()
        delta = value.detach().to(parameter) - parameter
        if delta.any():
            deltas[name] = delta
    return deltas


class DeltaStore:
    """Deltas of changes in safetensors files, so that memory does not hold those of all."""

    def __init__(self, folder: Path) -> None:
        """Keep them in this directory."""
        self._folder = folder

    def path(self, step: Pass, change: Change) -> Path:
        """Return the file of a change."""
        text = f"{step} {change.target} {json.dumps(dict(change.details), sort_keys=True)}"
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"

    def save(self, step: Pass, change: Change, deltas: dict[str, torch.Tensor]) -> None:
        """Keep the deltas of a change."""
        path = self.path(step, change)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file({name: value.contiguous().cpu() for name, value in deltas.items()}, temporary)
        temporary.replace(path)


@contextmanager
def added(program: Program, files: Sequence[Path]) -> Iterator[None]:
    """Add deltas to the program's parameters; at the end they are the very tensors they were.

    Memory: one copy of every changed parameter.
    """
    changed: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a file, not a mapping
                parameter = attribute_of(program, name)
                value = changed.get(name)
                if value is None:
                    value = changed[name] = parameter.detach().clone()
                value.add_(file.get_tensor(name).to(value))
    before = {name: attribute_of(program, name).data for name in changed}
    try:
        for name, value in changed.items():
            attribute_of(program, name).data = value
        yield
    finally:
        for name, value in before.items():
            attribute_of(program, name).data = value
