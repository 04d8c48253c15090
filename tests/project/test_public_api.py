"""The public names, in one place: what users may rely on."""

import importlib

import pytest

import graphopt

PUBLIC_NAMES = [
    "Plan",
    "Program",
    "capture",
    "densify",
    "export_onnx",
    "frontier",
    "load",
    "optimize",
    "plan",
    "recover",
    "report",
    "save",
]


def test_the_public_names_are_the_documented_ones() -> None:
    assert set(graphopt.__all__) == {*PUBLIC_NAMES, "__version__"}


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_each_public_name_can_be_called_and_is_documented(name: str) -> None:
    value = getattr(graphopt, name)
    assert callable(value)
    assert value.__doc__


@pytest.mark.parametrize("name", ["CaptureError", "GraphoptError"])
def test_errors_have_one_import_and_one_root(name: str) -> None:
    errors = importlib.import_module("graphopt.errors")
    assert issubclass(getattr(errors, name), errors.GraphoptError)
