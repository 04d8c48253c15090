"""A small GPT whose middle blocks run on half of the tokens: time saved over operations saved.

Random weights, bytes of a real text, 6 layers, no dropout. A training step is forward and backward
in float32, no optimizer; times are medians of paired, interleaved runs against the eager dense
model, operations are those executed in such a step. Random gates are measured where they start
(half of the tokens), the others once annealed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import graphopt
from graphopt.environment import environment, write_csv
from graphopt.kernels.token_routers import TokenGate
from graphopt.passes.gates.gate_tokens import GateTokens
from graphopt.passes.stopwatch import interleaved_ms
from graphopt.training import ExecutedFlops

_LAYERS = 6
_WAYS: dict[str, dict[str, str | bool]] = {
    "random, per block": {},
    "random, span": {"span": True},
    "attention, span": {"router": "attention", "span": True},
    "learned, span": {"router": "learned", "span": True},
}


@dataclass(frozen=True)
class Row:
    """One way of gating at one size; `time_per_flop_saved` is the quotient of the two before."""

    way: str
    width: int
    batch: int
    length: int
    keep: float
    dense_flops: int
    gated_flops: int
    dense_ms: float
    gated_ms: float
    ratio: float
    saved_flops: float
    saved_time: float
    time_per_flop_saved: float


def main(
    data: Annotated[Path, typer.Option(help="A text file.")],
    widths: Annotated[str, typer.Option(help="Widths of the model.")] = "256,384",
    batch: Annotated[int, typer.Option(help="Texts per batch.")] = 8,
    length: Annotated[int, typer.Option(help="Bytes per text.")] = 256,
    keep: Annotated[float, typer.Option(help="Share of the tokens.")] = 0.5,
    budget: Annotated[float, typer.Option(help="Seconds to time each model.")] = 10.0,
    output: Annotated[Path, typer.Option(help="CSV file to add rows to.")] = (
        Path(__file__).parent / "results" / "gated_gpt.csv"
    ),
) -> None:
    """Measure every way of gating at every width and add the rows."""
    ids = _batch(data, batch, length)
    for width in map(int, widths.split(",")):
        dense = _model(width, length).train()
        for way, options in _WAYS.items():
            gated = graphopt.optimize(
                dense,
                ids,
                recipe=[GateTokens(keep=keep, **options)],  # type: ignore[arg-type]
                measure=False,
            )
            for gate in gated.modules():
                if isinstance(gate, TokenGate):
                    gate.advance(0, 1.0 if "router" in options else 0.0)
            row = _row(way, width, keep, dense, gated, ids, budget)
            typer.echo(str(row))
            write_csv(output, [row], environment())


def _row(
    way: str,
    width: int,
    keep: float,
    dense: nn.Module,
    gated: nn.Module,
    ids: dict[str, Tensor],
    budget: float,
) -> Row:
    models = (dense, gated)
    dense_flops, gated_flops = (_flops(partial(_step, model, ids)) for model in models)
    times = interleaved_ms(
        [partial(_step, model, ids) for model in models], torch.device("cpu"), budget
    )
    ratio = statistics.median(before / after for before, after in zip(*times, strict=True))
    saved_flops, saved_time = 1 - gated_flops / dense_flops, 1 - 1 / ratio
    batch, length = ids["input_ids"].shape
    return Row(
        way=way,
        width=width,
        batch=batch,
        length=length,
        keep=keep,
        dense_flops=dense_flops,
        gated_flops=gated_flops,
        dense_ms=round(statistics.median(times[0]), 2),
        gated_ms=round(statistics.median(times[1]), 2),
        ratio=round(ratio, 3),
        saved_flops=round(saved_flops, 4),
        saved_time=round(saved_time, 4),
        time_per_flop_saved=round(saved_time / saved_flops, 3),
    )


def _step(model: nn.Module, ids: dict[str, Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    model(**ids).loss.backward()


def _flops(run: Callable[[], None]) -> int:
    with ExecutedFlops() as executed:
        run()
    flops: int = executed.flops
    return flops


def _model(width: int, length: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=length,
        n_embd=width,
        n_layer=_LAYERS,
        n_head=width // 64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def _batch(data: Path, batch: int, length: int) -> dict[str, Tensor]:
    text = data.read_bytes()[: batch * length]
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().reshape(batch, length)
    return {"input_ids": ids, "labels": ids}


if __name__ == "__main__":
    typer.run(main)
