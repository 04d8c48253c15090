"""Language models on code: .py files as bytes, those of this Python's library and packages.

Files go to one of two halves by the name of their package; a hundredth of each half tunes, another
one tests. A model is trained on the second half, from scratch or from a checkpoint that was trained
on the first half.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tasks import Batch, Quality, Split

_VOCABULARY = 256
_EVALUATED_BYTES = 2**18
_EVALUATED = 64
_LEAST_BYTES = 20_000_000
_PARTS = 100


class Language:
    """The workload; arguments of the model are those of `GPT2Config`.

    A checkpoint has its own; there `frozen` is the number of first blocks that are not trained, and
    with them the embeddings, of which one is the head too.

    Args:
        data: Folder of the .py files, None for this Python's own.
        checkpoint: Directory of a checkpoint to adapt, None to start from random weights.
        length: Bytes of a sample.
        half: Half of the corpus that is trained on, 0 or 1.
        largest_bytes: Bytes of a half to use.
    """

    def __init__(
        self,
        data: Path | None,
        checkpoint: Path | None,
        *,
        length: int = 128,
        half: int = 1,
        largest_bytes: int = 30_000_000,
    ) -> None:
        self._data = data
        self._checkpoint = checkpoint
        self._length = length
        self._half = half
        self._largest_bytes = largest_bytes

    @property
    def samples(self) -> int:
        """Number of windows that do not overlap."""
        return (len(self._corpus["training"]) - 1) // self._length

    def model(self, seed: int, arguments: Mapping[str, Any]) -> nn.Module:
        """Return a new model, or the checkpoint."""
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(seed)
        if self._checkpoint is not None:
            adapted: nn.Module = GPT2LMHeadModel.from_pretrained(self._checkpoint)
            _freeze(adapted, arguments.get("frozen", 0))
            return adapted
        sizes = {"vocab_size": _VOCABULARY, "n_positions": self._length, "use_cache": False}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        model: nn.Module = GPT2LMHeadModel(GPT2Config(**{**sizes, **drops, **ends, **arguments}))
        return model

    def grouped(self, order: Sequence[int], size: int, seed: int) -> list[list[int]]:
        """Return the epoch in its order, without a last, smaller batch."""
        starts = range(0, len(order) - size + 1, size)
        return [list(order[start : start + size]) for start in starts]

    def batch(self, samples: Sequence[int], seed: int) -> Batch:
        """Return windows of the corpus [sample, byte]."""
        return self._windows("training", samples)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of every window's bytes."""
        logits = model(input_ids=batch["input_ids"]).logits.float()
        each = F.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        return each.mean(1)

    def evaluate(self, model: nn.Module, split: Split) -> Quality:
        """Return loss and accuracy per byte."""
        count = min(len(self._corpus[split]) - 1, _EVALUATED_BYTES) // self._length
        loss = right = 0.0
        for start in range(0, count, _EVALUATED):
            batch = self._windows(split, range(start, min(start + _EVALUATED, count)))
            logits = model(input_ids=batch["input_ids"]).logits.float().transpose(1, 2)
            loss += F.cross_entropy(logits, batch["labels"], reduction="sum").item()
            right += (logits.argmax(1) == batch["labels"]).sum().item()
        predicted = count * self._length
        return Quality(loss=loss / predicted, accuracy=100 * right / predicted)

    def _windows(self, part: str, samples: Sequence[int]) -> Batch:
        starts = torch.tensor(list(samples)) * self._length
        window = self._corpus[part][starts[:, None] + torch.arange(self._length + 1)].long()
        return {"input_ids": window[:, :-1].contiguous(), "labels": window[:, 1:].contiguous()}

    @cached_property
    def _corpus(self) -> dict[str, Tensor]:
        """Return the bytes of every part."""
        parts: dict[str, list[bytes]] = {"training": [], "tuning": [], "test": []}
        size = 0
        for path, half, number in _files(self._data):
            if half != self._half or size >= self._largest_bytes:
                continue
            content = path.read_bytes()
            size += len(content)
            parts[{0: "tuning", 1: "test"}.get(number, "training")].append(content)
        least = min(_LEAST_BYTES, self._largest_bytes) // 2
        if size < least or not all(parts.values()):
            empty = [name for name, files in parts.items() if not files]
            raise SystemExit(
                f"expected at least {least:,} bytes of Python files in half {self._half}, some for "
                f"each of training, tuning and test; got {size:,}, none for {empty or 'no part'}; "
                "install more packages, or pass a folder of more of them as --data"
            )
        return {
            name: torch.frombuffer(bytearray(b"\n".join(files)), dtype=torch.uint8)
            for name, files in parts.items()
        }


def _freeze(model: Any, blocks: int) -> None:
    parts = (model.transformer.wte, model.transformer.wpe, *model.transformer.h[:blocks])
    for part in parts if blocks else ():
        part.requires_grad_(False)


def _files(data: Path | None) -> list[tuple[Path, int, int]]:
    """Return files with their half and a number below 100, in an order drawn by their names."""
    own = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    found = []
    for root in own if data is None else {data}:
        for path in root.rglob("*.py"):
            inside = path.relative_to(root)
            if root == Path(sysconfig.get_path("stdlib")) and "site-packages" in inside.parts:
                continue
            number = _number(str(inside))
            found.append((number, path, _number(inside.parts[0]) % 2))
    found.sort(key=lambda item: (item[0], str(item[1])))
    return [(path, half, number % _PARTS) for number, path, half in found]


def _number(text: str) -> int:
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
