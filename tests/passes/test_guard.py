"""The guard: what counts as drift, what a score may return, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.passes import guard as guard_module
from graphopt.passes.drift import Output, compare, deviation
from graphopt.passes.errors import ConfigError, InputError
from graphopt.passes.guard import Guard, GuardCheck
from graphopt.passes.program import Program

Batch = dict[str, Any]


class Masked(nn.Module):
    """Attention over tokens whose padding an input names: an output per token, and one per row."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.outer = nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = (x @ x.transpose(1, 2)).masked_fill(mask[:, None] == 0, -1e9)
        tokens = self.outer(self.inner(scores.softmax(-1) @ x))
        return tokens, tokens[:, 0].tanh()


def batch(seed: int, rows: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (rows, 1), generator=generator)
    return {
        "x": torch.randn(rows, 6, 8, generator=generator),
        "mask": (torch.arange(6) < lengths).long(),
    }


BATCHES = [batch(1), batch(2, rows=5)]


@pytest.fixture(scope="module")
def captured() -> Program:
    return capture(Masked(), batch(0))


@pytest.fixture
def program(captured: Program) -> Program:
    """The same program for every test, with the same weights."""
    torch.manual_seed(0)
    captured.model.load_state_dict(Masked().state_dict())
    captured.model.eval()
    return captured


def outputs_of(program: Program, batch: Batch) -> list[Tensor]:
    """Return the outputs in float64, with zeros at padding."""
    with torch.no_grad():
        tokens, first = program.model(**batch)
    return [(tokens * batch["mask"][..., None]).double(), first.double()]


def widen(program: Program, factor: float = 1.1) -> None:
    with torch.no_grad():
        program.model.get_parameter("inner.weight").mul_(factor)


def test_nothing_changed_is_no_drift_to_the_last_bit(program: Program) -> None:
    verdict = Guard(max_drift=0.0, min_cosine=1.0).prepare(program, BATCHES).check(program)
    assert verdict.ok
    assert (verdict.drift, verdict.cosine) == (0.0, 1.0)


def test_drift_and_cosine_are_those_of_the_real_tokens(program: Program) -> None:
    before = [outputs_of(program, item) for item in BATCHES]
    check = Guard(max_drift=1e9).prepare(program, BATCHES)
    widen(program)
    after = [outputs_of(program, item) for item in BATCHES]
    drifts, cosines = [], []
    for index in range(2):
        rows = []
        for old, new, item in zip(before, after, BATCHES, strict=True):
            drifts.append(((new[index] - old[index]).norm() / old[index].norm()).item())
            cosine = torch.cosine_similarity(new[index], old[index], dim=-1)
            rows.append(cosine[item["mask"].bool()] if index == 0 else cosine)
        cosines.append(torch.cat(rows).mean().item())
    verdict = check.check(program)
    assert verdict.drift == pytest.approx(max(drifts), rel=1e-9)
    assert verdict.cosine == pytest.approx(min(cosines), rel=1e-9)
    assert len(set(drifts)) == 4


def test_a_limit_that_is_broken_is_named_with_both_numbers(program: Program) -> None:
    drift = Guard(max_drift=0.01).prepare(program, BATCHES)
    cosine = Guard(min_cosine=1.0).prepare(program, BATCHES)
    widen(program)
    found = drift.check(program)
    assert not found.ok
    assert found.sentence == f"drift {found.drift:.3g} is above the 0.01 allowed"
    found = cosine.check(program)
    assert not found.ok
    assert found.sentence == f"cosine {found.cosine:.5f} is below the 1 asked for"


def test_the_model_stays_as_it_is(program: Program) -> None:
    program.model.train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    check = Guard(max_drift=0.1, score=lambda current: 1.0).prepare(program, BATCHES)
    check.check(program)
    assert torch.equal(torch.rand(2), expected)
    assert all(module.training for module in program.model.modules())


def test_values_that_are_not_finite_violate_every_limit(program: Program) -> None:
    for guard in (Guard(max_drift=1e9), Guard(min_cosine=-1.0 + 1e-6)):
        check = guard.prepare(program, BATCHES)
        weight = program.model.get_parameter("outer.weight")
        before = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(math.nan)
        assert not check.check(program).ok
        with torch.no_grad():
            weight.copy_(before)


def test_outputs_of_other_sizes_are_infinitely_far() -> None:
    assert compare(torch.ones(2, 3), torch.ones(2, 4), None) == (math.inf, -2.0, 2)


def test_what_was_not_finite_before_may_stay_so() -> None:
    value = torch.tensor([[1.0, math.inf], [math.nan, 2.0]])
    assert compare(value, value, None) == (0.0, 2.0, 2)
    drift, _, _ = compare(torch.tensor([[1.0, 5.0], [math.nan, 2.0]]), value, None)
    assert drift == math.inf


def test_chunks_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    value, before = torch.randn(2, 7, 5, 3, generator=generator)
    where = torch.rand(7, 1, 1, generator=generator) > 0.4
    whole = compare(value, before, where)
    monkeypatch.setattr("graphopt.passes.drift._CHUNK", 6)
    assert compare(value, before, where) == pytest.approx(whole, rel=1e-12)
    assert whole[2] == int(where.sum()) * 5


