"""What Triton's compiler makes of every tile-table row, without a GPU.

Compiles each row for its architecture, reads registers, stack and shared memory from the binary and
instructions from the PTX, and checks them: no spills, shared memory within the architecture's
limit and at least stages - 1 buffers of both operands, tensor-core instructions (Hopper's own,
wgmma, wherever a side of the tile has the 64 rows it needs), asynchronous copies of 16 bytes (of
4 where TensorFloat-32 operands are turned around). No time is measured: nothing runs.

    python benchmarks/kernels_ahead_of_time.py
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Triton 3.9 warns unless this is said, and 3.10 changes the default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphopt.kernels.gpu import block_sparse, launch
from graphopt.kernels.gpu.tiles import ARCHITECTURES, Tile, tiles

RESULTS = Path(__file__).parent / "results" / "kernels_ahead_of_time.csv"

_INTEGERS = {
    "tokens",
    "tiles",
    "share_size",
    "dense_stride",
    "result_stride",
    "gradient_stride",
    "x_stride",
}
_INDICES = {
    "starts",
    "order",
    "dense_steps",
    "value_steps",
    "gradient_columns",
    "x_columns",
    "value_places",
}
# Not known to be multiples of 16.
_UNEVEN = {"tokens", "tiles"}
_TENSOR_CORE = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
}


@dataclass(frozen=True)
class Variant:
    """One kernel to compile: a row of the tile table for one product and block."""

    tile: Tile
    product: str
    block: tuple[int, int]

    @property
    def constants(self) -> dict[str, Any]:
        """Return the constants it runs with, those that cost most registers."""
        if self.product == "weight_gradient":
            return launch.weight_gradient_constants(self.tile, self.block)
        transposed = self.product == "input_gradient"
        constants = launch.multiply_constants(self.tile, self.block, transposed=transposed)
        if self.tile.operation == "multiply":
            constants |= {"GROUP": 8, "HAS_BIAS": not transposed}
            activated = self.tile.takes_activations and not transposed
            constants |= {"ACTIVATION": "gelu" if activated else "none"}
        return constants


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    operation: str
    product: str
    precision: str
    architecture: str
    block_out: int
    block_in: int
    width: int
    span: int
    step: int
    warps: int
    stages: int
    from_tokens: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    shared_limit_bytes: int
    stage_bytes: int
    buffers: float
    instruction: str
    instructions: int
    copies_of_16_bytes: int
    smaller_copies: int
    triton: str

    @property
    def faults(self) -> list[str]:
        """Return what is not as it should be."""
        found = []
        if self.stack_bytes:
            found.append(f"spills {self.stack_bytes} bytes")
        if self.shared_bytes > self.shared_limit_bytes:
            found.append(f"{self.shared_bytes} bytes of shared memory")
        if self.shared_bytes < (self.stages - 1) * self.stage_bytes:
            found.append(f"{self.buffers} buffers for {self.stages} stages")
        if self.instruction != self._wanted_instruction:
            found.append(f"{self.instruction} instead of {self._wanted_instruction}")
        if not self.copies_of_16_bytes and not self.smaller_copies:
            found.append("no asynchronous copies")
        # Hopper wants float32 operands turned around, which copies element by element.
        if self.smaller_copies and self.precision != "tf32":
            found.append(f"{self.smaller_copies} copies of less than 16 bytes")
        return found

    @property
    def _wanted_instruction(self) -> str:
        # Float32 as such has no matrix instruction; 64 rows are the least of the newer ones.
        if self.precision == "ieee":
            return "fma"
        if max(self.width, self.span) < 64:
            return "mma"
        return {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(self.architecture, "mma")


def variants() -> Iterator[Variant]:
    """Yield every row of the tile table with each product it serves.

    The block is the one with the longest steps the row allows; for the widest forward tiles also
    the narrow one of the inference preset.
    """
    for tile in tiles():
        longest = max(tile.width, tile.step)
        if tile.operation == "weight_gradient":
            yield Variant(tile, "weight_gradient", (tile.width, min(tile.width, tile.span)))
            continue
        yield Variant(tile, "forward", (tile.width, longest))
        yield Variant(tile, "input_gradient", (longest, tile.width))
        if tile.operation == "multiply" and tile.precision == "half" and tile.width == 128:
            yield Variant(tile, "forward", (128, 32))


def compile_variant(variant: Variant) -> Row:
    """Return what the compiler made of one kernel."""
    tile, constants = variant.tile, variant.constants
    kernel = getattr(block_sparse, tile.operation)
    element = "bf16" if tile.precision == "half" else "fp32"
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = _argument_type(name, element, tile.operation)
        if name not in _UNEVEN:
            attributes[(place,)] = [["tt.divisibility", 16]]
    number = int(tile.architecture.removeprefix("sm_"))
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", number, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    registers, stack_bytes = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in _TENSOR_CORE.items()}
    instruction = max(counts, key=lambda name: counts[name])
    if not counts[instruction]:
        instruction = "fma"
    width = constants.get("WIDTH") or constants["ROWS"]
    item_bytes = 2 if tile.precision == "half" else 4
    stage_bytes = (width + tile.span) * constants["STEP"] * item_bytes
    shared_bytes = compiled.metadata.shared
    return Row(
        operation=tile.operation,
        product=variant.product,
        precision=tile.precision,
        architecture=tile.architecture,
        block_out=variant.block[0],
        block_in=variant.block[1],
        width=width,
        span=tile.span,
        step=constants["STEP"],
        warps=tile.warps,
        stages=tile.stages,
        from_tokens=tile.from_tokens,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=shared_bytes,
        shared_limit_bytes=ARCHITECTURES[tile.architecture],
        stage_bytes=stage_bytes,
        buffers=round(shared_bytes / stage_bytes, 2),
        instruction=instruction,
        instructions=counts.get(instruction, 0),
        copies_of_16_bytes=len(re.findall(r"cp\.async\.(?:cg|bulk\.tensor)", ptx)),
        smaller_copies=len(re.findall(r"cp\.async\.ca", ptx)),
        triton=triton.__version__,
    )


def _argument_type(name: str, element: str, operation: str) -> str:
    if name in _INTEGERS:
        return "i32"
    if name in _INDICES:
        return "*i32"
    # Weight gradients of shared tokens are summed in float32.
    if name == "partial_sums" or (name == "result" and operation == "weight_gradient"):
        return "*fp32"
    return f"*{element}"


def resources(binary: bytes) -> tuple[int, int]:
    """Return registers per thread, and stack and local bytes: what spills."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    if found is None:
        raise ValueError(f"expected the resources of a kernel from cuobjdump, got {done.stdout!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write a table of dataclasses anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    draft.replace(path)


def main() -> int:
    """Compile everything, write the table, and return how many rows have faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to write")
    parser.add_argument(
        "--architecture", action="append", choices=ARCHITECTURES, help="only this; default: all"
    )
    options = parser.parse_args()
    chosen = options.architecture or ARCHITECTURES
    rows, faults = [], 0
    for variant in (v for v in variants() if v.tile.architecture in chosen):
        row = compile_variant(variant)
        rows.append(row)
        faults += bool(row.faults)
        print(
            f"{row.architecture:6} {row.product:15} {row.operation:19} {row.precision} "
            f"{row.width}x{row.span}x{row.step} warps {row.warps} stages {row.stages}: "
            f"{row.registers} registers, {row.shared_bytes} bytes shared, {row.instructions} "
            f"{row.instruction}{''.join(f'  FAULT: {fault}' for fault in row.faults)}"
        )
    write_rows(options.output, rows)
    print(f"{len(rows)} kernels compiled with triton {triton.__version__}, {faults} with faults")
    return faults


if __name__ == "__main__":
    sys.exit(min(main(), 1))
