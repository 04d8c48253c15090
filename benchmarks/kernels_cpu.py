"""Block-sparse linear layers on the CPU against the best dense layer of the same dtype.

The dense versions of a product take turns in one process on one thread (pin it:
`taskset -c 1 python benchmarks/kernels_cpu.py`); then every sparse one takes turns with the best of
them. `speedup` is the median over the turns of best dense / sparse, and
`efficiency = density * speedup`: 1 means that only the stored blocks cost time; the layer pays from
the density `efficiency` downwards. Every sparse result is compared with float64 before it is timed.
Sparse float32 layers run at torch's default precision in inference and at "medium" in training,
where both kinds need it to reach oneDNN.

Dense baselines: `F.linear` at both float32 precisions of torch (another library on some
processors), oneDNN with packed weights (inference only), and, as the rivals of another dtype,
bfloat16 and dynamic int8. The plot needs matplotlib (`pip install matplotlib`).

`--routes` times the forms of the inference product instead; `graphopt/kernels/cpu/routes.py` holds
the table that was read off those rows.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from graphopt.environment import environment, write_csv
from graphopt.kernels import BlockSparseLinear
from graphopt.kernels.cpu import packed, routes
from graphopt.passes.stopwatch import interleaved_ms

Operation = Literal["forward", "input gradient", "weight gradient", "training step"]
Timed = Callable[[], object]

_RESULTS = Path(__file__).parent / "results"
_GROUP = 32
_TILES = {(768, 3072): (256, 768, 1536), (1024, 4096): (256, 1024, 2048), (3072, 768): (256, 384)}
_DENSITIES = (1.0, 0.75, 0.5, 0.25, 0.125, 0.05)
_ERROR_LIMITS = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
_PRECISIONS = {torch.float32: ("highest", "medium"), torch.bfloat16: ("highest",)}


@dataclass(frozen=True)
class Row:
    """One sparse product against the dense ones of the same size."""

    operation: Operation
    dtype: str
    float32_precision: str
    in_features: int
    out_features: int
    tokens: int
    block_out: int
    block_in: int
    density: float
    sparse_ms: float
    best_dense: str
    best_dense_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    efficiency: float
    relative_error: float
    linear_highest_ms: float | None
    linear_medium_ms: float | None
    packed_ms: float | None
    bfloat16_ms: float | None
    int8_ms: float | None


@dataclass(frozen=True)
class RouteRow:
    """The forms of one inference product."""

    dtype: str
    float32_precision: str
    in_features: int
    out_features: int
    tokens: int
    block_out: int
    density: float
    tiles_ms: float
    direct_ms: float
    batched_ms: float
    dense_ms: float
    chosen: str


def main(
    output: Annotated[Path, typer.Option(help="CSV file to add rows to.")] = (
        _RESULTS / "kernels_cpu.csv"
    ),
    plot: Annotated[Path, typer.Option(help="PNG of the speedup over density.")] = (
        _RESULTS / "kernels_cpu.png"
    ),
    tokens: Annotated[str, typer.Option(help="Rows of the input, inference.")] = "1,16,128,512",
    training_tokens: Annotated[str, typer.Option(help="Rows of the input, training.")] = "512",
    budget_s: Annotated[float, typer.Option(help="Seconds for each version, about.")] = 0.15,
    measure_routes: Annotated[bool, typer.Option("--routes", help="Time the forms only.")] = False,
) -> None:
    """Time every product at every density and write rows and a plot."""
    torch.set_num_threads(1)
    if measure_routes:
        _measure_routes(output.with_name("kernels_cpu_routes.csv"), budget_s)
        return
    for sizes in _TILES:
        for dtype in _PRECISIONS:
            for count in map(int, tokens.split(",")):
                _measure(output, "forward", sizes, dtype, count, budget_s)
            for count in map(int, training_tokens.split(",")):
                for operation in ("input gradient", "weight gradient", "training step"):
                    _measure(output, operation, sizes, dtype, count, budget_s)
    draw(output, plot)


def _measure(
    output: Path,
    operation: Operation,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    tokens: int,
    budget_s: float,
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(*sizes, dtype=dtype)
    x = torch.randn(tokens, sizes[0], dtype=dtype)
    gradient = torch.randn(tokens, sizes[1], dtype=dtype)
    versions = _dense_versions(linear, x, gradient, operation)
    device = torch.device("cpu")
    dense_times = interleaved_ms(list(versions.values()), device, budget_s)
    medians = {name: median(times) for name, times in zip(versions, dense_times, strict=True)}
    best = min((n for n in versions if n not in ("bfloat16", "int8")), key=medians.__getitem__)
    precision = "highest" if operation == "forward" or dtype != torch.float32 else "medium"
    rows = []
    for tile, density in product(_TILES[sizes], _DENSITIES):
        layer = BlockSparseLinear.from_dense(
            linear, density, block_out=tile, block_in=_GROUP, training=operation != "forward"
        )
        timed = _timed(operation, layer, x, gradient, precision)
        error = _relative_error(operation, layer, x, gradient, timed)
        if error > _ERROR_LIMITS[dtype]:
            typer.echo(f"{operation}, tile {tile}, density {density}: wrong by {error:.1e}")
            continue
        turns = interleaved_ms([versions[best], timed], device, budget_s)
        ratios = [dense / sparse for dense, sparse in zip(*turns, strict=True)]
        low, *_, high = quantiles(ratios, n=5)
        rows.append(
            Row(
                operation=operation,
                dtype=str(dtype).removeprefix("torch."),
                float32_precision=precision,
                in_features=sizes[0],
                out_features=sizes[1],
                tokens=tokens,
                block_out=tile,
                block_in=_GROUP,
                density=density,
                sparse_ms=round(median(turns[1]), 4),
                best_dense=best,
                best_dense_ms=round(median(turns[0]), 4),
                speedup=round(median(ratios), 3),
                speedup_low=round(low, 3),
                speedup_high=round(high, 3),
                efficiency=round(density * median(ratios), 3),
                relative_error=float(f"{error:.1e}"),
                linear_highest_ms=medians.get("linear highest"),
                linear_medium_ms=medians.get("linear medium"),
                packed_ms=medians.get("packed"),
                bfloat16_ms=medians.get("bfloat16"),
                int8_ms=medians.get("int8"),
            )
        )
    write_csv(output, rows, environment())
    for row in rows:
        if row.density in (0.5, 0.25):
            typer.echo(
                f"{row.operation} {row.dtype} {row.float32_precision} {sizes[0]}->{sizes[1]} "
                f"{tokens} tokens, tile {row.block_out}, density {row.density}: "
                f"{row.speedup:.2f}x, efficiency {row.efficiency:.2f} over {best}"
            )


def _dense_versions(
    linear: nn.Linear, x: Tensor, gradient: Tensor, operation: Operation
) -> dict[str, Timed]:
    versions: dict[str, Timed] = {
        f"linear {precision}": _timed(operation, linear, x, gradient, precision)
        for precision in _PRECISIONS[x.dtype]
    }
    if operation != "forward":
        return versions
    weight, bias = linear.weight.detach(), linear.bias.detach()
    run = packed.dense_product(weight, bias)
    versions["packed"] = lambda: run(x)
    if x.dtype == torch.float32:
        half = x.bfloat16()
        run_half = packed.dense_product(weight.bfloat16(), bias.bfloat16())
        versions["bfloat16"] = lambda: run_half(half)
        versions["int8"] = _dynamic_int8(weight, bias, x)
    return versions


def _dynamic_int8(weight: Tensor, bias: Tensor, x: Tensor) -> Timed:
    scales = weight.abs().amax(1) / 127
    zeros = torch.zeros(len(scales), dtype=torch.long)
    with warnings.catch_warnings():
        # torch retires quantized tensors, and has no other dynamic int8 product for a CPU yet.
        warnings.simplefilter("ignore", UserWarning)
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    prepacked = torch.ops.quantized.linear_prepack(quantized, bias)
    return lambda: torch.ops.quantized.linear_dynamic(x, prepacked)


def _timed(
    operation: Operation, layer: nn.Module, x: Tensor, gradient: Tensor, precision: str
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that runs one operation of a layer at a float32 precision."""
    parameters: list[Tensor] = list(layer.parameters())

    def forward() -> tuple[Tensor, ...]:
        torch.set_float32_matmul_precision(precision)
        with torch.no_grad():
            return (layer(x),)

    if operation == "forward":
        return forward
    torch.set_float32_matmul_precision(precision)
    wanted = {
        "input gradient": [x.clone().requires_grad_()],
        "weight gradient": parameters[:1],
        "training step": [x.clone().requires_grad_(), *parameters],
    }[operation]
    source = wanted[0] if operation != "weight gradient" else x
    for parameter in parameters:
        parameter.requires_grad_(operation != "input gradient")
    result = layer(source)
    for parameter in parameters:
        parameter.requires_grad_()

    def backward() -> tuple[Tensor, ...]:
        torch.set_float32_matmul_precision(precision)
        return torch.autograd.grad(result, wanted, gradient, retain_graph=True)

    def step() -> tuple[Tensor, ...]:
        torch.set_float32_matmul_precision(precision)
        return torch.autograd.grad(layer(source), wanted, gradient)

    return step if operation == "training step" else backward