def test_numbers_without_dimensions_drift_but_have_no_cosine() -> None:
    found = deviation([([Output(torch.tensor(1.5))], [Output(torch.tensor(1.0))])])
    assert (found.drift, found.cosine) == (0.5, 1.0)


def first_weight(program: Program) -> float:
    return program.model.get_parameter("inner.weight")[0, 0].item()


def test_a_score_may_fall_by_max_drop_and_no_further(program: Program) -> None:
    with torch.no_grad():
        program.model.get_parameter("inner.weight")[0, 0] = 1.0
    exactly = Guard(score=first_weight, max_drop=0.25).prepare(program, BATCHES)
    less = Guard(score=first_weight, max_drop=0.125).prepare(program, BATCHES)
    widen(program, 0.75)
    assert exactly.check(program).ok
    assert exactly.check(program).score == 0.75
    verdict = less.check(program)
    assert not verdict.ok
    assert verdict.sentence == (
        "the score first_weight went from 1 to 0.75, a drop of more than the 0.125 allowed"
    )
    record = exactly.record(exactly.check(program))
    assert (record.score, record.score_before, record.score_after) == ("first_weight", 1.0, 0.75)
    assert (record.batches, record.max_drop) == (2, 0.25)


def failing(program: Program) -> float:
    raise KeyError("labels")


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (failing, "the score failing raised KeyError: 'labels'"),
        (lambda program: math.nan, "the score <lambda> returned NaN"),
        (lambda program: "high", "the score <lambda> returned str, not a number,"),
        (lambda program: torch.ones(2), "the score <lambda> returned Tensor, not a number,"),
        (lambda program: None, "the score <lambda> returned NoneType, not a number,"),
    ],
)
def test_a_score_that_fails_on_the_dense_model_is_an_error(
    program: Program, score: Any, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Guard(score=score).prepare(program, BATCHES)
    assert str(caught.value) == f"{reason} on the dense model, so it cannot guard anything"


@pytest.mark.parametrize("value", [2, True, torch.tensor([2.0]), torch.tensor(2)])
def test_a_score_may_be_any_number(program: Program, value: Any) -> None:
    assert Guard(score=lambda program: value).prepare(program, BATCHES).score == float(value)


def test_a_score_that_fails_after_a_change_violates_the_guard(program: Program) -> None:
    def fails_later(current: Program) -> float:
        if first_weight(current) != before:
            raise RuntimeError("shapes differ")
        return 1.0

    before = first_weight(program)
    check = Guard(score=fails_later).prepare(program, BATCHES)
    widen(program)
    verdict = check.check(program)
    assert not verdict.ok
    assert verdict.score is None
    assert verdict.sentence == "the score fails_later raised RuntimeError: shapes differ"


def test_large_outputs_are_kept_of_fewer_batches(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "_REFERENCE_BYTES", 1)
    check = Guard(max_drift=1.0).prepare(program, BATCHES)
    assert len(check.references) == 1


def test_a_batch_of_another_form_is_an_error(program: Program) -> None:
    with pytest.raises(InputError, match="lacks mask"):
        Guard(max_drift=1.0).prepare(program, [{"x": BATCHES[0]["x"]}])
    wide = {"x": torch.randn(3, 6, 9), "mask": torch.ones(3, 6, dtype=torch.long)}
    with pytest.raises(InputError, match=r"sizes \[3, 6, 9\], \[3, 6\] does not run"):
        Guard(max_drift=1.0).prepare(program, [wide])
    with pytest.raises(InputError, match="no batch to check on"):
        Guard(max_drift=1.0).prepare(program, [])


def test_exact_changes_are_refused_below_rounding_only(program: Program) -> None:
    def check(max_drift: float) -> GuardCheck:
        return Guard(max_drift=max_drift).prepare(program, BATCHES)

    rounding = check(1.0).rounding
    assert torch.finfo(torch.float32).eps < rounding < 1e-3
    assert check(rounding).exact_refusal is None
    refusal = check(rounding / 2).exact_refusal
    assert refusal is not None
    assert f"drift of {rounding:.1e}" in refusal


def test_a_prepared_guard_keeps_to_what_the_dense_model_did(program: Program) -> None:
    prepared = Guard(max_drift=0.01).prepared(program, BATCHES)
    widen(program)
    assert not prepared.prepare(program, BATCHES).check(program).ok
    assert prepared.max_drift == 0.01


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "a guard needs max_drift, min_cosine or a score"),
        ({"max_drift": -0.1}, "max_drift must be at least 0, got -0.1"),
        ({"max_drift": math.inf}, "max_drift must be a finite number, got inf"),
        ({"max_drift": "5%"}, "max_drift must be a finite number, got '5%'"),
        ({"min_cosine": 1.1}, "min_cosine must be between -1 and 1, got 1.1"),
        ({"score": 3.0}, "score must be a function that takes the model .* got float"),
        ({"max_drift": 1, "max_drop": -1}, "max_drop must be at least 0, got -1"),
    ],
)
def test_limits_that_make_no_sense_are_errors(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Guard(**options)
