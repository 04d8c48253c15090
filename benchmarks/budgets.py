"""Whether budgets are met: four architectures at nine budgets each, spent over allowed.

FLOPs, parameters and bytes are counted on the rewritten model; latencies are medians of the whole
rewritten and the dense model in torch, float32, timed in turns after the solver is done. All
approximate passes take part, there is no accuracy guard, and losses are estimated from the weights
alone: only the budget is at stake. MiniLM is the real checkpoint, the others have random weights:
GPT-2 small at 1 x 128 tokens, ViT-S at 4 and ResNet-18 at 4 images of 224 x 224.

Losses are estimated once for all budgets of a model that offer the same changes; `seconds` of the
first row contain that.

A budget that even the smallest sizes cannot meet is a row with the note that the plan carries.

Model: see `minilm_protocol`.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from minilm_protocol import example
from torch import nn

import graphopt
from graphopt.environment import environment, write_csv
from graphopt.passes.base import Cost
from graphopt.passes.budget import parse_budget, spent
from graphopt.passes.plan import CostRecord
from graphopt.passes.stopwatch import interleaved_ms
from graphopt.recipes import Recipe, load_recipe
from graphopt.runtime import installation_of

BUDGETS = (
    "80%",
    "60%",
    "40%",
    "80% parameters",
    "65% parameters",
    "70% bytes",
    "50% bytes",
    "80% latency",
    "60% latency",
)
PASSES = (
    "prune-channels",
    "factorize-low-rank",
    "sparsify-blocks",
    "gate-layers",
    "quantize-weights",
)
Example = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One budget of one model; `spent_over_allowed` is 1 where the budget is used up exactly."""

    model: str
    budget: str
    allowed: float
    spent: float
    spent_over_allowed: float
    changes: int
    passes: str
    seconds: float
    note: str


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face directory of all-MiniLM-L6-v2.")],
    only: Annotated[str, typer.Option(help="Models, separated by commas.")] = "",
    budgets: Annotated[str, typer.Option(help="Budgets, separated by commas.")] = ",".join(BUDGETS),
    cost_cache: Annotated[Path | None, typer.Option(help="File of measured times.")] = None,
    output: Annotated[Path, typer.Option(help="CSV file to add rows to.")] = (
        Path(__file__).parent / "results" / "budgets.csv"
    ),
) -> None:
    """Optimize every model at every budget and add one row for each."""
    models = _models(model)
    for name in only.split(",") if only else models:
        dense, inputs = models[name]()
        with tempfile.TemporaryDirectory() as store:
            for text in budgets.split(","):
                row = _row(name, dense, inputs, text, Path(store), cost_cache)
                typer.echo(str(row))
                write_csv(output, [row], environment())


def _row(
    name: str, dense: nn.Module, inputs: Example, text: str, store: Path, cache: Path | None
) -> Row:
    budget = parse_budget(text)
    assert budget is not None
    start = time.perf_counter()
    optimized = graphopt.optimize(
        dense,
        inputs,
        recipe=_recipe(),
        budget=text,
        calibration_store=store,
        cost_cache=cache,
        measure=budget.resource == "latency",
    )
    seconds = time.perf_counter() - start
    installation = installation_of(optimized)
    assert installation is not None
    plan = installation.plan
    assert plan.totals is not None
    before, after = plan.totals.before, plan.totals.after
    if budget.resource == "latency":
        before_ms, after_ms = _latencies_ms(dense, optimized, inputs)
        before = before.model_copy(update={"latency_ms": before_ms})
        after = after.model_copy(update={"latency_ms": after_ms})
    allowed, used = budget.allowed(_cost(before)), spent(_cost(after), budget.resource)
    return Row(
        model=name,
        budget=text,
        allowed=round(allowed, 3),
        spent=round(used, 3),
        spent_over_allowed=round(used / allowed, 4),
        changes=len(plan.changes),
        passes=" ".join(dict.fromkeys(record.pass_name for record in plan.changes)),
        seconds=round(seconds, 1),
        note=next((note for note in plan.notes if "budget" in note), ""),
    )


def _recipe() -> Recipe:
    """Return every approximate pass under the solver, without a guard."""
    return load_recipe(PASSES).model_copy(update={"name": "budgets", "allocation": "solver"})


def _latencies_ms(dense: nn.Module, optimized: nn.Module, inputs: Example) -> tuple[float, float]:
    def run(model: nn.Module) -> Callable[[], Any]:
        twin = copy.deepcopy(model).eval()

        def infer() -> Any:
            with torch.no_grad():
                return twin(**inputs)

        return infer

    before, after = interleaved_ms((run(dense), run(optimized)), torch.device("cpu"), 6.0)
    ratio = statistics.median(b / a for b, a in zip(before, after, strict=True))
    return statistics.median(before), statistics.median(before) / ratio


def _cost(record: CostRecord) -> Cost:
    return Cost(**record.model_dump())


def _models(minilm: Path) -> dict[str, Callable[[], tuple[nn.Module, Example]]]:
    from transformers import (
        AutoModel,
        GPT2Config,
        GPT2LMHeadModel,
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    def made(model: nn.Module, inputs: Example) -> tuple[nn.Module, Example]:
        return model.eval(), inputs

    images = {"pixel_values": torch.randn(4, 3, 224, 224, generator=torch.Generator())}
    tokens = {"input_ids": torch.arange(128)[None] * 7 + 100}
    return {
        "MiniLM": lambda: made(AutoModel.from_pretrained(minilm), example()),
        "GPT-2 small": lambda: made(GPT2LMHeadModel(GPT2Config(use_cache=False)), tokens),
        "ViT-S": lambda: made(
            ViTForImageClassification(
                ViTConfig(
                    hidden_size=384,
                    num_attention_heads=6,
                    intermediate_size=1536,
                    num_labels=1000,
                )
            ),
            images,
        ),
        "ResNet-18": lambda: made(
            ResNetForImageClassification(
                ResNetConfig(
                    embedding_size=64,
                    hidden_sizes=[64, 128, 256, 512],
                    depths=[2, 2, 2, 2],
                    layer_type="basic",
                    num_labels=1000,
                )
            ),
            images,
        ),
    }


if __name__ == "__main__":
    typer.run(main)
