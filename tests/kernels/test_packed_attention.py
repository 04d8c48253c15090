"""Attention among packed rows is the padded one, whatever form computes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graphopt.kernels import packed_attention as forms
from graphopt.kernels.packed_attention import packed_attention, sample_starts
from graphopt.kernels.packed_rows import pack_rows, real_rows

BOUND = 1e-12
"""The arithmetic is float64."""

MASKS = {
    "right": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "an empty sample": [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1]],
}


def padded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, ordered: bool) -> Tensor:
    """Return the reference: attention over the padded batch under an explicit mask."""
    tokens = mask.shape[1]
    shown = mask.bool()[:, None, None, :].expand(-1, 1, tokens, tokens)
    if ordered:
        shown = shown & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=shown, enable_gqa=True
    )


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_every_form_is_the_padded_attention_with_its_gradients(
    name: str, traced: bool, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if traced:
        monkeypatch.setattr(forms, "_is_traced", lambda: True)
    mask = torch.tensor(MASKS[name])
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(3, heads, 5, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    ]
    index, starts = real_rows(mask, True), sample_starts(mask, True)
    tokens = mask.shape[1]
    shown = mask.bool()[:, None, None, :].expand(-1, 1, tokens, tokens)
    if ordered:
        shown = shown & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    query, key, value = (pack_rows(item, index, 0, 2) for item in inputs)
    actual = packed_attention(
        query, key, value, shown, 0.0, False, None, True, index, starts, mask, ordered
    )
    expected = pack_rows(padded(inputs[0], inputs[1], inputs[2], mask, ordered), index, 0, 2)
    assert actual.shape == (1, 4, int(mask.sum()), 8)
    assert (actual - expected).abs().max() <= BOUND
    weights = torch.randn(actual.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((actual * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, reference in zip(found, wanted, strict=True):
        assert (gradient - reference).abs().max() <= BOUND


def test_starts_follow_either_kind_of_mask() -> None:
    mask = torch.tensor(MASKS["right"])
    assert sample_starts(mask, True).tolist() == [0, 5, 7, 11]
    assert sample_starts(1 - mask, False).tolist() == [0, 5, 7, 11]


def test_no_real_token_at_all_gives_no_rows() -> None:
    mask = torch.zeros(2, 3, dtype=torch.int64)
    index, starts = real_rows(mask, True), sample_starts(mask, True)
    rows = torch.empty(1, 2, 0, 4)
    result = packed_attention(
        rows, rows, rows, None, 0.0, False, None, False, index, starts, mask, False
    )
    assert result.shape == (1, 2, 0, 4)


def test_variable_length_kernels_are_for_cuda_only() -> None:
    query = torch.empty(1, 2, 3, 4, dtype=torch.bfloat16)
    assert not forms._has_variable_lengths(query, 0.0)
