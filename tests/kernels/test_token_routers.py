"""Taking tokens out and putting them back, and the routers that choose them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.kernels.gates import Gate
from graphopt.kernels.token_routers import (
    AttendedTokens,
    LearnedTokens,
    RandomTokens,
    blend_tokens,
    stream_change,
)
from graphopt.kernels.token_selection import (
    attention_received,
    kept_count,
    put_tokens,
    spread_tokens,
    take_tokens,
)

BATCH, TOKENS, KEPT = 3, 20, 7


def shared() -> Tensor:
    return torch.randperm(TOKENS)[:KEPT].sort().values[None]


def per_sample() -> Tensor:
    return torch.stack([torch.randperm(TOKENS)[:KEPT].sort().values for _ in range(BATCH)])


@given(st.integers(1, 2000), st.floats(0.01, 1.0))
def test_counts_are_the_next_multiple_of_16_or_all(tokens: int, share: float) -> None:
    kept = kept_count(tokens, share)
    assert kept == tokens or kept % 16 == 0
    assert min(tokens, share * tokens - 0.05) <= kept <= min(tokens, share * tokens + 16)


def test_round_shares_give_round_counts() -> None:
    assert [kept_count(tokens, 0.5) for tokens in (8, 32, 64, 100)] == [8, 16, 32, 64]
    assert [kept_count(160, share) for share in (0.3, 0.7, 1.0)] == [48, 112, 160]


@pytest.mark.parametrize("index", [shared(), per_sample()], ids=["shared", "per sample"])
def test_taken_tokens_are_those_of_the_index(index: Tensor) -> None:
    rows = index.expand(BATCH, -1)
    batch = None if len(index) == 1 else 0
    x = torch.randn(BATCH, TOKENS, 5)
    mask = torch.randn(BATCH, 1, TOKENS, TOKENS)
    taken = take_tokens(x, index, (1,), batch)
    both = take_tokens(mask, index, (2, 3), batch)
    for sample, chosen in enumerate(rows):
        assert torch.equal(taken[sample], x[sample, chosen])
        assert torch.equal(both[sample, 0], mask[sample, 0][chosen][:, chosen])


def test_values_without_samples_are_taken_for_each() -> None:
    index = per_sample()
    table, bias = torch.randn(1, TOKENS, 4), torch.randn(2, TOKENS, TOKENS)
    taken, biases = take_tokens(table, index, (1,), 0), take_tokens(bias, index, (1, 2), -1)
    assert biases.shape == (BATCH, 2, KEPT, KEPT)
    for sample, chosen in enumerate(index):
        assert torch.equal(taken[sample], table[0, chosen])
        assert torch.equal(biases[sample, 1], bias[1][chosen][:, chosen])


@pytest.mark.parametrize("index", [shared(), per_sample()], ids=["shared", "per sample"])
@pytest.mark.parametrize(("batch_dim", "token_dim"), [(0, 1), (1, 0)])
def test_tokens_are_put_where_they_came_from(index: Tensor, batch_dim: int, token_dim: int) -> None:
    x = torch.randn(BATCH, TOKENS, 5, dtype=torch.float64).movedim((0, 1), (batch_dim, token_dim))
    x = x.contiguous().requires_grad_()
    place = None if len(index) == 1 else batch_dim

    def skip(value: Tensor) -> Tensor:
        taken = take_tokens(value, index, (token_dim,), place)
        return put_tokens(value, index, taken.sin(), token_dim, place)

    wanted = x.detach().clone().movedim((batch_dim, token_dim), (0, 1))
    for sample, chosen in enumerate(index.expand(BATCH, -1)):
        wanted[sample, chosen] = wanted[sample, chosen].sin()
    assert torch.equal(skip(x).movedim((batch_dim, token_dim), (0, 1)), wanted)
    assert torch.autograd.gradcheck(skip, (x,))


@pytest.mark.parametrize("index", [shared(), per_sample()], ids=["shared", "per sample"])
def test_spread_values_are_zero_for_skipped_tokens(index: Tensor) -> None:
    stream, keys = torch.zeros(BATCH, TOKENS, 5), torch.randn(BATCH, 2, TOKENS, 4)
    batch = None if len(index) == 1 else 0
    whole = spread_tokens(take_tokens(keys, index, (2,), batch), index, stream, 1, (2, batch))
    for sample, chosen in enumerate(index.expand(BATCH, -1)):
        wanted = torch.zeros(2, TOKENS, 4)
        wanted[:, chosen] = keys[sample][:, chosen]
        assert torch.equal(whole[sample], wanted)


def test_no_index_costs_nothing() -> None:
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    assert take_tokens(x, None, (1,)) is x
    assert put_tokens(x, None, y, 1) is y
    assert spread_tokens(y, None, x, 1, (1, 0)) is y


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "added"])
def test_attention_received_is_the_mean_over_heads_and_queries(mask: str) -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    if mask == "causal":
        seen = seen.tril()
    elif mask != "none":
        seen[1, ..., 4:] = False
    values = torch.eye(6).expand(2, 4, 6, 6).contiguous()
    attended = nn.functional.scaled_dot_product_attention(q, k, values, seen, scale=0.3)
    given_mask = {"boolean": seen, "added": torch.where(seen, 0.0, -torch.inf)}.get(mask)
    found = attention_received(q @ k.mT, 0.3, given_mask, mask == "causal")
    torch.testing.assert_close(found, attended.mean((1, 2)))
    if mask in ("boolean", "added"):
        assert found[1, 4:].eq(0).all()


def chosen(gate: RandomTokens | AttendedTokens, **inputs: Tensor) -> Tensor:
    index = gate(
        torch.zeros(3, 64, 4), inputs.get("score"), inputs.get("ids"), inputs.get("padding"), 1, 0
    )
    assert isinstance(index, Tensor)
    return index


def test_random_choices_depend_on_seed_number_and_step_alone() -> None:
    def choice(seed: int, number: int, step: int) -> list[int]:
        gate = RandomTokens(keep=0.25, seed=seed, number=number)
        torch.manual_seed(seed + number + step)
        gate.advance(step, 0.0)
        torch.rand(step)
        numbers: list[int] = chosen(gate)[0].tolist()
        return numbers

    assert choice(1, 2, 3) == choice(1, 2, 3)
    assert len({tuple(choice(*key)) for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}) == 4
    assert choice(1, 2, 3) == sorted(set(choice(1, 2, 3)))


def test_a_gate_counts_its_training_steps_until_somebody_advances_it() -> None:
    gate = Gate()
    steps = []
    for _ in range(3):
        gate.begin()
        steps.append(gate.step)
    gate.eval().begin()
    gate.train().advance(7, 0.5)
    gate.begin()
    assert [*steps, gate.step] == [0, 1, 2, 7]
    assert not gate.state_dict()


def test_random_gates_are_off_in_evaluation_mode() -> None:
    assert RandomTokens(keep=0.5).eval()(torch.zeros(2, 64, 4), None, None, None, 1, 0) is None


def test_the_most_attended_tokens_run_and_padding_comes_last() -> None:
    gate = AttendedTokens(keep=0.25, start=0.25, fixed=(0, -1), special_ids=(9,))
    score = torch.rand(3, 64)
    padding = torch.ones(3, 64, dtype=torch.long)
    padding[0, 10:] = 0
    score[0, 30:] = 5.0
    ids = torch.zeros(3, 64, dtype=torch.long)
    ids[1, 33] = 9
    index = chosen(gate, score=score, padding=padding, ids=ids)
    assert index.shape == (3, 16)
    assert set(range(10)) <= set(index[0].tolist())
    assert {0, 33, 63} <= set(index[1].tolist())
    best = [n for n in score[2].argsort(descending=True).tolist() if n not in (0, 63)][:14]
    assert index[2].tolist() == sorted([0, 63, *best])
    other = AttendedTokens(keep=0.25, start=0.25, marks_real=False)
    assert set(chosen(other, score=score, padding=padding)[0].tolist()) <= set(range(30, 64))


def test_the_share_of_a_ranked_gate_is_saved() -> None:
    gate = LearnedTokens(4, keep=0.25)
    assert gate(torch.zeros(3, 64, 4), torch.rand(3, 64), None, None, 1, 0) is None
    gate.advance(3, 0.125)
    assert gate.share() == 0.625
    loaded = LearnedTokens(4, keep=0.25)
    assert loaded.share() == 1.0
    loaded.load_state_dict(gate.state_dict())
    assert loaded.share() == 0.625


def test_the_weight_of_a_learned_gate_starts_at_one_exactly() -> None:
    gate = LearnedTokens(4, keep=0.5)
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    assert torch.equal(blend_tokens(gate, x, y), y)
    nn.init.normal_(gate.weight)
    w = 1 + 0.2 * torch.tanh(x @ gate.weight)[..., None]
    torch.testing.assert_close(blend_tokens(gate, x, y), x + w * (y - x))


def test_the_change_of_a_token_is_its_turn() -> None:
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    after = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])
    torch.testing.assert_close(stream_change(before, after, True), torch.tensor([[0.0, 1.0, 2.0]]))
