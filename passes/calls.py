"""A call of a model in one canonical form, however it was written.

`model(x)`, `model(input=x)` and `model(input=x, mask=None)` mean the same; all become the ordered
dictionary of the arguments that differ from their defaults.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .errors import InputError


def signature_of(model: nn.Module) -> inspect.Signature:
    """Return the signature of the model's forward, without `self`."""
    return inspect.signature(model.forward)


def canonical_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by name, in signature order, defaults left out.

    Variable positional arguments stay one tuple under their own name (`args`); variable keyword
    arguments are merged in.

    Raises:
        InputError: if the call does not fit the signature.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the inputs do not fit forward{signature}: {error}; "
            "pass a tensor, a tuple of positional arguments or a dict of keyword arguments"
        ) from error
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(sorted(value.items()))
        elif not is_default(value, parameter.default):
            arguments[name] = value
    return arguments


def expand_arguments(
    signature: inspect.Signature, arguments: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn canonical arguments back into positional and keyword arguments for a call."""
    positional: list[Any] = []
    rest = dict(arguments)
    parameters = list(signature.parameters.values())
    variable = next((p for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL), None)
    for parameter in parameters:
        leads = parameter.kind is inspect.Parameter.POSITIONAL_ONLY or (
            variable is not None
            and variable.name in rest
            and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        )
        if leads and (parameter.name in rest or parameter.default is not parameter.empty):
            positional.append(rest.pop(parameter.name, parameter.default))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            positional.extend(rest.pop(parameter.name, ()))
    return tuple(positional), rest


def example_arguments(model: nn.Module, example: Any) -> dict[str, Any]:
    """Return canonical arguments for example inputs as a user writes them.

    Args:
        model: The model they are for.
        example: A tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments.
    """
    signature = signature_of(model)
    if isinstance(example, torch.Tensor):
        return canonical_arguments(signature, (example,), {})
    if hasattr(example, "keys"):
        return canonical_arguments(signature, (), {key: example[key] for key in example.keys()})  # noqa: SIM118 - any mapping-like batch, also ones whose iteration is not over keys
    if isinstance(example, (tuple, list)):
        return canonical_arguments(signature, tuple(example), {})
    raise InputError(
        f"example inputs must be a tensor, a tuple or a dict, got {type(example).__name__}"
    )


def is_default(value: Any, default: Any) -> bool:
    """Say whether an argument is its parameter's default, or equal to it as a plain value."""
    if value is default:
        return True
    return (
        isinstance(value, (bool, int, float, str))
        and type(value) is type(default)
        and (value == default)
    )
