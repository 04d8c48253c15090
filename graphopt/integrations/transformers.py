"""`transformers.Trainer` with a clock and a ledger: one callback.

from graphopt.integrations.transformers import GraphoptCallback

Trainer(model, args, train_dataset=data, callbacks=[GraphoptCallback("run.jsonl")]).train()
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from graphopt.errors import MissingExtraError
from graphopt.training import ComputeClock, Ledger

from .followed_steps import FollowedSteps

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError(
        "GraphoptCallback needs transformers, which is not installed; "
        "pip install 'graphopt[hf]' accelerate"
    ) from error

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

_STATE = "graphopt"


class GraphoptCallback(TrainerCallback):  # type: ignore[misc]
    """Advances the gates of a model that a `Trainer` trains, and writes down what steps cost.

    State is part of the Trainer's checkpoints: `train(resume_from_checkpoint=...)` goes on with
    the clock, the gates and the ledger where the checkpoint was written.

    For a learning rate that follows the clock, make the clock first:

        clock = ComputeClock(model, planned_flops=budget)
        Trainer(..., callbacks=[GraphoptCallback(clock=clock)],
                optimizers=(optimizer, clock.learning_rate(optimizer)))

    Args:
        ledger: A ledger, or the path of its file; None keeps totals only.
        clock: What the gates follow; None makes a clock over the Trainer's steps.
    """

    def __init__(
        self, ledger: Ledger | str | Path | None = None, *, clock: ComputeClock | None = None
    ) -> None:
        self._steps = FollowedSteps(ledger, clock)
        self._watch: Any = None

    @property
    def ledger(self) -> Ledger:
        """What the steps cost."""
        return self._steps.ledger

    @property
    def clock(self) -> ComputeClock | None:
        """What the gates follow; None before the training, if it was not given."""
        return self._steps.clock

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Make the clock, and go on where a checkpoint was written."""
        self._stop()
        if self._steps.clock is None:
            self._steps.clock = ComputeClock(model, planned_steps=state.max_steps)
        if _STATE in state.stateful_callbacks:
            self._steps.load_state_dict(state.stateful_callbacks[_STATE])
        self._watch = model.register_forward_hook(self._saw, with_kwargs=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count from here."""
        self._steps.begin()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count to here: the scheduler's step comes next, and may follow the clock."""
        self._steps.end()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Put the state where the Trainer's next checkpoint takes it from."""
        state.stateful_callbacks[_STATE] = self._steps.state_dict()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave the model as it was."""
        self._stop()

    def _stop(self) -> None:
        self._steps.drop()
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _saw(
        self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], outputs: Any
    ) -> None:
        if model.training:
            loss = outputs.get("loss") if isinstance(outputs, dict) else None
            self._steps.saw(inputs or args, loss)
