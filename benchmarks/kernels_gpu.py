"""Block-sparse products on one CUDA device, against every dense form worth comparing with.

    python benchmarks/kernels_gpu.py

Needs torch, triton and numpy, and ends within eight minutes: the cases stand in order of
importance, and it says which of them it left out. Baselines, of the same type: cuBLAS on the dense
weight, cuBLAS on a smaller dense weight of equal FLOPs, a block-diagonal `torch.bmm` of equal
FLOPs, and torch's BSR `linear`. "step" is forward, input, weight and bias gradient one after the
other, without autograd.

Every result is compared with float64 before anything is timed (new memory is NaN then); a case that
fails is reported and not timed. Operands are normal and rotate over more than 50 MB, so that the
L2 cache holds none of them; up to 256 tokens, 20 calls are replayed as one CUDA graph. A latency is
the lower of two medians, its spread how far the other was above. Efficiency is density * T_dense /
T_sparse: above the density it is slower than dense.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
import platform
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

if __name__ == "__main__":
    # graphopt.kernels from this checkout, without the front and the packages that needs.
    sys.modules["graphopt"] = types.ModuleType("graphopt")
    sys.modules["graphopt"].__path__ = [str(Path(__file__).resolve().parents[1])]

from graphopt.kernels.block_layout import BlockLayout
from graphopt.kernels.gpu.accuracy import PRODUCTS, Problem
from graphopt.kernels.gpu.tiles import Tile, architecture, find_tile

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernels_gpu.csv"
MINUTES = 7.5

_CACHE_BYTES = 60e6
_GRAPH_TOKENS = 256
_GRAPH_CALLS = 20
_REPEAT_MS = 100.0


@dataclass(frozen=True)
class Case:
    """One layer, one number of tokens, one pattern."""

    out_features: int
    in_features: int
    tokens: int
    block_out: int
    block_in: int
    density: float
    dtype: str = "bfloat16"
    precision: str = "half"
    pattern: str = "balanced"


@dataclass(frozen=True)
class Row:
    """One version of one product of a case."""

    product: str
    version: str
    out_features: int
    in_features: int
    tokens: int
    block_out: int
    block_in: int
    density: float
    dtype: str
    precision: str
    pattern: str
    tile: str
    error_over_bound: float
    latency_ms: float
    spread: float
    useful_tflops: float
    speedup_over_dense: float
    efficiency: float
    copy_gb_per_s: float
    cublas_tflops: float
    device: str
    python: str
    torch: str
    triton: str
    commit: str
    date: str


@dataclass(frozen=True)
class Version:
    """One way to compute a product.

    Attributes:
        name: What the CSV calls it.
        compute: Takes the operands.
        operands: Tensors that are read, to be rotated.
        tile: What a Triton kernel computes with.
    """

    name: str
    compute: Callable[..., object]
    operands: tuple[Tensor, ...]
    tile: str = ""


@dataclass(frozen=True)
class Place:
    """The device and what it reaches in this run."""

    copy_gb_per_s: float
    cublas_tflops: float
    device: str
    python: str
    torch: str
    triton: str
    commit: str
    date: str


def cases() -> Iterator[Case]:
    """Yield the grid, the most telling cases first."""
    main = Case(4096, 4096, 8192, 128, 128, 0.5)
    for density in (0.5, 0.25, 1.0, 0.75, 0.375, 0.125, 0.05):
        yield replace(main, density=density)
    decode = replace(main, block_in=32)
    for tokens in (1, 16, 256):
        for density in (0.5, 0.25):
            yield replace(decode, tokens=tokens, density=density)
    for block in ((128, 64), (64, 64), (128, 32), (32, 32)):
        for density in (0.5, 0.25):
            yield replace(main, block_out=block[0], block_in=block[1], density=density)
    for sizes in ((14336, 4096), (4096, 14336), (3072, 768), (768, 3072)):
        for density in (0.5, 0.25):
            yield replace(main, out_features=sizes[0], in_features=sizes[1], density=density)
    for dtype, precision in (("float16", "half"), ("float32", "tf32"), ("float32", "ieee")):
        for density in (0.5, 0.25):
            yield replace(main, tokens=2048, density=density, dtype=dtype, precision=precision)
    for pattern in ("unbalanced", "one dense row"):
        yield replace(main, density=0.25, pattern=pattern)
    for block in ((128, 128), (64, 64)):
        for tokens in (2048, 16384):
            for density in (0.5, 0.25):
                found = replace(main, tokens=tokens, density=density)
                yield replace(found, block_out=block[0], block_in=block[1])
    for density in (1.0, 0.75, 0.375, 0.125, 0.05):
        yield replace(main, block_in=64, density=density)
        yield replace(main, block_out=64, block_in=64, density=density)
        yield replace(decode, tokens=16, density=density)


def mask_of(case: Case) -> Tensor:
    """Return which blocks are stored; equal for equal cases."""
    tiles, groups = case.out_features // case.block_out, case.in_features // case.block_in
    scores = torch.rand(tiles, groups, generator=torch.Generator().manual_seed(0))
    if case.pattern == "one dense row":
        scores[0] = 2.0
    return BlockLayout.from_scores(
        scores, case.density, case.block_out, case.block_in, balanced=case.pattern == "balanced"
    ).mask()


def tiles_of(case: Case, name: str) -> dict[str, Tile]:
    """Return the tile-table row of every product, whatever gain the table expects."""
    sides = {
        "forward": ("multiply", case.block_out),
        "input_gradient": ("multiply", case.block_in),
        "weight_gradient": ("weight_gradient", case.block_out),
    }
    return {
        product: find_tile(operation, case.precision, name, side, case.tokens)
        for product, (operation, side) in sides.items()
    }


def problem_of(case: Case, device: str) -> Problem:
    """Return operands for a case, drawn on the device."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    layout = BlockLayout.from_mask(mask_of(case).to(device), case.block_out, case.block_in)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    return Problem(
        layout=layout,
        x=normal(case.tokens, case.in_features),
        gradient=normal(case.tokens, case.out_features),
        values=normal(layout.blocks, case.block_out, case.block_in),
        bias=normal(case.out_features),
    )


