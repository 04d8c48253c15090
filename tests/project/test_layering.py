"""Imports point down: graphopt -> graphopt.passes -> graphopt.kernels -> torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BELOW = {
    "passes": ("graphopt.passes", "graphopt.kernels"),
    "kernels": ("graphopt.kernels",),
}


def absolute_imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def wrong_imports(source: str, folder: str) -> list[str]:
    """List what a file of `folder` imports although it lies above or goes by a bare name."""
    allowed = BELOW.get(folder, ("graphopt",))
    return [
        name
        for name in absolute_imports(source)
        if within(name, "passes")
        or within(name, "kernels")
        or (within(name, "graphopt") and not any(within(name, package) for package in allowed))
    ]


@pytest.mark.parametrize(
    "folder", ["graphopt", "passes", "kernels", "tests", "benchmarks", "examples"]
)
def test_imports_point_down(folder: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): names
        for path in (ROOT / folder).rglob("*.py")
        if (names := wrong_imports(path.read_text(), folder))
    }
    assert wrong == {}


@pytest.mark.parametrize("folder", ["graphopt", "passes", "kernels"])
def test_relative_imports_stay_in_their_folder(folder: str) -> None:
    climbing = [
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level > 1
    ]
    assert climbing == []


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("kernels", "from graphopt.passes.program import Program"),
        ("kernels", "import graphopt"),
        ("passes", "from graphopt import optimize"),
        ("passes", "def late():\n    from graphopt.capture import capture"),
        ("graphopt", "from passes.program import Program"),
        ("tests", "import kernels"),
    ],
)
def test_a_wrong_import_is_found(folder: str, line: str) -> None:
    assert wrong_imports(line, folder) != []
