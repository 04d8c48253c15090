"""What Triton's compiler makes of the kernels that move rows of tokens, without a GPU.

Compiles each for every element size and architecture, reads registers and stack from the binary
and the loads and stores from the PTX, and checks them: no spills, and rows move 16 bytes at a time,
each byte once. (Row numbers are loaded one by one.) No time is measured: nothing runs.

    python benchmarks/token_rows_ahead_of_time.py
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before triton is imported: it sets what triton reads then.
from kernels_ahead_of_time import resources, write_rows

# isort: split
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphopt.kernels.gpu import row_launch, token_rows
from graphopt.kernels.gpu.tiles import ARCHITECTURES

RESULTS = Path(__file__).parent / "results" / "token_rows_ahead_of_time.csv"

WIDTH = 768
# Not known to be multiples of 16.
_UNEVEN = {"size", "taken"}
_PIECE_BYTES = 16
_WARP_THREADS = 32


@dataclass(frozen=True)
class Variant:
    """One kernel to compile, for elements of one size; `reads` is how many tensors of rows."""

    kernel: str
    item_bytes: int
    architecture: str
    reads: int

    @property
    def constants(self) -> dict[str, Any]:
        """Return the constants it runs with for rows of WIDTH elements."""
        if self.kernel == "number_rows":
            return {"ROWS": row_launch.row_tile(1, self.item_bytes).rows}
        tile = row_launch.row_tile(WIDTH, self.item_bytes)
        constants: dict[str, Any] = {"ROWS": tile.rows, "COLUMNS": tile.columns}
        if self.kernel == "combine":
            constants["HAS_BASE"] = self.reads == 2
        return constants


@dataclass(frozen=True)
class Row:
    """One compiled kernel; loads and stores are instructions of a thread."""

    kernel: str
    item_bytes: int
    architecture: str
    reads: int
    tile_rows: int
    tile_columns: int
    warps: int
    registers: int
    stack_bytes: int
    wide_loads: int
    wide_stores: int
    narrow_stores: int
    triton: str

    @property
    def faults(self) -> list[str]:
        """Return what is not as it should be."""
        found = []
        if self.stack_bytes:
            found.append(f"spills {self.stack_bytes} bytes")
        if self.kernel == "number_rows":
            return found
        tile_bytes = self.tile_rows * self.tile_columns * self.item_bytes
        pieces = tile_bytes // (self.warps * _WARP_THREADS * _PIECE_BYTES)
        if self.wide_loads != pieces * self.reads:
            found.append(f"{self.wide_loads} loads of 16 bytes instead of {pieces * self.reads}")
        if self.wide_stores != pieces or self.narrow_stores:
            found.append(f"{self.wide_stores} stores of 16 bytes instead of {pieces}")
        return found


def variants() -> Iterator[Variant]:
    """Yield every kernel for every element size, and `combine` with and without a base."""
    for architecture in ARCHITECTURES:
        for item_bytes in row_launch.ITEM_TYPES:
            yield Variant("gather", item_bytes, architecture, 1)
            yield Variant("combine", item_bytes, architecture, 2)
            yield Variant("combine", item_bytes, architecture, 1)
        yield Variant("number_rows", 8, architecture, 0)


def compile_variant(variant: Variant) -> Row:
    """Return what the compiler made of one kernel."""
    kernel, constants = getattr(token_rows, variant.kernel), variant.constants
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = _argument_type(name, variant.item_bytes)
        if name not in _UNEVEN:
            attributes[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", int(variant.architecture.removeprefix("sm_")), _WARP_THREADS),
        options={"num_warps": row_launch.WARPS},
    )
    registers, stack_bytes = resources(compiled.asm["cubin"])
    found = re.findall(r"\b(ld|st)\.global\.(v4\.b32|v2\.b64)?", compiled.asm["ptx"])
    return Row(
        kernel=variant.kernel,
        item_bytes=variant.item_bytes,
        architecture=variant.architecture,
        reads=variant.reads,
        tile_rows=constants["ROWS"],
        tile_columns=constants.get("COLUMNS", 1),
        warps=row_launch.WARPS,
        registers=registers,
        stack_bytes=stack_bytes,
        wide_loads=sum(kind == "ld" and width != "" for kind, width in found),
        wide_stores=sum(kind == "st" and width != "" for kind, width in found),
        narrow_stores=sum(kind == "st" and width == "" for kind, width in found),
        triton=triton.__version__,
    )


def _argument_type(name: str, item_bytes: int) -> str:
    if name in {"size", "taken", "width"} or name.endswith("_stride"):
        return "i32"
    return {"index": "*i64", "slots": "*i32"}.get(name, f"*i{8 * item_bytes}")


def main() -> int:
    """Compile everything, write the table, and return how many rows have faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to write")
    parser.add_argument(
        "--architecture", action="append", choices=ARCHITECTURES, help="only this; default: all"
    )
    options = parser.parse_args()
    chosen = options.architecture or ARCHITECTURES
    rows = [compile_variant(variant) for variant in variants() if variant.architecture in chosen]
    faults = 0
    for row in rows:
        faults += bool(row.faults)
        print(
            f"{row.architecture:6} {row.kernel:11} of {row.reads} x {row.item_bytes} bytes, "
            f"{row.tile_rows}x{row.tile_columns}: {row.registers} registers, {row.wide_loads} "
            f"loads and {row.wide_stores} stores of 16 bytes"
            f"{''.join(f'  FAULT: {fault}' for fault in row.faults)}"
        )
    write_rows(options.output, rows)
    print(f"{len(rows)} kernels compiled with triton {triton.__version__}, {faults} with faults")
    return faults


if __name__ == "__main__":
    sys.exit(min(main(), 1))
