"""Attention over the real tokens of a padded batch, sample by sample where that is cheaper.

Three forms compute the same:

* variable-length attention of torch, on CUDA in half precision without dropout;
* one attention for each sample, on a CPU;
* padded attention between `unpack_rows` and `pack_rows`, elsewhere and where a program is traced.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .packed_rows import pack_rows, unpack_rows

__all__ = ["packed_attention", "sample_starts"]


def sample_starts(mask: Tensor, marks_real: bool) -> Tensor:
    """Return where every sample begins among the packed rows, and where the last one ends.

    Args:
        mask: [batch, token], any type.
        marks_real: Whether it is non-zero where tokens are real, else where they are padding.

    Returns:
        [batch + 1], int32.
    """
    real = mask != 0 if marks_real else mask == 0
    return functional.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    index: Tensor,
    starts: Tensor,
    mask: Tensor,
    ordered: bool,
) -> Tensor:
    """Return scaled dot product attention among the real tokens of each sample.

    Args:
        query: Packed queries [1, head, real token, head width].
        key: Packed keys, like the queries; maybe fewer heads.
        value: Packed values, like the keys.
        attn_mask: What masks the padded attention, [batch, 1 or head, 1 or token, token]; it must
            hide padding and, if `ordered`, later tokens, and nothing else.
        dropout_p: Rate at which attention weights are dropped.
        is_causal: Whether the padded attention is causal by itself.
        scale: Factor of the scores; None is 1 / sqrt(head width).
        enable_gqa: Whether a key head serves several query heads.
        index: Row numbers of the real tokens.
        starts: Where samples begin, from `sample_starts`.
        mask: The padding mask [batch, token].
        ordered: Whether a token attends to itself and earlier ones only.

    Returns:
        [1, head, real token, head width].
    """
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
    if _has_variable_lengths(query, dropout_p):
        return _variable_length(query, key, value, starts, mask.shape[1], ordered, options)
    if type(starts) is Tensor and not query.is_cuda and not _is_traced():
        return _sample_by_sample(query, key, value, starts.tolist(), ordered, options)
    result = functional.scaled_dot_product_attention(
        unpack_rows(query, index, mask, 0, 2),
        unpack_rows(key, index, mask, 0, 2),
        unpack_rows(value, index, mask, 0, 2),
        attn_mask=attn_mask,
        is_causal=is_causal,
        **options,
    )
    return pack_rows(result, index, 0, 2)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def _has_variable_lengths(query: Tensor, dropout_p: float) -> bool:
    """Say whether torch has a kernel for packed sequences of this kind."""
    if not query.is_cuda or dropout_p or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.compiler.is_exporting() or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    try:
        from torch.nn.attention import varlen  # noqa: F401 - from torch 2.10 on
    except ImportError:
        return False
    return True


def _variable_length(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    longest: int,
    ordered: bool,
    options: dict[str, Any],
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    heads = query.shape[1]
    if options["enable_gqa"]:  # repeated here: older versions of the kernel want equal counts
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    result = varlen_attn(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        starts,
        starts,
        longest,
        longest,
        scale=options["scale"],
        window_size=(-1, 0) if ordered else (-1, -1),
    )
    assert isinstance(result, Tensor)
    return result.transpose(0, 1).unsqueeze(0)


def _sample_by_sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: list[int],
    ordered: bool,
    options: dict[str, Any],
) -> Tensor:
    results = [
        functional.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            is_causal=ordered,
            **options,
        )
        for start, end in pairwise(starts)
        if end > start
    ]
    if not results:
        return query[..., : value.shape[-1]]
    return torch.cat(results, 2)
