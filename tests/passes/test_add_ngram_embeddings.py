"""`add-ngram-embeddings` finds the table of tokens and leaves outputs as they are at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import EXAMPLE, find_case, without_dropout

import graphopt
from graphopt.capture import capture
from graphopt.export import export_onnx
from graphopt.kernels.ngram_embeddings import NgramEmbeddings
from graphopt.passes.base import Context
from graphopt.passes.errors import ConfigError, PlanError
from graphopt.passes.extend.add_ngram_embeddings import AddNgramEmbeddings
from graphopt.passes.verifier import rounding_bound
from graphopt.runtime import installation_of
from graphopt.testing import assert_same_outputs

RECIPE = "add-ngram-embeddings{rows=512}"


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    case = find_case("gpt2")
    return without_dropout(case.build()).eval(), case.call(*EXAMPLE, labels=False)[1]


def optimized(model: nn.Module, example: Any) -> nn.Module:
    return graphopt.optimize(model, example, recipe=RECIPE)


def reason(model: nn.Module, example: Any, **options: Any) -> str:
    proposal = AddNgramEmbeddings(**options).propose(capture(model, example), Context())
    assert not proposal.candidates
    return proposal.misses[0].reason


def trained(model: nn.Module) -> None:
    """Give the vectors values."""
    (module,) = (m for m in model.modules() if isinstance(m, NgramEmbeddings))
    with torch.no_grad():
        module.weight.normal_(generator=torch.Generator().manual_seed(0))


def test_outputs_are_equal_at_first_and_look_back_only_once_trained() -> None:
    dense, example = gpt2()
    before = dense(**example).logits
    model = optimized(dense, example).eval()
    assert torch.equal(model(**example).logits, before)
    trained(model)
    after = model(**example).logits
    assert not torch.equal(after, before)
    changed = example["input_ids"].clone()
    changed[:, 6] = (changed[:, 6] + 1) % 90
    other = model(**{**example, "input_ids": changed}).logits
    assert torch.equal(other[:, :6], after[:, :6])
    assert not torch.equal(other[:, 6:], after[:, 6:])


def test_a_training_learns_n_grams() -> None:
    dense, example = gpt2()
    call = {**example, "labels": example["input_ids"]}
    model = optimized(dense.train(), call)
    model(**call).loss.backward()
    (module,) = (m for m in model.modules() if isinstance(m, NgramEmbeddings))
    assert module.weight.grad is not None
    assert module.weight.grad.abs().sum() > 0


def test_decoding_with_a_cache_is_refused() -> None:
    dense, example = gpt2()
    model = optimized(dense, example).eval()
    trained(model)
    cache = find_case("gpt2").build().eval()(**example, use_cache=True).past_key_values
    with pytest.raises(PlanError, match="use_cache=False"):
        model(input_ids=example["input_ids"][:, -1:], past_key_values=cache, use_cache=True)


def test_a_call_with_a_cache_is_left_as_it_is() -> None:
    dense, example = gpt2()
    cache = dense(**example, use_cache=True).past_key_values
    call = {"input_ids": example["input_ids"][:, -3:], "past_key_values": cache}
    assert "continues a sequence" in reason(dense, call)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_tokens_have_the_n_grams_of_their_sequence(side: str) -> None:
    case = find_case("llama-padded")
    _, call = case.call(3, 12)
    mask = torch.ones_like(call["input_ids"])
    mask[0, 7:] = mask[2, 4:] = 0
    call["attention_mask"] = mask if side == "right" else mask.flip(1)
    real = call["attention_mask"].bool()
    results = []
    for passes in ([RECIPE], [RECIPE, "pack-tokens"]):
        dense = without_dropout(case.build()).eval()
        model = graphopt.optimize(dense, call, recipe=passes, measure=False)
        made = installation_of(model)
        assert made is not None
        assert len(made.plan.changes) == len(passes)
        trained(model)
        results.append(model(**call).logits[real])
    bound = rounding_bound(capture(case.build(), call))
    assert_same_outputs(results[1], results[0], bound=bound)


def test_the_export_computes_the_same(tmp_path: Path) -> None:
    dense, example = gpt2()
    model = optimized(dense, example).eval()
    trained(model)
    report = export_onnx(model, tmp_path / "model.onnx", example, measure=False)
    assert set(report.dynamic["input_ids"]) == {0, 1}


def test_models_without_tokens_and_unknown_inputs_are_refused() -> None:
    assert "no input" in reason(nn.Linear(4, 4), torch.randn(2, 4))
    dense, example = gpt2()
    assert "not looked up" in reason(dense, example, ids="nonsense")


def test_of_several_inputs_with_tokens_one_is_named() -> None:
    case = find_case("t5")
    _, call = case.call(*EXAMPLE)
    dense = without_dropout(case.build())
    assert "say which are token ids" in reason(dense, call)
    step = AddNgramEmbeddings(rows=512, ids="decoder_input_ids")
    (candidate,) = step.propose(capture(dense, call), Context()).candidates
    assert candidate.change.details["ids"] == "decoder_input_ids"


@pytest.mark.parametrize("options", [{"longest": 1}, {"longest": 9}, {"rows": 0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="longest n-gram"):
        AddNgramEmbeddings(**options)