def _relative_error(
    operation: Operation,
    layer: BlockSparseLinear,
    x: Tensor,
    gradient: Tensor,
    timed: Callable[[], tuple[Tensor, ...]],
) -> float:
    """Return the largest relative error of an operation's results against float64."""
    assert layer.bias is not None
    leaves = [item.detach().double().requires_grad_() for item in (x, layer.values, layer.bias)]
    output = functional.linear(leaves[0], layer.layout.unpack(leaves[1]), leaves[2])
    if operation == "forward":
        expected: tuple[Tensor, ...] = (output,)
    else:
        grads = torch.autograd.grad(output, leaves, gradient.double())
        expected = {
            "input gradient": grads[:1],
            "weight gradient": grads[1:2],
            "training step": grads,
        }[operation]
    pairs = zip(timed(), expected, strict=True)
    return max(float((a.double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs)


def _measure_routes(output: Path, budget_s: float) -> None:
    """Time all forms of the inference product, and name the one that the table chooses."""
    for sizes, tiles in _TILES.items():
        for dtype, precisions in _PRECISIONS.items():
            for tokens in (1, 4, 16, 64, 128, 256, 512):
                for precision in precisions:
                    torch.set_float32_matmul_precision(precision)
                    rows = [
                        _route_row(sizes, dtype, precision, tokens, tile, density, budget_s)
                        for tile in tiles
                        for density in (0.75, 0.5, 0.25)
                    ]
                    write_csv(output, rows, environment())
                    typer.echo(f"{sizes} {dtype} {precision} {tokens} tokens done")


def _route_row(
    sizes: tuple[int, int],
    dtype: torch.dtype,
    precision: str,
    tokens: int,
    tile: int,
    density: float,
    budget_s: float,
) -> RouteRow:
    linear = nn.Linear(*sizes, dtype=dtype).requires_grad_(False)
    layer = BlockSparseLinear.from_dense(linear, density, block_out=tile, block_in=_GROUP)
    x = torch.randn(tokens, sizes[0], dtype=dtype)
    forms: list[Timed] = []
    for build in packed.FORMS.values():
        forms.append(partial(build(layer.values, layer.bias, layer.layout), x))
    times = interleaved_ms(forms, torch.device("cpu"), budget_s)
    found = {
        name: round(median(values), 4) for name, values in zip(packed.FORMS, times, strict=True)
    }
    return RouteRow(
        dtype=str(dtype).removeprefix("torch."),
        float32_precision=precision,
        in_features=sizes[0],
        out_features=sizes[1],
        tokens=tokens,
        block_out=tile,
        density=density,
        tiles_ms=found["tiles"],
        direct_ms=found["direct"],
        batched_ms=found["batched"],
        dense_ms=found["dense"],
        chosen=routes.choose_route(dtype, tokens, sizes[1] // tile, density, balanced=True),
    )


def draw(table: Path, picture: Path) -> None:
    """Draw the newest speedups of a CSV file over density, and where they break even."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    with table.open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    panels = list(dict.fromkeys((row["operation"], row["dtype"]) for row in rows))
    columns = 2
    figure, axes = pyplot.subplots(
        -(-len(panels) // columns), columns, figsize=(12, 3.4 * len(panels) / columns), sharex=True
    )
    for panel, axis in zip(panels, axes.flat, strict=False):
        curves: dict[str, dict[float, float]] = {}
        for row in rows:
            if (row["operation"], row["dtype"]) == panel and int(row["tokens"]) == 512:
                sizes = f"{row['in_features']} -> {row['out_features']}"
                name = f"{sizes}, tiles of {row['block_out']} rows"
                curves.setdefault(name, {})[float(row["density"])] = float(row["speedup"])
        for name, points in curves.items():
            axis.plot(list(points), list(points.values()), marker="o", markersize=3, label=name)
        axis.plot(_DENSITIES, [1 / d for d in _DENSITIES], "k:", label="1 / density")
        axis.axhline(1, color="black", linewidth=1)
        axis.annotate("break-even with the best dense", (0.051, 1.04), fontsize=7)
        axis.set(
            title=f"{', '.join(panel)}, 512 tokens", xscale="log", yscale="log", ylabel="speedup"
        )
        axis.set_xticks(_DENSITIES, [str(d) for d in _DENSITIES])
        axis.legend(fontsize=6)
    figure.supxlabel("density")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    typer.run(main)
