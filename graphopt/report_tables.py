"""The tables and lines of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from graphopt.passes.plan import CostRecord, GuardRecord, Totals

if TYPE_CHECKING:
    from rich.table import Table

    from .report import BudgetUse, ReportRow

_TARGETS_SHOWN = 3
_ROUNDING = 1e-9


def totals_table(totals: Totals) -> Table:
    """Return what the whole model costs before and after."""
    before, after = totals.before, totals.after
    shown = [
        ("FLOPs (forward)", before.flops, after.flops, _count),
        ("parameters", before.parameters, after.parameters, _count),
        ("size, bytes", before.size_bytes, after.size_bytes, _count),
        (
            f"{after.latency_source or 'measured'}, ms",
            before.latency_ms,
            after.latency_ms,
            _milliseconds,
        ),
    ]
    return _table(
        "Whole model",
        ("", "before", "after", "after / before"),
        [(name, text(old), text(new), _share(old, new)) for name, old, new, text in shown],
    )


def budget_line(use: BudgetUse) -> str:
    """Say what was asked for and what was reached."""
    text = _RESOURCES[use.budget.resource]
    line = f"Budget: {use.budget}"
    if use.reached is None or use.allowed is None:
        return f"{line}; what was reached was not measured"
    met = "met" if use.reached <= use.allowed * (1 + _ROUNDING) else "not met"
    return f"{line}; at most {text(use.allowed)}, reached {text(use.reached)}: {met}"


def guard_line(guard: GuardRecord) -> str:
    """Say what the guard found and what it asked for."""
    drift, cosine = f"drift {guard.drift:.3g}", f"cosine {guard.cosine:.5f}"
    if guard.max_drift is not None:
        drift += f" (at most {guard.max_drift:g})"
    if guard.min_cosine is not None:
        cosine += f" (at least {guard.min_cosine:g})"
    facts = [drift, cosine]
    if guard.score is not None:
        facts.append(
            f"{guard.score} {guard.score_before:g} → {guard.score_after:g} "
            f"(may drop by {guard.max_drop:g})"
        )
    batches = "1 batch" if guard.batches == 1 else f"{guard.batches} batches"
    return f"Guard, on {batches}: {', '.join(facts)}"


def kept_table(rows: list[ReportRow], runtime: str) -> Table:
    """Return the changes that are in place, with their costs, errors and, where known, losses."""
    with_losses = any(row.loss is not None for row in rows)
    cells = []
    for row in rows:
        assert row.before is not None
        assert row.after is not None
        cells.append(
            (
                row.target,
                row.pass_name,
                row.reason,
                f"{_count(row.before.flops)} → {_count(row.after.flops)}",
                f"{_count(row.before.parameters)} → {_count(row.after.parameters)}",
                _times(row.before, row.after),
                _pair(_error, row.predicted_error, " / ", row.measured_error),
                *([_loss(row)] if with_losses else []),
            )
        )
    return _table(
        f"Changed: {len(rows)}",
        (
            *("layer", "pass", "change", "FLOPs", "parameters", f"ms in {runtime}"),
            "error predicted / measured",
            *(["loss, from"] if with_losses else []),
        ),
        cells,
    )


def given_up_table(rows: list[ReportRow]) -> Table:
    """Return the changes that the guard had taken back, each with what was wrong with it."""
    cells = [(row.target, row.pass_name, row.reason) for row in rows]
    return _table(f"Given up for the guard: {len(rows)}", ("layer", "pass", "reason"), cells)


def refused_table(rows: list[ReportRow]) -> Table:
    """One line per pass and reason, because many layers share one."""
    groups: dict[tuple[str, str], list[ReportRow]] = {}
    for row in rows:
        groups.setdefault((row.pass_name, row.reason), []).append(row)
    cells = []
    for (pass_name, reason), same in groups.items():
        names = ", ".join(row.target for row in same[:_TARGETS_SHOWN])
        more = len(same) - _TARGETS_SHOWN
        flops = sum(row.before.flops for row in same if row.before is not None)
        cells.append(
            (
                names + (f" and {more} more" if more > 0 else ""),
                pass_name,
                reason,
                _count(flops) if any(row.before for row in same) else "-",
            )
        )
    return _table(f"Left as it was: {len(rows)}", ("layer", "pass", "reason", "FLOPs"), cells)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "pass")
    for row in rows:
        table.add_row(*map(Text, row))  # as text, because "[8, 128]" is not markup
    return table


def _count(value: float | None) -> str:
    """Return a count with three digits and a decimal prefix."""
    if value is None:
        return "-"
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.3g}{prefix}"
        value /= 1000
    return f"{value:.3g}P"


def _share(before: float | None, after: float | None) -> str:
    return f"{after / before:.1%}" if before and after is not None else "-"


def _pair(
    text: Callable[[float | None], str], first: float | None, between: str, second: float | None
) -> str:
    return "-" if first is None and second is None else f"{text(first)}{between}{text(second)}"


def _times(before: CostRecord, after: CostRecord) -> str:
    """Return both times, and how they were found if not by measuring."""
    text = _pair(_milliseconds, before.latency_ms, " → ", after.latency_ms)
    source = after.latency_source
    return text if source in ("", "measured") else f"{text} ({source})"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _loss(row: ReportRow) -> str:
    return "-" if row.loss is None else f"{row.loss:.2g}, {row.loss_source}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


_RESOURCES: dict[str, Callable[[float], str]] = {
    "flops": lambda value: f"{_count(value)} FLOPs",
    "parameters": lambda value: f"{_count(value)} parameters",
    "bytes": lambda value: f"{_count(value)}B",
    "latency": lambda value: f"{_milliseconds(value)} ms",
}
