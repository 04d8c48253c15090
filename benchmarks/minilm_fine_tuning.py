"""Fine-tuning steps of all-MiniLM-L6-v2 on AG News, eager Hugging Face and `exact` in turns.

Both models start from the same weights and see the same batches of 32 texts, padded to the longest,
in shuffled order or grouped by length. Every step is run by both, in alternating order: forward,
backward and AdamW, float32, dropout off so that the losses can be compared. Two loss curves that
only differ by rounding drift apart slowly; the control is the eager model run twice, its second
run with the parameters' last bit changed.

Model and data: see `minilm_protocol`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from minilm_protocol import read_rows
from torch import Tensor, nn

import graphopt
from graphopt.environment import environment, write_csv
from graphopt.training import ExecutedFlops

_BATCH = 32
_WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """All steps of one setting; times are medians, the ratio the median of the ratios by step."""

    recipe: str
    batches: str
    precision: str
    steps: int
    padding_share: float
    eager_ms: float
    optimized_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    eager_flops: int
    optimized_flops: int
    saved_flops: float
    saved_time: float
    time_per_flop_saved: float
    last_eager_loss: float
    last_optimized_loss: float
    largest_loss_difference: float
    control_loss_difference: float


@dataclass
class Trainee:
    """A model with its optimizer and what its steps took."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float]
    times_ms: list[float]
    flops: int = 0

    def step(self, batch: dict[str, Tensor]) -> None:
        """Train on one batch."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.times_ms.append(1e3 * (time.perf_counter() - start))

    def count(self, batch: dict[str, Tensor]) -> None:
        """Count the operations of a forward and a backward pass; nothing is trained."""
        with ExecutedFlops() as executed:
            self.model(**batch).loss.backward()
        self.flops += executed.flops
        self.optimizer.zero_grad()


def main(
    data: Annotated[Path, typer.Option(help="AG News test split as CSV.")],
    model: Annotated[Path, typer.Option(help="Hugging Face directory of all-MiniLM-L6-v2.")],
    steps: Annotated[int, typer.Option(help="Steps of each model.")] = 200,
    grouped: Annotated[bool, typer.Option(help="Group texts of like length.")] = False,
    precision: Annotated[str, typer.Option(help="torch's float32 matmul precision.")] = "highest",
    recipe: Annotated[str, typer.Option(help="Recipe of the optimized model.")] = "exact",
    control: Annotated[bool, typer.Option(help="Also train the control.")] = False,
    output: Annotated[Path, typer.Option(help="CSV file to add a row to.")] = (
        Path(__file__).parent / "results" / "minilm_fine_tuning.csv"
    ),
) -> None:
    """Train both and add a row."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(precision)
    batches = list(_batches(data, model, steps, grouped=grouped))
    eager = _trainee(_classifier(model))
    optimized = _trainee(graphopt.optimize(_classifier(model), batches[0], recipe=recipe))
    other = _trainee(_nudged(_classifier(model))) if control else None
    for number, batch in enumerate(batches):
        order = (eager, optimized) if number % 2 == 0 else (optimized, eager)
        for trainee in order:
            trainee.step(batch)
        if other is not None:
            other.step(batch)
        if number % 10 == 9:
            typer.echo(_progress(number + 1, eager, optimized))
    for batch in batches[:: max(1, steps // 10)]:
        eager.count(batch)
        optimized.count(batch)
    row = _row(eager, optimized, other, batches, (recipe, "grouped" if grouped else "shuffled"))
    typer.echo(str(row))
    write_csv(output, [row], environment())


def _row(
    eager: Trainee,
    optimized: Trainee,
    control: Trainee | None,
    batches: list[dict[str, Tensor]],
    setting: tuple[str, str],
) -> Row:
    ratios = _ratios(eager, optimized)
    low, _, high = statistics.quantiles(ratios, n=4)
    ratio = statistics.median(ratios)
    flops = [trainee.flops for trainee in (eager, optimized)]
    saved_flops, saved_time = 1 - flops[1] / flops[0], 1 - 1 / ratio
    masks = [batch["attention_mask"] for batch in batches]
    real = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    return Row(
        recipe=setting[0],
        batches=setting[1],
        precision=torch.get_float32_matmul_precision(),
        steps=len(batches),
        padding_share=round(1 - real, 3),
        eager_ms=round(statistics.median(eager.times_ms[_WARM_UP:]), 1),
        optimized_ms=round(statistics.median(optimized.times_ms[_WARM_UP:]), 1),
        ratio=round(ratio, 3),
        ratio_low=round(low, 3),
        ratio_high=round(high, 3),
        eager_flops=flops[0],
        optimized_flops=flops[1],
        saved_flops=round(saved_flops, 3),
        saved_time=round(saved_time, 3),
        time_per_flop_saved=round(saved_time / saved_flops, 3),
        last_eager_loss=eager.losses[-1],
        last_optimized_loss=optimized.losses[-1],
        largest_loss_difference=_largest_difference(eager, optimized),
        control_loss_difference=(
            _largest_difference(eager, control) if control is not None else float("nan")
        ),
    )


def _ratios(eager: Trainee, optimized: Trainee) -> list[float]:
    pairs = list(zip(eager.times_ms, optimized.times_ms, strict=True))
    return [before / after for before, after in pairs[_WARM_UP:]]


def _largest_difference(first: Trainee, second: Trainee) -> float:
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=True))


def _progress(step: int, eager: Trainee, optimized: Trainee) -> str:
    ratio = statistics.median(_ratios(eager, optimized))
    return (
        f"step {step}: {ratio:.2f}x, losses {eager.losses[-1]:.6f} {optimized.losses[-1]:.6f}, "
        f"largest difference {_largest_difference(eager, optimized):.1e}"
    )


def _trainee(model: nn.Module) -> Trainee:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    return Trainee(model.train(), optimizer, [], [])


def _classifier(directory: Path) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model: Callable[..., Any] = AutoModelForSequenceClassification.from_pretrained
    return model(  # type: ignore[no-any-return]
        directory, num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def _nudged(model: nn.Module) -> nn.Module:
    """Change the last bit of every parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps)
    return model


def _batches(
    data: Path, directory: Path, count: int, *, grouped: bool
) -> Iterator[dict[str, Tensor]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = read_rows(data)
    random.Random(0).shuffle(rows)
    rows = rows[: count * _BATCH]
    groups = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    if grouped:
        by_length = sorted(rows, key=lambda row: len(row[1]))
        groups = [by_length[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
        random.Random(1).shuffle(groups)
    for group in groups:
        tokens = tokenizer(
            [text for _, text in group],
            padding=True,
            truncation=True,
            max_length=256,
            return_tensors="pt",
        )
        yield {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "labels": torch.tensor([label for label, _ in group]),
        }


if __name__ == "__main__":
    typer.run(main)
