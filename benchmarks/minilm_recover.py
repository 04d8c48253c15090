"""All-MiniLM-L6-v2, made cheaper and then recovered: cosine before and after some minutes.

The checkpoint is optimized with a recipe and a budget, then `graphopt.recover` trains it on the
texts alone. Quality is the cosine of mean-pooled sentence embeddings to the dense model's, mean and
smallest, on texts that nothing else saw: the last 1,000 rows of the data, once as they are (padded)
and once joined to rows that fill all 128 tokens (full). Calibration reads the first rows, joined;
recovery trains on rows up to 5,744, half of them padded, half joined, newly drawn in every round,
and is judged on the 256 rows after those. The table of words is not trained.

The result is a checkpoint directory, for `deployment_race.py` and for `graphopt export`.

Model and data: see `minilm_protocol`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from minilm_protocol import read_texts
from torch import Tensor, nn

import graphopt
from graphopt.environment import environment, write_csv
from graphopt.recipes import load_recipe
from graphopt.training import recovery_of

Batch = dict[str, Tensor]

LENGTH = 128
JUDGED = slice(5744, 6000)
TRAINED = slice(0, 5744)
TESTED = slice(6600, 7600)
_CALIBRATED = 32
"""Full rows in a calibration batch."""
_BUCKET = 16
"""Batches of texts among which those of like length are put together."""


@dataclass(frozen=True)
class Row:
    """One recovery: cosines of embeddings, mean and smallest."""

    recipe: str
    budget: str
    minutes: float
    autocast: str
    learning_rate: float
    layerwise: float
    flops_share: float
    steps: int
    seconds: float
    stopped: str
    padded_before: float
    padded_after: float
    padded_smallest: float
    full_before: float
    full_after: float
    full_smallest: float


class Texts:
    """Batches of texts, half of them padded and half joined, drawn anew at every iteration.

    Args:
        texts: The texts.
        tokenizer: Of the checkpoint.
        rows: Full rows in a batch; a padded batch has twice as many.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any, rows: int) -> None:
        encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        self._texts: list[list[int]] = encoded
        self._ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        self._rows = rows

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches by torch's random numbers."""
        order = torch.randperm(len(self._texts)).tolist()
        middle = len(order) // 2
        made = [*self.padded(order[:middle]), *self.joined(order[middle:])]
        for place in torch.randperm(len(made)).tolist():
            yield made[place]

    def padded(self, order: Sequence[int]) -> Iterator[Batch]:
        """Yield texts as they are, those of like length together."""
        size, bucket = 2 * self._rows, 2 * self._rows * _BUCKET
        for start in range(0, len(order), bucket):
            part = sorted(order[start : start + bucket], key=lambda index: len(self._texts[index]))
            for first in range(0, len(part), size):
                yield self._batch([self._texts[i] for i in part[first : first + size]])

    def joined(self, order: Sequence[int]) -> Iterator[Batch]:
        """Yield rows in which the texts go on one after the other, all tokens used."""
        tokens = [token for index in order for token in self._texts[index]]
        inner = LENGTH - 2
        rows = [tokens[i : i + inner] for i in range(0, len(tokens) - inner + 1, inner)]
        for first in range(0, len(rows), self._rows):
            yield self._batch(rows[first : first + self._rows])

    def _batch(self, rows: Sequence[Sequence[int]]) -> Batch:
        first, last = self._ends
        cut = [torch.tensor([first, *row[: LENGTH - 2], last]) for row in rows]
        ids = nn.utils.rnn.pad_sequence(cut, batch_first=True)
        sizes = torch.tensor([len(row) for row in cut])
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < sizes[:, None]).long(),
        }


def cosines(model: nn.Module, dense: nn.Module, texts: Sequence[Batch]) -> Tensor:
    """Return the cosine of every text's embedding to the dense model's."""
    found = []
    with torch.no_grad():
        for batch in texts:
            weights = batch["attention_mask"].unsqueeze(-1)
            one, other = (
                (item(**batch).last_hidden_state * weights).sum(1) for item in (model, dense)
            )
            found.append(F.cosine_similarity(one, other))
    return torch.cat(found)


