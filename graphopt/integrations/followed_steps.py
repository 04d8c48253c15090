"""The steps of somebody else's loop: counted in a ledger, and told to a clock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from graphopt.errors import TrainingError
from graphopt.training import ComputeClock, Entry, Ledger


class FollowedSteps:
    """A ledger and a clock that a callback keeps up to date.

    Args:
        ledger: A ledger, or the path of its file; None keeps totals only.
        clock: What the gates follow; None lets the callback make it.
    """

    def __init__(self, ledger: Ledger | str | Path | None, clock: ComputeClock | None) -> None:
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self.clock = clock
        self._entry: Entry | None = None
        self._losses: list[Tensor] = []

    @property
    def counting(self) -> bool:
        """Whether a step has begun."""
        return self._entry is not None

    def begin(self) -> None:
        """Count from here, instead of what an error may have left open."""
        self.drop()
        self._entry, self._losses = self.ledger.begin(), []

    def saw(self, batch: Any, loss: Any) -> None:
        """Note a batch [batch, ...] of the step, and its loss.

        Args:
            batch: A tensor, or a collection of tensors; token ids are its "input_ids".
            loss: A tensor; anything else is no loss.
        """
        if self._entry is None:
            return
        items = list(batch.values()) if isinstance(batch, Mapping) else batch
        first = next(iter(items), None) if isinstance(items, (list, tuple)) else items
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if isinstance(first, Tensor) and first.dim():
            self._entry.samples += first.shape[0]
        if isinstance(tokens, Tensor):
            self._entry.tokens += tokens.numel()
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())

    def end(self) -> None:
        """Write the step down and advance the clock."""
        entry, self._entry = self._entry, None
        if entry is None or self.clock is None:
            raise TrainingError(
                "expected a training step to end, got none that began; pass the callback to a "
                "Trainer instead of calling it"
            )
        if self._losses:
            entry.loss = sum(float(loss) for loss in self._losses) / len(self._losses)
        self.ledger.finish(entry)
        self.clock.step(entry)

    def drop(self) -> None:
        """Count no further."""
        self._entry = None
        self.ledger.drop()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both, JSON values."""
        assert self.clock is not None
        return {"clock": self.clock.state_dict(), "ledger": self.ledger.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the step of a `state_dict`."""
        assert self.clock is not None
        self.clock.load_state_dict(state["clock"])
        self.ledger.load_state_dict(state["ledger"])
