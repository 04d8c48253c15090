"""What the training kit does in each of two processes, and in one that has all the data."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel

import graphopt
from graphopt.errors import TrainingError
from graphopt.kernels.token_routers import RandomTokens
from graphopt.passes.gates.gate_tokens import GateTokens
from graphopt.training import (
    ComputeClock,
    Ledger,
    SampleGate,
    WithSampleIds,
    in_step,
    load_training,
    save_training,
)

SAMPLES, TOKENS, BATCH, STEPS, SAVED_AT = 24, 48, 8, 9, 4
PLANNED_FLOPS = 6e8


@functools.cache
def optimized() -> nn.Module:
    """Return a decoder in float64 whose middle blocks run on random tokens while it is trained."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=4,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).double()
    batch = {"input_ids": torch.randint(0, 40, (BATCH, TOKENS)), "use_cache": False}
    made = graphopt.optimize(model, batch, recipe=[GateTokens(keep=0.3)], measure=False)
    assert any(isinstance(module, RandomTokens) for module in made.modules())
    return made.train()


class Texts(Dataset[Tensor]):
    """Random token ids, some of them learned fast."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, place: int) -> Tensor:
        generator = torch.Generator().manual_seed(place)
        return torch.randint(0, 2 + place, (TOKENS,), generator=generator)


def wrapped(kind: str) -> nn.Module:
    model = copy.deepcopy(optimized())
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp2":
        for block in model.get_submodule("transformer.h").children():
            fully_shard(block)
        fully_shard(model)
    return model


class Run:
    """One training with all parts of the kit."""

    def __init__(self, kind: str, path: Path | None = None) -> None:
        self.ranks = 1 if kind == "one" else 2
        model = wrapped(kind)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.clock = ComputeClock(model, planned_flops=PLANNED_FLOPS)
        self.ledger = Ledger(path)
        self.gate = SampleGate(SAMPLES, progress=lambda: self.clock.progress, stop=1)
        self.schedule = self.clock.learning_rate(optimizer)
        self.model, self.optimizer = model, optimizer
        self.routers = [m for m in model.modules() if isinstance(m, RandomTokens)]

    def parts(self) -> dict[str, Any]:
        names = ("model", "optimizer", "clock", "ledger", "gate", "schedule")
        return {name: getattr(self, name) for name in names}

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            WithSampleIds(Texts()), batch_size=BATCH // self.ranks, sampler=self.gate
        )
        while True:
            yield from loader

    def steps(self, count: int) -> list[list[float]]:
        """Train; return loss, progress, operations, samples and rows of every step."""
        found: list[list[float]] = []
        for (ids, places), _ in zip(self.batches(), range(count), strict=False):
            with self.ledger.step(tokens=ids.numel(), samples=len(ids)) as entry:
                logits = self.model(input_ids=ids, use_cache=False).logits
                losses = nn.functional.cross_entropy(
                    logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
                ).mean(1)
                loss = (losses * self.gate.weights(places)).sum() / (BATCH / self.ranks)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                entry.loss = loss
            drawn = [int(torch.randint(0, 1000, (), generator=r.generator())) for r in self.routers]
            self.gate.update(places, losses)
            self.clock.step(entry)
            self.schedule.step()
            assert isinstance(entry.loss, float)
            found.append([entry.loss, self.clock.progress, entry.flops, entry.samples, *drawn])
        return found


def train_and_save(kind: str, directory: Path, name: str) -> None:
    """Train with a checkpoint on the way, and write down what happened."""
    run = Run(kind, directory / f"{kind}.jsonl")
    found = run.steps(SAVED_AT)
    save_training(directory / f"{kind}-saved", **run.parts())
    found += run.steps(STEPS - SAVED_AT)
    (directory / f"{name}.json").write_text(json.dumps(found))


def resume(kind: str, saved: Path) -> list[list[float]]:
    """Go on from a checkpoint of another kind of training, without its file of the ledger."""
    run = Run(kind)
    load_training(saved, **run.parts())
    return run.steps(STEPS - SAVED_AT)


def end_together(rank: int, directory: Path) -> None:
    """One rank has more batches, and longer ones: nobody waits, and all gates agree."""
    model = wrapped("ddp")
    clock, ledger = ComputeClock(model, planned_flops=PLANNED_FLOPS), Ledger()
    routers = [module for module in model.modules() if isinstance(module, RandomTokens)]
    batches = [torch.ones(2 + rank, TOKENS - 16 * rank, dtype=torch.long)] * (3 + 2 * rank)
    found = []
    for ids in in_step(batches):
        with ledger.step(tokens=ids.numel()) as entry:
            model(input_ids=ids, use_cache=False).logits.square().sum().backward()
        clock.step(entry)
        found.append([clock.progress, ledger.totals["train"]["tokens"], routers[0].progress])
    (directory / f"uneven-{rank}.json").write_text(json.dumps(found))


def refuse_ranks_that_differ(rank: int, directory: Path) -> None:
    """Every rank says so at set-up, none waits for another."""
    model = nn.Sequential(RandomTokens(keep=0.5, seed=rank))
    with pytest.raises(TrainingError, match=r"same budget and gates on every rank"):
        ComputeClock(nn.Identity(), planned_steps=10 + rank)
    with pytest.raises(TrainingError, match=r"same budget and gates on every rank"):
        ComputeClock(model, planned_steps=10)
    with pytest.raises(TrainingError, match="same samples and options on every rank"):
        SampleGate(SAMPLES, progress=lambda: 0.0, seed=rank)
    gate = SampleGate(SAMPLES, progress=lambda: rank / 10)
    with pytest.raises(TrainingError, match="same choice of samples on every rank"):
        next(iter(gate))
    file = directory / "file"
    if rank == 0:
        file.write_text("not a directory")
    distributed.barrier()
    with pytest.raises(graphopt.errors.CheckpointError, match=r"is a file|could not write"):
        save_training(file, model=nn.Identity())


def use_the_kit(rank: int, directory: Path) -> None:
    for kind in ("ddp", "fsdp2"):
        train_and_save(kind, directory, f"{kind}-{rank}")
    resumed = {
        "one to ddp": resume("ddp", directory / "one-saved"),
        "one to fsdp2": resume("fsdp2", directory / "one-saved"),
        "ddp to fsdp2": resume("fsdp2", directory / "ddp-saved"),
    }
    (directory / f"resumed-{rank}.json").write_text(json.dumps(resumed))
    end_together(rank, directory)
    refuse_ranks_that_differ(rank, directory)
