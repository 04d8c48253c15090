"""Some positions of every sample's tokens, and the part of causal masks that belongs to them."""

from __future__ import annotations

import torch
from torch import Tensor

from .packed_rows import real_rows
from .token_rows import gather_rows

__all__ = ["causal_mask_at", "causal_mask_of", "labelled_rows", "take_position"]


def labelled_rows(mask: Tensor, marks_labels: bool) -> Tensor:
    """Return the row numbers of the tokens that a loss reads, sample after sample.

    Args:
        mask: [batch, token], any type.
        marks_labels: Whether it is non-zero at tokens with a label, else at those without.

    Returns:
        [labelled token], int64, ascending; its length depends on the data.
    """
    return real_rows(mask, marks_labels)


def take_position(x: Tensor, positions: Tensor, batch: int, token: int) -> Tensor:
    """Return one token of each sample.

    Cost: one read and one write of the rows.

    Args:
        x: A value with samples and tokens in these dimensions; 1 sample stands for all.
        positions: [batch], int64; negative ones count from the end.
        batch: The dimension of samples.
        token: The dimension of tokens.

    Returns:
        The same with 1 token.
    """
    rows = x.movedim((batch, token), (0, 1))
    samples, tokens = positions.shape[0], rows.shape[1]
    rows = rows.expand(samples, *rows.shape[1:]).flatten(0, 1)
    first = torch.arange(samples, device=x.device) * tokens
    taken = gather_rows(rows, first + positions % tokens)
    return taken.unsqueeze(1).movedim((0, 1), (batch, token))


def causal_mask_at(key: Tensor, positions: Tensor) -> Tensor:
    """Return which keys a query at one position of each sample attends to.

    Args:
        key: [batch, head, token, width].
        positions: [batch], int64; negative ones count from the end.

    Returns:
        [batch, 1, 1, token], bool.
    """
    tokens = key.shape[-2]
    mask = torch.arange(tokens, device=key.device) <= (positions % tokens).unsqueeze(1)
    return mask[:, None, None]


def causal_mask_of(key: Tensor, start: int | None, stop: int | None) -> Tensor:
    """Return which keys the queries of a range of positions attend to.

    Args:
        key: [batch, head, token, width].
        start: First position; negative ones count from the end.
        stop: The position after the last.

    Returns:
        [query, token], bool.
    """
    places = torch.arange(key.shape[-2], device=key.device)
    return places <= places[start:stop].unsqueeze(1)
