"""Which input dimensions of an ONNX file stay open, and what their sizes are called."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from graphopt.passes.errors import ExportError

from .flat_model import FlatModel

OpenSizes: TypeAlias = dict[str, dict[int, str]]
"""For each input, its open dimensions and the names of their sizes."""

_SYMBOL = re.compile(r"\b[su]\d+\b")


def candidates(flat: FlatModel) -> OpenSizes:
    """Return the dimensions that may be a batch or a sequence.

    These are the first one of every tensor and all of a tensor with three at most: torch.export
    finds out which of them the weights fix. Images keep their height and width.
    """
    names: dict[tuple[str, int], str] = {}
    found: OpenSizes = {}
    for name, tensor in zip(flat.input_names, flat.example, strict=True):
        found[name] = {}
        for index, size in enumerate(tensor.shape):
            if index == 0 or tensor.dim() <= 3 or not tensor.is_floating_point():
                kind = ("batch", "sequence")[index] if index < 2 else f"size_{index}"
                free = kind not in names.values()
                names.setdefault((kind, size), kind if free else f"{name}_{kind}")
                found[name][index] = names[kind, size]
    return found


def requested(dynamic: Mapping[str, Mapping[int, str]], flat: FlatModel) -> OpenSizes:
    """Return the dimensions that a caller named, with readable names for bare symbols.

    Raises:
        ExportError: if there is no such input or dimension.
    """
    readable = candidates(flat)
    for name, dimensions in dynamic.items():
        if name not in flat.input_names:
            raise ExportError(f"there is no input {name!r} to keep open: {flat.input_names}")
        rank = flat.example[flat.input_names.index(name)].dim()
        if not all(0 <= index < rank for index in dimensions):
            raise ExportError(f"input {name!r} has {rank} dimensions, got {sorted(dimensions)}")
    return {
        name: {
            index: readable[name].get(index, f"size_{index}") if _SYMBOL.search(size) else size
            for index, size in dynamic.get(name, {}).items()
        }
        for name in flat.input_names
    }


def narrowed(wanted: OpenSizes) -> Iterator[OpenSizes]:
    """Yield `wanted`, then less of it: without one size, only one size, nothing."""
    names = list(dict.fromkeys(name for sizes in wanted.values() for name in sizes.values()))
    choices = [
        set(names),
        *(set(names) - {name} for name in reversed(names)),
        *({name} for name in names),
        set(),
    ]
    for index, kept in enumerate(choices):
        if kept not in choices[:index]:
            yield {
                name: {index: size for index, size in sizes.items() if size in kept}
                for name, sizes in wanted.items()
            }


def traceable_example(flat: FlatModel, sizes: OpenSizes) -> list[torch.Tensor]:
    """Return the example with every open size at least 2: torch.export fixes sizes of 1.

    Where the model does not run on that, the example stays as it is.
    """
    tensors = []
    for name, tensor in zip(flat.input_names, flat.example, strict=True):
        for index in sizes[name]:
            if tensor.shape[index] == 1:
                tensor = tensor.repeat_interleave(2, dim=index)
        tensors.append(tensor)
    try:
        with torch.no_grad():
            flat(*tensors)
    except Exception:
        return flat.example
    return tensors


def size_names(program: torch.export.ExportedProgram, sizes: OpenSizes) -> dict[str, str]:
    """Return a readable name for every symbol of an exported program.

    Dimensions of one wanted name share it: torch.export may not have needed their equality, but
    the file promises only what was asked for.

    Args:
        program: Exported from a flat model, inputs in its order.
        sizes: The dimensions that were to stay open, and their names.
    """
    names: dict[str, str] = {}
    for dimensions, value in zip(sizes.values(), input_values(program), strict=True):
        for index, wanted in dimensions.items():
            symbol = str(value.shape[index])
            if _SYMBOL.fullmatch(symbol):
                names.setdefault(symbol, wanted)
    return names


def found_sizes(
    program: torch.export.ExportedProgram, sizes: OpenSizes, names: Mapping[str, str]
) -> OpenSizes:
    """Return, for each input, the dimensions that stayed open and their readable names."""
    return {
        name: {
            index: renamed(str(size), names)
            for index, size in enumerate(value.shape)
            if not is_concrete_int(size)
        }
        for name, value in zip(sizes, input_values(program), strict=True)
    }


def input_values(program: torch.export.ExportedProgram) -> list[torch.Tensor]:
    """Return the fake input tensors of an exported program."""
    user_inputs = set(program.graph_signature.user_inputs)
    return [
        node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in user_inputs
    ]


def renamed(expression: str, names: Mapping[str, str]) -> str:
    """Return a size's expression with readable names for its symbols."""
    return _SYMBOL.sub(lambda match: names.get(match.group(), match.group()), expression)


def static_notes(
    flat: FlatModel, wanted: OpenSizes, found: OpenSizes, failures: Sequence[Exception]
) -> tuple[str, ...]:
    """Return a sentence on the wanted dimensions that are fixed, and the first failure if any."""
    fixed = [
        f"{name} dimension {index} = {tensor.shape[index]}"
        for name, tensor in zip(flat.input_names, flat.example, strict=True)
        for index in wanted[name]
        if index not in found[name]
    ]
    notes = [f"fixed sizes: {', '.join(fixed)}"] if fixed else []
    return (*notes, *(f"a first attempt failed: {failure}" for failure in failures[:1]))
