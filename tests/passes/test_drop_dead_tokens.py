"""Tokens that nobody reads are not computed: the same outputs, losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo import EXAMPLE, find_case, with_attention, without_dropout

from graphopt.capture import capture
from graphopt.kernels.packed_rows import real_rows
from graphopt.passes.base import Context
from graphopt.passes.errors import ConfigError
from graphopt.passes.exact.drop_dead_tokens import DropDeadTokens
from graphopt.passes.facts import total_cost
from graphopt.passes.manager import PassManager
from graphopt.passes.program import Program
from graphopt.passes.registry import parse_pipeline
from graphopt.passes.verifier import preserved, rounding_bound
from graphopt.testing import assert_same_outputs

POSITIONS = ("bert-classifier", "modernbert", "vit", "bert-classifier:eager")
LABELS = ("gpt2", "t5")


def changed(
    model: nn.Module, example: Any, pipeline: str = "drop-dead-tokens"
) -> tuple[Program, int]:
    """Return the program and the forward FLOPs it had."""
    program = capture(model, example)
    before = total_cost(program).flops
    context = Context(training=True)
    plan = PassManager(passes=parse_pipeline(pipeline), context=context).run(program)
    assert "drop-dead-tokens" in [record.pass_name for record in plan.changes], plan.misses
    return program, before


def build(name: str) -> nn.Module:
    name, _, attention = name.partition(":")
    model = without_dropout(find_case(name).build())
    return with_attention(model, attention) if attention else model


def call(name: str, batch: int, length: int) -> dict[str, Any]:
    case = find_case(name.partition(":")[0])
    kwargs: dict[str, Any] = case.call(batch, length, labels=True)[1]
    return kwargs


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def assert_same_step(program: Program, inputs: dict[str, Any], reads: tuple[str, ...]) -> None:
    """Compare outputs and gradients with the eager model, in both modes."""
    from graphopt.passes.program import eager_forward

    bound = rounding_bound(program)
    for training in (True, False):
        with preserved(program.model):
            program.model.train(training)
            found, expected = program(**inputs), eager_forward(program.model)(**inputs)
            for name in reads:
                assert_same_outputs(found[name], expected[name], bound=bound)
            if not expected.loss.isfinite():
                continue
            ours, theirs = (gradients(program.model, r.loss) for r in (found, expected))
            largest = max(value.norm().item() for value in theirs.values() if value is not None)
            for name, value in theirs.items():
                other = ours[name]
                if value is None:
                    assert other is None
                    continue
                error = (torch.zeros_like(value) if other is None else other).sub(value).norm()
                # Gradients that cancel to nothing have only rounding in them.
                assert error <= 8 * bound * max(value.norm().item(), 1e-3 * largest), name


@pytest.mark.parametrize("name", POSITIONS)
def test_what_only_the_first_token_needs(name: str) -> None:
    program, before = changed(build(name), call(name, 4, 9))
    assert total_cost(program).flops < 0.75 * before
    for batch, length in ((2, 5), (3, 12)):
        assert_same_step(program, call(name, batch, length), ("loss", "logits"))


@pytest.mark.parametrize("name", LABELS)
def test_what_only_labelled_tokens_need(name: str) -> None:
    inputs = call(name, 4, 9)
    inputs["labels"][:, 2:] = -100
    program, before = changed(build(name), inputs, "drop-dead-tokens{outputs=loss}")
    assert total_cost(program).flops < 0.95 * before
    for labelled in (3, 0, 100):
        other = call(name, 3, 12)
        other["labels"][1, labelled:] = -100
        other["labels"][2] = -100
        if labelled == 0:
            other["labels"][:] = -100
        assert_same_step(program, other, ("loss",))


def test_logits_come_back_with_zeros_at_tokens_without_label() -> None:
    inputs = call("gpt2", 3, 9)
    inputs["labels"][:, :4] = -100
    program, _ = changed(build("gpt2"), inputs, "drop-dead-tokens{outputs=loss}")
    program.model.eval()
    with torch.no_grad():
        logits = program(**inputs).logits
        expected = program.model(**inputs).logits
    # The label of a token is read at the one before it.
    assert_same_outputs(logits[:, 3:-1], expected[:, 3:-1], bound=rounding_bound(program))
    assert not logits[:, :3].any()
    assert not logits[:, -1].any()


def classifier(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A decoder that classifies by its last token that is not padding."""
    torch.manual_seed(0)
    common = {"vocab_size": 100, "num_labels": 3, "pad_token_id": 0}
    model: nn.Module
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common)
        model = transformers.GPT2ForSequenceClassification(config)
    else:
        llama = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **common,
        )
        model = transformers.LlamaForSequenceClassification(llama)
    return without_dropout(model), sentences(4, 9, padded=kind == "llama")


