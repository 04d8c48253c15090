"""The deployment race: all-MiniLM-L6-v2 on CPU threads, everything in one run, in turns.

Batches of 1, 8 and 32 texts of 128 tokens; two sets of inputs: AG News texts padded to 128, and
texts joined until no token is padding. Calibration texts are others than test texts. Latency is the
median of paired, interleaved calls, its ratio that of the pairs to ONNX Runtime fp32 (above 1 is
faster); quality is the cosine of mean-pooled embeddings to the fp32 model's on the test texts.

graphopt's entries are its recipes, exported once for each set of inputs, each file in every runtime
that is installed. `pack-tokens` is left out where no token is padding. `--recovered` adds models
that `graphopt.recover` trained and `graphopt.save` wrote; they are exported as they are.

Needs for all entries: `pip install openvino nncf torchao`, and
`pip install --no-deps torch-pruning==1.6.1`. Entries without their library are left out.
Model and data: see `minilm_protocol`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated

import torch
import typer
from race_entries import contestants
from race_inputs import InputSet, Runner, cosines, input_sets, pooled
from race_rivals import rivals
from torch import Tensor, nn

from graphopt.environment import environment, write_csv

_BASE = "onnxruntime fp32"
_TOOLS = ("openvino", "nncf", "torchao", "torch-pruning")


@dataclass(frozen=True)
class Row:
    """One entry at one batch size."""

    inputs: str
    real_share: float
    batch: int
    entry: str
    latency_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    cosine_mean: float
    cosine_min: float
    tools: str


def main(
    data: Annotated[Path, typer.Option(help="AG News test split as CSV.")],
    model: Annotated[Path, typer.Option(help="Hugging Face directory of all-MiniLM-L6-v2.")],
    recovered: Annotated[
        list[Path] | None, typer.Option(help="Saved models to race as well; repeatable.")
    ] = None,
    recipes: Annotated[str, typer.Option(help="graphopt's, separated by spaces.")] = (
        "exact deploy deploy-int8"
    ),
    only: Annotated[str, typer.Option(help="Sets of inputs, separated by commas.")] = "full,padded",
    batches: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,32",
    turns: Annotated[int, typer.Option(help="Timed calls of each entry.")] = 15,
    texts: Annotated[int, typer.Option(help="Texts of each set that quality is measured on.")] = (
        256
    ),
    calibration_texts: Annotated[int, typer.Option(help="Texts to calibrate on.")] = 128,
    quick: Annotated[bool, typer.Option(help="Few texts and turns, one batch size.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of every runtime.")] = 2,
    output: Annotated[Path, typer.Option(help="CSV file to add rows to.")] = (
        Path(__file__).parent / "results" / "deployment_race.csv"
    ),
) -> None:
    """Race and add one row for each entry, set of inputs and batch size."""
    from transformers import AutoModel

    torch.set_num_threads(threads)
    if quick:
        batches, turns, texts = "8", 5, 64
    dense = AutoModel.from_pretrained(model).eval()
    sets = input_sets(data, model, texts, 64 if quick else calibration_texts)
    with tempfile.TemporaryDirectory() as folder:
        for inputs in sets:
            if inputs.name not in only.split(","):
                continue
            entries: dict[str, Runner] = {}
            for name, runner in _entries(dense, inputs, Path(folder), recipes, recovered or []):
                entries[name] = runner
                typer.echo(f"{inputs.name}: {name} is ready")
            rows = _race(entries, dense, inputs, [int(size) for size in batches.split(",")], turns)
            for row in rows:
                typer.echo(
                    f"{row.inputs:6} {row.batch:3} {row.entry:45} {row.latency_ms:8.2f} ms "
                    f"{row.ratio:5.2f}x [{row.ratio_low:.2f}, {row.ratio_high:.2f}] "
                    f"cosine {row.cosine_mean:.4f} / {row.cosine_min:.4f}"
                )
            write_csv(output, rows, environment())


def _entries(
    dense: nn.Module, inputs: InputSet, folder: Path, recipes: str, recovered: list[Path]
) -> Iterator[tuple[str, Runner]]:
    yield from rivals(dense, inputs, folder)
    yield from contestants(dense, inputs, folder, recipes.split(), recovered)


def _race(
    entries: Mapping[str, Runner],
    dense: nn.Module,
    inputs: InputSet,
    sizes: list[int],
    turns: int,
) -> list[Row]:
    wanted = pooled(lambda batch: dense(**batch).last_hidden_state, inputs.test)
    quality = {
        name: cosines(pooled(runner, inputs.test), wanted) for name, runner in entries.items()
    }
    tools = " ".join(f"{name} {_version(name)}" for name in _TOOLS)
    rows = []
    for size in sizes:
        batch = {name: tensor[:size].contiguous() for name, tensor in inputs.test[0].items()}
        times = _turns({name: partial(run, batch) for name, run in entries.items()}, turns)
        for name, found in times.items():
            ratios = [base / own for base, own in zip(times[_BASE], found, strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            rows.append(
                Row(
                    inputs=inputs.name,
                    real_share=round(inputs.real_share, 3),
                    batch=size,
                    entry=name,
                    latency_ms=round(statistics.median(found), 3),
                    ratio=round(statistics.median(ratios), 3),
                    ratio_low=round(low, 3),
                    ratio_high=round(high, 3),
                    cosine_mean=round(quality[name][0], 5),
                    cosine_min=round(quality[name][1], 5),
                    tools=tools,
                )
            )
    return rows


def _turns(calls: Mapping[str, partial[Tensor]], turns: int) -> dict[str, list[float]]:
    """Return milliseconds of every call, one per turn.

    Each entry runs twice and the second run counts: the threads of the entry before, which go on
    waiting for work for a while, are asleep by then, and its own data is in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, turns):
        order = list(calls) if turn % 2 == 0 else list(calls)[::-1]
        for name in order:
            calls[name]()
            start = time.perf_counter()
            calls[name]()
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    typer.run(main)
