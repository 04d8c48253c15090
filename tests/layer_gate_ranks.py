"""What each of two processes does that train a model with gated blocks; importable by both."""

from __future__ import annotations

import copy
import faulthandler
import gc
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt.kernels.gates import Gate
from graphopt.kernels.layer_gate import LayerGate
from graphopt.passes.base import Pass
from graphopt.passes.gates.gate_layers import GateLayers
from graphopt.passes.gates.grow_depth import GrowDepth
from graphopt.passes.gates.grow_width import GrowWidth
from graphopt.training.ranks import whole

RANKS = 2
STEPS = 8
ROWS = 4


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        return result


def build(step: Pass | None = None) -> nn.Module:
    """Return a model with gates, by default those that leave out blocks at random."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 8), *[Block() for _ in range(4)], nn.Linear(8, 3)).double()
    example = torch.randn(ROWS, 8, dtype=torch.float64)
    return graphopt.optimize(model, (example,), recipe=[step or GateLayers(rate=0.7)]).train()


def build_convolutions() -> nn.Module:
    """Return a model whose channels join later; it has no norms, which see a rank's rows only."""
    torch.manual_seed(3)
    layers = (nn.Conv1d(1, 32, 3), nn.ReLU(), nn.Conv1d(32, 32, 3), nn.ReLU())
    pooled = (nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 3))
    model = nn.Sequential(nn.Unflatten(1, (1, 8)), *layers, *pooled).double()
    for layer in layers:
        if isinstance(layer, nn.Conv1d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    example = torch.randn(ROWS, 8, dtype=torch.float64)
    return graphopt.optimize(model, (example,), recipe=[GrowWidth(joins=0.5)]).train()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(RANKS * ROWS, 11, generator=generator, dtype=torch.float64)
    return x[:, :8], x[:, 8:]


def train(
    model: nn.Module, part: slice, *, growing: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses and the last values.

    A growing model is told its progress, and trained by gradient descent: for a block that is left
    out that is the same with a gradient of zero, as ranks have it, and with none.
    """
    kind = torch.optim.SGD if growing else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-2)
    losses: list[float] = []
    for step in range(STEPS):
        for gate in model.modules() if growing else ():
            if isinstance(gate, Gate):
                gate.advance(step, step / STEPS)
        x, target = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x[part]), target[part])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    values = {
        name.removeprefix("module."): whole(value.detach())
        for name, value in model.named_parameters()
    }
    return losses, values


def decisions(model: nn.Module) -> Tensor:
    """Return which gate left its block out in which step: [steps, gates]."""
    gates = [module for module in model.modules() if isinstance(module, LayerGate)]
    found = []
    for step in range(STEPS):
        for gate in gates:
            gate.advance(step, 0.0)
        found.append([gate.skips() for gate in gates])
    return torch.tensor(found)


def run_rank(rank: int, directory: str) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    meeting = f"file://{directory}/store"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    try:
        built = build()
        for kind in ("ddp", "fsdp2"):
            model = copy.deepcopy(built)
            if kind == "fsdp2":
                for block in model:  # type: ignore[attr-defined]
                    if isinstance(block, Block):
                        fully_shard(block)
                fully_shard(model)
            wrapped = DistributedDataParallel(model) if kind == "ddp" else model
            losses, values = train(wrapped, slice(rank * ROWS, (rank + 1) * ROWS))
            found = {
                **values,
                "losses": torch.tensor(losses, dtype=torch.float64),
                "decisions": decisions(model),
            }
            torch.save(found, Path(directory) / f"{kind}-{rank}.pt")
        for kind, grown in (("depth", build(GrowDepth())), ("width", build_convolutions())):
            rows = slice(rank * ROWS, (rank + 1) * ROWS)
            losses, values = train(DistributedDataParallel(grown), rows, growing=True)
            kept = {**values, "losses": torch.tensor(losses, dtype=torch.float64)}
            torch.save(kept, Path(directory) / f"{kind}-{rank}.pt")
        distributed.barrier()
    finally:
        # Models hold on to the group by reference cycles; its threads end only with them.
        gc.collect()
        distributed.destroy_process_group()
    # As in two_ranks: the interpreter's own ending is no part of the test.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