def main(
    model: Annotated[Path, typer.Option(help="Directory of the checkpoint.")],
    data: Annotated[Path, typer.Option(help="AG News CSV.")],
    directory: Annotated[Path, typer.Option(help="Where the recovered checkpoint goes.")],
    recipe: Annotated[str, typer.Option(help="Recipe, or passes by comma.")] = "prune-channels",
    budget: Annotated[str, typer.Option(help="Budget, empty for the recipe's own.")] = "60%",
    optimized: Annotated[
        Path | None, typer.Option(help="Recover this checkpoint instead of optimizing.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Time for recovery, 0 for none.")] = 15.0,
    texts: Annotated[int, typer.Option(help="Calibration texts, joined to full rows.")] = 600,
    rows: Annotated[int, typer.Option(help="Full rows in a batch.")] = 8,
    learning_rate: Annotated[float, typer.Option()] = 5e-4,
    layerwise: Annotated[float, typer.Option(help="Share of the time for blocks alone.")] = 0.15,
    autocast: Annotated[str, typer.Option(help="bfloat16, or float32 for none.")] = "bfloat16",
    store: Annotated[Path | None, typer.Option(help="Directory to resume from.")] = None,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/minilm_recover.csv"),
) -> None:
    """Optimize, recover, save; print cosines and add a row to the CSV file."""
    lines = read_texts(data)
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)  # type: ignore[no-untyped-call, unused-ignore]
    dense = AutoModel.from_pretrained(model).eval()
    test = Texts(lines[TESTED], tokenizer, rows)
    everything = range(len(lines[TESTED]))
    padded, full = list(test.padded(everything)), list(test.joined(everything))
    if optimized is None:
        passes = recipe.split(",")
        calibration = [
            batch
            for batch in Texts(lines[:texts], tokenizer, _CALIBRATED).joined(range(texts))
            if len(batch["input_ids"]) == _CALIBRATED
        ]
        cheap = graphopt.optimize(
            dense,
            calibration[0],
            recipe=recipe if len(passes) == 1 and _is_recipe(recipe) else passes,
            budget=budget or None,
            calibration=calibration,
            calibration_store=None if store is None else store / "calibration",
            cost_cache=None if store is None else store / "costs.json",
        )
    else:
        cheap = graphopt.load(optimized)
    before = [cosines(cheap, dense, part) for part in (padded, full)]
    typer.echo(f"before: padded {before[0].mean():.4f}, full {before[1].mean():.4f}")
    if not minutes:
        graphopt.save(cheap, directory, source=model)
        return
    # The table of words was not made cheaper; steps that leave it alone take less time.
    for name, parameter in cheap.named_parameters():
        parameter.requires_grad_(not name.endswith("word_embeddings.weight"))
    judged = Texts(lines[JUDGED], tokenizer, rows)
    inside = range(len(lines[JUDGED]))
    recovered = graphopt.recover(
        cheap,
        dense,
        Texts(lines[TRAINED], tokenizer, rows),
        held_out=[*judged.padded(inside[::2]), *judged.joined(inside[1::2])],
        minutes=minutes,
        learning_rate=learning_rate,
        layerwise=layerwise,
        autocast=None if autocast == "float32" else getattr(torch, autocast),
        store=None if store is None else store / "recovery",
    )
    report = recovery_of(recovered)
    assert report is not None
    for point in report.history:
        typer.echo(
            f"{point.seconds:5.0f} s, {point.phase}: loss {point.loss:.4f}, {point.judgement}"
        )
    typer.echo(str(report))
    after = [cosines(recovered, dense, part) for part in (padded, full)]
    graphopt.save(recovered, directory, source=model)
    row = Row(
        recipe=recipe if optimized is None else optimized.name,
        budget=budget if optimized is None else "",
        minutes=minutes,
        autocast=autocast,
        learning_rate=learning_rate,
        layerwise=layerwise,
        flops_share=graphopt.report(recovered).flops_share or 1.0,
        steps=report.steps,
        seconds=report.seconds,
        stopped=report.stopped,
        padded_before=before[0].mean().item(),
        padded_after=after[0].mean().item(),
        padded_smallest=after[0].min().item(),
        full_before=before[1].mean().item(),
        full_after=after[1].mean().item(),
        full_smallest=after[1].min().item(),
    )
    write_csv(output, [row], environment())
    typer.echo(f"{row}")


def _is_recipe(name: str) -> bool:
    try:
        load_recipe(name)
    except graphopt.errors.GraphoptError:
        return False
    return True


if __name__ == "__main__":
    typer.run(main)
