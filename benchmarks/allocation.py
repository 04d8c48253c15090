"""The solver against one share for all layers and against each pass alone, at equal latency.

all-MiniLM-L6-v2 in torch, float32, batches of 32 x 128 tokens; calibration on AG News texts, errors
on others: relative error of the last hidden states on real tokens, and mean cosine of the pooled
embeddings. Every method is asked for the same measured latency, and its latency is measured
again afterwards, in turns with the dense model; uniform allocation is bisected on its share of
the FLOPs until its own measured latency fits.

Model and data: see `minilm_protocol`.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from minilm_protocol import batches, embeddings, example, read_texts
from torch import nn

import graphopt
from graphopt.datasets import Batches
from graphopt.environment import environment, write_csv
from graphopt.passes.errors import GraphoptError
from graphopt.passes.stopwatch import interleaved_ms
from graphopt.recipes import load_recipe
from graphopt.runtime import installation_of

FLOAT_PASSES = ("prune-channels", "factorize-low-rank", "sparsify-blocks", "gate-layers")
ALL_PASSES = (*FLOAT_PASSES, "quantize-weights")
_BISECTIONS = 6


@dataclass(frozen=True)
class Row:
    """One method at one latency.

    Attributes:
        method: "solver", "uniform" (the same share in every layer) or "solver, one pass".
        passes: The passes that could be used.
        asked: Share of the dense latency that was asked for.
        reached: Share that was measured afterwards.
        flops_share: Share of the dense FLOPs left.
        drift: Relative error of the last hidden states on held-out texts, real tokens only.
        cosine: Mean cosine of the pooled embeddings on held-out texts.
        changes: Number of changes.
        note: Why a row is as it is.
    """

    method: str
    passes: str
    asked: float
    reached: float
    flops_share: float
    drift: float
    cosine: float
    changes: int
    note: str


@dataclass(frozen=True)
class Setting:
    """What all methods share."""

    dense: nn.Module
    calibration: Batches
    held_out: Batches
    cost_cache: Path
    store: Path


def main(
    data: Annotated[Path, typer.Option(help="AG News test split as CSV.")],
    model: Annotated[Path, typer.Option(help="Hugging Face directory of all-MiniLM-L6-v2.")],
    shares: Annotated[str, typer.Option(help="Latencies to ask for.")] = "0.8,0.65,0.5",
    calibration_texts: Annotated[int, typer.Option(help="Texts to calibrate on.")] = 128,
    output: Annotated[Path, typer.Option(help="CSV file to add rows to.")] = (
        Path(__file__).parent / "results" / "allocation.csv"
    ),
) -> None:
    """Run every method at every latency and add one row for each."""
    from transformers import AutoModel

    texts = read_texts(data)
    folder = Path(tempfile.mkdtemp())
    setting = Setting(
        dense=AutoModel.from_pretrained(model).eval(),
        calibration=batches(texts[:calibration_texts], model),
        held_out=batches(texts[-256:], model),
        cost_cache=folder / "costs.json",
        store=folder / "statistics",
    )
    for share in map(float, shares.split(",")):
        for pool in (FLOAT_PASSES, ALL_PASSES):
            _report(setting, "solver", pool, share, _solved, output)
        for name in ALL_PASSES:
            _report(setting, "solver, one pass", (name,), share, _solved, output)
        _report(setting, "uniform", ("prune-channels",), share, _uniform, output)
        _report(setting, "uniform", ("factorize-low-rank",), share, _uniform, output)


Method = Callable[[Setting, tuple[str, ...], float], nn.Module]


def _report(
    setting: Setting,
    method: str,
    passes: tuple[str, ...],
    share: float,
    make: Method,
    output: Path,
) -> None:
    try:
        optimized = make(setting, passes, share)
    except GraphoptError as error:
        typer.echo(f"{method} {passes} at {share:.0%}: {error}")
        return
    installation = installation_of(optimized)
    assert installation is not None
    plan = installation.plan
    assert plan.totals is not None
    drift, cosine = _errors(setting, optimized)
    row = Row(
        method=method,
        passes=" ".join(passes),
        asked=share,
        reached=round(_share(setting.dense, optimized, 4.0), 3),
        flops_share=round(plan.totals.after.flops / plan.totals.before.flops, 4),
        drift=round(drift, 4),
        cosine=round(cosine, 5),
        changes=len(plan.changes),
        note=next((note for note in plan.notes if "budget" in note), ""),
    )
    typer.echo(str(row))
    write_csv(output, [row], environment())


def _solved(setting: Setting, passes: tuple[str, ...], share: float) -> nn.Module:
    recipe = load_recipe(passes).model_copy(update={"allocation": "solver"})
    return graphopt.optimize(
        setting.dense,
        example(),
        recipe=recipe,
        budget=f"{share:.0%} latency",
        calibration=setting.calibration,
        calibration_store=setting.store,
        cost_cache=setting.cost_cache,
    )


def _uniform(setting: Setting, passes: tuple[str, ...], share: float) -> nn.Module:
    """Return the model of the largest share of FLOPs, the same in every layer, that fits."""

    def made(flops_share: float, *, calibrated: bool) -> nn.Module:
        return graphopt.optimize(
            setting.dense,
            example(),
            recipe=load_recipe(passes).model_copy(update={"allocation": "uniform"}),
            budget=flops_share,
            calibration=setting.calibration if calibrated else None,
            cost_cache=setting.cost_cache,
        )

    low, high = 0.1, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = _share(setting.dense, made(middle, calibrated=False), 1.5) <= share
        low, high = (middle, high) if fits else (low, middle)
    return made(low, calibrated=True)


def _share(dense: nn.Module, optimized: nn.Module, seconds: float) -> float:
    """Return the optimized model's share of the dense one's latency, measured in turns."""

    def run(model: nn.Module) -> Callable[[], Any]:
        twin = copy.deepcopy(model).eval()
        batch = example()

        def infer() -> Any:
            with torch.no_grad():
                return twin(**batch)

        return infer

    before, after = interleaved_ms((run(dense), run(optimized)), torch.device("cpu"), seconds)
    return statistics.median(b / a for a, b in zip(before, after, strict=True))


def _errors(setting: Setting, optimized: nn.Module) -> tuple[float, float]:
    """Return drift of the hidden states and mean cosine of the embeddings on held-out texts."""
    wrong = right = 0.0
    with torch.no_grad():
        for batch in setting.held_out:
            real = batch["attention_mask"].bool()
            dense = setting.dense(**batch).last_hidden_state[real].double()
            states = optimized(**batch).last_hidden_state[real].double()
            wrong += (states - dense).square().sum().item()
            right += dense.square().sum().item()
    wanted = embeddings(setting.dense, setting.held_out)
    found = embeddings(optimized, setting.held_out)
    return (wrong / right) ** 0.5, torch.cosine_similarity(found, wanted).mean().item()


if __name__ == "__main__":
    typer.run(main)