def sentences(batch: int, length: int, *, padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 100, (batch, length))
    for row in range(batch):
        ids[row, length - row % 3 :] = 0
    inputs = {"input_ids": ids, "labels": torch.arange(batch) % 3}
    return inputs | ({"attention_mask": (ids != 0).long()} if padded else {})


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_last_token_of_each_sample(kind: str) -> None:
    model, inputs = classifier(kind)
    program, before = changed(model, inputs)
    assert total_cost(program).flops < 0.85 * before
    for batch, length in ((2, 5), (5, 12)):
        other = sentences(batch, length, padded="attention_mask" in inputs)
        assert_same_step(program, other, ("loss", "logits"))


@pytest.mark.parametrize("keep", [1, 3])
def test_a_decoder_that_keeps_some_logits(keep: int) -> None:
    model = build("llama").eval()
    inputs = {**find_case("llama").call(*EXAMPLE)[1], "logits_to_keep": keep, "use_cache": False}
    program, before = changed(model, inputs)
    assert total_cost(program).flops < 0.8 * before
    other = {**find_case("llama").call(2, 12)[1], "logits_to_keep": keep, "use_cache": False}
    with torch.no_grad():
        assert_same_outputs(
            program(**other).logits, model(**other).logits, bound=rounding_bound(program)
        )


class Causal(nn.Module):
    """A residual layer whose attention says that it is causal instead of passing a mask."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last
        self.projections = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.feed_forward = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, features: Tensor) -> Tensor:
        q, k, v = (p(features).unflatten(-1, (4, 8)).transpose(1, 2) for p in self.projections[:3])
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = features + self.projections[3](mixed.transpose(1, 2).flatten(2))
        result: Tensor = hidden + self.feed_forward(hidden)
        return result[:, -self.last :]


@pytest.mark.parametrize("last", [1, 3])
def test_a_causal_flag_becomes_the_mask_of_the_last_queries(last: int) -> None:
    model = Causal(last).eval()
    program, before = changed(model, (torch.randn(3, 9, 32),))
    assert total_cost(program).flops < 0.7 * before
    features = torch.randn(2, 12, 32)
    assert_same_outputs(program(features), model(features), bound=rounding_bound(program))


class Biased(nn.Module):
    """Attention whose bias is kept as [query, key, head]: its queries are at another place then."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(9, 9, 4))
        self.projections = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, features: Tensor) -> Tensor:
        q, k, v = (p(features).unflatten(-1, (4, 8)).transpose(1, 2) for p in self.projections[:3])
        bias = self.bias.permute(2, 0, 1)[None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, bias)
        hidden: Tensor = features + self.projections[3](mixed.transpose(1, 2).flatten(2))
        return hidden[:, 1:]


def test_a_bias_is_cut_at_its_queries_wherever_these_come_from() -> None:
    model = Biased().eval()
    program, before = changed(model, (torch.randn(3, 9, 32),))
    assert total_cost(program).flops < before
    features = torch.randn(2, 9, 32)
    assert_same_outputs(program(features), model(features), bound=rounding_bound(program))


def test_it_goes_before_packing() -> None:
    inputs = call("bert-classifier", 4, 9)
    program, _ = changed(build("bert-classifier"), inputs, "drop-dead-tokens,pack-tokens")
    assert any(node.target is real_rows for node in program.graph.nodes)
    assert_same_step(program, call("bert-classifier", 5, 7), ("loss", "logits"))
    found = DropDeadTokens().propose(program, Context()).misses[0].reason
    assert "put drop-dead-tokens before pack-tokens" in found


def test_it_says_what_reads_everything() -> None:
    def reason(name: str, **labels: Any) -> str:
        args, kwargs = find_case(name).call(*EXAMPLE, **labels)
        program = capture(build(name), kwargs or args)
        proposal = DropDeadTokens().propose(program, Context())
        assert not proposal.candidates
        return proposal.misses[0].reason

    assert "the output logits is returned at every token" in reason("gpt2", labels=True)
    assert "the output output is returned at every token" in reason("transformer-encoder")
    assert "no stream of tokens" in reason("sequential")


def test_unknown_outputs_are_refused() -> None:
    program = capture(build("gpt2"), call("gpt2", 3, 9))
    with pytest.raises(ConfigError, match="among loss, logits, past_key_values, got 'lost'"):
        DropDeadTokens(outputs="lost").propose(program, Context())
