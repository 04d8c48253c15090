"""The tree itself: file sizes, names, packages, and the docstring examples."""

import doctest
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"graphopt": "graphopt", "passes": "graphopt.passes", "kernels": "graphopt.kernels"}
LONGEST_FILE_LINES = 500
EMPTY_WORDS = {"utils", "util", "helpers", "helper", "common", "misc"}


def sources() -> Iterator[Path]:
    for folder in (*FOLDERS, "tests", "benchmarks", "examples"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def module_names() -> Iterator[str]:
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__")))


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in sources()}
    assert {
        str(path.relative_to(ROOT)): lines
        for path, lines in lengths.items()
        if lines > LONGEST_FILE_LINES
    } == {}


def test_no_name_says_nothing() -> None:
    named = {path for path in sources() if EMPTY_WORDS & {*path.stem.split("_"), path.parent.name}}
    assert named == set()


@pytest.mark.parametrize("folder", ["passes", "kernels"])
def test_bare_import_is_refused(folder: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert f"expected the import name graphopt.{folder}, got {folder}" in result.stderr


@pytest.mark.parametrize("name", list(module_names()))
def test_docstring_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_transformers_does_not_take_our_kernels_for_its_own() -> None:
    """It probes for a package `kernels`; with the root on the path it finds our folder."""
    code = "import transformers; transformers.BertModel; print(len(vars(__import__('kernels'))))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
