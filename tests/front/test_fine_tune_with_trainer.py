"""The example runs as it stands, learns, and spends what the recipe promises."""

from __future__ import annotations

import csv
import json
import random
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

EXAMPLE = Path(__file__).parents[2] / "examples" / "fine_tune_with_trainer.py"
WORDS = ["gold", "bank", "share", "goal", "match", "team"]
LAYERS = 4

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(vocab=str(vocabulary), model_max_length=64)
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    return directory


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two topics with words of their own, texts of very different lengths."""
    draws = random.Random(0)
    path = tmp_path / "texts.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        for number in range(400):
            label = number % 2
            count = draws.choice([4, 4, 4, 40])
            words = draws.choices(WORDS[3 * label : 3 * label + 3], k=count)
            writer.writerow([label + 1, "gold", " ".join(words)])
    return path


def test_a_training_costs_less_and_learns(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import graphopt

    main = runpy.run_path(str(EXAMPLE))["main"]
    found: dict[str, Any] = main(checkpoint, texts, tmp_path / "less")
    monkeypatch.setattr(graphopt, "optimize", lambda model, *_, **__: model)
    plain: dict[str, Any] = main(checkpoint, texts, tmp_path / "plain")
    spent = {
        name: sum(json.loads(line)["flops"] for line in (tmp_path / name / "ledger.jsonl").open())
        for name in ("less", "plain")
    }
    # Half of the blocks save two thirds of their operations; the padding comes on top.
    assert spent["less"] < (1 - 1 / 2 * 2 / 3) * spent["plain"]
    uninformed = torch.tensor(2.0).log().item()
    assert found["eval_loss"] < uninformed
    assert plain["eval_loss"] < uninformed


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
