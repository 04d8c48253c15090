"""Losses of changes: estimates against measurements, and measurements that leave nothing behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import find_case, without_dropout

from graphopt.capture import capture
from graphopt.passes.base import Candidate, Change, Context, Pass, Proposal, State
from graphopt.passes.calibration import Calibration
from graphopt.passes.compress.factorize_low_rank import FactorizeLowRank
from graphopt.passes.loss_model import LossModel
from graphopt.passes.program import Program
from graphopt.passes.registry import pass_named
from graphopt.passes.weighted_statistics import grouped

Batches = list[dict[str, Any]]
Chosen = tuple[Pass, Candidate]


def captured(name: str, *, labels: bool = False) -> tuple[Program, Batches]:
    """Return a program in evaluation mode, its weights large enough to matter, and batches."""
    case = find_case(name)
    torch.manual_seed(0)
    model = without_dropout(case.build()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    batches = [dict(case.call(8, length, labels=labels)[1]) for length in (9, 7, 9, 8)]
    return capture(model, batches[0]), batches


def estimated(program: Program, context: Context, *names: str) -> tuple[LossModel, list[Chosen]]:
    losses = LossModel(program, context)
    found = []
    for name in names:
        step = pass_named(name)
        for candidate in step.offer(program, context).candidates:
            found.append((step, losses.estimate(step, candidate)))
    return losses, found


def state_of(program: Program) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in program.model.state_dict().items()}


def rank_correlation(first: list[float], second: list[float]) -> float:
    ranks = [torch.tensor(v).argsort().argsort().double() for v in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_estimates_rank_changes_as_measurements_do(name: str) -> None:
    program, batches = captured(name)
    context = Context(calibration=Calibration(batches))
    losses, found = estimated(program, context, "prune-channels", "sparsify-blocks")
    assert {candidate.loss_source for _, candidate in found} == {"data"}
    guessed = [candidate.loss or 0.0 for _, candidate in found]
    measured = [losses.measure([item]) for item in found]
    # Without a relation the correlation of n ranks has a standard deviation of 1 / sqrt(n - 1):
    # 0.9 is 6 of them or more.
    assert len(found) > 45
    assert rank_correlation(guessed, measured) > 0.9
    # The curvature of outputs is kept up to independence of rows: the scale is that of a loss.
    ratios = torch.tensor(guessed) / torch.tensor(measured)
    assert 0.5 < float(ratios.median()) < 2


def test_a_linear_model_is_estimated_exactly_up_to_the_signs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 6), nn.Linear(6, 4)).eval()
    x = torch.randn(2048, 8)
    program = capture(model, {"input": x[:32]})
    calibration = Calibration([{"input": part} for part in x.split(64)])
    _, found = estimated(program, Context(calibration=calibration), "prune-channels")
    change = found[-1][1].change
    weight = found[-1][0].reconstruct(
        program, change, found[-1][0].transfer(program, change, Context(calibration=calibration))
    )
    assert weight is not None
    with torch.no_grad():
        hidden, out = model[0](x), model(x)
        other = model[2](nn.functional.linear(hidden, weight["1.weight"], weight["1.bias"]))
    expected = float((other - out).square().sum() / out.square().sum())
    # Each of 2048 rows contributes the mean over 4 outputs' random signs: errors of 1 / sqrt(2048)
    # of the loss, and the energy is that of the first 32 samples.
    energy = float(out[:32].square().sum() / 32 / (out.square().sum() / 2048))
    assert found[-1][1].loss == pytest.approx(expected / energy, rel=0.1)


def test_choices_are_measured_together_and_leave_the_model_as_it_was() -> None:
    program, batches = captured("llama")
    context = Context(calibration=Calibration(batches))
    losses, found = estimated(program, context, "prune-channels", "gate-layers")
    before, graph = state_of(program), str(program)
    first, *_, last = found
    alone = [losses.measure([item]) for item in (first, last)]
    both = losses.measure([first, last])
    assert losses.measure([]) == 0.0
    assert all(0 < loss < both for loss in alone)
    assert both == losses.measure([first, last])
    assert str(program) == graph
    after = program.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_measuring_is_what_replacing_parameters_gives() -> None:
    program, batches = captured("gpt2")
    context = Context(calibration=Calibration(batches))
    losses, found = estimated(program, context, "prune-channels")
    step, candidate = found[-1]
    state = step.transfer(program, candidate.change, context)
    dense = step.reconstruct(program, candidate.change, state)
    assert dense is not None
    with torch.no_grad():
        plain = [program(**batch).logits for batch in batches]
        for name, value in dense.items():
            program.model.get_parameter(name).copy_(value)
        changed = [program(**batch).logits for batch in batches]
    error = sum(float((a - b).square().sum()) for a, b in zip(plain, changed, strict=True))
    energy = sum(float(a.square().sum()) for a in plain)
    program, _ = captured("gpt2")
    losses = LossModel(program, context)
    assert losses.measure([(step, candidate)]) == pytest.approx(error / energy, rel=1e-4)


class Interrupted(Exception):
    """Stands for an interrupt."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
def test_an_interrupt_leaves_the_model_as_it_was(error: type[BaseException]) -> None:
    program, batches = captured("gpt2")
    context = Context(calibration=Calibration(batches))
    losses, found = estimated(program, context, "prune-channels")
    losses.measure([found[0]])
    tensors = {name: value.data_ptr() for name, value in program.model.named_parameters()}

    def fail(*_: Any) -> None:
        raise error

    handle = program.model.get_submodule("transformer.h.1.mlp.act").register_forward_hook(fail)
    with pytest.raises(error):
        losses.measure([found[0]])
    handle.remove()
    after = {name: value.data_ptr() for name, value in program.model.named_parameters()}
    assert after == tensors
    assert not program.model.training


