"""The ids of samples: names that stay with them through shuffling, epochs and restarts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from graphopt.errors import ConfigError, TrainingError

SampleIds = Sequence[Hashable] | Tensor


class SampleTable:
    """Finds samples by their ids.

    Args:
        samples: How many there are, whose ids are then 0, 1, ..., or the ids themselves.

    Raises:
        ConfigError: There is no sample, or an id appears twice.
    """

    def __init__(self, samples: int | Sequence[Hashable]) -> None:
        self.size = samples if isinstance(samples, int) else len(samples)
        self.names = None if isinstance(samples, int) else list(samples)
        if self.size < 1:
            raise ConfigError(f"expected at least 1 sample, got {self.size}")
        names = self.names or ()
        self._places = {item: place for place, item in enumerate(names)}
        if len(self._places) < len(names):
            twice = next(item for place, item in enumerate(names) if self._places[item] != place)
            raise ConfigError(
                f"expected a different id for every sample, got {twice!r} twice; ids must name one "
                "sample each and stay the same from run to run"
            )

    def places(self, ids: SampleIds) -> Tensor:
        """Return the places in the dataset of the samples of a batch [batch], int64, on the CPU.

        Raises:
            TrainingError: An id is unknown, of a wrong type, or there twice.
        """
        if self.names is None:
            found = _integers(ids)
            unknown = found[(found < 0) | (found >= self.size)].tolist()
        else:
            listed = ids.tolist() if isinstance(ids, Tensor) else list(ids)
            unknown = [item for item in listed if item not in self._places]
            found = torch.tensor([self._places.get(item, -1) for item in listed])
        if unknown:
            raise TrainingError(
                f"expected ids of the {self.size} samples of this gate, got "
                f"{', '.join(map(repr, unknown[:3]))}; every sample needs an id that stays the "
                "same in all epochs"
            )
        if len(found.unique()) < len(found):
            raise TrainingError(
                "expected every id once in a batch, got one twice; an id must name one sample, in "
                "all epochs"
            )
        return found


class WithSampleIds(Dataset[Any]):
    """A dataset whose items carry their id: their place in it, which shuffling does not change.

    Items that are mappings get a key `sample_id`; of any other, a pair is made: (item, id).

    Args:
        data: A dataset with a length and places.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: int) -> Any:
        item = self.data[place]
        if isinstance(item, Mapping):
            return {**item, "sample_id": place}
        return item, place


def _integers(ids: SampleIds) -> Tensor:
    try:
        found = ids if isinstance(ids, Tensor) else torch.tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros(0)
    if found.dim() != 1 or found.is_floating_point() or found.dtype == torch.bool:
        raise TrainingError(
            f"expected sample ids [batch], integers, got {type(ids).__name__} of "
            f"{found.dtype if isinstance(ids, Tensor) else 'something else'}; "
            "WithSampleIds(dataset) adds them to the items of a dataset"
        )
    return found.long().cpu()
