"""Which samples an epoch trains on: those that are learned well come less often and weigh more."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from graphopt.errors import ConfigError, TrainingError
from graphopt.kernels.gates import Gate

from .ranks import Group, group_rank, group_size, is_shared, require_same, summed
from .sample_ids import SampleIds, SampleTable

_UNSEEN = 3.0


class SampleGate(Sampler[int]):
    """Drops a share of the samples whose loss is below the mean, without a bias (InfoBatch).

        gate = SampleGate(len(data), progress=lambda: clock.progress)
        loader = DataLoader(
            WithSampleIds(data), batch_size=32, sampler=gate, generator=torch.Generator()
        )
        for epoch in range(epochs):
            for batch, ids in loader:
                losses = ...                                # [batch], reduction="none"
                ((losses * gate.weights(ids)).sum() / 32).backward()
                gate.update(ids, losses)

    Of the samples whose last seen loss is below the mean of all, each is dropped with probability
    `drop` for one epoch; one that stays weighs `1 / (1 - drop)`, so the expected sum of gradients
    is that of the whole epoch. (Divide by the size of a full batch, on each rank: the mean over a
    last, shorter one gives its samples more weight.) Samples not seen yet count as a loss of 3, so
    the first epoch is full. An epoch is full too if, were it as long as the one before it, it would
    end after `stop` of the training: the end sees all data, unweighted. Worth it from about 4
    epochs on.

    The loader's own generator matters for resuming within an epoch only: without one, a loader that
    is started draws a number that dropout would have had.

    Choice and order are functions of seed, epoch and losses. Several ranks choose alike: the losses
    are exchanged once per epoch, each rank takes every `ranks`-th sample of one order, and all have
    equally many, some samples twice with half their weight where they do not divide.
    Cost: no forward pass; a few bytes per sample, and per epoch a few passes over them.

    Args:
        samples: How many samples there are, whose ids are then 0, 1, ..., or the ids themselves in
            the order of the dataset: texts or integers that stay the same from run to run.
        progress: Tells the share of the training that is done, in [0, 1].
        drop: Probability with which a well-learned sample is dropped, in [0, 1).
        stop: Share of the training after which nothing is dropped.
        seed: Seed of choice and order, the same on all ranks.
        process_group: The ranks that train together; all by default.

    Raises:
        ConfigError: An option is outside its range, or an id appears twice.
        TrainingError: Ranks hold different samples or options.

    Source: Qin et al., InfoBatch, ICLR 2024.
    """

    def __init__(
        self,
        samples: int | Sequence[Hashable],
        *,
        progress: Callable[[], float],
        drop: float = 0.5,
        stop: float = 0.875,
        seed: int = 0,
        process_group: Group | None = None,
    ) -> None:
        if not 0 <= drop < 1 or not 0 <= stop <= 1:
            raise ConfigError(f"expected drop in [0, 1) and stop in [0, 1], got {drop} and {stop}")
        self.table = SampleTable(samples)
        self.drop = drop
        self.stop = stop
        self.epoch = 0
        self.scores = torch.full((self.table.size,), _UNSEEN)
        self._progress = progress
        self._group = process_group
        self._draws = Gate(seed=seed, number=-1)
        self._seen = torch.zeros(self.table.size, dtype=torch.bool)
        self._weights = self._shared_weights = torch.ones(self.table.size)
        self._order = torch.zeros(0, dtype=torch.int64)
        self._share = self._order
        self._started = 0.0
        self._trained = 0
        self._exhausted = False
        text = f"{self.table.size} {drop} {stop} {seed} {self.table.names}"
        require_same("samples and options", text, (), process_group)

    def __len__(self) -> int:
        """Return how many samples this rank trains on in this epoch; before the first, in that."""
        return len(self._share) or math.ceil(self.table.size / group_size(self._group))

    def __iter__(self) -> Iterator[int]:
        """Yield the places of this rank's samples in the dataset: a new epoch, or what is left.

        Raises:
            TrainingError: The losses of the epoch before never came.
        """
        if self._exhausted and not self._trained:
            raise TrainingError(
                "expected the losses of the last epoch, got none; call update(ids, losses) after "
                "every batch"
            )
        if self._exhausted or self._trained >= len(self._share):
            self._begin()
        yield from self._share[self._trained :].tolist()
        self._exhausted = True

    def weights(self, ids: SampleIds) -> Tensor:
        """Return the weights of samples in this epoch [batch], float32; multiply the losses by it.

        Raises:
            TrainingError: An id is unknown, appears twice, or is not trained on in this epoch.
        """
        places = self.table.places(ids)
        weights = self._shared_weights[places]
        if not bool(weights.all()):
            dropped = [int(place) for place in places[weights == 0][:3]]
            raise TrainingError(
                f"expected ids that this epoch trains on, got samples at {dropped}, which it "
                "dropped; take the batches from a loader with this gate as its sampler"
            )
        return weights.to(ids.device) if isinstance(ids, Tensor) else weights

    def update(self, ids: SampleIds, losses: Tensor) -> None:
        """Remember the losses of a batch: call it once per batch, on every rank.

        Args:
            ids: The ids of the batch [batch].
            losses: Their losses [batch], before weights; one that is not finite changes nothing.

        Raises:
            TrainingError: An id is unknown or appears twice, or there are not as many losses.
        """
        places = self.table.places(ids)
        if losses.shape != places.shape:
            raise TrainingError(
                f"expected one loss per sample, [{len(places)}], got {list(losses.shape)}; "
                'compute the loss with reduction="none" and average over everything but the batch'
            )
        values = losses.detach().float().cpu()
        finite = values.isfinite()
        self.scores[places[finite]] = values[finite]
        self._seen[places[finite]] = True
        self._trained += len(places)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, also within an epoch; call it on every rank."""
        self._exchange()
        return {
            "epoch": self.epoch,
            "trained": self._trained,
            "started": self._started,
            "scores": self.scores.clone(),
            "order": self._order.clone(),
            "weights": self._weights.clone(),
            "ranks": group_size(self._group),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on within the epoch of a `state_dict`.

        Raises:
            TrainingError: The state has another number of samples, or was saved within an epoch
                by another number of ranks.
        """
        scores: Tensor = state["scores"]
        if scores.shape != self.scores.shape:
            raise TrainingError(
                f"expected scores of {len(self.scores)} samples, got {len(scores)}; resume with "
                "the dataset that the training began with"
            )
        ranks, now = int(state["ranks"]), group_size(self._group)
        trained = int(state["trained"]) * ranks
        if trained % now:
            raise TrainingError(
                f"{trained} samples of this epoch, trained by {ranks} ranks, cannot be divided "
                f"over {now}; resume with {ranks} ranks, or from a checkpoint between epochs"
            )
        self.epoch = int(state["epoch"])
        self._started = float(state["started"])
        self.scores = scores.clone()
        self._seen.zero_()
        self._take(state["order"].clone(), state["weights"].clone())
        self._trained = trained // now

    def _begin(self) -> None:
        """Choose the samples of a new epoch."""
        self._exchange()
        progress = self._progress()
        self._draws.advance(self.epoch, progress)
        generator = self._draws.generator()
        order = torch.randperm(self.table.size, generator=generator)
        chances = torch.rand(self.table.size, generator=generator)
        weights = torch.ones(self.table.size)
        if progress + (progress - self._started) <= self.stop:
            scores = self.scores.double()
            learned = scores < scores.mean()
            weights[learned] = 1 / (1 - self.drop)
            weights[learned & (chances < self.drop)] = 0
        self.epoch += 1
        self._started = progress
        order = order[weights[order] > 0]
        where = f"{self.epoch} {progress}"
        require_same("choice of samples", where, (order, weights), self._group)
        self._take(order, weights)

    def _take(self, order: Tensor, weights: Tensor) -> None:
        """Give this rank its share; samples that fill up the last round share their weight."""
        ranks = group_size(self._group)
        missing = -len(order) % ranks
        filled = order.repeat(1 + math.ceil(missing / max(len(order), 1)))
        rounds = torch.cat([order, filled[len(filled) - missing :]])
        copies = rounds.bincount(minlength=self.table.size).clamp(min=1)
        self._order, self._weights = order, weights
        self._shared_weights = weights / copies
        self._share = rounds[group_rank(self._group) :: ranks]
        self._trained = 0
        self._exhausted = False

    def _exchange(self) -> None:
        """Give all ranks the losses that any of them has seen."""
        if is_shared(self._group):
            scores = torch.where(self._seen, self.scores, 0.0)
            sums = summed(torch.stack([scores, self._seen.float()]).double(), self._group)
            found = sums[1] > 0
            self.scores[found] = (sums[0] / sums[1])[found].float()
        self._seen.zero_()
