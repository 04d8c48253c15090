"""A cheap model gets nearer to its teacher, never farther, in the time it is given."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import graphopt
from graphopt.errors import CheckpointError, ConfigError, InputError, TrainingError
from graphopt.kernels.quantized_linear import QuantizedLinear
from graphopt.passes.base import replace_module
from graphopt.passes.drift import deviation
from graphopt.training import RecoveryReport, recovery_of
from graphopt.training.recovery_outputs import ReadOutputs
from graphopt.training.recovery_rounding import RoundedLinear, trainable_rounding
from graphopt.training.recovery_sites import Sites

BATCH, TOKENS, WORDS = 8, 12, 60
Batch = dict[str, Tensor]


def batch() -> Batch:
    lengths = torch.randint(3, TOKENS + 1, (BATCH, 1))
    return {
        "input_ids": torch.randint(WORDS, (BATCH, TOKENS)),
        "attention_mask": (torch.arange(TOKENS) < lengths).long(),
    }


@pytest.fixture(scope="module")
def data() -> list[Batch]:
    torch.manual_seed(1)
    return [batch() for _ in range(16)]


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=TOKENS,
    )
    model: nn.Module = BertModel(config).eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= 5  # so that blocks matter beside the residual stream
    return model


@pytest.fixture(scope="module")
def pruned(dense: nn.Module, data: list[Batch]) -> nn.Module:
    return graphopt.optimize(
        dense, data[0], recipe=["prune-channels"], budget=0.6, calibration=data[:4], measure=False
    )


class Chain(nn.Module):
    """Two blocks, each a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def teacher() -> Chain:
    torch.manual_seed(0)
    return Chain()


@pytest.fixture
def student(teacher: Chain) -> Chain:
    worse = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return worse


@pytest.fixture
def rows() -> list[Tensor]:
    return [torch.randn(BATCH, 4) for _ in range(16)]


def report_of(model: nn.Module) -> RecoveryReport:
    report = recovery_of(model)
    assert report is not None
    return report


def drift(model: nn.Module, dense: nn.Module, batches: list[Batch]) -> float:
    """Return the relative error at real tokens, computed by hand."""
    error = norm = 0.0
    with torch.no_grad():
        for item in batches:
            real = item["attention_mask"].bool()
            mine, wanted = (m(**item).last_hidden_state[real].double() for m in (model, dense))
            error += (mine - wanted).square().sum().item()
            norm += wanted.square().sum().item()
    return float((error / norm) ** 0.5)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pruned_model_gets_nearer_to_its_teacher_on_batches_it_never_saw(
    dense: nn.Module, pruned: nn.Module, data: list[Batch]
) -> None:
    before, teacher = state(pruned), state(dense)
    unseen = [batch() for _ in range(4)]
    recovered = graphopt.recover(pruned, dense, data, steps=60, learning_rate=2e-3)
    assert drift(recovered, dense, unseen) < 0.8 * drift(pruned, dense, unseen)
    report = report_of(recovered)
    assert report.after.drift < report.before.drift
    assert report.after.cosine > report.before.cosine
    assert {point.phase for point in report.history} == {"layer-wise", "end-to-end"}
    assert report.sites == ("encoder.layer.0", "encoder.layer.1")
    assert same(pruned, before)
    assert same(dense, teacher)
    assert recovery_of(pruned) is None


def test_the_model_keeps_its_class_modes_and_frozen_parameters(
    dense: nn.Module, pruned: nn.Module, data: list[Batch], tmp_path: Path
) -> None:
    dense.train()
    pruned.train()
    pruned.get_submodule("encoder.layer.1").eval()
    table = pruned.get_parameter("embeddings.word_embeddings.weight").requires_grad_(False)
    modes = [module.training for module in pruned.modules()]
    try:
        recovered = graphopt.recover(pruned, dense, data, steps=5)
        assert dense.training
    finally:
        dense.eval()
        pruned.eval()
        table.requires_grad_(True)
    assert isinstance(recovered, BertModel)
    assert [module.training for module in recovered.modules()] == modes
    found = recovered.get_parameter("embeddings.word_embeddings.weight")
    assert torch.equal(found, table)
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in recovered.parameters())
    graphopt.save(recovered.eval(), tmp_path / "out")
    with torch.no_grad():
        loaded = graphopt.load(tmp_path / "out")(**data[0]).last_hidden_state
        assert torch.equal(loaded, recovered(**data[0]).last_hidden_state)
    notes = graphopt.report(graphopt.load(tmp_path / "out")).notes
    assert notes[-1] == f"recovered: {recovery_of(recovered)}"
    assert len(notes) == len(graphopt.report(pruned).notes) + 1


