"""The training loop of a recovery: two phases, the best weights, and a place to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import CheckpointError, TrainingError

from .recovery_batches import TrainingBatches
from .recovery_outputs import Batch, HeldOut
from .recovery_report import (
    Judgement,
    RecoveryPoint,
    RecoveryReport,
    points_from,
    points_state,
)
from .recovery_sites import Sites
from .saved_training import STATE_FILE, load_training, save_training
from .schedules import warmup_linear

_JUDGINGS = 20
_JUDGING_SHARE = 0.1
"""Most of the time that judging may take."""
_PATIENCE = 1 / 5
"""Share of the schedule without improvement after which the best weights are gone back to."""
_RETURNS = 2
_SLOWER = 1 / 3
"""What a return multiplies the learning rate by."""
_GRADIENT_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class RecoverySettings:
    """What `recover` was asked for.

    Attributes:
        seconds: Time to spend.
        steps: Most training steps, None for no limit; the schedule then follows them.
        learning_rate: The highest of the schedule.
        layerwise: Share of the schedule for blocks alone.
        autocast: Type of matrix products, None for that of the model.
        store: Directory to go on from.
        progress: Told about every step.
    """

    seconds: float
    steps: int | None
    learning_rate: float
    layerwise: float
    autocast: torch.dtype | None
    store: Path | None
    progress: Callable[[str, int, int], None] | None


class RecoveryLoop:
    """Trains a cheap model until the time is up; made when the time begins.

    Its state (`state_dict`) is what `save_training` keeps beside model and optimizer.
    """

    def __init__(self, settings: RecoverySettings) -> None:
        """Start the clock."""
        self._settings = settings
        self._started = time.monotonic()
        self._spent_before = 0.0
        self._prepared_at = 0.0
        self._steps = 0
        self._longest_step = 0.0
        self._judging_seconds = 0.0
        self._judged_at = (0.0, 0)
        self._improved_at = settings.layerwise
        self._returns = 0
        self._losses: list[float] = []
        self._points: list[RecoveryPoint] = []

    def run(
        self, student: nn.Module, teacher: nn.Module, batches: TrainingBatches, examined: HeldOut
    ) -> RecoveryReport:
        """Train, and leave the best weights in the student.

        Args:
            student: The cheap model, in evaluation mode.
            teacher: The dense model, in evaluation mode.
            batches: What to train on.
            examined: What to judge by.

        Raises:
            TrainingError: if no output and no hidden value depends on a trained parameter.
            CheckpointError: if the store belongs to another model, or is damaged.
        """
        self._student, self._teacher = student, teacher
        self._batches, self._examined = batches, examined
        self._parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self._optimizers = _optimizers(student, self._parameters.values())
        self._sites = self._matched()
        self._best = self._copied()
        self._before = self._after = self._judgement()
        self._prepared_at = self._spent()
        self._judged_at = (self._prepared_at, 0)
        if self._settings.store is not None and (self._settings.store / STATE_FILE).exists():
            load_training(self._settings.store, model=student, recovery=self, **self._optimizers)
        try:
            stopped = self._train()
        except KeyboardInterrupt:
            stopped = "interrupted"
            self._save()
        finally:
            self._clear_gradients()
            self._restore_best()
        return RecoveryReport(
            before=self._before,
            after=self._after,
            seconds=self._spent(),
            steps=self._steps,
            stopped=stopped,
            sites=self._sites.names,
            history=tuple(self._points),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the model and the optimizer."""
        return {
            "seconds": self._spent(),
            "prepared_at": self._prepared_at,
            "steps": self._steps,
            "rounds": self._batches.rounds,
            "taken": self._batches.taken,
            "judged_at": list(self._judged_at),
            "improved_at": self._improved_at,
            "returns": self._returns,
            "before": asdict(self._before),
            "after": asdict(self._after),
            "points": points_state(self._points),
            "best": self._best,
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on after a stop.

        Raises:
            CheckpointError: if the state is damaged or of another model.
        """
        try:
            self._spent_before = float(state["seconds"])
            self._started = time.monotonic()
            self._prepared_at = float(state["prepared_at"])
            self._steps = int(state["steps"])
            self._batches.rounds, self._batches.taken = int(state["rounds"]), int(state["taken"])
            seconds, steps = state["judged_at"]
            self._judged_at = (float(seconds), int(steps))
            self._improved_at = float(state["improved_at"])
            self._returns = int(state["returns"])
            self._before, self._after = Judgement(**state["before"]), Judgement(**state["after"])
            best = dict(state["best"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the state of a recovery is damaged: {error}") from error
        self._points = points_from(state["points"])
        if best.keys() != self._parameters.keys():
            raise CheckpointError(
                "the store of this recovery trained other parameters; set requires_grad as then, "
                "or pass another directory"
            )
        self._best = best

    def _train(self) -> str:
        """Train until something says stop; return what."""
        batches = iter(self._batches)
        while True:
            stopped = self._reason_to_stop()
            if self._steps > self._judged_at[1] and (stopped is not None or self._judging_due()):
                self._judge()
                self._save()
                stopped = self._reason_to_stop()
            if stopped is not None:
                return stopped
            began = time.monotonic()
            self._step(next(batches))
            self._longest_step = max(self._longest_step, time.monotonic() - began)
            self._tell()

    def _step(self, batch: Batch) -> None:
        settings, outputs = self._settings, self._examined.outputs
        share = self._share()
        self._sites.alone = share < settings.layerwise
        rate = settings.learning_rate * _SLOWER**self._returns * warmup_linear(share)
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
        with torch.enable_grad(), self._sites.watched(outputs.real(batch)) as errors:
            with self._precision():
                with torch.no_grad():
                    wanted = outputs.call(self._teacher, batch)
                found = outputs.call(self._student, batch)
            loss = self._loss(outputs.error(found, wanted, batch), errors)
        self._clear_gradients()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), _GRADIENT_NORM)
        if torch.isfinite(norm):  # a step on a batch that overflowed would spoil all weights
            for optimizer in self._optimizers.values():
                optimizer.step()
        self._steps += 1
        self._losses.append(loss.item())

    def _loss(self, output: Tensor | None, sites: list[Tensor]) -> Tensor:
        """Return the error of the outputs plus the mean error of the sites."""
        parts = [] if output is None else [output]
        learned = [error for error in sites if error.requires_grad]
        if learned:
            parts.append(torch.stack(learned).mean())
        if not parts:
            raise TrainingError(
                "expected outputs or hidden values that depend on trained parameters, got none; "
                "set requires_grad=True on what may be trained"
            )
        return torch.stack(parts).sum()

    def _precision(self) -> AbstractContextManager[Any]:
        dtype = self._settings.autocast
        device = next(iter(self._parameters.values())).device.type
        return nullcontext() if dtype is None else torch.autocast(device, dtype)

    def _matched(self) -> Sites:
        outputs, (batch, _) = self._examined.outputs, self._examined.references[0]
        sites = Sites(self._student, self._teacher)
        sites.match(lambda model: outputs.call(model, batch), outputs.real(batch))
        return sites

    def _judgement(self) -> Judgement:
        began = time.monotonic()
        found = self._examined.judge(self._student)
        self._judging_seconds = max(self._judging_seconds, time.monotonic() - began)
        return found

    def _judge(self) -> None:
        """Judge the weights as they are; keep them if they are the best so far."""
        found = self._judgement()
        losses, self._losses = self._losses, []
        self._points.append(
            RecoveryPoint(
                seconds=self._spent(),
                steps=self._steps,
                phase=self._phase(),
                loss=sum(losses) / len(losses) if losses else float("nan"),
                judgement=found,
            )
        )
        self._judged_at = (self._spent(), self._steps)
        if found.better_than(self._after):
            self._after, self._best = found, self._copied()
            self._improved_at = max(self._improved_at, self._share())
        elif self._is_stale() and self._returns < _RETURNS:
            self._returns += 1
            self._improved_at = self._share()
            for optimizer in self._optimizers.values():
                optimizer.state.clear()
            self._restore_best()

    def _judging_due(self) -> bool:
        seconds, steps = self._judged_at
        if self._settings.steps is not None:
            return self._steps - steps >= max(self._settings.steps // _JUDGINGS, 1)
        pause = max(self._settings.seconds / _JUDGINGS, self._judging_seconds / _JUDGING_SHARE)
        return self._spent() - seconds >= pause

    def _reason_to_stop(self) -> str | None:
        # The model is judged once more at the end.
        if self._spent() + self._longest_step + self._judging_seconds > self._settings.seconds:
            return "time"
        if self._settings.steps is not None and self._steps >= self._settings.steps:
            return "steps"
        if self._is_stale() and self._returns == _RETURNS:
            return "no improvement"
        return None

    def _is_stale(self) -> bool:
        return self._share() - self._improved_at > _PATIENCE

    def _share(self) -> float:
        """Return how much of the schedule is done, in [0, 1]."""
        if self._settings.steps is not None:
            return min(self._steps / self._settings.steps, 1.0)
        whole = self._settings.seconds - self._judging_seconds - self._prepared_at
        return min((self._spent() - self._prepared_at) / max(whole, 1e-9), 1.0)

    def _spent(self) -> float:
        return self._spent_before + time.monotonic() - self._started

    def _phase(self) -> str:
        return "layer-wise" if self._sites.alone else "end-to-end"

    def _tell(self) -> None:
        settings = self._settings
        if settings.progress is None:
            return
        label = f"recover {self._phase()}"
        if settings.steps is not None:
            settings.progress(label, self._steps, settings.steps)
        else:
            settings.progress(label, int(self._spent()), int(settings.seconds))

    def _save(self) -> None:
        if self._settings.store is not None:
            save_training(
                self._settings.store, model=self._student, recovery=self, **self._optimizers
            )

    def _clear_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def _restore_best(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._best[name])

    def _copied(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._parameters.items()}


def _optimizers(model: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
    """Return Muon for the matrices of layers, and AdamW for tables, norms, biases and kernels.

    Both move weights by about the learning rate times 0.2 (root mean square), so one rate serves.

    Source: Jordan et al., Muon, 2024; Liu et al., Muon is Scalable for LLM Training, 2025.
    """
    tables = {
        id(weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for weight in module.parameters()
    }
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for item in parameters:
        (matrices if item.dim() == 2 and id(item) not in tables else others).append(item)
    made: dict[str, Any] = {}
    if matrices:
        made["matrices"] = torch.optim.Muon(
            matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
    if others:
        fused = all(item.device.type in ("cpu", "cuda") for item in others)
        made["others"] = torch.optim.AdamW(others, weight_decay=0.0, fused=fused)
    return made