def checked(case: Case, problem: Problem, tiles: dict[str, Tile]) -> dict[str, float]:
    """Return the error of every product over its rounding bound; a step's is the largest."""
    from graphopt.kernels.gpu.self_test import run

    errors = {}
    # New memory is filled with NaN: what no program writes is found.
    torch.use_deterministic_algorithms(True)
    try:
        found = {product: run(problem, product, tiles[product]) for product in PRODUCTS}
    finally:
        torch.use_deterministic_algorithms(False)
    for product, result in found.items():
        errors[product] = problem.excess(product, result, tf32=case.precision == "tf32")
    return errors | {"step": max(errors.values())}


def versions_of(
    product: str, case: Case, problem: Problem, tiles: dict[str, Tile]
) -> Iterator[Version]:
    """Yield every way to compute a product, the dense one first."""
    from graphopt.kernels.gpu.self_test import run

    x, gradient, values, bias = problem.x, problem.gradient, problem.values, problem.bias
    yield _matrix_version("dense", product, x, gradient, problem.layout.unpack(values), bias)

    def sparse(x: Tensor, gradient: Tensor, values: Tensor) -> None:
        operands = replace(problem, x=x, gradient=gradient, values=values)
        for part in PRODUCTS if product == "step" else (product,):
            run(operands, part, tiles[part])
        if product == "step":
            gradient.sum(0)

    used = "" if product == "step" else _described(tiles[product])
    yield Version("block-sparse", sparse, (x, gradient, values), used)
    width = max(16, round(problem.layout.density * case.in_features / 16) * 16)
    smaller = torch.randn(case.out_features, width, device=x.device, dtype=x.dtype)
    narrow = x[:, :width].contiguous()
    yield _matrix_version("dense, fewer inputs", product, narrow, gradient, smaller, bias)
    groups = round(1 / problem.layout.density)
    if groups > 1 and groups * problem.layout.density == 1:
        yield _diagonal_version(product, x, gradient, groups)
    if product == "forward" and x.device.type == "cuda":
        yield _bsr_version(problem)


