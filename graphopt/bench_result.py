"""What a comparison of a dense with an optimized model found."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .environment import Environment

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

_WIDTH_COLUMNS = 140


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One comparison; `low` and `high` are the quartiles around a median.

    Attributes:
        runtime: "torch" or "onnxruntime".
        mode: "inference", or "training step" (forward and backward, no optimizer).
        ratio: Median over the turns of dense / optimized; above 1 the optimized model is faster.
        dense_precision: The faster of torch's float32 matrix product settings for this model.
        optimized_precision: The same for the optimized model.
        turns: Number of pairs.
    """

    runtime: str
    mode: str
    dense_ms: float
    dense_low_ms: float
    dense_high_ms: float
    optimized_ms: float
    optimized_low_ms: float
    optimized_high_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    dense_precision: str
    optimized_precision: str
    turns: int


@dataclass(frozen=True, kw_only=True)
class SiteTime:
    """What one change of the plan brings by itself, as `optimize` and `plan` measured it.

    Attributes:
        target: What was rewritten.
        pass_name: The pass.
        dense_ms: Time of the part as it was.
        optimized_ms: Time of what took its place.
        source: "measured", "interpolated" or "predicted".
    """

    target: str
    pass_name: str
    dense_ms: float
    optimized_ms: float
    source: str


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All comparisons of two models; prints as tables.

    Attributes:
        rows: The comparisons.
        sites: The parts that were rewritten, with the times in the plan; only some changes are
            timed by themselves.
        sites_runtime: The runtime of those times, as in recipes.
        inputs: Names and shapes of the inputs.
        dense_dtype: Types of the dense model's parameters.
        optimized_dtype: Types of the optimized model's parameters.
        dense_flops: Operations that an inference on the example executes.
        optimized_flops: The same for the optimized model.
        environment: Where it was measured.
        notes: What was not measured, and why.
    """

    rows: tuple[BenchRow, ...]
    inputs: Mapping[str, tuple[int, ...]]
    dense_dtype: str
    optimized_dtype: str
    dense_flops: int
    optimized_flops: int
    environment: Environment
    notes: tuple[str, ...]
    sites: tuple[SiteTime, ...] = ()
    sites_runtime: str = "torch"

    @property
    def flops_ratio(self) -> float | None:
        """FLOPs of dense / optimized; no statement about time."""
        if not self.dense_flops or not self.optimized_flops:
            return None
        return self.dense_flops / self.optimized_flops

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data; ratios are dense / optimized."""
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "dense_dtype": self.dense_dtype,
            "optimized_dtype": self.optimized_dtype,
            "dense_flops": self.dense_flops,
            "optimized_flops": self.optimized_flops,
            "flops_ratio": self.flops_ratio,
            "environment": dataclasses.asdict(self.environment),
            "notes": list(self.notes),
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "sites_runtime": self.sites_runtime,
        }

    def __str__(self) -> str:
        """Return the table as text."""
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=_WIDTH_COLUMNS).print(self)
        return text.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, where it was measured, the FLOPs and the notes."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Dense against optimized", title_justify="left", box=box.SIMPLE_HEAD)
        for column in ("runtime", "mode", "dense, ms", "optimized, ms", "dense / optimized"):
            table.add_column(column)
        for row in self.rows:
            cells = (
                row.runtime,
                row.mode,
                _spread(row.dense_ms, row.dense_low_ms, row.dense_high_ms, row.dense_precision),
                _spread(
                    row.optimized_ms,
                    row.optimized_low_ms,
                    row.optimized_high_ms,
                    row.optimized_precision,
                ),
                f"{row.ratio:.2f} [{row.ratio_low:.2f}, {row.ratio_high:.2f}]",
            )
            table.add_row(*map(Text, cells))
        yield table
        yield Text("Medians and quartiles of turns in alternating order; above 1 is faster.")
        if self.flops_ratio is not None:
            yield Text(
                f"FLOPs {self.dense_flops:.3g} / {self.optimized_flops:.3g} = "
                f"{self.flops_ratio:.2f} (operations, not time)"
            )
        if self.sites:
            yield _sites_table(self.sites, self.sites_runtime)
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.inputs.items())
        where = self.environment
        yield Text(f"{shapes}; {self.dense_dtype} and {self.optimized_dtype}; {where.cpu}")
        yield Text(
            f"{where.device}, {where.threads} threads, torch {where.torch}, "
            f"onnxruntime {where.onnxruntime}, graphopt {where.graphopt} {where.commit}, "
            f"{where.date}"
        )
        for note in self.notes:
            yield Text(f"note: {note}")


def _sites_table(sites: tuple[SiteTime, ...], runtime: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"Parts by themselves, when the plan was made in {runtime}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in ("part", "pass", "dense, ms", "optimized, ms", "dense / optimized", "times"):
        table.add_column(column, overflow="fold")
    for site in sites:
        times = (f"{site.dense_ms:.3g}", f"{site.optimized_ms:.3g}")
        ratio = f"{site.dense_ms / site.optimized_ms:.2f}"
        table.add_row(*map(Text, (site.target, site.pass_name, *times, ratio, site.source)))
    return table


def _spread(middle: float, low: float, high: float, precision: str) -> str:
    suffix = f" ({precision})" if precision else ""
    texts = [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in (middle, low, high)]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]{suffix}"
