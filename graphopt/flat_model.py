"""A model as a function from named tensors to named tensors, the only form ONNX knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graphopt.passes.calls import example_arguments, expand_arguments, signature_of
from graphopt.passes.errors import ExportError, InputError
from graphopt.passes.structure import flatten, tensor_names

from .inputs import infer_inputs


class FlatModel(nn.Module):
    """A model whose inputs and outputs are flat tuples of tensors.

    Arguments that are not tensors are part of it. Outputs are the tensors in collections (tuples,
    lists, mappings, dataclasses); those inside other objects, such as a key/value cache, are state
    of the next call, not results, and are left out.

    Attributes:
        model: The model; shared, not copied.
        input_names: One name per input: the argument's name, then its path inside the argument.
        output_names: One name per output: its key in the result, or `output_<index>`.
        example: The example's tensors, one per input.
    """

    def __init__(self, model: nn.Module, arguments: dict[str, Any]) -> None:
        """Run the model once to learn the names of its outputs.

        Args:
            model: The model, in evaluation mode.
            arguments: Canonical arguments (see `graphopt.passes.calls`).

        Raises:
            ExportError: if the result holds no tensor.
            InputError: if the model fails on the arguments.
        """
        super().__init__()
        self.model = model
        self._signature = signature_of(model)
        self.example, self._structure = flatten(arguments)
        self.input_names = tensor_names(self._structure)
        try:
            with torch.no_grad():
                result = self._call(tuple(self.example))
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} fails on the example inputs: {first_line(error)}"
            ) from error
        outputs = list(_outputs(result, ()))
        if not outputs:
            raise ExportError(
                f"the result of {type(model).__name__} holds no tensors, so ONNX has no outputs; "
                "return a tensor, or a tuple, dict or dataclass of tensors"
            )
        self.output_names = _unique_names([path for path, _ in outputs], self.input_names)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the output tensors for input tensors in the order of `input_names`."""
        return tuple(tensor for _, tensor in _outputs(self._call(tensors), ()))

    def _call(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        arguments = self._structure.rebuild(tensors)
        args, kwargs = expand_arguments(self._signature, arguments)
        return self.model(*args, **kwargs)


def arguments_for(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Return canonical arguments for example inputs, inferring them if None.

    Raises:
        InputError: if they do not fit the model or cannot be inferred.
    """
    if example_inputs is None:
        return infer_inputs(model)
    return example_arguments(model, example_inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def first_line(error: BaseException) -> str:
    """Return the first line of the innermost cause of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _outputs(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Yield the tensors of a result with their paths, those in collections only."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _outputs(child, (*path, str(key)))
    elif isinstance(value, (tuple, list)):
        for index, child in enumerate(value):
            yield from _outputs(child, (*path, str(index)))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _outputs(getattr(value, field.name), (*path, field.name))


def _unique_names(paths: list[tuple[str, ...]], taken: list[str]) -> list[str]:
    names: list[str] = []
    for path in paths:
        name = "_".join(path)
        if not name or not name[0].isalpha() or name in taken:
            name = f"output_{name or 0}"
        while name in names or name in taken:
            name += "_"
        names.append(name)
    return names
