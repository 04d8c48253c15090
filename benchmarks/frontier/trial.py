"""One training of a study: an arm on a budget of operations, with a learning rate and a seed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import graphopt
from graphopt.training import ComputeClock, EvenBatches, ExecutedFlops, Ledger, SampleGate

from .study import Arm, Samples, Study
from .tasks import Batch, Split, Task

Precision = Literal["float32", "bfloat16"]
"""What arms are trained in; the second is autocast."""

_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Trial:
    """What came out of a training.

    Attributes:
        arm: Name of the arm.
        share: Its budget as a share of the dense model's full one.
        rate: Peak learning rate.
        seed: Seed of weights, order and augmentation; those up to 0 tune.
        precision: "float32" or "bfloat16" (autocast).
        loss: Held-out loss: of the test split, for seeds that tune of the tuning split.
        accuracy: Held-out accuracy, in percent.
        flops: Operations executed in all, without evaluation.
        outside_flops: Those of them outside of training steps: analysing, calibrating, probing.
        outside_seconds: Seconds of that.
        steps: Optimizer steps.
    """

    arm: str
    share: float
    rate: float
    seed: int
    precision: str
    loss: float
    accuracy: float
    flops: int
    outside_flops: int
    outside_seconds: float
    steps: int


@dataclass
class Trainee:
    """A model of an arm with all that its training loop needs."""

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    clock: ComputeClock
    gate: SampleGate
    scheduler: torch.optim.lr_scheduler.LambdaLR
    batch: int
    seed: int
    precision: str
    weighted: bool
    even: EvenBatches | None

    def step(self, samples: Sequence[int], batch: Batch) -> Tensor:
        """Make one optimizer step; clock and scheduler are left to the caller."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            losses = self.task.losses(self.model, batch)
        ids = list(samples)
        self.gate.update(ids, losses)
        weights = self.gate.weights(ids) if self.weighted else torch.ones(len(ids))
        full = self.batch if self.even is None else self.even.samples
        loss = (losses.float() * weights).sum() / full
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _LARGEST_GRADIENT)
        self.optimizer.step()
        return loss.detach()

    def batches(self) -> Iterator[tuple[list[int], Batch]]:
        """Yield batches, epoch after epoch, without end."""
        number = 0
        while True:
            for samples in self.even or self._grouped(number):
                number += 1
                yield samples, self.task.batch(samples, self.seed * 1_000_003 + number)

    def _grouped(self, number: int) -> list[list[int]]:
        return self.task.grouped(list(self.gate), self.batch, self.seed + number)


def made(study: Study, task: Task, arm: Arm, seed: int) -> tuple[nn.Module, float]:
    """Return an arm's model, and the seconds that rewriting it took."""
    torch.manual_seed(seed)
    model = task.model(seed, {**study.model, **arm.model})
    if arm.recipe is None:
        return model, 0.0
    example = task.batch(range(study.batch), seed)
    example.pop("labels", None)
    started = time.perf_counter()
    model = graphopt.optimize(
        model.train(), example, recipe=arm.recipe, budget=arm.budget, measure=False
    )
    return model, time.perf_counter() - started


def prepared(
    study: Study, task: Task, arm: Arm, planned_flops: float, rate: float, seed: int, precision: str
) -> tuple[Trainee, int, float]:
    """Return an arm's trainee, and the operations and seconds that making it took."""
    with ExecutedFlops() as executed:
        model, seconds = made(study, task, arm, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=rate, betas=(0.9, 0.98), weight_decay=study.weight_decay, fused=True
    )
    clock = ComputeClock(model, planned_flops=planned_flops)
    clock.charge(executed.flops)
    gate = _sample_gate(arm.samples, task.samples, clock, seed)
    batch = arm.batch or study.batch
    trainee = Trainee(
        task=task,
        model=model.train(),
        optimizer=optimizer,
        clock=clock,
        gate=gate,
        scheduler=clock.learning_rate(optimizer, warmup=study.warmup),
        batch=batch,
        seed=seed,
        precision=precision,
        weighted=arm.samples.choice == "learned",
        even=_even_batches(gate, batch, task, model) if arm.even_batches else None,
    )
    return trainee, executed.flops, seconds


def run_trial(
    study: Study,
    task: Task,
    name: str,
    share: float,
    rate: float,
    seed: int,
    *,
    full_flops: float,
    precision: str = "float32",
) -> Trial:
    """Train an arm until its budget is spent, and measure what it learned."""
    trainee, flops, seconds = prepared(
        study, task, study.arm(name), share * full_flops, rate, seed, precision
    )
    ledger = Ledger()
    ledger.charge(flops, seconds=seconds, kind="outside")
    train(trainee, ledger)
    split: Split = "test" if seed > 0 else "tuning"
    with torch.no_grad():
        quality = task.evaluate(trainee.model.eval(), split)
    return Trial(
        arm=name,
        share=share,
        rate=rate,
        seed=seed,
        precision=precision,
        loss=round(quality.loss, 6),
        accuracy=round(quality.accuracy, 3),
        flops=ledger.total_flops,
        outside_flops=flops,
        outside_seconds=round(seconds, 2),
        steps=trainee.clock.steps,
    )


def train(trainee: Trainee, ledger: Ledger) -> None:
    """Train until the clock's budget is spent."""
    batches = trainee.batches()
    while not trainee.clock.finished:
        samples, batch = next(batches)
        with ledger.step(samples=len(samples)) as entry:
            entry.loss = trainee.step(samples, batch)
        trainee.clock.step(entry)
        trainee.scheduler.step()


def full_flops(study: Study, task: Task) -> float:
    """Return the operations of the full budget: the study's epochs of the dense model.

    They are proportional to the number of samples, so two samples of every length are counted.
    """
    model = task.model(0, study.model).train()
    known: dict[str, float] = {}
    total = 0.0
    for samples in task.grouped(range(task.samples), study.batch, 0):
        batch = {name: value[:2] for name, value in task.batch(samples, 0).items()}
        shapes = str([tuple(value.shape[1:]) for value in batch.values()])
        if shapes not in known:
            with ExecutedFlops() as executed:
                losses = task.losses(model, batch)
                losses.sum().backward()
            known[shapes] = executed.flops / len(losses)
        total += known[shapes] * len(samples)
    return total * study.epochs


class _UniformGate(SampleGate):
    """The naive twin: as many samples are dropped, whichever they are."""

    def __iter__(self) -> Iterator[int]:
        """Give the losses to other samples before they choose."""
        order = torch.randperm(
            len(self.scores), generator=torch.Generator().manual_seed(self.epoch)
        )
        self.scores = self.scores[order]
        return super().__iter__()


def _even_batches(gate: SampleGate, batch: int, task: Task, model: nn.Module) -> EvenBatches:
    height, width = task.batch([0], 0)["images"].shape[-2:]
    return EvenBatches(gate, batch, model, size=(height, width))


def _sample_gate(samples: Samples, count: int, clock: ComputeClock, seed: int) -> SampleGate:
    kind = _UniformGate if samples.choice == "uniform" else SampleGate
    return kind(
        count,
        progress=lambda: clock.progress,
        drop=0.0 if samples.choice == "all" else samples.drop,
        stop=samples.stop,
        seed=seed,
    )
