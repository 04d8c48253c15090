"""Two processes that leave out blocks together end where one process with all the data ends."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from layer_gate_ranks import RANKS, build, build_convolutions, decisions, run_rank, train
from torch import nn
from torch.multiprocessing.spawn import spawn

from graphopt.passes.gates.grow_depth import GrowDepth


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run both ranks, once because starting them takes most of the time; return their files."""
    path = tmp_path_factory.mktemp("ranks")
    spawn(run_rank, (str(path),), nprocs=RANKS, join=True)
    return path


@pytest.fixture(scope="module")
def built() -> nn.Module:
    return build()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_blocks_are_left_out_alike_in_one_process_and_in_two(
    directory: Path, built: nn.Module, kind: str
) -> None:
    """Plain wrappers: no rank waits for a gradient that another does not have."""
    model = copy.deepcopy(built)
    losses, expected = train(model, slice(None))
    wanted = decisions(model)
    assert wanted.any(0).all()
    assert not wanted.all()
    first, second = (
        torch.load(directory / f"{kind}-{rank}.pt", weights_only=True) for rank in range(RANKS)
    )
    assert torch.equal(first["decisions"], wanted)
    assert torch.equal(second["decisions"], wanted)
    mean = (first.pop("losses") + second.pop("losses")) / 2
    # Means of two means are rounded differently; eight steps of Adam amplify that by less than 1e5.
    torch.testing.assert_close(mean, mean.new_tensor(losses), rtol=0, atol=1e-11)
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("kind", "late"), [("depth", "4.up.weight"), ("width", "3.weight")])
def test_a_model_grows_alike_in_one_process_and_in_two(
    directory: Path, kind: str, late: str
) -> None:
    model = build(GrowDepth()) if kind == "depth" else build_convolutions()
    losses, expected = train(model, slice(None), growing=True)
    first, second = (
        torch.load(directory / f"{kind}-{rank}.pt", weights_only=True) for rank in range(RANKS)
    )
    # As above: only the rounding of two means differs, and no Adam amplifies it.
    mean = (first.pop("losses") + second.pop("losses")) / 2
    torch.testing.assert_close(mean, mean.new_tensor(losses), rtol=0, atol=1e-11)
    assert expected[late][:, -1].any()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-11)
