"""How much of the planned training is spent: what every schedule follows."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from graphopt.errors import ConfigError
from graphopt.kernels.gates import Gate

from .ledger import Entry
from .ranks import Group, collected, require_same
from .schedules import warmup_linear


class ComputeClock:
    """Tells which share of the planned training is done, and lets gates and rates follow it.

        clock = ComputeClock(model, planned_flops=budget)
        scheduler = clock.learning_rate(optimizer)
        for batch in loader:
            with ledger.step() as entry:
                ...
            clock.step(entry)
            scheduler.step()

    What makes steps cheaper must not end the training early: with half of the tokens dropped, a
    schedule over steps would be over after half of the compute. So progress is operations spent
    over operations planned. With `planned_steps` it is steps over steps instead, for loops that
    count nothing.

    Every `Gate` in the model is advanced: once when the clock is made, then at every step.

    Several ranks: operations are summed over the ranks, so that progress, and with it every gate,
    is the same on all of them. Budget and gates are compared when the clock is made, and all ranks
    must call `step()` equally often (see `in_step`).

    Args:
        model: The model with its gates, optimized or not, wrapped or not.
        planned_flops: Operations of the whole training, of all ranks, forward and backward.
        planned_steps: Optimizer steps of the whole training.
        process_group: The ranks that train together; all by default.

    Raises:
        ConfigError: Not exactly one of both is given, or it is not positive.
        TrainingError: Ranks plan different budgets or hold different gates.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        planned_flops: float | None = None,
        planned_steps: int | None = None,
        process_group: Group | None = None,
    ) -> None:
        planned = planned_flops if planned_steps is None else planned_steps
        if (planned_flops is None) == (planned_steps is None) or planned is None or planned <= 0:
            raise ConfigError(
                "expected either planned_flops or planned_steps, above 0, got "
                f"{planned_flops} and {planned_steps}"
            )
        self.planned = planned
        self.counts_steps = planned_flops is None
        self.steps = 0
        self.consumed_flops = 0
        self._group = process_group
        self._gates = [module for module in model.modules() if isinstance(module, Gate)]
        gates = [(type(gate).__name__, gate.seed, gate.number) for gate in self._gates]
        require_same("budget and gates", f"{planned} {self.counts_steps} {gates}", (), self._group)
        self._advance()

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(1.0, (self.steps if self.counts_steps else self.consumed_flops) / self.planned)

    @property
    def finished(self) -> bool:
        """Whether the plan is spent."""
        return self.progress >= 1

    def step(self, spent: Entry | int | None = None) -> float:
        """Count an optimizer step, advance the gates, and return the progress.

        Args:
            spent: The step's entry in a ledger, or the operations that this rank executed. A clock
                over steps needs neither.

        Raises:
            ConfigError: A clock over operations was not told how many.
        """
        if spent is None and not self.counts_steps:
            raise ConfigError(
                "expected what the step spent, because the clock was made with planned_flops, got "
                "nothing; pass the entry of ledger.step(), or a number of operations"
            )
        self.steps += 1
        if spent is not None:
            self.charge(spent)
        self._advance()
        return self.progress

    def charge(self, spent: Entry | int) -> None:
        """Count operations outside of steps: a probe, a calibration, the filling of a cache.

        Args:
            spent: An entry of a ledger, or the operations that this rank executed; all ranks call.
        """
        if isinstance(spent, Entry):
            self.consumed_flops += spent.flops
        else:
            self.consumed_flops += int(collected([spent], self._group).sum())

    def learning_rate(self, optimizer: Optimizer, *, warmup: float = 0.05) -> LambdaLR:
        """Return a scheduler for `peak * min(1, progress / warmup) * (1 - progress)`.

        The peak is each parameter group's rate. Call its `step()` after that of the clock, or pass
        it to what calls it, such as `Trainer(optimizers=(optimizer, scheduler))`.
        """
        share = partial(warmup_linear, warmup=warmup)
        share(0.0)
        return LambdaLR(optimizer, lambda _: share(self.progress))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, JSON values."""
        return {"steps": self.steps, "consumed_flops": self.consumed_flops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the step of a `state_dict`; the plan is that of this clock."""
        self.steps = int(state["steps"])
        self.consumed_flops = int(state["consumed_flops"])
        self._advance()

    def _advance(self) -> None:
        for gate in self._gates:
            gate.advance(self.steps, self.progress)
