"""Inference of all-MiniLM-L6-v2 on padded AG News texts: dense and `pack-tokens`, side by side.

Batches of 32 texts, padded to the longest or to 128 tokens; torch and the exported files in ONNX
Runtime, float32, paired. Both exports are run and compared with torch before they are timed.

Model and data: see `minilm_protocol`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from minilm_protocol import read_texts

import graphopt
from graphopt.bench import bench
from graphopt.environment import environment, write_csv


@dataclass(frozen=True)
class Row:
    """One padding in one runtime; FLOPs are those of a forward pass."""

    padded_to: int
    real_share: float
    runtime: str
    mode: str
    dense_flops: int
    packed_flops: int
    dense_ms: float
    packed_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


def main(
    data: Annotated[Path, typer.Option(help="AG News test split as CSV.")],
    model: Annotated[Path, typer.Option(help="Hugging Face directory of all-MiniLM-L6-v2.")],
    repeats: Annotated[int, typer.Option(help="Timed pairs.")] = 15,
    output: Annotated[Path, typer.Option(help="CSV file to add rows to.")] = (
        Path(__file__).parent / "results" / "minilm_packed.csv"
    ),
) -> None:
    """Time both and add one row for each padding, runtime and mode."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    dense = AutoModel.from_pretrained(model).eval()
    for padding in ("longest", "max_length"):
        tokens = tokenizer(
            read_texts(data)[:32],
            padding=padding,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )
        batch = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        packed = graphopt.optimize(copy.deepcopy(dense), batch, recipe="pack-tokens", measure=False)
        result = bench(dense, packed, example=batch, repeats=repeats)
        mask = batch["attention_mask"]
        rows = [
            Row(
                padded_to=mask.shape[1],
                real_share=round(mask.to(torch.float32).mean().item(), 3),
                runtime=row.runtime,
                mode=row.mode,
                dense_flops=result.dense_flops,
                packed_flops=result.optimized_flops,
                dense_ms=round(row.dense_ms, 2),
                packed_ms=round(row.optimized_ms, 2),
                ratio=round(row.ratio, 3),
                ratio_low=round(row.ratio_low, 3),
                ratio_high=round(row.ratio_high, 3),
            )
            for row in result.rows
        ]
        for row in rows:
            typer.echo(str(row))
        for note in result.notes:
            typer.echo(f"note: {note}")
        write_csv(output, rows, environment())


if __name__ == "__main__":
    typer.run(main)