def test_training_that_only_harms_leaves_the_model_as_it_came(
    dense: nn.Module, pruned: nn.Module, data: list[Batch]
) -> None:
    recovered = graphopt.recover(pruned, dense, data, steps=24, learning_rate=1e3)
    assert same(recovered, state(pruned))
    report = report_of(recovered)
    assert report.after == report.before
    assert report.stopped == "no improvement"


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_numbers(
    student: Chain, teacher: Chain, rows: list[Tensor]
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    samples: Any = torch.cat(rows)
    loader = torch.utils.data.DataLoader(samples, batch_size=4, shuffle=True)
    runs = [graphopt.recover(student, teacher, loader, steps=6, seed=3) for _ in range(2)]
    assert same(runs[0], state(runs[1]))
    other = graphopt.recover(student, teacher, loader, steps=6, seed=4)
    assert not same(runs[0], state(other))
    assert torch.equal(torch.rand(3), expected)


def test_the_time_is_kept(student: Chain, teacher: Chain, rows: list[Tensor]) -> None:
    told: list[tuple[str, int, int]] = []
    prepared = report_of(graphopt.recover(student, teacher, rows, steps=1)).seconds
    minutes = (2 * prepared + 2) / 60  # as much again for a busy machine
    recovered = graphopt.recover(
        student, teacher, rows, minutes=minutes, progress=lambda *step: told.append(step)
    )
    report = report_of(recovered)
    assert report.stopped == "time"
    assert report.steps == len(told) > 0
    assert report.seconds < 60 * minutes + 1  # a step of this model takes far less than a second
    assert {total for _, _, total in told} == {int(60 * minutes)}
    assert {label for label, _, _ in told} == {"recover layer-wise", "recover end-to-end"}
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_an_interrupted_run_goes_on_to_the_same_result(
    student: Chain, teacher: Chain, rows: list[Tensor], tmp_path: Path
) -> None:
    def interrupt(label: str, done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    store = tmp_path / "run"
    partial = graphopt.recover(student, teacher, rows, steps=20, store=store, progress=interrupt)
    report = report_of(partial)
    assert (report.stopped, report.steps) == ("interrupted", 7)
    assert report.after.drift <= report.before.drift
    assert {path.suffix for path in store.iterdir()} == {".json", ".safetensors"}
    resumed = graphopt.recover(student, teacher, rows, steps=20, store=store)
    whole = graphopt.recover(student, teacher, rows, steps=20)
    assert not same(whole, state(partial))
    assert same(resumed, state(whole))
    assert [p.judgement for p in report_of(resumed).history] == [
        p.judgement for p in report_of(whole).history
    ]
    again = graphopt.recover(student, teacher, rows, steps=20, store=store)
    assert report_of(again).steps == 20
    assert same(again, state(whole))
    student.blocks[0].requires_grad_(False)
    with pytest.raises(CheckpointError, match="other parameters"):
        graphopt.recover(student, teacher, rows, steps=20, store=store)


def test_a_score_of_the_user_decides(student: Chain, teacher: Chain, rows: list[Tensor]) -> None:
    first = state(student)

    def score(model: nn.Module) -> float:
        return -float(not same(model, first))

    def once() -> Iterator[Tensor]:
        yield from rows[:4]

    recovered = graphopt.recover(student, teacher, once(), steps=7, score=score)
    assert same(recovered, first)
    assert report_of(recovered).after.score == 0
    assert report_of(recovered).steps == 7
    changed = graphopt.recover(student, teacher, rows, steps=7, score=lambda model: -score(model))
    assert not same(changed, first)


def test_a_packed_model_learns_at_its_real_tokens(dense: nn.Module, data: list[Batch]) -> None:
    cheap = graphopt.optimize(
        dense,
        data[0],
        recipe=["prune-channels", "pack-tokens"],
        budget=0.6,
        calibration=data[:4],
        measure=False,
    )
    assert {row.pass_name for row in graphopt.report(cheap).kept} == {
        "prune-channels",
        "pack-tokens",
    }
    recovered = graphopt.recover(cheap, dense, data, steps=30, learning_rate=2e-3)
    assert report_of(recovered).sites
    assert report_of(recovered).after.drift < report_of(recovered).before.drift


def test_quantized_layers_are_trained_and_stay_quantized(
    dense: nn.Module, data: list[Batch]
) -> None:
    cheap = copy.deepcopy(dense)
    for name, layer in list(cheap.named_modules()):
        if isinstance(layer, nn.Linear):
            coarse = QuantizedLinear.from_dense(layer, bits=4, group_size=16, activations="none")
            replace_module(cheap, name, coarse)
    before = state(cheap)
    recovered = graphopt.recover(cheap, dense, data, steps=60, learning_rate=2e-3)
    layers = [item for item in recovered.modules() if isinstance(item, QuantizedLinear)]
    assert len(layers) == 13
    assert not any(isinstance(item, RoundedLinear) for item in recovered.modules())
    report = report_of(recovered)
    assert report.after.drift < 0.9 * report.before.drift
    # What was judged is what came: the integers, not the float weights behind them.
    judged = ReadOutputs(recovered, dense, data[0])
    found = deviation((judged.observed(recovered, b), judged.observed(dense, b)) for b in data[-4:])
    assert found.drift == report.after.drift
    assert any(not torch.equal(layers[0].codes, before[n]) for n in before if n.endswith("codes"))


def test_rounded_layers_compute_like_quantized_ones_and_learn_like_float_ones() -> None:
    dense = nn.Linear(32, 16)
    layer = QuantizedLinear.from_dense(dense, bits=4, group_size=16, activations="none")
    x = torch.randn(5, 32, requires_grad=True)
    model = nn.Sequential(layer)
    expected = layer(x).detach()
    before, scales = layer.integers.clone(), layer.scales.clone()
    with trainable_rounding(model):
        rounded = model[0]
        assert isinstance(rounded, RoundedLinear)
        torch.testing.assert_close(rounded(x), expected)
        rounded(x).square().sum().backward()
        assert rounded.weight.grad is not None
        slopes = 2 * expected
        torch.testing.assert_close(rounded.weight.grad, slopes.t() @ x.detach())
        torch.testing.assert_close(x.grad, slopes @ rounded.weight.detach())
        with torch.no_grad():
            rounded.weight[0, :16] += 2 * layer.scales[0, 0]
            rounded.weight[1] += 0.4 * layer.scales[1, 0].minimum(layer.scales[1, 1])
    assert model[0] is layer
    moved = before.clone()
    moved[0, :16] += 2
    assert torch.equal(layer.integers, moved.clamp(max=7))
    assert torch.equal(layer.scales, scales)


def test_an_error_gives_quantized_layers_back_as_they_were() -> None:
    layer = QuantizedLinear.from_dense(nn.Linear(32, 16))
    model = nn.Sequential(layer)
    before = state(model)

    def fail() -> None:
        with trainable_rounding(model):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1)
            model(torch.randn(2, 32))
            raise InputError("stop")

    with pytest.raises(InputError):
        fail()
    assert model[0] is layer
    assert same(model, before)


def test_blocks_alone_read_what_the_teachers_blocks_give(student: Any, teacher: Any) -> None:
    x = torch.randn(6, 4)
    sites = Sites(student, teacher)
    sites.match(lambda model: model(x), None)
    assert sites.names == ("blocks.0", "blocks.1")
    sites.alone = True
    with sites.watched(None) as errors:
        wanted = teacher(x)
        assert torch.equal(student(x), wanted)
        found = list(errors)
    middle = teacher.blocks[0](x).detach()
    for error, mine, theirs, given in zip(
        found, student.blocks, teacher.blocks, (x, middle), strict=True
    ):
        expected = theirs(given).detach()
        hand = (mine(given) - expected).square().sum() / expected.square().sum()
        torch.testing.assert_close(error, hand)
    found[1].backward()
    assert student.blocks[0][0].weight.grad is None
    assert student.blocks[1][0].weight.grad is not None


def test_padding_does_not_count(dense: nn.Module, pruned: nn.Module, data: list[Batch]) -> None:
    outputs = ReadOutputs(pruned, dense, data[0])
    mine, wanted = (outputs.call(model, data[0]) for model in (pruned, dense))
    first = outputs.error(mine, wanted, data[0])
    assert first is not None
    padding = data[0]["attention_mask"] == 0
    assert padding.any()
    mine.last_hidden_state = mine.last_hidden_state.masked_fill(padding[..., None], 1e6)
    second = outputs.error(mine, wanted, data[0])
    assert second is not None
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, "minutes above 0"),
        ({"minutes": float("nan")}, "minutes above 0"),
        ({"steps": 0}, "at least 1 step"),
        ({"learning_rate": -1.0}, "learning rate above 0"),
        ({"layerwise": 1.0}, r"share in \[0, 1\)"),
    ],
)
def test_options_outside_their_range_are_refused(
    dense: nn.Module, pruned: nn.Module, data: list[Batch], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        graphopt.recover(pruned, dense, data, **options)


def test_models_that_do_not_fit_are_refused(
    dense: nn.Module, pruned: nn.Module, data: list[Batch]
) -> None:
    with pytest.raises(TrainingError, match="the model itself"):
        graphopt.recover(dense, dense, data)
    with pytest.raises(InputError, match="does not run on a batch"):
        graphopt.recover(pruned, dense, [{"input_ids": torch.full((2, 3), WORDS)}] * 4, steps=1)
    with pytest.raises(TrainingError, match="of one shape"):
        graphopt.recover(nn.Linear(4, 3), nn.Linear(4, 2), [torch.randn(2, 4)] * 4, steps=1)
