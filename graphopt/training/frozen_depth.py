"""How many of the first blocks may stay frozen: a short probe on a share of the data decides."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.errors import ConfigError, TrainingError
from graphopt.passes.frozen_depths import FrozenDepth, frozen_depths

from .executed_flops import ExecutedFlops
from .ranks import refuse_wrapped, summed

Loss = Callable[[nn.Module, Any], Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_SHARES = (1 / 3, 1 / 2, 2 / 3)
_HELD_OUT = 5
"""Every fifth batch is not trained on."""


@dataclass(frozen=True)
class DepthProbe:
    """What a probe found, and what it cost.

    Attributes:
        depth: Number of first blocks that may be frozen, 0 for none.
        frozen: Names of the parameters that are frozen then.
        losses: Mean held-out loss by depth, as far as it was tried.
        flops: Operations that the probe executed, to be charged: `ledger.charge(probe.flops,
            seconds=probe.seconds, kind="probe")`, `clock.charge(probe.flops)`.
        seconds: Time that it took.
    """

    depth: int
    frozen: tuple[str, ...]
    losses: dict[int, float]
    flops: int
    seconds: float

    def freeze(self, model: nn.Module) -> None:
        """Set `requires_grad=False` on the parameters of the chosen depth."""
        for name in self.frozen:
            model.get_parameter(name).requires_grad_(False)


def choose_frozen_depth(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: MakeOptimizer,
    *,
    loss: Loss | None = None,
    depths: Sequence[int] | None = None,
    share: float = 0.05,
    tolerance: float = 0.005,
    seed: int = 0,
    progress: bool = True,
) -> DepthProbe:
    """Find the most blocks that can be frozen at hardly any loss.

    The model is trained from where it is on a share of the data, once with nothing frozen and then
    from the deepest candidate upwards, on the same batches with the same random numbers, until the
    held-out loss is close enough to that of depth 0. The model is restored to the last bit, and so
    are modes, gradients and random numbers. On several ranks every rank probes its own data, and
    all decide by the mean loss.

    AutoFreeze (Liu et al. 2021, arXiv 2102.01386) freezes layers whose gradients fade; a probe of
    the loss itself is what this does.

    Args:
        model: The model, not yet optimized; on DistributedDataParallel, the module inside.
        batches: Training batches, in the order in which they are to be used.
        optimizer: Makes the optimizer for the parameters it is given, as the training will.
        loss: (model, batch) -> scalar; None takes `model(**batch).loss`.
        depths: Numbers of first blocks to try; None tries a third, a half and two thirds.
        share: Share of the batches to use, at least 10 batches; without a length all are used.
        tolerance: Largest relative rise of the held-out loss.
        seed: Seed of the random numbers.
        progress: Show a bar on a terminal.

    Raises:
        ConfigError: if a share, tolerance or depth makes no sense, or there are too few batches.
        TrainingError: if the model has no residual stream to cut, or is wrapped.
    """
    refuse_wrapped(model, "probing depths")
    if not 0 < share <= 1 or not tolerance >= 0:
        raise ConfigError(
            f"expected a share in (0, 1] and a tolerance of at least 0, got {share} and {tolerance}"
        )
    used = _share(batches, share)
    score = loss or _own_loss
    known = {item.depth: item for item in _depths(model, used[0])}
    wanted = _wanted(known, depths)
    started = time.perf_counter()
    losses: dict[int, float] = {}
    with ExecutedFlops() as executed, _steps(len(used) * (1 + len(wanted)), progress) as advance:
        chosen = known[0]
        for depth in (0, *wanted):
            with _restored(model):
                losses[depth] = _held_out_loss(
                    model, known[depth], used, optimizer, score, seed, advance
                )
            if depth and losses[depth] <= losses[0] * (1 + tolerance):
                chosen = known[depth]
                break
    return DepthProbe(
        depth=chosen.depth,
        frozen=chosen.parameters,
        losses=losses,
        flops=executed.flops,
        seconds=time.perf_counter() - started,
    )


def _share(batches: Iterable[Any], share: float) -> list[Any]:
    """Return the first batches, as many as the share says."""
    count = None
    if isinstance(batches, Sized):
        count = max(math.ceil(len(batches) * share), 2 * _HELD_OUT)
    used = list(islice(batches, count))
    if len(used) < _HELD_OUT:
        raise ConfigError(
            f"expected at least {_HELD_OUT} batches to probe with, got {len(used)}; pass more data "
            "or smaller batches"
        )
    return used


def _depths(model: nn.Module, batch: Any) -> tuple[FrozenDepth, ...]:
    found = frozen_depths(capture(model, batch))
    if len(found) == 1:
        raise TrainingError(
            f"expected a model with a residual stream, found none in {type(model).__name__}; "
            "freeze its first layers by name"
        )
    return found


def _wanted(known: dict[int, FrozenDepth], depths: Sequence[int] | None) -> list[int]:
    """Return the depths to try, the deepest first."""
    last = max(known)
    if depths is None:
        return sorted({round(last * part) for part in _SHARES} - {0, last}, reverse=True)
    unknown = [depth for depth in depths if depth not in known]
    if unknown:
        raise ConfigError(f"expected depths from 0 to {last}, got {unknown[0]}")
    return sorted({*depths} - {0}, reverse=True)


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    result = getattr(model(**batch), "loss", None)
    if not isinstance(result, Tensor):
        raise ConfigError(
            f"expected {type(model).__name__} to return a loss for these batches, got none; add "
            "labels to them or pass loss=lambda model, batch: ..."
        )
    return result


def _held_out_loss(
    model: nn.Module,
    depth: FrozenDepth,
    batches: Sequence[Any],
    make: MakeOptimizer,
    loss: Loss,
    seed: int,
    advance: Callable[[], None],
) -> float:
    """Train the blocks above a depth for one epoch; return the mean loss on held-out batches."""
    torch.manual_seed(seed)
    for name in depth.parameters:
        model.get_parameter(name).requires_grad_(False)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    held_out = batches[_HELD_OUT - 1 :: _HELD_OUT]
    model.train()
    with torch.enable_grad():
        for number, batch in enumerate(batches, 1):
            if number % _HELD_OUT == 0:
                continue
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            advance()
    model.eval()
    with torch.no_grad():
        total = torch.zeros(2, dtype=torch.float64)
        for batch in held_out:
            total += torch.tensor([loss(model, batch).item(), 1.0], dtype=torch.float64)
            advance()
    sum_of_losses, count = summed(total, None).tolist()
    return float(sum_of_losses / count)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Give a model back all that training changes."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    wanted = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    for parameter, _, _ in wanted:
        parameter.grad = None
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
            for parameter, requires_grad, gradient in wanted:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
            for module, training in modes:
                module.training = training


@contextmanager
def _steps(count: int, show: bool) -> Iterator[Callable[[], None]]:
    """Show a bar over a number of steps; it is for people, so only on a terminal."""
    if not (show and sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("frozen depth", total=count)
        yield lambda: bar.advance(task)
