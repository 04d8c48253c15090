"""The states of all random generators of a process, as tensors: dropout goes on where it was."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """Return the states of torch (also on the current CUDA device), Python and numpy."""
    _, words, spare = random.getstate()
    state: Any = np.random.get_state(legacy=True)
    _, numpy_words, place, has_spare, numpy_spare = state
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "numpy": torch.tensor([*numpy_words.tolist(), place, has_spare]),
        "spares": torch.tensor(
            [math.nan if spare is None else spare, numpy_spare], dtype=torch.float64
        ),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Set the generators to what `random_states` returned."""
    # Copies: torch reads a state from the beginning of its memory, also that of a view.
    torch.set_rng_state(states["torch"].clone())
    spare, numpy_spare = states["spares"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), None if math.isnan(spare) else spare))
    *words, place, has_spare = states["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(words, dtype=np.uint32), place, has_spare, numpy_spare)
    )
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].clone())
