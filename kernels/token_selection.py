"""A share of the tokens: how many, taken out of every value, computed, and put back.

Tokens are chosen for the whole batch (one row of numbers) or for each sample. They stay in order,
so causal attention over chosen tokens is causal. An index of None chooses all and costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .token_rows import combine_rows, gather_rows

__all__ = [
    "TOKENS_MULTIPLE",
    "attention_mean",
    "attention_received",
    "kept_count",
    "put_tokens",
    "spread_tokens",
    "take_tokens",
]

TOKENS_MULTIPLE = 16
"""Numbers of chosen tokens are multiples of this: the rows that matrix units work on at once."""

_PARTS = 65536


def kept_count(tokens: int, share: float) -> int:
    """Return how many tokens a share is: the next multiple of 16, at most all.

    Args:
        tokens: Number of tokens; a symbol in a trace gives an expression of it.
        share: In (0, 1].
    """
    step = TOKENS_MULTIPLE * _PARTS
    rounded = (tokens * int(share * _PARTS) + step - 1) // step * TOKENS_MULTIPLE
    count: int = torch.sym_min(tokens, rounded)
    return count


def take_tokens(
    x: Tensor, index: Tensor | None, token_dims: tuple[int, ...], batch_dim: int | None = None
) -> Tensor:
    """Return a value of the chosen tokens only: activations, masks, rotary tables, biases.

    Args:
        x: Any value with tokens; [token, token] values have two dimensions of them.
        index: Numbers of the chosen tokens [1 or batch, kept], ascending; None chooses all.
        token_dims: The dimensions of tokens.
        batch_dim: None if `index` has one row for all samples. Else the dimension of samples, of
            their number or 1; -n for n missing dimensions in front, as in broadcasting.

    Returns:
        The value with `kept` in place of the number of tokens.
    """
    if index is None:
        return x
    if batch_dim is None:
        for dim in token_dims:
            x = x.index_select(dim, index[0])
        return x
    if batch_dim < 0:
        x = x[(None,) * -batch_dim]
        token_dims = tuple(dim - batch_dim for dim in token_dims)
        batch_dim = 0
    if (batch_dim, token_dims) == (0, (1,)):
        return _rows_of(x, index)
    batch, kept = index.shape
    x = x.expand(*x.shape[:batch_dim], batch, *x.shape[batch_dim + 1 :])
    for dim in token_dims:
        wanted = [*x.shape[:dim], kept, *x.shape[dim + 1 :]]
        x = x.gather(dim, _lying(index, x.dim(), batch_dim, dim).expand(wanted))
    return x


def put_tokens(
    x: Tensor, index: Tensor | None, chosen: Tensor, token_dim: int, batch_dim: int | None = None
) -> Tensor:
    """Return the stream with the chosen tokens as computed and the others as they were.

    Args:
        x: The stream before [.., token, ..].
        index: As in `take_tokens`.
        chosen: The stream after, of the chosen tokens only.
        token_dim: The dimension of tokens.
        batch_dim: As in `take_tokens`.
    """
    if index is None:
        return chosen
    chosen = chosen.to(x.dtype)
    if batch_dim is None:
        return x.index_copy(token_dim, index[0], chosen)
    if (batch_dim, token_dim) != (0, 1):
        moved = put_tokens(
            x.movedim((batch_dim, token_dim), (0, 1)),
            index,
            chosen.movedim((batch_dim, token_dim), (0, 1)),
            1,
            0,
        )
        return moved.movedim((0, 1), (batch_dim, token_dim))
    rows = combine_rows(x.flatten(0, 1), _row_numbers(x, index), chosen.flatten(0, 1))
    return rows.reshape(x.shape)


def spread_tokens(
    chosen: Tensor,
    index: Tensor | None,
    x: Tensor,
    token_dim: int,
    place: tuple[int, int | None],
) -> Tensor:
    """Return a value of the chosen tokens with zeros for the others: a cache of keys, say.

    Args:
        chosen: Any value with one dimension of chosen tokens.
        index: As in `take_tokens`.
        x: The stream, for the number of its tokens.
        token_dim: The stream's dimension of tokens.
        place: The value's dimension of tokens, and as in `take_tokens` that of samples.
    """
    if index is None:
        return chosen
    dim, batch_dim = place
    shape = list(chosen.shape)
    shape[dim] = x.shape[token_dim]
    if batch_dim is None:
        return chosen.new_zeros(shape).index_copy(dim, index[0], chosen)
    places = _lying(index, chosen.dim(), batch_dim, dim).expand_as(chosen)
    return chosen.new_zeros(shape).scatter(dim, places, chosen)


def attention_received(
    products: Tensor, scale: float, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Return how much attention every token receives, mean over heads and queries.

    Source: attention routing (A-MoD, arXiv 2412.20875). Cost: one softmax over the products.

    Args:
        products: Products of queries and keys [batch, head, query, token].
        scale: Factor of the products.
        mask: What is added to them, or (boolean) where they count; broadcast.
        is_causal: Whether a query sees only what comes before it.

    Returns:
        [batch, token], float32; 0 for tokens that are masked out.
    """
    scores = products.detach().float() * scale
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.detach()
    return attention_mean(scores.softmax(-1))


def attention_mean(probabilities: Tensor) -> Tensor:
    """Return how much attention every token receives [batch, token], without gradient.

    Args:
        probabilities: [batch, head, query, token]; a query that sees nothing counts as 0.
    """
    return probabilities.detach().float().nan_to_num().mean((1, 2))


def _rows_of(x: Tensor, index: Tensor) -> Tensor:
    batch, kept = index.shape
    x = x.expand(batch, *x.shape[1:])
    rows = gather_rows(x.flatten(0, 1), _row_numbers(x, index))
    return rows.reshape(batch, kept, *x.shape[2:])


def _lying(index: Tensor, rank: int, batch_dim: int, token_dim: int) -> Tensor:
    """Return an index [batch, kept] with its dimensions where a value has them."""
    shape = [1] * rank
    shape[batch_dim], shape[token_dim] = index.shape
    return (index if batch_dim < token_dim else index.t()).reshape(shape)


def _row_numbers(x: Tensor, index: Tensor) -> Tensor:
    """Return the chosen tokens as rows of [batch*token, ...]."""
    first = torch.arange(index.shape[0], device=index.device) * x.shape[1]
    return (index + first[:, None]).flatten()
