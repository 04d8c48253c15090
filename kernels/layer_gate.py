"""A gate that leaves out a residual block in some training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .gates import Gate

__all__ = ["LayerGate", "without_block"]


class LayerGate(Gate):
    """Runs a block `y = x + f(x)` with some probability, else returns x; evaluation always runs it.

    The probability is `keep = 1 - rate * time(progress)`, where time stays 1 up to `plateau` and
    then falls to 0 at the end. Where the block runs in training, f(x) is divided by `keep`: the
    expectation over the steps is that of the plain block. Parameters of a block that is left out
    get gradients of zero: every parameter takes part in every step, as DistributedDataParallel
    wants, and optimizers see the gradients whose expectation is right.
    Source: stochastic depth (arXiv 1603.09382).

    Attributes:
        rate: Largest probability to leave the block out, in [0, 1).
        plateau: Progress up to which it stays, in [0, 1].
    """

    def __init__(
        self, *, rate: float, plateau: float = 0.5, seed: int = 0, number: int = 0
    ) -> None:
        """Hold the schedule; a gate has no parameters and no buffers."""
        super().__init__(seed=seed, number=number)
        self.rate = rate
        self.plateau = plateau

    @property
    def keep(self) -> float:
        """Probability to run the block at the present progress."""
        if self.progress <= self.plateau:
            return 1 - self.rate
        return 1 - self.rate * max(0.0, 1 - self.progress) / (1 - self.plateau)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def skips(self) -> bool:
        """Begin a training forward and say whether it leaves the block out."""
        self.begin()
        drawn = torch.rand((), generator=self.generator(), device="cpu", dtype=torch.float64)
        return drawn.item() >= self.keep

    def forward(self, x: Tensor, *, entry: Tensor | None = None) -> Tensor:
        """Return x, the block's result: what stands in a graph; `run` is what executes.

        Args:
            x: Result of the block.
            entry: What it started from, of the same shape; None where a container calls all its
                children.
        """
        return x

    def run(
        self, entry: Tensor, block: Callable[[], Tensor], sources: Sequence[object] = ()
    ) -> Tensor:
        """Return the block's result, or in some training steps what it started from.

        Args:
            entry: What the block starts from.
            block: Computes its result, of the same shape.
            sources: What it reads; the parameters among these, and those of modules, get a
                gradient of zero where the block is left out.
        """
        if not self.training:
            return block()
        if self.skips():
            return without_block(entry, sources)
        result = block()
        if self.keep == 1:
            return result
        return torch.lerp(entry.to(result.dtype), result, 1 / self.keep)

    def extra_repr(self) -> str:
        """Return the schedule, seed and number."""
        return f"rate={self.rate:.3g}, plateau={self.plateau}, {super().extra_repr()}"


def without_block(entry: Tensor, sources: Iterable[object]) -> Tensor:
    """Return a copy of what a block starts from, with gradients of zero for what the block reads.

    Args:
        entry: What the block starts from.
        sources: The parameters among these, and those of modules, get a gradient of zero.
    """
    copied: Tensor = _WithoutBlock.apply(entry, *_trained(sources))  # type: ignore[no-untyped-call]
    return copied


class _WithoutBlock(torch.autograd.Function):
    """A copy of a tensor: what follows may write to it, as to the result of an add."""

    @staticmethod
    def forward(ctx: Any, entry: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return entry.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *map(torch.zeros_like, ctx.saved_tensors)


def _trained(sources: Iterable[object]) -> list[nn.Parameter]:
    """Return the parameters that want a gradient, each once."""
    found: dict[int, nn.Parameter] = {}
    for source in sources:
        for parameter in source.parameters() if isinstance(source, nn.Module) else [source]:
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                found[id(parameter)] = parameter
    return list(found.values())
