"""Places inside two models, by module name, whose values are compared row by row.

A site is a block that both models have, or, where they share none, a layer: its output in the
cheap model and in the dense one belong to the same tokens and have the same width. Rows of padding
do not count, so values that lie packed (real tokens only) and padded ones compare.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.passes.module_blocks import block_names
from graphopt.passes.structure import flatten


class Sites:
    """The sites of a cheap model and its dense teacher, watched while both run.

    Attributes:
        names: Names of the modules.
        alone: Whether every site of the cheap model hands on the teacher's value instead of its
            own: each block then learns on its own, from what the dense blocks before it give.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        """Hold the models; `match` finds the sites.

        Args:
            student: The cheap model.
            teacher: The dense model.
        """
        self._student = student
        self._teacher = teacher
        self._places: dict[str, int] = {}
        self._wanted: dict[str, deque[Tensor]] = {}
        self._losses: list[Tensor] = []
        self._real: Tensor | None = None
        self.alone = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modules."""
        return tuple(self._places)

    def match(self, run: Callable[[nn.Module], Any], real: Tensor | None) -> None:
        """Find the sites: run both models once.

        Args:
            run: Calls a model with a batch.
            real: Which tokens of the batch are not padding [batch, token], None if all.
        """
        student_modules = dict(self._student.named_modules())
        modules = {
            name: module
            for name, module in self._teacher.named_modules()
            if name in student_modules
        }
        leaves = [
            name
            for name, module in modules.items()
            if name and not any(module.children()) and any(True for _ in module.parameters())
        ]
        blocks = [name for name in block_names(self._teacher) if name in modules]
        with torch.no_grad():
            wanted = _values(self._teacher, {*leaves, *blocks}, run)
            found = _values(self._student, {*leaves, *blocks}, run)
        for names in (blocks, leaves):
            for name in names:
                place = _nearest(found[name], wanted[name], real)
                if place is not None:
                    self._places[name] = place
            if self._places:
                return

    @contextmanager
    def watched(self, real: Tensor | None) -> Iterator[list[Tensor]]:
        """Compare the values at all sites: first the teacher is called once, then the student.

        Args:
            real: Which tokens of the batch are not padding [batch, token], None if all.

        Yields:
            A list to which each site of the student adds the squared relative error there.
        """
        self._wanted = {name: deque() for name in self._places}
        self._losses, self._real = [], real
        handles = []
        for name in self._places:
            for model, hook in ((self._teacher, self._note), (self._student, self._compare)):
                handles.append(model.get_submodule(name).register_forward_hook(_named(hook, name)))
        try:
            yield self._losses
        finally:
            for handle in handles:
                handle.remove()
            self._wanted, self._losses, self._real = {}, [], None

    def _note(self, name: str, output: Any) -> None:
        floats = _floats(output)
        if floats:
            self._wanted[name].append(floats[0].detach())

    def _compare(self, name: str, output: Any) -> Any:
        queue = self._wanted[name]
        if not queue:
            return None
        wanted = queue.popleft()
        tensors, structure = flatten(output)
        place = self._places[name]
        mine, theirs = _rows(tensors[place], self._real), _rows(wanted, self._real)
        if mine.shape != theirs.shape:
            return None
        self._losses.append(squared_error(mine, theirs))
        if not self.alone:
            return None
        value = wanted if wanted.shape == tensors[place].shape else theirs
        tensors[place] = value.to(tensors[place].dtype).reshape(tensors[place].shape)
        return structure.rebuild(tensors)


def squared_error(value: Tensor, reference: Tensor) -> Tensor:
    """Return ||value - reference||^2 / ||reference||^2, computed in float32 at least."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    value, reference = value.to(dtype), reference.to(dtype)
    norm = reference.square().sum().clamp_min(torch.finfo(dtype).tiny)
    return (value - reference).square().sum() / norm


def _named(hook: Callable[[str, Any], Any], name: str) -> Callable[..., Any]:
    return lambda module, inputs, output: hook(name, output)


def _values(
    model: nn.Module, names: set[str], run: Callable[[nn.Module], Any]
) -> dict[str, list[Any]]:
    """Return the outputs of every call of some modules."""
    values: dict[str, list[Any]] = defaultdict(list)
    handles = [
        model.get_submodule(name).register_forward_hook(
            _named(lambda key, output: values[key].append(output), name)
        )
        for name in names
    ]
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    return values


def _nearest(found: list[Any], wanted: list[Any], real: Tensor | None) -> int | None:
    """Return which tensor of the student's output is the teacher's first, None if none is.

    The graph of a cheap model may hand on more values from a block than the dense block returns.
    """
    if not found or len(found) != len(wanted) or not _floats(wanted[0]):
        return None
    theirs = _rows(_floats(wanted[0])[0], real)
    best, distance = None, 1.0
    for place, tensor in enumerate(flatten(found[0])[0]):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        mine = _rows(tensor, real)
        if mine.shape == theirs.shape:
            error = squared_error(mine, theirs).item()
            if error < distance:
                best, distance = place, error
    return best


def _floats(output: Any) -> list[Tensor]:
    return [
        value
        for value in flatten(output)[0]
        if isinstance(value, Tensor) and value.is_floating_point()
    ]


def _rows(value: Tensor, real: Tensor | None) -> Tensor:
    """Return a value's rows [rows, width], without those of padding."""
    if real is not None and value.shape[:2] == real.shape:
        value = value[real.to(value.device)]
    return value.reshape(-1, value.shape[-1]) if value.dim() else value.reshape(1, 1)
