"""Rows of tokens moved on one CUDA device: the Triton kernels against torch's own.

    python benchmarks/token_rows_gpu.py

Needs torch, triton and numpy, and ends within two minutes. Every result is compared with torch's
to the last bit before anything is timed (new memory is NaN then). Operands rotate over more than
50 MB; a latency is the lower of two medians, its spread how far the other was above
(benchmarks/kernels_gpu.py). The share of the copy bandwidth counts each byte of the result once as
written and once as read; a scatter reads its rows only. Row numbers are not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":
    # graphopt.kernels from this checkout, without the front and the packages that needs.
    sys.modules["graphopt"] = types.ModuleType("graphopt")
    sys.modules["graphopt"].__path__ = [str(Path(__file__).resolve().parents[1])]

from kernels_gpu import ROOT, Place, Version, add_rows, measured_ms, place_of

from graphopt.kernels.token_rows import (
    combine_rows_reference,
    gather_rows_reference,
    scatter_rows_reference,
)

RESULTS = ROOT / "benchmarks" / "results" / "token_rows_gpu.csv"
# More than any number that means "replay as a CUDA graph" to `measured_ms`.
_EAGER_TOKENS = 1 << 20


@dataclass(frozen=True)
class Case:
    """Which share of the rows of a tensor is moved."""

    rows: int
    width: int
    taken: int
    dtype: str


@dataclass(frozen=True)
class Row:
    """One version of one product of a case."""

    product: str
    version: str
    rows: int
    width: int
    taken: int
    dtype: str
    latency_ms: float
    spread: float
    speedup_over_torch: float
    share_of_copy_bandwidth: float
    copy_gb_per_s: float
    cublas_tflops: float
    device: str
    python: str
    torch: str
    triton: str
    commit: str
    date: str


def cases() -> Iterator[Case]:
    """Yield the grid: hidden states of models from small to large, then narrow rows."""
    for rows, width in ((8192, 384), (8192, 768), (16384, 4096), (65536, 768), (65536, 64)):
        for share in (0.5, 0.125):
            yield Case(rows, width, round(rows * share), "bfloat16")
    yield Case(8192, 768, 4096, "float32")
    yield Case(65536, 1, 32768, "int64")


def operands_of(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return base [rows, width], rows [taken, width] and the sorted index of a case."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    base = torch.randn(case.rows, case.width, device=device).mul(100).to(dtype)
    index = torch.randperm(case.rows, device=device)[: case.taken].sort().values
    return base, -base[: case.taken], index


def versions_of(
    product: str, base: Tensor, rows: Tensor, index: Tensor
) -> tuple[list[Version], int]:
    """Return torch's version, the kernel's, and the bytes they have to move."""
    from graphopt.kernels.gpu import row_launch

    size = base.shape[0]
    row_bytes = base.shape[1] * base.element_size()
    if product == "gather":
        return [
            Version("torch", gather_rows_reference, (base, index)),
            Version("triton", row_launch.gather, (base, index)),
        ], 2 * len(index) * row_bytes
    if product == "scatter":
        return [
            Version("torch", lambda r, i: scatter_rows_reference(r, i, size), (rows, index)),
            Version("triton", lambda r, i: row_launch.combine(None, i, r, size), (rows, index)),
        ], (size + len(index)) * row_bytes
    return [
        Version("torch", combine_rows_reference, (base, index, rows)),
        Version("triton", lambda b, i, r: row_launch.combine(b, i, r, size), (base, index, rows)),
    ], 2 * size * row_bytes


def are_equal(versions: list[Version]) -> bool:
    """Return whether the kernel's result is torch's, with new memory full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        wanted, found = (version.compute(*version.operands) for version in versions)
    finally:
        torch.use_deterministic_algorithms(False)
    assert isinstance(wanted, Tensor)
    assert isinstance(found, Tensor)
    return torch.equal(wanted, found)


def rows_of(case: Case, place: Place) -> Iterator[Row]:
    """Check one case and time both versions of its products."""
    base, rows, index = operands_of(case, "cuda")
    for product in ("gather", "scatter", "combine"):
        versions, moved_bytes = versions_of(product, base, rows, index)
        if not are_equal(versions):
            print(f"  {product} differs from torch: not timed")
            continue
        torch_ms = float("nan")
        for version in versions:
            latency_ms, spread = measured_ms(version, _EAGER_TOKENS)
            if version.name == "torch":
                torch_ms = latency_ms
            row = Row(
                product=product,
                version=version.name,
                **asdict(case),
                latency_ms=latency_ms,
                spread=spread,
                speedup_over_torch=torch_ms / latency_ms,
                share_of_copy_bandwidth=moved_bytes / latency_ms / 1e6 / place.copy_gb_per_s,
                **asdict(place),
            )
            print(
                f"  {product:8} {version.name:7} {latency_ms:9.4f} ms (+{spread:.1%}) "
                f"{row.speedup_over_torch:5.2f}x, {row.share_of_copy_bandwidth:.0%} of copying"
            )
            yield row


def main() -> None:
    """Measure the grid and add the rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to add rows to")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("Nothing was measured: expected a CUDA device, and torch sees none here.")
        return
    if importlib.util.find_spec("triton") is None:
        print("Nothing was measured: expected triton, which is not installed; pip install triton.")
        return
    place = place_of()
    print(f"{place.device}: copy {place.copy_gb_per_s} GB/s")
    for case in cases():
        print(case)
        add_rows(options.output, list(rows_of(case, place)))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
