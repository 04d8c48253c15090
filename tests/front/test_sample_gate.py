"""The sample gate drops what is learned, without a bias, and sees everything in the end."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from graphopt.errors import ConfigError, TrainingError
from graphopt.training import SampleGate, WithSampleIds

SIZE = 40


class Progress:
    """A clock of a test."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def __call__(self) -> float:
        return self.value


def seen(gate: SampleGate, losses: Tensor, *, step: float = 0.0) -> list[int]:
    """Train one epoch in batches of 8 at losses per sample; return the places in their order."""
    places = list(gate)
    for start in range(0, len(places), 8):
        batch = torch.tensor(places[start : start + 8])
        gate.update(batch, losses[batch])
    gate._progress.value += step  # type: ignore[attr-defined]
    return places


def warmed(losses: Tensor, **options: Any) -> SampleGate:
    """Return a gate that has seen all losses once."""
    gate = SampleGate(len(losses), progress=Progress(), **options)
    assert sorted(seen(gate, losses)) == list(range(len(losses)))
    return gate


def test_the_first_epoch_is_full_and_unweighted() -> None:
    gate = SampleGate(SIZE, progress=Progress())
    assert len(gate) == SIZE
    places = list(gate)
    assert sorted(places) == list(range(SIZE)) != places
    assert torch.equal(gate.weights(places), torch.ones(SIZE))


