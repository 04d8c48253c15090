"""Block-sparse layers in ONNX Runtime against its own dense product.

Exports `nn.Linear` and `BlockSparseLinear` layers (random weights, random balanced blocks, 32-wide
column groups, float32) with `graphopt.export_onnx` and times the files on the CPU: one thread, the
two in turns, single calls in an order that alternates, inputs and outputs in memory of ONNX
Runtime. The thread's own processor time counts, which other processes do not lengthen as they do
wall time. `ratio` is the median over the pairs of dense / sparse, between its 20th and 80th
percentile; `efficiency` is density * ratio, 1 where only the kept blocks cost time. Outputs are
checked against torch before they are timed; `error` is the largest difference from float64
arithmetic over the largest output. Under three minutes; pin the process: `taskset -c 1 python ...`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import onnxruntime
import torch
import typer
from torch import nn

import graphopt
from graphopt.environment import environment, write_csv
from graphopt.kernels import BlockLayout, BlockSparseLinear
from graphopt.onnx_comparison import compare
from graphopt.onnx_runtime import run, session

_SIZES = ((768, 3072), (3072, 768), (1024, 4096))
_TILES = (256, 384, 512, 768, 1024)
_DENSITIES = (0.5, 0.25)
_TOKENS = (1, 16, 128, 512)
_GROUP = 32
_MIN_PAIRS = 15


@dataclass(frozen=True)
class Row:
    """One layer at one number of tokens."""

    in_features: int
    out_features: int
    tile: int
    group: int
    density: float
    tokens: int
    dense_processor_ms: float
    sparse_processor_ms: float
    ratio: float
    ratio_20: float
    ratio_80: float
    efficiency: float
    error: float
    pairs: int


@dataclass(frozen=True)
class _Exported:
    """A layer and the session of its file."""

    layer: nn.Module
    runtime: onnxruntime.InferenceSession

    def error(self, x: torch.Tensor) -> float:
        """Return the relative error on x, once the outputs are found equal to torch's."""
        shapes = {"x": tuple(x.shape)}
        name = self.runtime.get_inputs()[0].name
        actual = run(self.runtime, {name: x})["output_0"]
        with torch.no_grad():
            expected = self.layer(x)
            weight, bias = (getattr(self.layer, part).double() for part in ("weight", "bias"))
            exact = x.double() @ weight.T + bias
        unit_roundoff = torch.finfo(x.dtype).eps / 2
        found = compare("output_0", shapes, actual, expected, exact, unit_roundoff)
        if found.failure is not None:
            raise typer.BadParameter(found.failure)
        return float((actual - exact).abs().max() / exact.abs().max())

    def call(self, x: torch.Tensor) -> Callable[[], object]:
        """Return a call on x that copies nothing to or from Python."""
        binding = self.runtime.io_binding()
        name = self.runtime.get_inputs()[0].name
        result = run(self.runtime, {name: x})["output_0"]
        value = onnxruntime.OrtValue.ortvalue_from_numpy
        binding.bind_ortvalue_input(name, value(x.numpy()))
        binding.bind_ortvalue_output("output_0", value(result.numpy()))
        return lambda: self.runtime.run_with_iobinding(binding)


def main(
    seconds: Annotated[float, typer.Option(help="Time for the pairs of one row.")] = 0.6,
    output: Annotated[Path, typer.Option(help="CSV file to add rows to.")] = (
        Path(__file__).parent / "results" / "block_sparse_onnx.csv"
    ),
) -> None:
    """Time every layer at every number of tokens and add one row each to the CSV file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for in_features, out_features in _SIZES:
        dense = _exported(nn.Linear(in_features, out_features))
        for density, tile in _configurations(out_features):
            layer = _random_layer(in_features, out_features, tile, density)
            sparse = _exported(layer)
            for tokens in _TOKENS:
                x = torch.randn(tokens, in_features)
                dense.error(x)
                error = sparse.error(x)
                pairs = _paired_processor_ms(dense.call(x), sparse.call(x), seconds)
                ratios = [a / b for a, b in pairs]
                fifths = quantiles(ratios, n=5)
                row = Row(
                    in_features=in_features,
                    out_features=out_features,
                    tile=tile,
                    group=_GROUP,
                    density=layer.density,
                    tokens=tokens,
                    dense_processor_ms=round(median(a for a, _ in pairs), 4),
                    sparse_processor_ms=round(median(b for _, b in pairs), 4),
                    ratio=round(median(ratios), 3),
                    ratio_20=round(fifths[0], 3),
                    ratio_80=round(fifths[-1], 3),
                    efficiency=round(layer.density * median(ratios), 3),
                    error=float(f"{error:.2g}"),
                    pairs=len(pairs),
                )
                rows.append(row)
                typer.echo(
                    f"{in_features} -> {out_features}, tile {tile}, density {density}, "
                    f"{tokens} tokens: {row.dense_processor_ms:.3f} / "
                    f"{row.sparse_processor_ms:.3f} ms = {row.ratio:.2f} "
                    f"({row.ratio_20:.2f} to {row.ratio_80:.2f})"
                )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(output, rows, environment())


def _configurations(out_features: int) -> Iterator[tuple[float, int]]:
    tiles = sorted({*_TILES, out_features // 2})
    for density in _DENSITIES:
        yield from ((density, n) for n in tiles if n <= out_features and out_features % n == 0)


def _random_layer(
    in_features: int, out_features: int, tile: int, density: float
) -> BlockSparseLinear:
    scores = torch.rand(out_features // tile, in_features // _GROUP)
    return BlockSparseLinear(BlockLayout.from_scores(scores, density, tile, _GROUP))


def _exported(layer: nn.Module) -> _Exported:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        graphopt.export_onnx(layer, path, torch.randn(4, int(str(layer.in_features))))
        return _Exported(layer, session(path, threads=1))


def _paired_processor_ms(
    dense: Callable[[], object], sparse: Callable[[], object], seconds: float
) -> list[tuple[float, float]]:
    for call in (dense, sparse) * 3:
        call()
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < _MIN_PAIRS:
        found = {}
        for call in (dense, sparse) if len(times) % 2 == 0 else (sparse, dense):
            start = time.thread_time()
            call()
            found[call] = 1e3 * (time.thread_time() - start)
        times.append((found[dense], found[sparse]))
    return times


if __name__ == "__main__":
    typer.run(main)
