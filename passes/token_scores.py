"""What speaks for a token before a router has learned anything, computed in a block that runs all.

Attention received: the block's queries and keys are multiplied once more, or its probabilities are
read where they exist. Change: how much the block turned the token.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import fx

from graphopt.kernels.token_routers import stream_change
from graphopt.kernels.token_selection import attention_mean, attention_received

from .axis_flow import arguments_of, operator_name
from .program import Program, shape_of
from .token_blocks import BlockChain, TokenBlock, token_dims

_SOFTMAX = ("softmax", "_softmax", "_safe_softmax")


class Unscored(Exception):
    """Why a block cannot say which tokens matter; a clause for a miss."""


def check_score(blocks: BlockChain, block: TokenBlock | None, router: str) -> None:
    """Check that `insert_score` can be called.

    Args:
        blocks: The chain.
        block: The block before the gated ones, None if there is none.
        router: "attention" or "learned".

    Raises:
        Unscored: if it cannot.
    """
    if block is None:
        raise Unscored("no block before it says which tokens matter; start later (first=1)")
    if router == "attention":
        _attention(blocks, block)


def insert_score(program: Program, blocks: BlockChain, block: TokenBlock, router: str) -> fx.Node:
    """Insert the score of all tokens that a block gives; return its node [batch, token]."""
    graph = program.graph
    if router == "learned":
        with graph.inserting_after(block.exit):
            score = graph.call_function(
                stream_change, (block.entry, block.exit, blocks.batch_dim < blocks.token_dim)
            )
        score.meta = {"modules": ("",), "calls": ("",)}
        return score
    attention = _attention(blocks, block)
    with graph.inserting_after(attention):
        if operator_name(attention) in _SOFTMAX:
            score = graph.call_function(attention_mean, (attention,))
            made = [score]
        else:
            made = _products(graph, attention)
            score = made[-1]
    for node in made:
        node.meta = {"modules": attention.meta["modules"], "calls": attention.meta["calls"]}
    return score


def score_flops(blocks: BlockChain, block: TokenBlock, router: str) -> int:
    """Return what the score costs at the example's sizes; a multiply-add is 2."""
    if router != "attention":
        return 0
    attention = _attention(blocks, block)
    if operator_name(attention) in _SOFTMAX:
        return 0
    batch, heads, queries, width = shape_of(arguments_of(attention)["query"])
    return 2 * batch * heads * queries * width * blocks.tokens.size


def _products(graph: fx.Graph, attention: fx.Node) -> list[fx.Node]:
    """Insert the products of queries and keys and the attention that every token receives."""
    aten = torch.ops.aten
    arguments = arguments_of(attention)
    query, key = arguments["query"], arguments["key"]
    scale = arguments["scale"] or shape_of(query)[-1] ** -0.5
    made = [
        graph.call_function(aten.detach.default, (query,)),
        graph.call_function(aten.detach.default, (key,)),
    ]
    groups = shape_of(query)[1] // shape_of(key)[1]
    if groups > 1:
        made.append(graph.call_function(aten.repeat_interleave.self_int, (made[-1], groups, 1)))
    made.append(graph.call_function(aten.transpose.int, (made[-1], -2, -1)))
    made.append(graph.call_function(aten.matmul.default, (made[0], made[-1])))
    made.append(
        graph.call_function(
            attention_received,
            (made[-1], scale, arguments["attn_mask"], arguments["is_causal"]),
        )
    )
    for earlier, later in pairwise(made):
        earlier.append(later)
    return made


def _attention(blocks: BlockChain, block: TokenBlock) -> fx.Node:
    """Return the attention of a block over the stream's own tokens, or its probabilities."""
    tokens = blocks.tokens
    for region in block.regions:
        for node in region.nodes:
            if node.op != "call_function":
                continue
            name = operator_name(node)
            if name == "scaled_dot_product_attention":
                key = arguments_of(node)["key"]
                found = len(shape_of(key)) - 2 in token_dims(tokens, key)
                shape = shape_of(arguments_of(node)["query"])
            elif name in _SOFTMAX:
                shape = shape_of(node)
                found = len(shape) > 1 and token_dims(tokens, node)[-2:] == (
                    len(shape) - 2,
                    len(shape) - 1,
                )
            else:
                continue
            if found and len(shape) == 4 and shape[0] == shape_of(block.entry)[blocks.batch_dim]:
                return node
            if found:
                raise Unscored(f"the attention {node.name} does not have its samples first")
    raise Unscored("the block before it has no attention over its own tokens")
