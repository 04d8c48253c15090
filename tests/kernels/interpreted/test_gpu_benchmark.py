"""The parts of benchmarks/kernels_gpu.py that need no GPU: its grid, its checks, its versions."""

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "kernels_gpu.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[SCRIPT.stem] = module
    specification.loader.exec_module(module)
    return module


def test_the_grid_starts_with_the_goals_and_has_no_case_twice(script: ModuleType) -> None:
    cases = list(script.cases())
    assert len(set(cases)) == len(cases)
    first = cases[0]
    assert (first.block_out, first.block_in, first.density, first.dtype) == (
        (128, 128, 0.5, "bfloat16")
    )
    assert {case.density for case in cases} == {1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.05}
    for case in cases:
        for name in ("sm_80", "sm_86", "sm_90", "sm_100"):
            assert set(script.tiles_of(case, name)) == set(script.PRODUCTS)
        mask = script.mask_of(case)
        # To whole blocks of a row.
        stored, step = mask.double().mean().item(), 1 / mask.shape[1]
        assert stored == pytest.approx(case.density, abs=step / 2)


@pytest.mark.parametrize("pattern", ["balanced", "unbalanced", "one dense row"])
@pytest.mark.parametrize("tokens", [16, 150])
def test_cases_are_checked_and_every_version_runs(
    script: ModuleType, pattern: str, tokens: int
) -> None:
    case = script.Case(256, 512, tokens, 64, 64, 0.5, "float16", "half", pattern)
    problem, tiles = script.problem_of(case, "cpu"), script.tiles_of(case, "sm_80")
    errors = script.checked(case, problem, tiles)
    assert set(errors) == {*script.PRODUCTS, "step"}
    assert all(0 < error <= 1 for error in errors.values())
    for product in errors:
        names = []
        for version in script.versions_of(product, case, problem, tiles):
            version.compute(*version.operands)
            names.append(version.name)
        assert names == ["dense", "block-sparse", "dense, fewer inputs", "block-diagonal"]


def test_a_wrong_kernel_is_found_before_it_is_timed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graphopt.kernels.gpu import launch

    case = script.Case(256, 256, 70, 64, 64, 0.5, "float16")
    problem, tiles = script.problem_of(case, "cpu"), script.tiles_of(case, "sm_80")
    right = launch.weight_gradient
    monkeypatch.setattr(launch, "weight_gradient", lambda *args: right(*args) * 1.01)
    errors = script.checked(case, problem, tiles)
    assert errors["weight_gradient"] > 1
    assert errors["step"] > 1
    assert errors["forward"] <= 1


def test_rows_are_added_to_the_file(script: ModuleType, tmp_path: Path) -> None:
    row = script.Row(
        "forward", "dense", 8, 8, 1, 2, 2, 0.5, "float16", "half", "balanced", "", 0.0,
        1 / 3, 0.01, 1.0, 1.0, 0.5, 1.0, 1.0, "card", "3", torch.__version__, "3", "abc", "now",
    )  # fmt: skip
    for _ in range(2):
        script.add_rows(tmp_path / "rows.csv", [row])
    with (tmp_path / "rows.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [one["latency_ms"] for one in found] == ["0.33333", "0.33333"]
    assert found[0]["device"] == "card"


def test_versions_that_move_rows_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.kernels.gpu import row_launch

    path = SCRIPT.with_name("token_rows_gpu.py")
    monkeypatch.syspath_prepend(str(path.parent))
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, path.stem, script)
    specification.loader.exec_module(script)
    assert all(case.taken < case.rows for case in script.cases())
    base, rows, index = script.operands_of(script.Case(12, 70, 5, "bfloat16"), "cpu")
    right = row_launch.combine
    for product, moved in (("gather", 10), ("scatter", 17), ("combine", 24)):
        versions, moved_bytes = script.versions_of(product, base, rows, index)
        assert moved_bytes == moved * 70 * 2
        assert script.are_equal(versions)
    monkeypatch.setattr(row_launch, "combine", lambda *args: right(*args) + 1)
    assert not script.are_equal(script.versions_of("combine", base, rows, index)[0])