def test_structural_changes_are_measured_in_place_and_undone() -> None:
    program, batches = captured("llama")
    context = Context(calibration=Calibration(batches))
    step = pass_named("gate-layers")
    candidate = step.offer(program, context).candidates[0]
    losses = LossModel(program, context)
    expected = losses.estimate(step, candidate)
    assert expected.loss_source == "measured"
    before, graph = state_of(program), str(program)
    found = LossModel(program, context).estimate(Structural(step), candidate)
    assert found.loss_source == "measured"
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert str(program) == graph
    after = program.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Structural(Pass):
    """A pass whose changes no parameters can stand for."""

    name = "structural"
    exact = False

    def __init__(self, step: Pass) -> None:
        self._step = step

    def propose(self, program: Program, context: Context) -> Proposal:
        return self._step.propose(program, context)

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        return self._step.transfer(program, change, context)

    def apply(self, program: Program, change: Change) -> None:
        self._step.apply(program, change)

    def restore(self, model: nn.Module, change: Change) -> None:
        self._step.restore(model, change)


def test_without_data_losses_are_proxies_from_weights() -> None:
    program, _ = captured("llama")
    _, found = estimated(program, Context(), "prune-channels", "factorize-low-rank", "gate-layers")
    assert {candidate.loss_source for _, candidate in found} == {"weights"}
    levels: dict[str, list[float]] = {}
    for step, candidate in found:
        place = f"{step.name} {candidate.change.target} {candidate.change.details.get('group')}"
        levels.setdefault(place, []).append(candidate.loss or 0.0)
    assert max(map(len, levels.values())) == 7
    for place, values in levels.items():
        assert values == sorted(values), place
        assert values[0] > 0, place


def test_a_proxy_is_the_energy_lost_times_the_share_of_the_operations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 48)).eval()
    program = capture(model, torch.randn(4, 16))
    step = FactorizeLowRank(round_to=4)
    losses = LossModel(program, Context())
    for candidate in step.offer(program, Context()).candidates:
        place = int(candidate.change.target)
        layer = model[place]
        assert isinstance(layer, nn.Linear)
        energy = torch.linalg.svdvals(layer.weight.detach().double()).square()
        lost = float(energy[candidate.change.details["rank"] :].sum() / energy.sum())
        found = losses.estimate(step, candidate).loss
        assert found == pytest.approx(lost * {0: 1 / 4, 2: 3 / 4}[place], rel=1e-5)


def test_on_the_meta_device_losses_are_shares_of_the_operations() -> None:
    case = find_case("bert-classifier")
    with torch.device("meta"):
        model = case.build()
    program = capture(model.to("meta"), dict(case.call(2, 8)[1]))
    step = pass_named("factorize-low-rank")
    losses = LossModel(program, Context())
    found = [losses.estimate(step, item) for item in step.offer(program, Context()).candidates]
    assert {item.loss_source for item in found} == {"weights"}
    values = [item.loss or 0.0 for item in found]
    assert losses.measure([(step, item) for item in found]) == sum(values)


def test_labels_make_it_the_models_own_loss() -> None:
    program, batches = captured("bert-classifier", labels=True)
    context = Context(calibration=Calibration(batches))
    losses, found = estimated(program, context, "prune-channels")
    step, candidate = found[-1]
    loss = losses.measure([(step, candidate)])
    dense = step.reconstruct(
        program, candidate.change, step.transfer(program, candidate.change, context)
    )
    assert dense is not None

    def mean_loss() -> float:
        with torch.no_grad():
            return sum(float(program(**batch).loss) for batch in batches) / len(batches)

    before = mean_loss()
    with torch.no_grad():
        for name, value in dense.items():
            program.model.get_parameter(name).copy_(value)
    assert loss == pytest.approx(mean_loss() - before, rel=1e-3)


def test_small_changes_follow_the_gradient_of_the_loss() -> None:
    program, batches = captured("bert-classifier", labels=True)
    context = Context(calibration=Calibration(batches))
    losses, found = estimated(program, context, "factorize-low-rank")
    assert {candidate.loss_source for _, candidate in found} == {"data"}
    small = sorted(found, key=lambda item: abs(item[1].loss or 0.0))
    guessed = [candidate.loss or 0.0 for _, candidate in small]
    measured = [losses.measure([item]) for item in small]
    # A sign alone is right by chance in half of the cases.
    right = sum(a * b > 0 for a, b in zip(guessed, measured, strict=True))
    assert right >= 0.8 * len(small)
    assert rank_correlation(guessed, measured) > 0.8


def test_progress_is_told_about_sweeps_and_a_store_saves_them(tmp_path: Any) -> None:
    program, batches = captured("gpt2")
    step = pass_named("prune-channels")
    told: list[list[tuple[int, int]]] = []
    for _ in range(2):
        told.append([])
        context = Context(calibration=Calibration(batches, store=tmp_path))
        losses = LossModel(
            program, context, progress=lambda label, done, total: told[-1].append((done, total))
        )
        losses.estimate(step, step.offer(program, context).candidates[0])
    assert told[0] == [(1, 1), (1, 1)]
    assert told[1] == []


@dataclass(frozen=True)
class Part:
    """Stands for statistics of some size."""

    size_bytes: int


def test_statistics_in_memory_take_a_given_room_beside_the_largest() -> None:
    parts = [Part(size) for size in (3, 1, 4, 1, 5, 9, 2, 6)]
    groups = list(grouped(parts, 4))
    assert [part for group in groups for part in group] == parts
    assert all(sum(part.size_bytes for part in group) <= 4 + 9 for group in groups)
    assert len(groups) == 4
