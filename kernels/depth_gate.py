"""A gate that leaves out a residual block up to some progress, and then lets it join as a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed, nn

from .gates import Gate
from .layer_gate import without_block

__all__ = ["DepthGate", "is_untrained"]


class DepthGate(Gate):
    """Leaves out a block `y = x + f(x)` of a new model, and copies another block into it later.

    Up to `joins` the block's parameters are 0, so that evaluation, a checkpoint and the plain model
    agree on what the model is: f(x) = 0. From then on it trains as every other, from the other
    block's values. What a gate has to know is in the parameters: zeros are a block that is left
    out, and a block that was trained is not touched, also where a training begins anew. Parameters
    that are left out get no gradient, so that Adam begins anew with them; where processes train
    together it is zero, as DistributedDataParallel wants.

    As long as nobody reports progress, nothing happens. The model's parameters must be whole, not
    shards, at the time of a forward.

    Source: growing in depth by stacking, G_stack (arXiv 2405.15319).

    Attributes:
        own: Names of the block's parameters in the model.
        donor: Names of those that are copied into them, in this order.
        joins: Progress from which the block takes part.
    """

    def __init__(self, *, own: Sequence[str], donor: Sequence[str], joins: float) -> None:
        """Hold names and schedule; a gate has no parameters and no buffers."""
        super().__init__()
        self.own = tuple(own)
        self.donor = tuple(donor)
        self.joins = joins
        self._takes_part = False
        # Which parameters were 0 when last looked at, with how often each was written to.
        self._zeros: tuple[tuple[int, int], ...] = ()
        # In a tuple, so that the model is no child of its own gate.
        self._model: tuple[nn.Module, ...] = ()

    def attach(self, model: nn.Module) -> None:
        """Tell the gate the model that its names are about."""
        self._model = (model,)

    def forward(self, x: Tensor, *, entry: Tensor | None = None) -> Tensor:
        """Return x, the block's result; arguments as in `LayerGate.forward`."""
        return x

    def run(
        self, entry: Tensor, block: Callable[[], Tensor], sources: Sequence[object] = ()
    ) -> Tensor:
        """Return the block's result, or in training what it started from while it is left out.

        Args:
            entry: What the block starts from.
            block: Computes its result, of the same shape.
            sources: What it reads.

        Raises:
            RuntimeError: if the two blocks are no longer of the same shapes.
        """
        if not self.training or self._joined():
            return block()
        together = distributed.is_available() and distributed.is_initialized()
        return without_block(entry, sources if together else ())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _joined(self) -> bool:
        """Begin a training forward and say whether the block takes part, having changed it."""
        self.begin()
        if self._takes_part or not self._advanced:
            return True
        own = self._parameters_of(self.own)
        # To look at values waits for the device, so not in every step.
        if self.progress < self.joins and _writes(own) == self._zeros:
            return False
        left_out = not any(bool(parameter.any()) for parameter in own)
        if self.progress >= self.joins and left_out:
            self._copy(own)
        self._takes_part = self.progress >= self.joins or not (left_out or is_untrained(own))
        if not self._takes_part and not left_out:
            with torch.no_grad():
                for parameter in own:
                    parameter.zero_()
        self._zeros = () if self._takes_part else _writes(own)
        return self._takes_part

    def _copy(self, own: Sequence[nn.Parameter]) -> None:
        with torch.no_grad():
            for name, target, source in zip(
                self.own, own, self._parameters_of(self.donor), strict=True
            ):
                if target.shape != source.shape:
                    raise RuntimeError(
                        f"{name} {list(target.shape)} was to begin as a copy of a parameter that "
                        f"is now {list(source.shape)}; apply grow-depth after the passes that "
                        "change shapes"
                    )
                target.copy_(source)

    def _parameters_of(self, names: Sequence[str]) -> list[nn.Parameter]:
        (model,) = self._model
        return [model.get_parameter(name) for name in names]

    def extra_repr(self) -> str:
        """Return the schedule."""
        return f"joins={self.joins}"


def is_untrained(parameters: Sequence[Tensor]) -> bool:
    """Say whether parameters are as an initialization leaves them.

    One of them has then the same value everywhere, such as a norm's weights of 1; training moves
    all entries, each by its own gradient.
    """
    return any(p.numel() > 1 and bool((p == p.flatten()[0]).all()) for p in parameters)


def _writes(parameters: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((id(parameter), parameter._version) for parameter in parameters)
