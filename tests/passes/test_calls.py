"""Calls in one canonical form, whichever way they were written."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.errors import InputError
from graphopt.passes.calls import (
    canonical_arguments,
    example_arguments,
    expand_arguments,
    is_default,
    signature_of,
)


def plain(first: Any, second: Any = None, *, scale: float = 1.0, flag: bool = False) -> None: ...
def variable(first: Any, *rest: Any, scale: float = 1.0, **others: Any) -> None: ...
def leading(first: Any, other: int = 2, /, third: Any = None) -> None: ...


class Model(nn.Module):
    def forward(self, first: Any, second: Any = None) -> Any:
        return first


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "expected"),
    [
        (plain, (1,), {}, {"first": 1}),
        (plain, (), {"second": None, "first": 1}, {"first": 1}),
        (plain, (1, 2), {"scale": 1.0, "flag": True}, {"first": 1, "second": 2, "flag": True}),
        (plain, (1,), {"scale": 1}, {"first": 1, "scale": 1}),
        (variable, (1, 2, 3), {"b": 5, "a": 4}, {"first": 1, "rest": (2, 3), "a": 4, "b": 5}),
        (leading, (1, 2, 3), {}, {"first": 1, "third": 3}),
        (leading, (1, 3), {"third": 4}, {"first": 1, "other": 3, "third": 4}),
    ],
)
def test_canonical_arguments_and_back(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], expected: dict[str, Any]
) -> None:
    signature = inspect.signature(function)
    arguments = canonical_arguments(signature, args, kwargs)
    assert arguments == expected
    again_args, again_kwargs = expand_arguments(signature, arguments)
    assert canonical_arguments(signature, again_args, again_kwargs) == expected


def test_a_call_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"do not fit forward\(first.*missing a required"):
        canonical_arguments(inspect.signature(plain), (), {"second": 1})


def test_defaults_are_recognised_by_value_only_for_plain_values() -> None:
    tensor = torch.ones(2)
    assert is_default(tensor, tensor)
    assert not is_default(torch.ones(2), tensor)
    assert is_default("mean", "mean")
    assert not is_default(True, 1)
    assert not is_default(None, 1.0)


class Batch:
    """Mapping-like, but iterates over something else, as some tokenizers' batches do."""

    def keys(self) -> list[str]:
        return ["first", "second"]

    def __getitem__(self, key: str) -> str:
        return key.upper()


def test_example_inputs_as_users_write_them() -> None:
    model, tensor = Model(), torch.ones(2)
    assert example_arguments(model, tensor)["first"] is tensor
    assert example_arguments(model, [tensor, 3])["second"] == 3
    assert example_arguments(model, {"second": 3, "first": tensor})["second"] == 3
    assert example_arguments(model, Batch()) == {"first": "FIRST", "second": "SECOND"}
    with pytest.raises(InputError, match="got str"):
        example_arguments(model, "text")
    assert list(signature_of(model).parameters) == ["first", "second"]
