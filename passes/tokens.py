"""The residual stream of a program and the axis its tokens lie on, found by dataflow.

A residual add joins a value with something computed from that very value: `x + branch(x)`. Chains
of such adds are the residual stream; what lies between the value and the add is a region. Neither
names nor classes are looked at, so pre- and post-norm, parallel branches, encoders with decoders
and convolutional stages all come out of the same rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from .axes import axes_of
from .axis_flow import operator_name, tensor_nodes
from .axis_terms import atoms
from .facts import attribute_of, facts_of
from .program import Program, shape_of
from .residual_adds import ResidualAdd, ResidualAdds


@dataclass(frozen=True)
class TokenAxis:
    """The dimensions of a stream along which its tokens lie.

    Attributes:
        dims: The stream's token dimensions: (1,) of [batch, token, width], (2, 3) of
            [batch, channel, height, width].
        size: Number of tokens at the example's sizes.
        symbols: Symbols of dynamic token dimensions; none where the number is static.
        inputs: Names of the program's inputs that have tokens, with their token dimensions.
        axes: Numbers of its axes in `axes_of(program)`.
        nodes: All nodes of the graph that have tokens, with their token dimensions.
    """

    dims: tuple[int, ...]
    size: int
    symbols: frozenset[str]
    inputs: Mapping[str, tuple[int, ...]]
    axes: frozenset[int]
    nodes: Mapping[fx.Node, tuple[int, ...]]


@dataclass(frozen=True)
class Region:
    """What lies between a value of the stream and the add that joins its result back in.

    Attributes:
        entry: The value of the stream it starts from.
        add: The add that ends it; without the region its value is that of `entry`.
        nodes: The nodes in between, in graph order.
        outside: Tensors that nodes of the region read besides `entry`, parameters and
            what is computed from them alone left out: masks, rotary tables, an encoder's output.
        token_inputs: Those of `outside` that have the stream's tokens, with their dimensions.
        token_parameters: Parameters of the region with a dimension over tokens (token-mixing
            layers): the tokens of such a region cannot be chosen.
        escapes: Nodes of the region that something other than its add reads.
        after: Nodes on the stream between `add` and the next region (post-norm, activation).
    """

    entry: fx.Node
    add: fx.Node
    nodes: tuple[fx.Node, ...]
    outside: tuple[fx.Node, ...]
    token_inputs: Mapping[fx.Node, tuple[int, ...]]
    token_parameters: tuple[str, ...]
    escapes: tuple[fx.Node, ...]
    after: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Chain:
    """Regions one after the other on a stream of one width and one set of tokens.

    A region may see the stream flattened to [batch*token, width]; the dimensions below are those
    at the first region, `tokens.nodes` has them for every node.

    Attributes:
        regions: The regions in graph order.
        width_dim: The stream's dimension of features or channels.
        batch_dims: Its dimensions over independent rows.
        tokens: Its token dimensions, None if it has none ([batch, width]).
    """

    regions: tuple[Region, ...]
    width_dim: int
    batch_dims: tuple[int, ...]
    tokens: TokenAxis | None


@dataclass(frozen=True)
class ResidualStream:
    """All chains of a program.

    Attributes:
        chains: The chains in graph order; a change of width or resolution starts a new one.
        reason: Why there are none, empty if there are some.
    """

    chains: tuple[Chain, ...]
    reason: str = ""


def residual_stream(program: Program) -> ResidualStream:
    """Return the residual stream of a program; analysed once per state of its graph."""
    stream: ResidualStream = program.fact("residual stream", lambda p: _Analysis(p).stream())
    return stream


def token_axis(program: Program) -> TokenAxis | None:
    """Return the token axis of the chain that does the most work, None if there is none."""
    facts = facts_of(program)
    chains = [chain for chain in residual_stream(program).chains if chain.tokens is not None]
    if not chains:
        return None

    def flops(chain: Chain) -> int:
        return sum(facts.cost(region.nodes).flops for region in chain.regions)

    return max(chains, key=flops).tokens


class _Analysis:
    def __init__(self, program: Program) -> None:
        self._program = program
        self._axes = axes_of(program)
        self._facts = facts_of(program)
        self._adds = ResidualAdds(program)
        self._from_parameters: set[fx.Node] = set()
        for node in program.graph.nodes:
            sources = tensor_nodes(node)
            if node.op == "get_attr":
                if isinstance(attribute_of(program, str(node.target)), torch.nn.Parameter):
                    self._from_parameters.add(node)
            elif sources and all(item in self._from_parameters for item in sources):
                self._from_parameters.add(node)

    def stream(self) -> ResidualStream:
        chains = tuple(map(self._chain, self._adds.chains()))
        reason = "no value is added to something that a layer computes from it"
        return ResidualStream(chains, "" if chains else reason)

    def _chain(self, residuals: Sequence[ResidualAdd]) -> Chain:
        bodies = [self._adds.between(residual.entry, residual.add) for residual in residuals]
        width_dim, batch_dims, token_dims = self._roles(residuals[0].add, bodies)
        tokens = self._tokens(residuals[0].add, token_dims) if token_dims else None
        nexts = [*(residual.entry for residual in residuals[1:]), None]
        regions = tuple(
            self._region(residual, body, following, tokens)
            for residual, body, following in zip(residuals, bodies, nexts, strict=True)
        )
        return Chain(regions, width_dim, batch_dims, tokens)

    def _roles(
        self, stream: fx.Node, bodies: Iterable[Sequence[fx.Node]]
    ) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Return the width dimension, the batch dimensions and the token dimensions."""
        dims = [{axis.number for axis in atoms(term)} for term in self._axes.term(stream)]
        made = {
            group.axis
            for group in self._axes.groups()
            if any(member.role in ("producer", "consumer") for member in group.members)
        }
        width = [index for index, found in enumerate(dims) if found & made]
        width_dim = width[-1] if width else len(dims) - 1
        rest = [index for index in range(len(dims)) if index != width_dim]
        summed = {axis for body in bodies for node in body for axis in self._summed(node)}
        tokens = [index for index in rest if dims[index] & summed] or rest[1:]
        return width_dim, tuple(i for i in rest if i not in tokens), tuple(tokens)

    def _summed(self, node: fx.Node) -> set[int]:
        """Return the axes over which two activations are multiplied: those that attention mixes."""
        if node.op != "call_function":
            return set()
        name, operands = operator_name(node), tensor_nodes(node)
        if name == "scaled_dot_product_attention":
            term = self._axes.term(operands[1])[-2]
        elif name in ("matmul", "bmm") and all(item.op != "get_attr" for item in operands):
            term = self._axes.term(operands[0])[-1]
        else:
            return set()
        return {axis.number for axis in atoms(term)}

    def _tokens(self, stream: fx.Node, dims: tuple[int, ...]) -> TokenAxis:
        terms = self._axes.term(stream)
        numbers = frozenset(axis.number for dim in dims for axis in atoms(terms[dim]))
        value = stream.meta["val"]
        symbols = frozenset(name for dim in dims for name in _symbols(value.shape[dim]))
        nodes: dict[fx.Node, tuple[int, ...]] = {}
        for node in self._program.graph.nodes:
            if not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            found = tuple(
                index
                for index, (term, size) in enumerate(
                    zip(self._axes.term(node), node.meta["val"].shape, strict=True)
                )
                if symbols & _symbols(size) or numbers & {axis.number for axis in atoms(term)}
            )
            if found:
                nodes[node] = found
        size = prod(shape_of(stream)[dim] for dim in dims)
        inputs = {node.name: nodes[node] for node in self._program.placeholders if node in nodes}
        return TokenAxis(dims, size, symbols, inputs, numbers, nodes)

    def _region(
        self,
        residual: ResidualAdd,
        body: Sequence[fx.Node],
        following: fx.Node | None,
        tokens: TokenAxis | None,
    ) -> Region:
        inside = {*body, residual.add}
        reads = dict.fromkeys(
            item
            for node in (*body, residual.add)
            for item in tensor_nodes(node)
            if item not in inside and item is not residual.entry
        )
        carriers = tokens.nodes if tokens is not None else {}
        token_axes = tokens.axes if tokens is not None else frozenset()
        weights = dict.fromkeys(
            name for node in body for name in sorted(self._facts.nodes[node].weights)
        )
        after: list[fx.Node] = []
        if following is not None and following is not residual.add:
            after = [*self._adds.between(residual.add, following), following]
        return Region(
            entry=residual.entry,
            add=residual.add,
            nodes=tuple(body),
            outside=tuple(node for node in reads if node not in self._from_parameters),
            token_inputs={
                node: carriers[node]
                for node in reads
                if node in carriers and node not in self._from_parameters
            },
            token_parameters=tuple(
                name for name in weights if token_axes & self._parameter_axes(name)
            ),
            escapes=tuple(node for node in body if any(user not in inside for user in node.users)),
            after=tuple(after),
        )

    def _parameter_axes(self, name: str) -> set[int]:
        return {axis.number for term in self._axes.parameter(name) for axis in atoms(term)}


def _symbols(size: int | torch.SymInt) -> set[str]:
    if isinstance(size, int):
        return set()
    return {str(symbol) for symbol in size.node.expr.free_symbols}