def test_only_samples_below_the_mean_are_dropped_and_the_others_of_them_weigh_more() -> None:
    losses = torch.linspace(0, 1, SIZE)
    gate = warmed(losses, drop=0.25)
    kept = set(seen(gate, losses))
    assert set(range(SIZE // 2, SIZE)) <= kept
    learned = sorted(kept - set(range(SIZE // 2, SIZE)))
    assert 0 < len(learned) < SIZE // 2
    assert torch.equal(gate.weights(learned), torch.full((len(learned),), 1 / 0.75))
    assert torch.equal(gate.weights([SIZE - 1]), torch.ones(1))
    dropped = next(place for place in range(SIZE) if place not in kept)
    with pytest.raises(TrainingError, match=rf"samples at \[{dropped}\], which it dropped"):
        gate.weights([dropped])


def test_the_expected_loss_is_that_of_all_samples() -> None:
    """Exactly: the weights of all outcomes of the draws, by their probabilities, sum to one."""
    drop = 0.3
    weight = warmed(torch.tensor([0.0, 1.0]), drop=drop)
    while 0 not in list(weight):
        weight._exhausted = True
    (kept,) = weight.weights([0]).double().tolist()
    outcomes = itertools.product((0.0, kept), repeat=3)
    expected = sum(
        math.prod(drop if item == 0 else 1 - drop for item in outcome) * sum(outcome)
        for outcome in outcomes
    )
    assert expected == pytest.approx(3, rel=2 * torch.finfo(torch.float32).eps)


def test_the_gradient_has_no_bias_over_many_epochs() -> None:
    losses = torch.cat([torch.linspace(0, 0.2, SIZE // 2), torch.linspace(1, 2, SIZE // 2)])
    gate = warmed(losses)
    epochs = 400
    total = torch.zeros(SIZE, dtype=torch.float64)
    for _ in range(epochs):
        places = torch.tensor(seen(gate, losses))
        total[places] += gate.weights(places)
    assert torch.equal(total[SIZE // 2 :], torch.full((SIZE // 2,), float(epochs)).double())
    # A weight is 0 or 2, each half of the time: a mean of `epochs` has a deviation of
    # 1 / sqrt(epochs); all 20 stay within 4.5 of those with a probability of 0.9999.
    assert ((total / epochs - 1).abs() < 4.5 / math.sqrt(epochs)).all()


def test_nothing_is_dropped_at_the_end() -> None:
    """Pruned epochs end before 0.875 of the training: with 8 epochs the last one starts there."""
    losses = torch.linspace(0, 1, SIZE)
    gate = SampleGate(SIZE, progress=Progress())
    lengths = [len(seen(gate, losses, step=0.125)) for _ in range(8)]
    assert lengths[0] == lengths[-1] == SIZE
    assert max(lengths[1:-1]) < SIZE
    few = SampleGate(SIZE, progress=Progress())
    assert [len(seen(few, losses, step=0.5)) for _ in range(2)] == [SIZE, SIZE]


def test_equal_seeds_choose_alike_and_others_do_not() -> None:
    losses = torch.linspace(0, 1, SIZE)
    runs = [seen(warmed(losses, seed=seed), losses) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_loss_that_overflowed_is_forgotten() -> None:
    gate = warmed(torch.linspace(0, 1, SIZE))
    before = gate.scores.clone()
    gate.update([3, 4], torch.tensor([math.inf, math.nan]))
    assert torch.equal(gate.scores, before)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("form", ["pair", "mapping"])
def test_a_plain_data_loader_trains_on_it(form: str, workers: int) -> None:
    x = torch.randn(SIZE, 4)
    pairs = TensorDataset(x, x.sum(1, keepdim=True))
    data: Any = (
        pairs
        if form == "pair"
        else [{"x": pair[0], "y": pair[1]} for pair in map(pairs.__getitem__, range(SIZE))]
    )
    gate = SampleGate(SIZE, progress=Progress())
    loader = DataLoader(WithSampleIds(data), batch_size=8, sampler=gate, num_workers=workers)
    model = nn.Linear(4, 1)
    for _ in range(3):
        batches = 0
        for batch in loader:
            ids = batch["sample_id"] if form == "mapping" else batch[1]
            inputs, wanted = (batch["x"], batch["y"]) if form == "mapping" else batch[0]
            assert torch.equal(inputs, x[ids])
            losses = (model(inputs) - wanted).square().mean(1)
            (losses * gate.weights(ids)).mean().backward()
            gate.update(ids, losses)
            batches += 1
        assert batches == len(loader)
    assert gate.epoch == 3
    assert batches < SIZE // 8


@pytest.mark.parametrize("stop_after", [0, 8, 24, SIZE])
def test_it_resumes_within_an_epoch(stop_after: int) -> None:
    losses = torch.linspace(0, 1, SIZE)
    whole, stopped = warmed(losses), warmed(losses)
    expected = [*seen(whole, losses), *seen(whole, losses)]
    begun = list(itertools.islice(stopped, stop_after))
    gate = stopped
    if begun:
        gate.update(begun, losses[begun])
    resumed = SampleGate(SIZE, progress=Progress())
    resumed.load_state_dict(gate.state_dict())
    rest = seen(resumed, losses)
    assert (begun + rest)[: len(expected)] == expected[: len(begun) + len(rest)]
    if 0 < len(begun) < len(whole):
        assert torch.equal(resumed.weights(begun + rest), gate.weights(begun + rest))


def test_names_are_ids_too() -> None:
    gate = SampleGate(["a", "b", "c"], progress=Progress())
    for place in gate:
        gate.update([["a", "b", "c"][place]], torch.tensor([float(place)]))
    assert gate.scores.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, SIZE], rf"ids of the {SIZE} samples of this gate, got {SIZE}"),
        ([-1], "got -1"),
        ([1, 1], "expected every id once in a batch"),
        (torch.tensor([0.5]), r"got Tensor of torch\.float32; WithSampleIds"),
        (["a"], "expected sample ids .* WithSampleIds"),
        (None, "expected sample ids .* got NoneType"),
    ],
)
def test_ids_that_name_no_sample_are_refused(ids: Any, message: str) -> None:
    gate = SampleGate(SIZE, progress=Progress())
    with pytest.raises(TrainingError, match=message):
        gate.update(ids, torch.zeros(1))


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"drop in \[0, 1\)"):
        SampleGate(SIZE, progress=Progress(), drop=1)
    with pytest.raises(ConfigError, match="at least 1 sample"):
        SampleGate(0, progress=Progress())
    with pytest.raises(ConfigError, match="got 'a' twice"):
        SampleGate(["a", "b", "a"], progress=Progress())
    gate = SampleGate(SIZE, progress=Progress())
    with pytest.raises(TrainingError, match=r"one loss per sample, \[2\], got \[\]"):
        gate.update([0, 1], torch.tensor(1.0))
    list(gate)
    with pytest.raises(TrainingError, match="call update"):
        list(gate)
    with pytest.raises(TrainingError, match="scores of 40 samples, got 3"):
        gate.load_state_dict(SampleGate(3, progress=Progress()).state_dict())
