"""The blocks of a residual stream that could run on some tokens only, found by dataflow.

A block is a part of the stream with one region that mixes tokens (attention) and what follows until
the next such region: attention and feed-forward of a layer, with the norms behind their adds where
these are on the stream (post-norm). A token that skips it is carried over as it came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .axis_flow import operator_name, tensor_nodes
from .program import Program, shape_of
from .tokens import Chain, Region, TokenAxis, residual_stream

_CASTS = ("to", "_to_copy", "type_as", "contiguous", "clone", "alias")


@dataclass(frozen=True)
class TokenBlock:
    """A block of a chain.

    Attributes:
        entry: The value of the stream before it.
        exit: The value of the stream after it, of the same shape.
        regions: The regions it is made of.
    """

    entry: fx.Node
    exit: fx.Node
    regions: tuple[Region, ...]

    @property
    def scopes(self) -> tuple[str, ...]:
        """The names of the modules its nodes come from, each once."""
        nodes = (node for region in self.regions for node in region.nodes)
        return tuple(dict.fromkeys(name for node in nodes for name in node.meta["modules"] if name))


@dataclass(frozen=True)
class BlockChain:
    """The blocks of one chain.

    Attributes:
        chain: The chain.
        tokens: Its token axis.
        blocks: Its blocks in order.
        token_dim: The stream's dimension of tokens.
        batch_dim: Its dimension of samples.
        refusal: Why none of its blocks can run on some tokens, None if nothing is against it.
    """

    chain: Chain
    tokens: TokenAxis
    blocks: tuple[TokenBlock, ...]
    token_dim: int
    batch_dim: int
    refusal: str | None


def block_chains(program: Program) -> tuple[BlockChain, ...]:
    """Return the blocks of every chain that has tokens; analysed once per state of the graph."""
    found: tuple[BlockChain, ...] = program.fact("token blocks", _find)
    return found


def token_dims(tokens: TokenAxis, node: fx.Node) -> tuple[int, ...]:
    """Return the dimensions of a value that count exactly the tokens."""
    if node not in tokens.nodes:
        return ()
    shape = shape_of(node)
    return tuple(dim for dim in tokens.nodes[node] if shape[dim] == tokens.size)


def merged_dims(tokens: TokenAxis, node: fx.Node) -> tuple[int, ...]:
    """Return the dimensions of a value that count tokens and something else (batch*token)."""
    if node not in tokens.nodes:
        return ()
    shape = shape_of(node)
    return tuple(dim for dim in tokens.nodes[node] if shape[dim] not in (1, tokens.size))


def _find(program: Program) -> tuple[BlockChain, ...]:
    return tuple(
        _block_chain(chain, chain.tokens)
        for chain in residual_stream(program).chains
        if chain.tokens is not None
    )


def _block_chain(chain: Chain, tokens: TokenAxis) -> BlockChain:
    entry = _uncast(chain.regions[0].entry)
    refusal = None
    if len(tokens.dims) != 1:
        refusal = "its tokens lie on a grid, and some of them are no grid"
    elif len(chain.batch_dims) != 1:
        refusal = "its stream has no single dimension of samples"
    elif chain.width_dim != len(shape_of(entry)) - 1:
        refusal = "the features of its stream are not the last dimension"
    elif tokens.size == 1:
        refusal = "the example has one token; pass a longer one"
    blocks: list[TokenBlock] = []
    groups = [] if refusal else _groups(chain, tokens)
    for group in groups:
        exit_ = _exit(group[-1], entry, blocks)
        blocks.append(TokenBlock(entry, exit_, tuple(group)))
        entry = exit_
    if refusal is None and not any(_mixes(region, tokens) for region in chain.regions):
        refusal = "none of its regions mixes tokens by attention"
    return BlockChain(
        chain,
        tokens,
        tuple(blocks),
        tokens.dims[0],
        chain.batch_dims[0] if chain.batch_dims else 0,
        refusal,
    )


def _groups(chain: Chain, tokens: TokenAxis) -> list[list[Region]]:
    groups: list[list[Region]] = [[]]
    mixed = False
    for region in chain.regions:
        mixes = _mixes(region, tokens)
        if mixes and mixed:
            groups.append([])
        mixed = mixed or mixes
        groups[-1].append(region)
    return groups


def _mixes(region: Region, tokens: TokenAxis) -> bool:
    """Say whether a region multiplies the tokens of the stream with each other."""
    return any(
        len(token_dims(tokens, node)) > 1
        or (
            operator_name(node) == "scaled_dot_product_attention"
            and any(
                len(shape_of(item)) - 2 in token_dims(tokens, item)
                for item in tensor_nodes(node)[1:2]
            )
        )
        for node in region.nodes
        if node.op == "call_function"
    )


def _exit(last: Region, entry: fx.Node, earlier: Sequence[TokenBlock]) -> fx.Node:
    """Return where a block ends: its last add, or the norm behind it on the stream."""
    path = [last.add, *last.after]
    if not last.after and earlier:
        before = earlier[-1].regions[-1]
        path.extend(_like(last.add, [n for n in before.after if not _is_cast(n)]))
    wanted = _sizes(entry)
    ends = [
        node
        for index, node in enumerate(path)
        if _sizes(node) == wanted and all(map(_is_cast, path[index + 1 :]))
    ]
    return ends[0] if ends else path[-1]


def _like(add: fx.Node, pattern: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the nodes behind the last add that are like those behind an earlier one."""
    found: list[fx.Node] = []
    node = add
    for like in pattern:
        users = list(node.users)
        if len(users) != 1 or users[0].op != like.op or _kind(users[0]) != _kind(like):
            return []
        node = users[0]
        found.append(node)
    return found


def _kind(node: fx.Node) -> Any:
    body: fx.Graph | None = node.meta.get("body")
    if node.op != "call_module":
        return node.target
    return (
        None
        if body is None
        else [inner.target for inner in body.nodes if inner.op[-8:] == "function"]
    )


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]


def _uncast(node: fx.Node) -> fx.Node:
    while _is_cast(node) and node.meta["val"].dtype == tensor_nodes(node)[0].meta["val"].dtype:
        node = tensor_nodes(node)[0]
    return node


def _is_cast(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node) in _CASTS