def _matrix_version(
    name: str, product: str, x: Tensor, gradient: Tensor, weight: Tensor, bias: Tensor
) -> Version:
    def compute(x: Tensor, gradient: Tensor, weight: Tensor) -> None:
        if product in ("forward", "step"):
            functional.linear(x, weight, bias)
        if product in ("input_gradient", "step"):
            gradient @ weight
        if product in ("weight_gradient", "step"):
            gradient.t() @ x
        if product == "step":
            gradient.sum(0)

    return Version(name, compute, (x, gradient, weight))


def _diagonal_version(product: str, x: Tensor, gradient: Tensor, groups: int) -> Version:
    outputs, inputs = gradient.shape[1] // groups, x.shape[1] // groups
    weight = torch.randn(groups, outputs, inputs, device=x.device, dtype=x.dtype)

    def compute(x: Tensor, gradient: Tensor, weight: Tensor) -> None:
        a = x.view(-1, groups, inputs).transpose(0, 1)
        g = gradient.view(-1, groups, outputs).transpose(0, 1)
        if product in ("forward", "step"):
            torch.bmm(a, weight.transpose(1, 2))
        if product in ("input_gradient", "step"):
            torch.bmm(g, weight)
        if product in ("weight_gradient", "step"):
            torch.bmm(g.transpose(1, 2), a)
        if product == "step":
            gradient.sum(0)

    return Version("block-diagonal", compute, (x, gradient, weight))


def _bsr_version(problem: Problem) -> Version:
    layout, bias = problem.layout, problem.bias
    ends = layout.blocks_per_row_tile.cumsum(0)
    starts, columns = torch.cat([ends.new_zeros(1), ends]), layout.columns.long()
    size = (layout.out_features, layout.in_features)

    def compute(x: Tensor, values: Tensor) -> None:
        weight = torch.sparse_bsr_tensor(starts, columns, values, size, check_invariants=False)
        functional.linear(x, weight, bias)

    return Version("torch BSR", compute, (problem.x, problem.values))


def _described(tile: Tile) -> str:
    sizes = f"{tile.span}x{tile.width}x{tile.step}"
    return f"{tile.operation} {sizes} warps {tile.warps} stages {tile.stages}"


def measured_ms(version: Version, tokens: int) -> tuple[float, float]:
    """Return the lower of two medians, and how far the other was above it, as a share."""
    size_bytes = sum(operand.numel() * operand.element_size() for operand in version.operands)
    sets = [version.operands]
    while len(sets) * size_bytes < _CACHE_BYTES:
        sets.append(tuple(operand.clone() for operand in version.operands))

    def calls() -> None:
        for i in range(_GRAPH_CALLS):
            version.compute(*sets[i % len(sets)])

    for operands in sets[:3]:
        version.compute(*operands)
    torch.cuda.synchronize()
    if tokens > _GRAPH_TOKENS:
        turns = [lambda operands=operands: version.compute(*operands) for operands in sets]
        found = [_median_ms(turns) for _ in range(2)]
    else:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        found = [_median_ms([graph.replay]) / _GRAPH_CALLS for _ in range(2)]
    return min(found), max(found) / min(found) - 1


def _median_ms(turns: Sequence[Callable[[], object]]) -> float:
    """Return the median time of one call, over at least 100 ms of calls that take turns."""
    started = time.perf_counter()
    for _ in range(3):
        turns[0]()
    torch.cuda.synchronize()
    estimate_ms = 1e3 * (time.perf_counter() - started) / 3
    count = min(2000, max(10, round(_REPEAT_MS / estimate_ms)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * count)]
    for i in range(count):
        events[2 * i].record()
        turns[i % len(turns)]()
        events[2 * i + 1].record()
    torch.cuda.synchronize()
    return float(median(events[2 * i].elapsed_time(events[2 * i + 1]) for i in range(count)))


