"""Texts of the deployment race: padded as they come, and joined until they fill every token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from minilm_protocol import read_texts
from torch import Tensor

LENGTH = 128
BATCH = 32
_FIRST_CALIBRATION_TEXT = 4000

Batch = Mapping[str, Tensor]
Runner = Callable[[Batch], Tensor]
"""Returns the last hidden state [batch, tokens, width]."""


@dataclass(frozen=True)
class InputSet:
    """Tokenized texts of one kind.

    Attributes:
        name: "padded" or "full".
        test: Batches of 32 texts, padded to 128 tokens.
        calibration: Batches of other texts, half of each kind; the same for both sets.
    """

    name: str
    test: list[dict[str, Tensor]]
    calibration: list[dict[str, Tensor]]

    @property
    def real_share(self) -> float:
        """Share of tokens that are not padding."""
        return torch.cat([batch["attention_mask"] for batch in self.test]).float().mean().item()


def input_sets(data: Path, model: Path, texts: int, calibration_texts: int) -> list[InputSet]:
    """Return both sets; test texts come from the first rows, calibration texts from others."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = read_texts(data)
    test, calibration = rows[:_FIRST_CALIBRATION_TEXT], rows[_FIRST_CALIBRATION_TEXT:]

    def batches(chosen: Sequence[str]) -> list[dict[str, Tensor]]:
        tokens = tokenizer(
            list(chosen),
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        names = ("input_ids", "attention_mask")
        return [
            {name: tokens[name][start : start + BATCH] for name in names}
            for start in range(0, len(chosen), BATCH)
        ]

    def joined(chosen: Sequence[str], count: int) -> list[str]:
        found, current, length = [], "", 0
        for text in chosen:
            current, length = f"{current} {text}", length + len(tokenizer.tokenize(text))
            if length >= LENGTH:
                found.append(current)
                current, length = "", 0
        return found[:count]

    half = calibration_texts // 2
    seen = batches(joined(calibration, half)) + batches(calibration[-half:])
    return [
        InputSet("full", batches(joined(test, texts)), seen),
        InputSet("padded", batches(test[:texts]), seen),
    ]


def pooled(run: Runner, batches: Sequence[Batch]) -> Tensor:
    """Return mean-pooled embeddings [texts, width]."""
    results = []
    with torch.inference_mode():
        for batch in batches:
            states = run(batch).float()
            weights = batch["attention_mask"].unsqueeze(-1).to(states)
            results.append((states * weights).sum(1) / weights.sum(1))
    return torch.cat(results)


def cosines(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Return mean and smallest cosine of embeddings [texts, width]."""
    values = F.cosine_similarity(found, wanted)
    return values.mean().item(), values.min().item()
