"""One-shot compression of all-MiniLM-L6-v2 to a FLOP budget: quality and latency, side by side.

Compares graphopt (magnitude, OBS, OBS and repair) and Torch-Pruning 1.6.1 (group magnitude and
Taylor importance, over the same structures: heads and feed-forward units) without any training.
Quality is the mean cosine of mean-pooled sentence embeddings to the dense model's, on 1,000 texts
that calibration never saw: rows 1000 to 1999. The method and its defaults (head_loss, damping, the
weighing of rows) were chosen on rows 1000 to 1299, so `--evaluate-from 2000` is the clean check.
Latency is paired against the dense model, in torch and ONNX Runtime.

Model and data: see `minilm_protocol`. Torch-Pruning: `pip install --no-deps torch-pruning==1.6.1`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
import typer
from minilm_protocol import EVALUATED_TEXTS, batches, embeddings, example, plain, read_texts
from torch import nn

import graphopt
from graphopt.bench import bench
from graphopt.datasets import Batches
from graphopt.environment import environment, write_csv
from graphopt.passes.compress.prune_channels import PruneChannels
from graphopt.passes.facts import total_cost


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
    rows = read_texts(data)
    from transformers import AutoModel

    dense = AutoModel.from_pretrained(model).eval()
    calibration = batches(rows[:texts], model)
    evaluated = batches(rows[evaluate_from : evaluate_from + EVALUATED_TEXTS], model)
    sizes = example()
    reference = embeddings(dense, evaluated)
    dense_flops = total_cost(graphopt.capture(dense, sizes)).flops
    for budget in map(float, budgets.split(",")):

        def ours(budget: float = budget, **options: Any) -> nn.Module:
            return graphopt.optimize(
                dense,
                sizes,
                recipe=[PruneChannels(**options)],
                budget=budget,
                calibration=None if options["scores"] == "magnitude" else calibration,
                measure=False,
            )

        def theirs(data: Batches | None, budget: float = budget) -> nn.Module:
            return torch_pruning(dense, sizes, budget, data)

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
            flops = total_cost(graphopt.capture(plain(small), sizes)).flops
            cosine = F.cosine_similarity(embeddings(small, evaluated), reference).mean().item()
            ratios: dict[str, float] = {}
            if repeats:
                result = bench(dense, small, example=sizes, repeats=repeats)
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


if __name__ == "__main__":
    typer.run(main)