def rows_of(case: Case, place: Place) -> Iterator[Row]:
    """Check one case and time every version of its products."""
    name = architecture(torch.device("cuda", torch.cuda.current_device()))
    if name is None:
        raise ValueError(f"expected a CUDA device with rows in the tile table, got {place.device}")
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.precision == "tf32" else "ieee"
    problem, tiles = problem_of(case, "cuda"), tiles_of(case, name)
    errors = checked(case, problem, tiles)
    few = case.tokens <= 16
    # What is stored, in whole blocks.
    density = problem.layout.density
    for product in ("forward",) if few else (*PRODUCTS, "step"):
        if not errors[product] <= 1:
            print(f"  {product} is wrong by {errors[product]:.3g} times its bound: not timed")
            continue
        flops = 2 * case.tokens * problem.values.numel() * (3 if product == "step" else 1)
        dense_ms = float("nan")
        for version in versions_of(product, case, problem, tiles):
            try:
                latency_ms, spread = measured_ms(version, case.tokens)
            except (RuntimeError, ValueError) as error:
                print(f"  {product}, {version.name} does not run: {str(error).splitlines()[0]}")
                continue
            if version.name == "dense":
                dense_ms = latency_ms
            row = Row(
                product=product,
                version=version.name,
                **asdict(replace(case, density=density)),
                tile=version.tile,
                error_over_bound=errors[product] if version.name == "block-sparse" else 0.0,
                latency_ms=latency_ms,
                spread=spread,
                useful_tflops=flops / latency_ms / 1e9,
                speedup_over_dense=dense_ms / latency_ms,
                efficiency=density * dense_ms / latency_ms,
                **asdict(place),
            )
            print(
                f"  {product:15} {version.name:19} {latency_ms:9.4f} ms (+{spread:.1%}) "
                f"{row.useful_tflops:7.1f} TFLOP/s {row.speedup_over_dense:5.2f}x "
                f"efficiency {row.efficiency:.2f}"
            )
            yield row


def place_of() -> Place:
    """Measure copy bandwidth and cuBLAS bfloat16, and return them with where this runs."""
    import triton

    block = torch.randn(2**28, device="cuda", dtype=torch.float32)
    other = torch.empty_like(block)
    copy_ms, _ = measured_ms(Version("copy", other.copy_, (block,)), _GRAPH_TOKENS + 1)
    bytes_moved = 2 * block.numel() * block.element_size()
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product_ms, _ = measured_ms(Version("cuBLAS", torch.mm, (matrix, matrix)), _GRAPH_TOKENS + 1)
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return Place(
        copy_gb_per_s=round(bytes_moved / copy_ms / 1e6, 1),
        cublas_tflops=round(2 * 8192**3 / product_ms / 1e9, 1),
        device=torch.cuda.get_device_name(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.__version__,
        commit=commit,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def add_rows(path: Path, rows: Sequence[Any]) -> None:
    """Add rows, all of one dataclass, to the CSV file."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8", newline="") as file:
        file.write(old)
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        if not old:
            writer.writeheader()
        for row in rows:
            numbers = {k: float(f"{v:.5g}") for k, v in asdict(row).items() if type(v) is float}
            writer.writerow(asdict(row) | numbers)
    draft.replace(path)


def main() -> None:
    """Measure the grid until the time is up, and add the rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="when to stop")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to add rows to")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("Nothing was measured: expected a CUDA device, and torch sees none here.")
        return
    if importlib.util.find_spec("triton") is None:
        print("Nothing was measured: expected triton, which is not installed; pip install triton.")
        return
    deadline = time.monotonic() + 60 * options.minutes
    place = place_of()
    print(f"{place.device}: copy {place.copy_gb_per_s} GB/s, cuBLAS {place.cublas_tflops} TFLOP/s")
    left_out = []
    for case in cases():
        if time.monotonic() > deadline:
            left_out.append(case)
            continue
        print(case)
        try:
            add_rows(options.output, list(rows_of(case, place)))
        except Exception as error:  # One case that a device or compiler refuses ends no run.
            print(f"  nothing kept of this case: {type(error).__name__}: {error}")
        torch.cuda.empty_cache()
    print(f"{len(left_out)} cases left out when the time was up")
    for case in left_out:
        print(f"  {case}")


if __name__ == "__main__":
    main()
