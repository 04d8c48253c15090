"""Packed models compute what padded ones do, at every real token, for any padding."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import Case, find_case, without_dropout

import graphopt
from graphopt.capture import capture
from graphopt.passes.base import Context
from graphopt.passes.calibration import Calibration
from graphopt.passes.costs import Comparison, Costs
from graphopt.passes.errors import ConfigError, PlanError
from graphopt.passes.exact.pack_tokens import PackTokens
from graphopt.passes.facts import total_cost
from graphopt.passes.manager import PassManager
from graphopt.passes.structure import flatten
from graphopt.passes.verifier import relative_error, rounding_bound
from graphopt.runtime import installation_of

BOUND = 1e-12
"""Models run in float64: rounding is 1e-16 per operation, a row of zeros in place of another 1."""


def call(case: Case, real: Tensor, *, labels: bool = False) -> dict[str, Any]:
    """Return a call whose padding is where `real` [batch, token] is false."""
    batch, length = real.shape
    kwargs: dict[str, Any] = case.call(batch, length, labels=labels)[1]
    if "padding" in kwargs:
        kwargs["padding"] = ~real
        kwargs["features"] = kwargs["features"].double()
    else:
        kwargs["attention_mask"] = real.long()
    if labels and kwargs["labels"].dim() == 2:
        kwargs["labels"] = kwargs["labels"].masked_fill(~real, -100)
    return kwargs


def right(batch: int, length: int, *lengths: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None].expand(batch, 1)


def left(batch: int, length: int, *lengths: int) -> Tensor:
    return right(batch, length, *lengths).flip(1)


@cache
def models(name: str, labels: bool = False) -> tuple[Case, nn.Module, nn.Module]:
    """Return a dense model in float64 and its packed twin."""
    case = find_case(name)
    dense = without_dropout(case.build()).double()
    example = call(case, right(3, 9, 9, 5, 7), labels=labels)
    packed = graphopt.optimize(dense, example, recipe=["pack-tokens"], measure=False)
    installed = installation_of(packed)
    assert installed is not None
    assert installed.plan.changes, installed.plan.misses
    return case, dense, packed


def read(value: Tensor, real: Tensor) -> Tensor:
    """Return what may be read of an output."""
    if value.dim() < 2:
        return value
    if value.shape[:2] == real.shape:
        return value[real]
    if value.dim() == 4 and value.shape[2] == real.shape[1]:  # keys and values of a cache
        return value.transpose(1, 2)[real]
    return value[real.any(1)]


def outcome(model: nn.Module, inputs: dict[str, Any], real: Tensor) -> dict[str, Tensor]:
    """Return outputs at real tokens, and the gradients of their sum with random weights."""
    outputs, _ = flatten(model(**inputs))
    found = {
        f"output {number}": read(value, real)
        for number, value in enumerate(outputs)
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    random = torch.Generator().manual_seed(0)
    weights = (torch.randn(v.shape, generator=random, dtype=v.dtype) for v in found.values())
    loss = torch.stack([(v * w).sum() for v, w in zip(found.values(), weights, strict=True)]).sum()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found |= {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}
    return found


def assert_same(name: str, real: Tensor, *, training: bool, labels: bool = False) -> None:
    case, dense, packed = models(name, labels)
    inputs = call(case, real, labels=labels)
    expected = outcome(dense.train(training), inputs, real)
    rows: list[int] = []
    layer = next(
        m for m in packed.modules() if isinstance(m, nn.LayerNorm) or "RMS" in str(type(m))
    )
    hook = layer.register_forward_hook(lambda _, __, y: rows.append(y.numel() // y.shape[-1]))
    actual = outcome(packed.train(training), inputs, real)
    hook.remove()
    assert rows == [int(real.sum())], "the layers do not run on real tokens"
    assert actual.keys() == expected.keys()
    for key, value in actual.items():
        scale = max(expected[key].norm().item(), 1e-3)
        error = (value - expected[key]).norm().item()
        assert error <= BOUND * scale, f"{key} differs by {error / scale:.1e}"


CLASSIFIERS = ("bert-classifier", "modernbert", "roberta", "distilbert")
"""They read the first token of every row, which must be real."""
OTHERS = ("transformer-encoder-padded", "gpt2-padded", "llama-padded")
PADDINGS = {
    "other sizes": right(4, 12, 12, 1, 7, 3),
    "one row": right(1, 6, 4),
    "no padding": right(2, 5, 5, 5),
    "an empty row": right(3, 6, 6, 0, 2),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 0]]).bool(),
    "left": left(3, 8, 8, 2, 5),
}


@pytest.mark.parametrize("name", [*CLASSIFIERS, *OTHERS])
def test_outputs_and_gradients_at_real_tokens_are_those_of_the_padded_model(name: str) -> None:
    for padding, real in PADDINGS.items():
        if padding != "left" or name in OTHERS:
            assert_same(name, real, training=padding != "one row")
    assert_same(name, PADDINGS["other sizes"], training=False)


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2-padded"])
def test_losses_are_those_of_the_padded_model(name: str) -> None:
    assert_same(name, right(3, 7, 7, 3, 5), training=True, labels=True)


@pytest.mark.parametrize("name", ["modernbert", "llama-padded", "transformer-encoder-padded"])
def test_padded_inputs_change_nothing_and_their_outputs_are_zero(name: str) -> None:
    case, _, packed = models(name)
    real = right(3, 8, 8, 2, 5)
    inputs = call(case, real)
    key = "features" if "features" in inputs else "input_ids"
    other = inputs | {
        key: inputs[key].where(real if inputs[key].dim() == 2 else real[..., None], 7)
    }
    assert not torch.equal(other[key], inputs[key])
    packed.eval()
    with torch.no_grad():
        before, _ = flatten(packed(**inputs))
        after, _ = flatten(packed(**other))
    assert all(map(torch.equal, before, after))
    if before[0].shape[:2] == real.shape:
        assert not before[0][~real].any()
        assert before[0][real].all(dim=-1).any()


def refusal(model: nn.Module, example: Any, **options: Any) -> str:
    """Return why a model is not packed."""
    proposal = PackTokens(**options).propose(capture(model, example), Context())
    assert not proposal.candidates
    (miss,) = proposal.misses
    return miss.reason


def test_models_without_padding_are_left_alone() -> None:
    case = find_case("vit")
    assert "no input marks padding" in refusal(case.build(), case.call(2, 0)[1])
    case = find_case("llama")
    assert "no input marks padding" in refusal(case.build(), case.call(2, 6)[1])


class Pooled(nn.Module):
    """A layer on every token, and a mean over tokens that may or may not leave out padding."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.embedding = nn.Embedding(50, 16)
        self.layer = nn.Sequential(nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 16))
        self.head = nn.Linear(16, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        hidden = hidden + self.layer(hidden)
        weight = mask[..., None].float() if self.masked else torch.ones_like(hidden[..., :1])
        pooled = (hidden * weight).sum(1) / weight.sum(1)
        result: Tensor = self.head(pooled)
        return result


def pooled_call(real: Tensor) -> dict[str, Tensor]:
    ids = torch.arange(real.numel()).view(real.shape) % 50
    return {"ids": ids, "mask": real.long()}


class Offset(Pooled):
    """Its mean reads a constant at padding, which only the mask knows of."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.layer(self.embedding(ids)) * mask[..., None].float()
        result: Tensor = self.head((hidden + (1 - mask[..., None].float())).sum(1))
        return result


def test_an_output_that_reads_padding_is_refused() -> None:
    example = pooled_call(right(3, 8, 8, 5, 2))
    reason = refusal(Pooled(masked=False), example, mask="mask")
    assert "padded positions are read by output 0" in reason
    unpadded = pooled_call(right(3, 8, 8, 8, 8))
    assert "are read by output 0" in refusal(Pooled(masked=False), unpadded, mask="mask")
    assert "are read by output 0" in refusal(Offset(masked=True), example, mask="mask")


def test_labels_of_padding_that_the_loss_reads_are_refused() -> None:
    case = find_case("gpt2-padded")
    example = call(case, right(3, 7, 7, 3, 5), labels=True)
    example["labels"] = example["input_ids"]
    assert "labels of padding" in refusal(without_dropout(case.build()), example)


def test_a_mask_that_no_attention_reads_can_be_named() -> None:
    model = Pooled(masked=True)
    example = pooled_call(right(3, 8, 8, 5, 2))
    assert "no input marks padding" in refusal(model, example)
    packed = graphopt.optimize(model, example, recipe=[PackTokens(mask="mask")], measure=False)
    rows: list[int] = []
    packed.get_submodule("layer.0").register_forward_hook(lambda _, x, y: rows.append(y.shape[1]))
    inputs = pooled_call(right(2, 10, 3, 10))
    difference = relative_error(packed(**inputs), model(**inputs))
    assert difference <= 1e-6  # float32: eps sqrt(64) / 8
    assert rows == [13]
    with pytest.raises(ConfigError, match="must name an input of the model"):
        graphopt.optimize(model, example, recipe=[PackTokens(mask="masks")])


def test_costs_follow_the_real_tokens_and_an_unpadded_example_is_kept_and_says_so() -> None:
    case = find_case("bert-classifier")
    shares = {}
    for lengths in ((8, 2, 2), (8, 8, 8)):
        program = capture(case.build(), call(case, right(3, 8, *lengths)))
        before = total_cost(program).flops
        plan = PassManager(passes=[PackTokens()], context=Context(training=True)).run(program)
        shares[lengths] = total_cost(program).flops / before
        (change,) = plan.changes
        unpadded = "no padding, so nothing was measured" in change.summary
        assert unpadded == (lengths == (8, 8, 8))
        assert change.after.flops == pytest.approx(total_cost(program).flops, rel=1e-3)
    assert shares[8, 8, 8] == 1
    assert 0.45 < shares[8, 2, 2] < 0.5  # half of the tokens, and a quarter of attention


@pytest.mark.parametrize("padded", [False, True])
def test_data_without_padding_are_not_packed(padded: bool) -> None:
    case = find_case("bert-classifier")
    full = call(case, right(3, 8, 8, 8, 8))
    program = capture(case.build(), full)
    last = call(case, right(3, 8, 8, 8, 7)) if padded else full
    proposal = PackTokens().propose(program, Context(calibration=Calibration([full, last])))
    assert bool(proposal.candidates) == padded
    if not padded:
        assert (
            "no row of the example and the calibration data has padding"
            in proposal.misses[0].reason
        )


class SlowCosts(Costs):
    """Finds every candidate half as fast."""

    def compare_prepared(
        self, key: str, dense: Callable[[], Any], candidate: Callable[[], Any]
    ) -> Comparison:
        dense()()
        candidate()()
        return Comparison(dense_ms=1.0, candidate_ms=2.0, ratio=0.5)


@pytest.mark.parametrize("training", [False, True])
def test_what_measures_slower_is_kept_padded(training: bool) -> None:
    case = find_case("bert-classifier")
    program = capture(case.build(), call(case, right(3, 8, 8, 2, 2)))
    code = program.code
    proposal = PackTokens().propose(program, Context(training=training, costs=SlowCosts()))
    assert not proposal.candidates
    assert "packed measured 0.50x" in proposal.misses[0].reason
    assert program.code == code


def test_a_packed_model_is_copied_saved_compiled_and_cast(tmp_path: Path) -> None:
    case, _, packed = models("bert-classifier")
    inputs = call(case, right(3, 7, 7, 3, 5))
    packed.eval()
    with torch.no_grad():
        expected = packed(**inputs).logits
        assert torch.equal(copy.deepcopy(packed)(**inputs).logits, expected)
        graphopt.save(packed, tmp_path / "packed")
        loaded = graphopt.load(tmp_path / "packed").eval()
        assert relative_error(loaded(**inputs).logits, expected) <= BOUND
        assert installation_of(loaded) is not None
        with torch.autocast("cpu", torch.bfloat16):
            cast = packed(**inputs).logits
        assert relative_error(cast, expected) < 0.1
        compiled = torch.compile(packed, backend="eager")(**inputs).logits
        assert relative_error(compiled, expected) <= BOUND
    code = installation_of(packed)
    assert code is not None
    assert "real_rows" in code.code
    sections = code.code.split("# ")
    assert sum("real_rows(" in section for section in sections) == 1
    assert len(sections) > 3


def test_a_plan_for_another_mask_is_refused() -> None:
    case = find_case("bert-classifier")
    program = capture(case.build(), call(case, right(3, 8, 8, 5, 2)))
    (candidate,) = PackTokens().propose(program, Context()).candidates
    details = {**candidate.change.details, "mask": "input_mask"}
    with pytest.raises(PlanError, match="must name an input"):
        PackTokens().apply(program, replace(candidate.change, details=details))


def test_what_is_put_back_may_be_viewed_in_an_order_that_was_copied_before() -> None:
    from transformers import DebertaV2Config, DebertaV2Model

    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    dense = DebertaV2Model(config).eval()  # permute, contiguous, view to [batch*head, token, width]
    real = right(2, 6, 6, 3)
    example = {"input_ids": torch.randint(30, real.shape), "attention_mask": real.long()}
    packed = graphopt.optimize(copy.deepcopy(dense), example, recipe="pack-tokens", measure=False)
    installation = installation_of(packed)
    assert installation is not None
    assert installation.plan.changes
    assert installation.program is not None
    with torch.no_grad():
        states = [model(**example).last_hidden_state[real] for model in (packed, dense)]
    assert relative_error(*states) <= rounding_bound(installation.program)
