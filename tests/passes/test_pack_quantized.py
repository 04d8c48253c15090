"""Layers in integers run on real tokens only, where they round each token on its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from zoo import find_case, without_dropout

import graphopt
from graphopt.passes.verifier import relative_error

BOUND = 1e-12
"""In float64, inputs are next to never so near to a boundary that packing rounds them elsewhere."""


def right(length: int, *lengths: int) -> Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def call(real: Tensor) -> dict[str, Tensor]:
    kwargs: dict[str, Tensor] = find_case("bert-classifier").call(*real.shape)[1]
    return {**kwargs, "attention_mask": real.long()}


def decisions(model: nn.Module) -> list[str]:
    rows = graphopt.report(model).rows
    return [row.decision for row in rows if row.pass_name == "pack-tokens"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_layers_are_packed(bits: int, fused: bool) -> None:
    dense = without_dropout(find_case("bert-classifier").build()).double().eval()
    example = call(right(9, 9, 5, 7))
    recipe = f"quantize-weights{{bits={bits}}}" + (",fuse-projections" if fused else "")
    quantized = graphopt.optimize(dense, example, recipe=recipe, measure=False)
    packed = graphopt.optimize(
        copy.deepcopy(dense), example, recipe=f"{recipe},pack-tokens", measure=False
    )
    assert decisions(packed) == ["kept"]
    for real in (right(9, 9, 5, 7), right(12, 1, 12, 3, 6)):
        inputs = call(real)
        with torch.no_grad():
            found, wanted = packed(**inputs).logits, quantized(**inputs).logits
        assert relative_error(found, wanted) <= BOUND


def test_layers_with_one_scale_for_all_tokens_are_not_packed() -> None:
    dense = without_dropout(find_case("bert-classifier").build()).eval()
    recipe = "quantize-weights{activations=dynamic-tensor},pack-tokens"
    result = graphopt.optimize(dense, call(right(9, 9, 5, 7)), recipe=recipe, measure=False)
    assert decisions(result) == ["refused"]
