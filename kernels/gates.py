"""What decides, step by step, which part of a model computes."""

from __future__ import annotations

from hashlib import blake2b
from typing import ClassVar

import torch
from torch import nn

__all__ = ["Gate"]


class Gate(nn.Module):
    """A module whose decision is a pure function of its seed, its number, the step and progress.

    So all ranks decide alike without a message, a recomputed forward decides as the first one did,
    and resuming a training means advancing to where it stopped: none of it is in `state_dict`.
    As long as nobody advances it, a gate counts its own training forwards as steps and its progress
    stays 0.

    Attributes:
        seed: Seed of the training, the same on all ranks.
        number: Which gate of the model it is; gates of one seed draw different numbers.
        step: The training step of the present decision.
        progress: Share of the training that is done, in [0, 1]; schedules are functions of it.
        eager_refusal: Why the model's own forward, which knows no gate, must not run in evaluation
            mode; None where it computes the same.
    """

    eager_refusal: ClassVar[str | None] = None

    def __init__(self, *, seed: int = 0, number: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.number = number
        self.step = 0
        self.progress = 0.0
        self._advanced = False
        self._forwards = 0

    def advance(self, step: int, progress: float) -> None:
        """Set the step and the progress that the next forwards decide by."""
        self.step = step
        self.progress = progress
        self._advanced = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self) -> None:
        """Count a training forward, unless somebody advances the gate: first thing of a forward.

        A forward that activation checkpointing repeats within a backward is not counted.
        """
        recomputing = torch._C._current_graph_task_id() != -1
        if self.training and not self._advanced and not recomputing:
            self.step = self._forwards
            self._forwards += 1

    def generator(self) -> torch.Generator:
        """Return a generator on the CPU for this step's decision: equal on all devices."""
        text = f"{self.seed} {self.number} {self.step}"
        digest = blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def extra_repr(self) -> str:
        """Return seed and number."""
        return f"seed={self.seed}, number={self.number}"
