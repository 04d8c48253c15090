"""A gate that shows a model smaller images at the beginning of its training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .gates import Gate

__all__ = ["ResolutionGate"]


class ResolutionGate(Gate):
    """Resizes images in training: small up to `hold`, then growing, in full from `full_at` on.

    [image, channel, height, width] -> [image, channel, height', width'], averaged over areas. Sizes
    are multiples of `multiple`, never above the image's own. In evaluation, and before anybody
    reports progress, images stay as they are.
    Source: progressive resizing (Howard et al., fast.ai's DAWNBench entry, 2018), at the end in
    full because nets see objects of another size otherwise (FixRes, arXiv 1906.06423).

    Attributes:
        start: Share of height and width at first, in (0, 1].
        hold: Progress up to which it stays.
        full_at: Progress from which images are full.
        multiple: What sizes are multiples of.
    """

    def __init__(
        self, *, start: float = 0.5, hold: float = 0.2, full_at: float = 0.6, multiple: int = 4
    ) -> None:
        """Hold the schedule; a gate has no parameters and no buffers."""
        super().__init__()
        self.start = start
        self.hold = hold
        self.full_at = full_at
        self.multiple = multiple

    @property
    def share(self) -> float:
        """Share of height and width at the present progress."""
        if not self._advanced or self.progress >= self.full_at:
            return 1.0
        if self.progress <= self.hold:
            return self.start
        done = (self.progress - self.hold) / (self.full_at - self.hold)
        return self.start + (1 - self.start) * done

    def shown(self, size: int) -> int:
        """Return how many of so many rows or columns are shown."""
        rounded = self.multiple * max(1, round(self.share * size / self.multiple))
        return size if self.share == 1 else min(size, rounded)

    def forward(self, images: Tensor) -> Tensor:
        """Return the images at the present size."""
        if not self.training:
            return images
        self.begin()
        height, width = images.shape[-2:]
        sizes = self.shown(height), self.shown(width)
        if sizes == (height, width):
            return images
        return F.interpolate(images, sizes, mode="area")

    def extra_repr(self) -> str:
        """Return the schedule."""
        return f"start={self.start}, hold={self.hold}, full_at={self.full_at}"
