"""Blocks run on chosen tokens, and nothing else about the model changes."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from gated_models import call, choose, deeper, gates
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import find_case

import graphopt
from graphopt.kernels.token_routers import LearnedTokens
from graphopt.passes.errors import ConfigError, PlanError
from graphopt.passes.facts import facts_of
from graphopt.passes.gates.gate_tokens import GateTokens
from graphopt.passes.structure import flatten
from graphopt.passes.verifier import relative_error, rounding_bound
from graphopt.runtime import installation_of
from graphopt.testing import assert_same_outputs


def gated(model: nn.Module, example: Any, **options: Any) -> nn.Module:
    return graphopt.optimize(model, example, recipe=[GateTokens(**options)], measure=False)


@cache
def _prepared(name: str, options: frozenset[tuple[str, Any]]) -> nn.Module:
    return gated(deeper(name), call(name), **dict(options))


def prepared(name: str, **options: Any) -> nn.Module:
    """Return a gated model of three layers; the same one is made once."""
    return copy.deepcopy(_prepared(name, frozenset(options.items())))


def floats(result: Any) -> list[Tensor]:
    return [value for value in flatten(result)[0] if value.is_floating_point()]


def reasons(model: nn.Module, example: Any, **options: Any) -> list[str]:
    plan = graphopt.plan(model, example, recipe=[GateTokens(**options)])
    assert not plan.changes
    return [miss.reason for miss in plan.misses]


def bound_of(model: nn.Module) -> float:
    installation = installation_of(model)
    assert installation is not None
    assert installation.program is not None
    return rounding_bound(installation.program)


ROUTERS = {
    **dict.fromkeys(("t5", "vit", "opt"), "random"),
    **dict.fromkeys(("distilbert", "modernbert", "mpt"), "learned"),
}


@pytest.mark.parametrize(("name", "router"), ROUTERS.items())
def test_taking_all_tokens_out_and_putting_them_back_is_the_model(name: str, router: str) -> None:
    dense, example = deeper(name), call(name)
    model = gated(dense, example, router=router, last=-1)
    assert len(gates(model)) == (4 if name == "t5" else 2)
    assert_same_outputs(model.eval()(**example), dense.eval()(**example))
    choose(model)
    found, wanted = floats(model.train()(**example)), floats(dense.train()(**example))
    for value, reference in zip(found, wanted, strict=True):
        assert relative_error(value, reference) <= bound_of(model)


@pytest.mark.parametrize("shared", [True, False])
def test_a_causal_model_runs_blocks_on_the_chosen_tokens(shared: bool) -> None:
    """By hand: the chosen tokens keep their order and positions, the others skip the block."""
    dense, example = deeper("gpt2"), call("gpt2")
    model = prepared("gpt2", router="random" if shared else "learned")
    index = torch.randperm(40)[:16].sort().values[None]
    if not shared:
        index = torch.stack([torch.randperm(40)[:16].sort().values for _ in range(3)])
    choose(model, index)
    body: Any = dense.get_submodule("transformer")
    x = body.wte(example["input_ids"]) + body.wpe(torch.arange(40))
    x = body.h[0](x)
    for row, chosen in enumerate(index.expand(3, -1)):
        x[row, chosen] = body.h[1](x[row : row + 1, chosen])[0]
    wanted = dense.get_submodule("lm_head")(body.ln_f(body.h[2](x)))
    assert relative_error(model(**example).logits, wanted) <= bound_of(model)


@pytest.mark.parametrize("shared", [True, False])
def test_masks_and_rotary_tables_are_taken_with_the_tokens(shared: bool) -> None:
    dense, example = deeper("llama-padded"), call("llama-padded")
    model = gated(dense, example, router="random" if shared else "attention", span=True, last=-1)
    index = torch.randperm(40)[:16].sort().values[None]
    if not shared:
        index = torch.stack([torch.randperm(40)[:16].sort().values for _ in range(3)])
    choose(model, index)
    body: Any = dense.get_submodule("model")
    x = body.embed_tokens(example["input_ids"])
    table = body.rotary_emb(x, torch.arange(40)[None])
    seen = torch.ones(40, 40, dtype=torch.bool).tril() & example["attention_mask"].bool()[:, None]
    mask = seen[:, None]
    x = body.layers[0](x, attention_mask=mask, position_embeddings=table)
    rows = []
    for row, chosen in enumerate(index.expand(3, -1)):
        part = x[row : row + 1, chosen]
        inner = mask[row : row + 1, :, chosen][..., chosen]
        tables = tuple(item[:, chosen] for item in table)
        for layer in (body.layers[1], body.layers[2]):
            part = layer(part, attention_mask=inner, position_embeddings=tables)
        rows.append(x[row].index_copy(0, chosen, part[0]))
    wanted = dense.get_submodule("lm_head")(body.norm(torch.stack(rows)))
    real = example["attention_mask"].bool()
    assert relative_error(model(**example).logits[real], wanted[real]) <= bound_of(model)


def test_post_norm_encoders_carry_skipped_tokens_over_unchanged() -> None:
    dense, example = deeper("bert-classifier"), call("bert-classifier")
    model = prepared("bert-classifier")
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:  # fresh norms are alike, so it would not matter which one is used
            parameter.data.normal_()
    dense.load_state_dict(model.state_dict())
    index = torch.arange(0, 40, 2)
    choose(model, index[None])
    body: Any = dense.get_submodule("bert")
    mask = example["attention_mask"].bool()[:, None, None].expand(-1, 1, 40, 40)
    first, middle, last = body.encoder.layer
    x = first(body.embeddings(input_ids=example["input_ids"]), mask)
    x = x.index_copy(1, index, middle(x[:, index], mask[:, :, index][..., index]))
    wanted = dense.get_submodule("classifier")(body.pooler(last(x, mask)))
    assert relative_error(model(**example).logits, wanted) <= bound_of(model)


def test_random_gates_choose_anew_in_every_step_and_equally_on_every_rank() -> None:
    model = prepared("gpt2", seed=3, last=-1)
    other = prepared("gpt2", seed=3, last=-1)

    def losses(run: nn.Module, steps: range) -> list[Tensor]:
        found = []
        for step in steps:
            for gate in gates(run):
                gate.advance(step, 0.0)
            found.append(run(**call("gpt2")).logits)
        return found

    first = losses(model, range(3))
    assert_same_outputs(losses(other, range(2, 3)), first[2:])
    assert not torch.equal(first[0], first[1])
    one, two = gates(model)
    x = torch.zeros(1, 256, 1)
    choice = [gate.train()(x, None, None, None, 1, 0) for gate in (one, two)]
    assert not torch.equal(*choice)


def test_the_share_of_random_gates_grows_until_all_tokens_run() -> None:
    dense, example = deeper("gpt2"), call("gpt2", 64)
    model = prepared("gpt2", keep=0.25, full_at=0.5)
    (gate,) = gates(model)
    counts = []
    for progress in (0.0, 0.1, 0.16, 0.3):
        gate.advance(1, progress)
        counts.append(gate(torch.zeros(2, 64, 4), None, None, None, 1, 0).shape[1])
    assert counts == [16, 32, 32, 48]
    gate.advance(1, 0.5)
    assert_same_outputs(model(**example), dense(**example))


def test_special_tokens_always_run_in_encoders() -> None:
    dense = deeper("roberta")
    example = call("roberta", 48)
    example["input_ids"][0, 40] = dense.config.eos_token_id  # type: ignore[union-attr]
    model = gated(dense, example)
    (gate,) = gates(model)
    assert gate.fixed == (0,)
    for step in range(8):
        gate.advance(step, 0.0)
        index = gate(torch.zeros(3, 48, 4), None, example["input_ids"], None, 1, 0)
        assert {0, 40} <= set(index[0].tolist())
        assert index.shape == (1, 32)


def test_learned_gates_start_as_the_model_and_learn() -> None:
    dense, example = deeper("gpt2"), call("gpt2")
    model = prepared("gpt2", router="learned")
    assert_same_outputs(model(**example).logits, dense(**example).logits)
    (gate,) = gates(model)
    gate.advance(1, 1.0)
    assert isinstance(gate, LearnedTokens)
    model(**example).logits.square().mean().backward()
    assert gate.weight.grad is not None
    assert gate.weight.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not torch.equal(model.eval()(**example).logits, dense.eval()(**example).logits)


@pytest.mark.parametrize("router", ["attention", "learned"])
def test_gates_that_look_ahead_refuse_a_cache_and_say_what_to_do(router: str) -> None:
    example = call("gpt2")
    model = prepared("gpt2", router=router).eval()
    with pytest.raises(PlanError, match=r"use_cache=False.*router=random"):
        model.generate(example["input_ids"], max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    assert model(input_ids=example["input_ids"][:, :20]).logits.shape[1] == 20


def test_random_gates_decode_as_the_plain_model() -> None:
    dense, example = deeper("gpt2").eval(), call("gpt2")
    model = prepared("gpt2").eval()
    options = {"max_new_tokens": 3, "do_sample": False}
    found = model.generate(example["input_ids"], **options)  # type: ignore[operator]
    wanted = dense.generate(example["input_ids"], **options)  # type: ignore[operator]
    assert_same_outputs(found, wanted)


def test_a_trained_gate_is_saved_with_its_share(tmp_path: Any) -> None:
    example = call("bert-classifier")
    model = gated(deeper("bert-classifier"), example, router="learned")
    for gate in gates(model):
        gate.advance(5, 1.0)
        gate.get_parameter("weight").data.normal_()
    graphopt.save(model, tmp_path / "out")
    loaded = graphopt.load(tmp_path / "out")
    assert_same_outputs(loaded(**example), model.eval()(**example))
    dense = deeper("bert-classifier").state_dict()
    assert dense.keys() < loaded.state_dict().keys()


def test_operations_shrink_with_the_tokens() -> None:
    dense, example = deeper("gpt2", 4), call("gpt2", 64)
    plain = graphopt.capture(dense, example)
    model = gated(dense, example)
    installation = installation_of(model)
    assert installation is not None
    assert installation.program is not None
    before, after = facts_of(plain), facts_of(installation.program)
    block = sum(
        facts.forward_flops
        for node, facts in before.nodes.items()
        if "transformer.h.1" in node.meta.get("modules", ())
    )
    squared = 2 * 2 * 3 * 64 * 64 * 32
    saved = 2 * ((block - squared) / 2 + squared * 3 / 4)
    assert before.forward_flops - after.forward_flops == saved
    totals = installation.plan.totals
    assert totals is not None
    assert totals.after.flops == after.forward_flops


def test_checkpointing_repeats_the_choice() -> None:
    example = call("gpt2")
    model = prepared("gpt2")
    again = copy.deepcopy(model)
    model(**example).logits.square().mean().backward()
    logits = checkpoint(
        lambda ids: again(input_ids=ids).logits, example["input_ids"], use_reentrant=False
    )
    logits.square().mean().backward()
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert torch.equal(one.grad, two.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_gated_models_compile_and_run_in_bfloat16() -> None:
    example = call("gpt2")
    model = prepared("gpt2")
    for gate in gates(model):
        gate.advance(0, 0.0)
    compiled = torch.compile(model, backend="eager")
    assert_same_outputs(compiled(**example).logits, model(**example).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**example).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "reason"),
    [("swin", "mixes tokens by attention"), ("cnn", "grid"), ("mixtral", "places of tokens")],
)
def test_what_cannot_run_on_some_tokens_says_why(name: str, reason: str) -> None:
    case = find_case(name)
    args, kwargs = case.call(2, 40)
    found = reasons(case.build(), kwargs or args, first=0, last=-1)
    assert any(reason in text for text in found), found


def test_outputs_inside_a_span_are_not_left_out() -> None:
    example = {**call("gpt2"), "output_hidden_states": True}
    found = reasons(deeper("gpt2", 4), example, span=True)
    assert any("lack the skipped tokens" in text for text in found), found
    assert len(gates(gated(deeper("gpt2", 4), example))) == 2


def test_routers_that_look_at_a_block_before_need_one() -> None:
    found = reasons(deeper("gpt2"), call("gpt2"), router="learned", first=0, last=0)
    assert found == ["no block before it says which tokens matter; start later (first=1)"]


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match="random, attention or learned"):
        GateTokens(router="best")
    with pytest.raises(ConfigError, match="keep"):
        GateTokens(keep=0.0)
