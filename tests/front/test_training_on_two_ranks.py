"""Two processes that train together end where one process with all the data ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from two_ranks import RANKS, build, run_rank, train


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run both ranks, once because starting them takes most of the time; return their files."""
    path = tmp_path_factory.mktemp("ranks")
    spawn(run_rank, (str(path),), nprocs=RANKS, join=True)
    return path


def loaded(directory: Path, name: str) -> list[dict[str, Tensor]]:
    files = [directory / f"{name}-{rank}.pt" for rank in range(RANKS)]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("moving", [False, True])
def test_layers_train_alike_in_one_process_and_in_two(
    directory: Path, kind: str, moving: bool
) -> None:
    expected = train(build(), slice(None), moving=moving)
    assert moving != torch.equal(expected["0.columns"], build().state_dict()["0.columns"])
    ranks = loaded(directory, f"{kind}-{moving}")
    outputs = torch.cat([found.pop("output") for found in ranks])
    # The mean of two means is rounded differently from one mean; six steps of Adam and sums over
    # at most 24 terms and 16 tokens amplify 1e-16 by less than 1e5.
    torch.testing.assert_close(outputs, expected["output"], rtol=0, atol=1e-11)
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-11)


def test_the_density_falls_alike_on_every_rank(directory: Path) -> None:
    first, second = loaded(directory, "density")
    assert [len(first[name]) for name in ("0.values", "2.values")] == [3, 5]
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
