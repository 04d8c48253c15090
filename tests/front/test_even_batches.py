"""Batches hold as many more samples as images are smaller, and every sample once."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import graphopt
from graphopt.errors import ConfigError
from graphopt.kernels.resolution_gate import ResolutionGate
from graphopt.training import ComputeClock, EvenBatches, SampleGate


def gated(*, start: float = 0.5) -> tuple[nn.Module, ComputeClock]:
    """Return a model behind a gate, and a clock of a hundred steps."""
    model = nn.Sequential(ResolutionGate(start=start, hold=0.2, full_at=0.6, multiple=4), nn.ReLU())
    return model, ComputeClock(model.train(), planned_steps=100)


def test_a_batch_holds_as_many_pixels_as_one_of_full_images() -> None:
    model, clock = gated()
    batches = EvenBatches(range(1000), 64, model, size=(28, 28))
    sizes = {0: 16, 40: 20, 50: 24, 70: 28}
    for step, size in sizes.items():
        clock.steps = step - 1
        clock.step()
        assert batches.samples == round(64 * 28 * 28 / size**2)
        assert len(next(iter(batches))) == batches.samples


def test_batches_shrink_within_an_epoch_and_every_sample_comes_once() -> None:
    model, clock = gated()
    found: list[list[int]] = []
    for batch in EvenBatches(range(4001), 64, model, size=(32, 32)):
        found.append(batch)
        clock.steps += 9
        clock.step()
    sizes = [len(batch) for batch in found]
    assert [sample for batch in found for sample in batch] == list(range(4001))
    assert sizes[0] == 256
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert sizes[-2] == 64 > sizes[-1] > 0


def test_an_interrupted_epoch_goes_on_with_the_same_batches() -> None:
    def batches_of(state: dict[str, Any] | None, steps: int) -> tuple[list[list[int]], SampleGate]:
        model, clock = gated()
        clock.load_state_dict({"steps": steps, "consumed_flops": 0})
        gate = SampleGate(2000, progress=lambda: clock.progress, seed=3)
        if state is not None:
            gate.load_state_dict(state)
        found: list[list[int]] = []
        for batch in EvenBatches(gate, 64, model, size=(32, 32)):
            gate.update(batch, torch.ones(len(batch)))
            found.append(batch)
            for _ in range(9):
                clock.step()
            if state is None and len(found) == stop:
                break
        return found, gate

    stop = 1000
    whole, _ = batches_of(None, 0)
    stop = 4
    first, gate = batches_of(None, 0)
    rest, _ = batches_of(gate.state_dict(), 9 * stop)
    assert len({len(batch) for batch in rest}) > 1
    assert first + rest == whole


def test_the_largest_of_several_images_counts() -> None:
    model, _ = gated()
    both = nn.ModuleList([model, gated(start=0.75)[0]])
    assert EvenBatches(range(9), 9, both, size=(32, 32)).samples == 16


def test_a_model_without_a_gate_or_without_a_clock_has_batches_of_one_size() -> None:
    for model in (nn.ReLU(), ResolutionGate()):
        assert EvenBatches(range(9), 4, model, size=(28, 28)).samples == 4


def test_an_optimized_model_trains_from_a_loader() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(96, 1, 16, 16), torch.randint(3, (96,))
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    model = graphopt.optimize(net, images[:4], recipe="ramp-resolution").train()
    clock = ComputeClock(model, planned_steps=12)
    gate = SampleGate(len(images), progress=lambda: clock.progress, seed=1)
    batches = EvenBatches(gate, 8, model, size=(16, 16))
    loader = DataLoader(TensorDataset(images, labels, torch.arange(96)), batch_sampler=batches)
    sizes: list[int] = []
    while not clock.finished:
        for part, targets, ids in loader:
            losses = nn.functional.cross_entropy(model(part), targets, reduction="none")
            gate.update(ids, losses)
            ((losses * gate.weights(ids)).sum() / batches.samples).backward()
            sizes.append(len(ids))
            clock.step()
    assert sizes[0] == 32
    assert 8 in sizes


def test_a_random_sampler_is_drawn_anew_each_epoch() -> None:
    data = TensorDataset(torch.arange(40))
    generator = torch.Generator().manual_seed(0)
    batches = EvenBatches(RandomSampler(data, generator=generator), 8, nn.ReLU(), size=(1, 1))
    first, second = list(batches), list(batches)
    assert first != second
    for epoch in (first, second):
        assert sorted(chain.from_iterable(epoch)) == list(range(40))


@pytest.mark.parametrize(("batch_size", "size"), [(0, (28, 28)), (8, (28, 0))])
def test_sizes_that_are_none_are_refused(batch_size: int, size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"expected a batch_size and a size .* at least 1, got"):
        EvenBatches(range(9), batch_size, nn.ReLU(), size=size)
