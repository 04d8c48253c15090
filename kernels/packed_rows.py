"""A batch of padded token sequences as the rows of its real tokens, and back.

padded: [batch, token, ...]   most rows may be padding
packed: [1, real token, ...]  sample after sample

A value may have its samples and tokens in any two dimensions, or merged in one; packing keeps the
order of its dimensions, so that what follows runs as it is, on one sample of all real tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .token_rows import gather_rows, scatter_rows

__all__ = ["pack_rows", "pack_samples", "pack_table", "real_rows", "unpack_rows"]

_MOST_ROWS = 2**31
"""Exporters write the bound of a count into the graph; without this it is more than an int64."""


def real_rows(mask: Tensor, marks_real: bool) -> Tensor:
    """Return the row numbers of the tokens that are not padding, sample after sample.

    Args:
        mask: [batch, token], any type.
        marks_real: Whether it is non-zero where tokens are real, else where they are padding.

    Returns:
        [real token], int64, ascending; its length depends on the data.
    """
    real = mask != 0 if marks_real else mask == 0
    index = real.reshape(-1).nonzero().reshape(-1)
    torch._check(index.shape[0] <= _MOST_ROWS)
    return index


def pack_rows(x: Tensor, index: Tensor, batch: int, token: int) -> Tensor:
    """Return the real rows of a padded value.

    Args:
        x: A value with samples and tokens in these dimensions: [batch, token, ...] for (0, 1),
            [batch*token, ...] for (0, 0).
        index: Row numbers of the real tokens, from `real_rows`.
        batch: The dimension of samples.
        token: The dimension of tokens.

    Returns:
        The same with 1 sample and as many tokens as the index has.
    """
    if batch == token:
        return gather_rows(x.movedim(batch, 0), index).movedim(0, batch)
    rows = gather_rows(x.movedim((batch, token), (0, 1)).flatten(0, 1), index)
    return rows.unsqueeze(0).movedim((0, 1), (batch, token))


def pack_table(x: Tensor, index: Tensor, mask: Tensor, token: int) -> Tensor:
    """Return the row of every real token from a table that all samples share.

    Args:
        x: A value with tokens and without samples: position embeddings [1, token, width].
        index: Row numbers of the real tokens.
        mask: The padding mask [batch, token].
        token: The dimension of tokens.

    Returns:
        The same with as many tokens as the index has.
    """
    numbers = torch.arange(mask.shape[1], device=index.device)
    return x.index_select(token, gather_rows(numbers.expand(mask.shape).flatten(), index))


def pack_samples(x: Tensor, index: Tensor, mask: Tensor, batch: int, token: int) -> Tensor:
    """Return the value of its sample for every real token.

    Args:
        x: A value that is the same for all tokens of a sample: [batch, 1, width].
        index: Row numbers of the real tokens.
        mask: The padding mask [batch, token].
        batch: The dimension of samples.
        token: The dimension of size 1 in the place of tokens.

    Returns:
        The same with 1 sample and as many tokens as the index has.
    """
    numbers = torch.arange(mask.shape[0], device=index.device)[:, None]
    samples = gather_rows(numbers.expand(mask.shape).flatten(), index)
    return x.index_select(batch, samples).transpose(batch, token)


def unpack_rows(x: Tensor, index: Tensor, mask: Tensor, batch: int, token: int) -> Tensor:
    """Return a padded value with these rows and zeros at padding.

    Args:
        x: A packed value, 1 sample of all real tokens.
        index: Row numbers of the real tokens.
        mask: The padding mask [batch, token].
        batch: The dimension of samples.
        token: The dimension of tokens; the same one where both are merged.

    Returns:
        The same with the samples and tokens of the mask.
    """
    samples, tokens = mask.shape
    if batch == token:
        rows = scatter_rows(x.movedim(batch, 0), index, samples * tokens)
        return rows.movedim(0, batch)
    rows = scatter_rows(x.movedim((batch, token), (0, 1)).squeeze(0), index, samples * tokens)
    padded: Tensor = rows.unflatten(0, (samples, tokens))
    return padded.movedim((0, 1), (batch, token))
