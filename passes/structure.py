"""Nested call arguments and results as flat lists of tensors.

`torch.utils._pytree` knows containers that somebody registered. Model results also hold plain
objects (key/value caches, user classes) that nobody did. Here any object whose attributes reach a
tensor is a node too, so that no global registration is needed and none can collide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

_TRACED = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Leaf:
    """A tensor position; `index` counts from the left.

    While a model is traced, a number that depends on a dynamic size is a leaf too: the graph
    returns it, so that, for instance, the length a cache reports follows the call.
    """

    index: int

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """Return the tensor at this position."""
        return tensors[self.index]


@dataclass(frozen=True)
class Constant:
    """A value that is part of the structure: flags, numbers, None, enum members."""

    value: Any

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """Return the constant."""
        return self.value


@dataclass(frozen=True)
class Container:
    """A node that `torch.utils._pytree` knows, by its type, context and children."""

    kind: type
    context: Any
    children: tuple[Structure, ...]

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """Return a fresh container of the same type around `tensors`."""
        unflatten = pytree.SUPPORTED_NODES[self.kind].unflatten_fn
        return unflatten([child.rebuild(tensors) for child in self.children], self.context)


@dataclass(frozen=True)
class Instance:
    """A plain object: its class and its attributes in order."""

    kind: type
    names: tuple[str, ...]
    children: tuple[Structure, ...]

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """Return a fresh object of the same class, without calling its constructor."""
        instance: Any = object.__new__(self.kind)
        for name, child in zip(self.names, self.children, strict=True):
            instance.__dict__[name] = child.rebuild(tensors)
        return instance


Structure = Leaf | Constant | Container | Instance


def flatten(value: Any) -> tuple[list[torch.Tensor], Structure]:
    """Split a nested value into its tensors and the structure around them.

    Args:
        value: Any nesting of registered containers, plain objects, tensors and constants.

    Returns:
        The tensors from left to right, and a structure with `rebuild(tensors)`; two values of the
        same form have equal structures.
    """
    tensors: list[Any] = []

    def visit(item: Any) -> Structure:
        if isinstance(item, _TRACED):
            tensors.append(item)
            return Leaf(len(tensors) - 1)
        kind = pytree._get_node_type(item)
        if kind in pytree.SUPPORTED_NODES:
            children, context = pytree.SUPPORTED_NODES[kind].flatten_fn(item)
            return Container(kind, context, tuple(visit(child) for child in children))
        if _holds_tensor(item, set()):
            attributes = vars(item)
            return Instance(
                type(item), tuple(attributes), tuple(visit(child) for child in attributes.values())
            )
        return Constant(item)

    return tensors, visit(value)


def tensor_names(structure: Structure) -> list[str]:
    """Return one identifier per tensor: argument name, then its path inside the argument.

    Args:
        structure: The structure of a dictionary of keyword arguments.
    """
    names: list[str] = []

    def visit(item: Structure, path: tuple[str, ...]) -> None:
        if isinstance(item, Leaf):
            names.append("_".join(path))
        elif isinstance(item, Instance):
            for name, child in zip(item.names, item.children, strict=True):
                visit(child, (*path, name))
        elif isinstance(item, Container):
            keys = item.context if item.kind is dict else range(len(item.children))
            for key, child in zip(keys, item.children, strict=True):
                visit(child, (*path, str(key)))

    visit(structure, ())
    return names


def outside_objects(structure: Structure) -> list[bool]:
    """Say for every tensor of a structure whether it is outside of plain objects.

    A tensor held by a plain object (a key/value cache) is state that a model hands to itself, and
    changes its size along with the model.
    """
    result: dict[int, bool] = {}

    def visit(item: Structure, outside: bool) -> None:
        if isinstance(item, Leaf):
            result[item.index] = outside
        elif isinstance(item, (Container, Instance)):
            for child in item.children:
                visit(child, outside and isinstance(item, Container))

    visit(structure, True)
    return [result[index] for index in sorted(result)]


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Return a copy of a nested value with `function` applied to every tensor."""
    tensors, structure = flatten(value)
    return structure.rebuild([function(tensor) for tensor in tensors])


def _holds_tensor(item: Any, seen: set[int]) -> bool:
    if isinstance(item, _TRACED):
        return True
    if isinstance(item, (*_ATOMS, type, torch.nn.Module)) or id(item) in seen:
        return False
    seen.add(id(item))
    kind = pytree._get_node_type(item)
    if kind in pytree.SUPPORTED_NODES:
        return any(
            _holds_tensor(child, seen) for child in pytree.SUPPORTED_NODES[kind].flatten_fn(item)[0]
        )
    return hasattr(item, "__dict__") and any(
        _holds_tensor(child, seen) for child in vars(item).values()
    )
