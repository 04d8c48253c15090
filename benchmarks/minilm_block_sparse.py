"""One-shot block sparsity in the feed-forward layers of all-MiniLM-L6-v2: what keeps its quality.

Feed-forward layers keep a share of their blocks, attention stays dense, nothing is trained.
Quality is the mean cosine of mean-pooled sentence embeddings to the dense model's, on 1,000 texts
that calibration never saw (rows 1000 to 1999; `--evaluate-from` takes others). Model and data: see
`minilm_protocol`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch.nn.functional as F
import typer
from minilm_protocol import EVALUATED_TEXTS, batches, embeddings, example, plain, read_texts

import graphopt
from graphopt.environment import environment, write_csv
from graphopt.kernels import BlockSparseLinear
from graphopt.passes.compress.sparsify_blocks import SparsifyBlocks
from graphopt.passes.facts import total_cost

_METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"scores": "magnitude", "permute": False, "repair": False},
    "magnitude + permute": {"scores": "magnitude", "repair": False},
    "OBS": {"scores": "obs", "permute": False, "repair": False},
    "OBS + repair": {"scores": "obs", "permute": False},
    "OBS + permute + repair": {"scores": "obs"},
}


@dataclass(frozen=True)
class Row:
    """One method at one density and height of blocks."""

    method: str
    density: float
    block_out: int
    block_in: int
    calibration_texts: int
    flops_share: float
    cosine: float


def main(
    model: Annotated[Path, typer.Option(help="Directory of the checkpoint.")],
    data: Annotated[Path, typer.Option(help="AG News CSV.")],
    densities: Annotated[str, typer.Option(help="Shares of blocks to keep.")] = "0.5",
    heights: Annotated[str, typer.Option(help="Rows of a block; 0 is the device's.")] = "0,128",
    texts: Annotated[int, typer.Option(help="Calibration texts.")] = 64,
    evaluate_from: Annotated[int, typer.Option(help="First row of the evaluated texts.")] = 1000,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/minilm_block_sparse.csv"),
) -> None:
    """Run every method and add one row each to the CSV file."""
    rows = read_texts(data)
    from transformers import AutoModel

    dense = AutoModel.from_pretrained(model).eval()
    calibration = batches(rows[:texts], model)
    evaluated = batches(rows[evaluate_from : evaluate_from + EVALUATED_TEXTS], model)
    reference = embeddings(dense, evaluated)
    dense_flops = total_cost(graphopt.capture(dense, example())).flops
    for density in map(float, densities.split(",")):
        for height in map(int, heights.split(",")):
            for method, options in _METHODS.items():
                by_data = options["scores"] == "obs"
                step = SparsifyBlocks(density=density, block_out=height, **options)
                small = graphopt.optimize(
                    dense,
                    example(),
                    recipe=[step],
                    calibration=calibration if by_data else None,
                    ignore=["attention", "pooler"],
                    measure=False,
                ).eval()
                layer = next(m for m in small.modules() if isinstance(m, BlockSparseLinear))
                row = Row(
                    method=method,
                    density=density,
                    block_out=layer.block_out,
                    block_in=layer.block_in,
                    calibration_texts=texts if by_data else 0,
                    flops_share=total_cost(graphopt.capture(plain(small), example())).flops
                    / dense_flops,
                    cosine=F.cosine_similarity(embeddings(small, evaluated), reference)
                    .mean()
                    .item(),
                )
                write_csv(output, [row], environment())
                typer.echo(f"{row}")


if __name__ == "__main__":
    typer.run(main)
