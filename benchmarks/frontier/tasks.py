"""What a workload gives to a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from .study import Study

Batch = dict[str, Tensor]
Split = Literal["tuning", "test"]


@dataclass(frozen=True)
class Quality:
    """What a model does on held-out samples.

    Attributes:
        loss: Mean cross-entropy in nats.
        accuracy: Share of samples that are right, in percent.
    """

    loss: float
    accuracy: float


class Task(Protocol):
    """Data and models of a workload; the split "test" is never tuned on."""

    @property
    def samples(self) -> int:
        """Number of training samples."""
        ...

    def model(self, seed: int, arguments: Mapping[str, Any]) -> nn.Module:
        """Return a new model, or a checkpoint with a new head."""
        ...

    def grouped(self, order: Sequence[int], size: int, seed: int) -> list[list[int]]:
        """Return an epoch's samples in batches."""
        ...

    def batch(self, samples: Sequence[int], seed: int) -> Batch:
        """Return training samples; the seed draws the augmentation."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of every sample [sample]."""
        ...

    def evaluate(self, model: nn.Module, split: Split) -> Quality:
        """Return a model's quality; it is in evaluation mode."""
        ...


def load_task(data: Path | None, checkpoint: Path | None, study: Study) -> Task:
    """Return the workload of a study.

    Raises:
        SystemExit: if it lacks data.
    """
    if study.workload == "language":
        from .language import Language

        return Language(data, checkpoint, **study.options)
    if data is None:
        raise SystemExit(f"the workload {study.workload!r} needs --data; its module says which")
    if study.workload == "images":
        from .images import Images

        return Images(data)
    from .topics import Topics

    return Topics(data, checkpoint, **study.options)
