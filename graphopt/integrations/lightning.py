"""`lightning.pytorch.Trainer` with a clock and a ledger: one callback.

from graphopt.integrations.lightning import GraphoptCallback

Trainer(max_steps=1000, callbacks=[GraphoptCallback("run.jsonl")]).fit(module, loader)
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from graphopt.errors import ConfigError, MissingExtraError
from graphopt.training import ComputeClock, Ledger

from .followed_steps import FollowedSteps

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingExtraError(
        "GraphoptCallback needs lightning, which is not installed; "
        "pip install 'graphopt[lightning]'"
    ) from error


class GraphoptCallback(Callback):  # type: ignore[misc]
    """Advances the gates of a module that a `Trainer` trains, and writes down what steps cost.

    State is part of Lightning's checkpoints: `fit(..., ckpt_path=...)` goes on with the clock, the
    gates and the ledger where the checkpoint was written. A scheduler that follows the clock
    (`clock.learning_rate`) is one step behind it, because Lightning calls it before the callback.

    Args:
        ledger: A ledger, or the path of its file; None keeps totals only.
        clock: What the gates follow; None makes a clock over the Trainer's optimizer steps.
    """

    def __init__(
        self, ledger: Ledger | str | Path | None = None, *, clock: ComputeClock | None = None
    ) -> None:
        self._steps = FollowedSteps(ledger, clock)
        self._resumed: dict[str, Any] | None = None
        self._done_steps = 0

    @property
    def ledger(self) -> Ledger:
        """What the steps cost."""
        return self._steps.ledger

    @property
    def clock(self) -> ComputeClock | None:
        """What the gates follow; None before the training, if it was not given."""
        return self._steps.clock

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the clock, and go on where a checkpoint was written.

        Raises:
            ConfigError: The training has no end, and no clock was given.
        """
        if self._steps.clock is None:
            planned = trainer.estimated_stepping_batches
            if not math.isfinite(planned):
                raise ConfigError(
                    "expected a training with an end, got a Trainer without one; pass max_steps or "
                    "max_epochs to the Trainer, or a clock to GraphoptCallback"
                )
            self._steps.clock = ComputeClock(pl_module, planned_steps=int(planned))
        if self._resumed is not None:
            self._steps.load_state_dict(self._resumed)
            self._resumed = None
        self._done_steps = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count from the first batch of an optimizer step."""
        if not self._steps.counting:
            self._steps.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count to the last batch of an optimizer step."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._steps.saw(batch, loss)
        if trainer.global_step != self._done_steps:
            self._done_steps = trainer.global_step
            self._steps.end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count no further."""
        self._steps.drop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Count no further."""
        self._steps.drop()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of clock and ledger for Lightning's checkpoint."""
        return {} if self._steps.clock is None else self._steps.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what to go on from when the training starts."""
        self._resumed = state_dict or None
