"""Batches that cost alike: while images are small, more of them make a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn
from torch.utils.data import Sampler

from graphopt.errors import ConfigError
from graphopt.kernels.resolution_gate import ResolutionGate

__all__ = ["EvenBatches"]


class EvenBatches(Sampler[list[int]]):
    """Puts as many more samples into a batch as the model's gates show smaller images.

        batches = EvenBatches(RandomSampler(data), 64, model, size=(28, 28))
        loader = DataLoader(data, batch_sampler=batches)

    A step has parts that do not shrink with its images: the optimizer, the launch of every
    operator, the reading of weights. In a small net they are much of a step on small images. A
    batch that holds as many pixels as one of full images takes about as long, and as much memory.
    Average the loss over the batch. The price: fewer optimizer steps than with batches of one size,
    which cost the small CNN of docs/training_frontier.md most of what small images saved.

    A batch is sized when its first sample is drawn: workers of a loader run a few batches ahead of
    the model, and so of its gates, and while images grow those batches cost more than others. How
    many batches an epoch has depends on the progress that it makes, so there is no length. A model
    without a gate, or whose gates show full images, has batches of `batch_size`.

    Args:
        sampler: Yields the samples of an epoch: a `Sampler`, a `SampleGate`, a list.
        batch_size: Samples in a batch of full images.
        model: The model with its gates, optimized or not, wrapped or not.
        size: Height and width of full images.

    Raises:
        ConfigError: The size of a batch or of images is not positive.

    Source: batches that grow as images shrink (Howard et al., fast.ai's DAWNBench entry, 2018).
    """

    def __init__(
        self,
        sampler: Iterable[int],
        batch_size: int,
        model: nn.Module,
        *,
        size: tuple[int, int],
    ) -> None:
        if batch_size < 1 or min(size) < 1:
            raise ConfigError(
                f"expected a batch_size and a size of images of at least 1, got {batch_size} and "
                f"{size}"
            )
        self.sampler = sampler
        self.batch_size = batch_size
        self.size = size
        self._gates = [module for module in model.modules() if isinstance(module, ResolutionGate)]

    @property
    def samples(self) -> int:
        """Samples in a full batch at the present progress; of several gates the largest counts."""
        height, width = self.size
        shown = [gate.shown(height) * gate.shown(width) for gate in self._gates]
        return round(self.batch_size * height * width / max(shown, default=height * width))

    def __iter__(self) -> Iterator[list[int]]:
        """Yield an epoch in batches of what the sampler yields; the last may be shorter."""
        batch: list[int] = []
        wanted = 0
        for sample in self.sampler:
            wanted = wanted if batch else self.samples
            batch.append(sample)
            if len(batch) == wanted:
                yield batch
                batch = []
        if batch:
            yield batch
