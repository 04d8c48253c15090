"""What each of two processes does that train together; a module, so that both can import it."""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_ranks_kit import use_the_kit

from graphopt.errors import TrainingError
from graphopt.kernels import BlockLayout, BlockSparseLinear
from graphopt.training import BlockTopology, DensitySchedule, densify_in_place
from graphopt.training.ranks import whole

RANKS = 2
STEPS = 6
TOKENS = 8


def build() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [
        BlockSparseLinear(BlockLayout.from_scores(torch.rand(rows, 6), 0.5, 8, 4)).double()
        for rows in (3, 5)  # 9 and 15 blocks: they do not divide over two ranks
    ]
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    shape = (RANKS * TOKENS, 24)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.randn(RANKS * TOKENS, 40, generator=generator, dtype=torch.float64)


def train(model: nn.Module, part: slice, *, moving: bool) -> dict[str, Tensor]:
    """Return the last outputs, gradients, values, places and moments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    topology = BlockTopology(model, optimizer, total_steps=STEPS, interval=2, stop=1)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        x, target = batch(step)
        optimizer.zero_grad()
        found["output"] = model(x[part])
        nn.functional.mse_loss(found["output"], target[part]).backward()
        optimizer.step()
        if moving:
            topology.step()
    found["output"] = found["output"].detach()
    for name, value in model.named_buffers():
        found[name.removeprefix("module.")] = value
    for name, value in model.named_parameters():
        short = name.removeprefix("module.")
        assert value.grad is not None
        found[short] = whole(value.detach())
        found[f"{short}.grad"] = whole(value.grad)
        for key, state in optimizer.state[value].items():
            found[f"{short}.{key}"] = whole(state)
    return found


def wrapped(kind: str) -> nn.Module:
    model = build()
    if kind == "ddp":
        return DistributedDataParallel(model)
    for block in model:
        if isinstance(block, BlockSparseLinear):
            fully_shard(block)
    fully_shard(model)
    return model


def train_all_ways(rank: int, directory: Path) -> None:
    part = slice(rank * TOKENS, (rank + 1) * TOKENS)
    for kind in ("ddp", "fsdp2"):
        for moving in (False, True):
            found = train(wrapped(kind), part, moving=moving)
            torch.save(found, directory / f"{kind}-{moving}-{rank}.pt")


def lower_density(rank: int, directory: Path) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = DensitySchedule(
        model, optimizer, final_density=0.2, total_steps=4, stop=1, interval=2
    )
    wrapper = DistributedDataParallel(model)
    part = slice(rank * TOKENS, (rank + 1) * TOKENS)
    for step in range(6):
        x, target = batch(step)
        optimizer.zero_grad()
        nn.functional.mse_loss(wrapper(x[part]), target[part]).backward()
        optimizer.step()
        if schedule.step():
            wrapper = DistributedDataParallel(model)
    torch.save(model.state_dict(), directory / f"density-{rank}.pt")


def refuse_wrappers() -> None:
    for kind in ("ddp", "fsdp2"):
        model = wrapped(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(TrainingError, match="wrap it again"):
            DensitySchedule(model, optimizer, final_density=0.3, total_steps=100)
        with pytest.raises(TrainingError, match="wrap it again"):
            densify_in_place(model, optimizer)


def refuse_different_blocks(rank: int) -> None:
    """Every rank says so, none waits for another."""
    model = build()
    layer = model[0]
    assert isinstance(layer, BlockSparseLinear)
    if rank == 1:
        layer.columns.copy_(BlockLayout.from_mask(~layer.layout.mask(), 8, 4).columns)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = BlockTopology(model, optimizer, total_steps=10, interval=1)
    before = layer.columns.clone()
    model(batch(0)[0]).square().sum().backward()
    with pytest.raises(TrainingError, match=r"same step, layers and blocks .* on ranks \[1\]"):
        topology.step()
    assert torch.equal(layer.columns, before)


def run_rank(rank: int, directory: str) -> None:
    faulthandler.enable()  # a rank that dies in native code says where
    torch.set_num_threads(1)
    meeting = f"file://{directory}/store"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    try:
        train_all_ways(rank, Path(directory))
        lower_density(rank, Path(directory))
        refuse_wrappers()
        refuse_different_blocks(rank)
        use_the_kit(rank, Path(directory))
        distributed.barrier()
    finally:
        # Models hold on to the group by reference cycles; its threads end only with them.
        gc.collect()
        distributed.destroy_process_group()
    # The interpreter's own ending is no part of the test: with threads of gloo still alive it has
    # aborted a rank that had done everything.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
