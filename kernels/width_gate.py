"""A gate that runs a layer with its first channels only up to some progress of the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .depth_gate import is_untrained
from .gates import Gate

__all__ = ["WidthGate", "WidthGrowth"]

Cuts = Mapping[str, Mapping[int, int]]
"""Per tensor, by name, how many indices of a dimension belong to the first channels."""


class WidthGrowth:
    """What the width gates of a model have in common: which channels join later, and when.

    Up to `joins` the weights by which later channels are read are 0, so that evaluation, a
    checkpoint and the plain model agree on what the model is: that of the first channels. From then
    on all channels are computed; later ones begin with the values they were initialized with, and
    nobody reads them yet. What is to be known is in the parameters: weights of 0 are channels that
    are left out, and a model that was trained is not touched, also where a training begins anew.

    The model's parameters must be whole, not shards, when its first forward begins.

    Attributes:
        cuts: What of the model's tensors belongs to the first channels.
        reads: For the tensors among these that read channels the dimensions in which they do.
        joins: Progress from which all channels take part.
    """

    def __init__(self, *, cuts: Cuts, reads: Mapping[str, Sequence[int]], joins: float) -> None:
        self.cuts = {name: dict(dims) for name, dims in cuts.items()}
        self.reads = {name: tuple(dims) for name, dims in reads.items()}
        self.joins = joins
        self._narrow = False
        self._joined = False
        # In a tuple, so that a gate's model is no child of the gate.
        self._model: tuple[nn.Module, ...] = ()

    def attach(self, model: nn.Module) -> None:
        """Tell it the model that its names are about."""
        self._model = (model,)

    def is_narrow(self, progress: float) -> bool:
        """Say whether later channels are left out; before the first time, stop their being read."""
        if self._joined or progress >= self.joins:
            self._joined = True
            return False
        if not self._narrow:
            self._begin()
        return self._narrow

    def _begin(self) -> None:
        (model,) = self._model
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        for name, dims in self.cuts.items():
            if name not in tensors or any(tensors[name].shape[d] < n for d, n in dims.items()):
                raise RuntimeError(
                    f"{name} was to begin with its first channels, but is gone or smaller now; "
                    "apply grow-width after the passes that change layers"
                )
        unread = [
            tensors[name].detach().narrow(dim, kept, tensors[name].shape[dim] - kept)
            for name, dims in self.reads.items()
            for dim in dims
            for kept in [self.cuts[name][dim]]
        ]
        if any(bool(part.any()) for part in unread):
            cut = [tensors[name] for name in self.cuts]
            self._joined = not is_untrained([p for p in cut if isinstance(p, nn.Parameter)])
        self._narrow = not self._joined
        if self._narrow:
            for part in unread:
                part.zero_()


class WidthGate(Gate):
    """Runs a layer with the first channels of its tensors, of as many channels of its input.

    before: y = layer(x)                     x [.., channels in, ..], y [.., channels out, ..]
    after:  y = layer(x), with weight[:n, :m] for weight, bias[:n] for bias and so on

    In evaluation, and as long as nobody reports progress, nothing happens. Parameters stay whole:
    what is left out gets gradients of 0. Running statistics of later channels are not updated.

    Sources: growing a net in width, exact where the new channels are not read at first (Net2Net,
    arXiv 1511.05641, copies them instead); training channels of a net from the first on, as slices
    of it (Slimmable networks, arXiv 1812.08928).

    Attributes:
        growth: Which channels join later, and when; all gates of a growth have the same.
        layer: Name of the layer in the model.
    """

    def __init__(self, *, growth: WidthGrowth, layer: str) -> None:
        """Hold what the gate needs; a gate has no parameters and no buffers."""
        super().__init__()
        self.growth = growth
        self.layer = layer
        prefix = f"{layer}."
        self._cuts = {
            name.removeprefix(prefix): dims
            for name, dims in growth.cuts.items()
            if name.startswith(prefix)
        }

    def forward(self, x: Tensor, *, entry: Tensor | None = None) -> Tensor:
        """Return x, the layer's result; arguments as in `LayerGate.forward`."""
        return x

    def run(
        self, entry: Tensor, block: Callable[[], Tensor], sources: Sequence[object] = ()
    ) -> Tensor:
        """Return the layer's result, in training of the first channels up to some progress.

        Args:
            entry: The layer's input.
            block: Computes its result in full.
            sources: The layer, and its input.
        """
        if not self.training or not self._advanced or not self._is_narrow():
            return block()
        layer = next(source for source in sources if isinstance(source, nn.Module))
        tensors = {name: _cut(getattr(layer, name), dims) for name, dims in self._cuts.items()}
        result: Tensor = functional_call(layer, tensors, (entry,))
        return result

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _is_narrow(self) -> bool:
        return self.growth.is_narrow(self.progress)

    def extra_repr(self) -> str:
        """Return the schedule."""
        return f"layer={self.layer!r}, joins={self.growth.joins}"


def _cut(tensor: Tensor, dims: Mapping[int, int]) -> Tensor:
    for dim, kept in dims.items():
        tensor = tensor.narrow(dim, 0, kept)
    return tensor
