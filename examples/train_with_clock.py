"""Train on a budget of operations, on one machine or on many; started again, it goes on.

python examples/train_with_clock.py out/
python -m torch.distributed.run --standalone --nproc-per-node=2 examples/train_with_clock.py out/
"""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from graphopt import training


def main(output: Path) -> None:
    """Train until the budget is spent."""
    torch.manual_seed(0)
    x = torch.randn(512, 32)
    data = training.WithSampleIds(TensorDataset(x, x[:, :8].argmax(1)))
    model: nn.Module = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Dropout(), nn.Linear(128, 8))
    if distributed.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    clock = training.ComputeClock(model, planned_flops=1e8)
    rate = clock.learning_rate(optimizer)
    gate = training.SampleGate(len(data), progress=lambda: clock.progress)
    ledger = training.Ledger(output / "ledger.jsonl")
    parts: dict[str, Any] = {"optimizer": optimizer, "rate": rate, "clock": clock, "gate": gate}
    parts["ledger"] = ledger
    if (output / "saved").exists():
        training.load_training(output / "saved", model=model, **parts)
    loader = DataLoader(data, batch_size=32, sampler=gate, generator=torch.Generator())
    while not clock.finished:
        for (inputs, labels), ids in loader:
            with ledger.step(samples=len(ids)) as entry:
                losses = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
                loss = entry.loss = (losses * gate.weights(ids)).sum() / 32
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            gate.update(ids, losses)
            clock.step(entry)
            rate.step()
        training.save_training(output / "saved", model=model, **parts)


if __name__ == "__main__":
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")
    main(Path(sys.argv[1]))
    if distributed.is_initialized():
        gc.collect()  # the wrapper holds on to the process group, whose threads must end first
        distributed.destroy_process_group()
