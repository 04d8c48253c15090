"""What Triton's compiler makes of all kernels, and that the committed reports say the same."""

import csv
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# The tables have more; these two are what every kernel is held to.
ARCHITECTURES = ("sm_80", "sm_90")
# What a row is; the rest is what the compiler of one release made of it.
IDENTITIES = {
    "kernels_ahead_of_time": (
        "operation",
        "product",
        "precision",
        "architecture",
        "block_out",
        "block_in",
        "width",
    ),
    "token_rows_ahead_of_time": ("kernel", "item_bytes", "architecture", "reads"),
}


def load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    specification = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, name, module)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load("kernels_ahead_of_time", tmp_path, monkeypatch)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("name", IDENTITIES)
def test_every_row_compiles_without_faults_as_the_committed_table_says(
    name: str, tmp_path: Path
) -> None:
    output = tmp_path / "table.csv"
    chosen = [word for part in ARCHITECTURES for word in ("--architecture", part)]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--output", str(output), *chosen],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows_of(BENCHMARKS / "results" / f"{name}.csv")
    found, committed = rows_of(output), [r for r in table if r["architecture"] in ARCHITECTURES]
    if found[0]["triton"] != committed[0]["triton"]:
        found, committed = (
            [{field: row[field] for field in IDENTITIES[name]} for row in rows]
            for rows in (found, committed)
        )
    assert found == committed


def test_tiles_that_do_not_fit_have_faults(script: ModuleType) -> None:
    """256 tokens by 128 outputs leave sm_80 no registers, and sm_86 no shared memory besides."""
    largest = next(v for v in script.variants() if v.tile.span == 256)
    for name, fault in (("sm_80", "spills"), ("sm_86", "bytes of shared memory")):
        tile = replace(largest.tile, architecture=name, stages=4)
        row = script.compile_variant(script.Variant(tile, "input_gradient", (128, 128)))
        assert any(fault in found for found in row.faults)


def test_a_row_without_buffers_copies_or_its_instruction_has_faults(script: ModuleType) -> None:
    tile = next(tile for tile in script.tiles() if tile.architecture == "sm_90")
    row = script.compile_variant(script.Variant(tile, "input_gradient", (128, 128)))
    assert row.faults == []
    one_buffer = replace(row, shared_bytes=row.stage_bytes, buffers=1.0)
    assert one_buffer.faults == [f"1.0 buffers for {row.stages} stages"]
    assert replace(row, instruction="mma").faults == ["mma instead of wgmma"]
    assert replace(row, copies_of_16_bytes=0).faults == ["no asynchronous copies"]
    assert replace(row, smaller_copies=2).faults == ["2 copies of less than 16 bytes"]


def test_the_sum_of_shares_compiles_everywhere(script: ModuleType) -> None:
    """It has no tile: it only adds."""
    kernel = script.block_sparse.add_partial_sums
    types = {"partial_sums": "*fp32", "bias": "*bf16", "result": "*bf16"}
    constants = {"TILE": 256, "HAS_BIAS": True, "ACTIVATION": "gelu"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    source = script.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    for name in script.ARCHITECTURES:
        target = script.GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
        binary = script.triton.compile(source, target=target).asm["cubin"]
        assert script.resources(binary)[1] == 0


def test_rows_that_move_in_small_pieces_have_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load("token_rows_ahead_of_time", tmp_path, monkeypatch)
    variant = script.Variant("combine", 2, "sm_90", 2)
    assert script.compile_variant(variant).faults == []
    # Rows whose distance is no multiple of 16 elements.
    monkeypatch.setattr(script, "_UNEVEN", {"size", "width", "base_stride"})
    faults = script.compile_variant(variant).faults
    assert [fault.split(" instead")[0] for fault in faults] == [
        "0 loads of 16 bytes",
        "0 stores of 16 bytes",
    ]
    spilling = replace(script.compile_variant(variant), stack_bytes=8)
    assert "spills 8 bytes" in spilling.faults
