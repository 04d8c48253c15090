"""Where the rows of a program's token stream lie in every value, and which nodes keep them apart.

A row is one token of one sample. A node is rowwise if each row of its output depends only on the
same row of its inputs (and on values without rows): a linear layer, a norm over the width, an
activation, a view. Attention, convolution over tokens, pooling and everything unknown mix rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from .axes import axes_of
from .axis_flow import Terms, operator_name, tensor_nodes, tensors_of
from .axis_terms import Product, Term, atoms, normal
from .program import Program, shape_of
from .row_mixing import mixed_dims
from .tokens import Chain, residual_stream, token_axis


@dataclass(frozen=True)
class Place:
    """The dimensions of a value that count samples and tokens.

    Attributes:
        batch: The dimension of samples, None if it has none ([1, token, width] tables).
        token: The dimension of tokens, None if it has none ([batch, width]); the same one as
            `batch` where both are merged ([batch*token, width]).
        token_first: Whether a merged dimension is [token*batch], the tokens slowest.

    A dimension may go on inside a row ([batch*head, token, width]): it then starts with its role.
    """

    batch: int | None
    token: int | None
    token_first: bool = False

    @property
    def merged(self) -> bool:
        """Whether one dimension enumerates the tokens of all samples."""
        return self.token is not None and self.batch == self.token


class RowPlaces:
    """The places of all nodes of a program.

    Attributes:
        batch: Number of samples in the example.
        tokens: Number of tokens per sample in the example.
    """

    def __init__(
        self,
        *,
        batch: int,
        tokens: int,
        places: Mapping[fx.Node, Place],
        carriers: frozenset[fx.Node],
        rowwise: frozenset[fx.Node],
        dims: Mapping[fx.Node, tuple[tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        """Hold the result of an analysis."""
        self.batch = batch
        self.tokens = tokens
        self._places = places
        self._carriers = carriers
        self._rowwise = rowwise
        self._dims = dims

    def place(self, node: fx.Node) -> Place | None:
        """Return where a node's rows lie.

        None if its value has neither samples nor tokens, has them in no simple place (the
        [token, token] scores of attention), or if several outputs differ.
        """
        return self._places.get(node)

    def has_rows(self, node: fx.Node) -> bool:
        """Say whether a value has samples or tokens, in a simple place or not."""
        return node in self._carriers

    def rowwise(self, node: fx.Node) -> bool:
        """Say whether a node has rows and computes each one on its own."""
        return node in self._rowwise

    def batch_dims(self, node: fx.Node) -> tuple[int, ...]:
        """Return every dimension of a tensor node that counts samples, merged ones too."""
        return self._dims.get(node, ((), ()))[0]

    def token_dims(self, node: fx.Node) -> tuple[int, ...]:
        """Return every dimension of a tensor node that counts tokens, merged ones too."""
        return self._dims.get(node, ((), ()))[1]


def row_places(program: Program, source: str | None = None) -> RowPlaces | None:
    """Return the places of the rows of a program; analysed once per state of its graph.

    Args:
        program: The program.
        source: An input [batch, token, ...] whose rows are meant (a padding mask); None takes
            the stream that does the most work.

    Returns:
        The places, None if the program has no such tokens.
    """
    places: RowPlaces | None = program.fact(
        f"row places of {source}", lambda current: _analyse(current, source)
    )
    return places


def _analyse(program: Program, source: str | None) -> RowPlaces | None:
    roles = _Roles.of(program, source)
    return None if roles is None else _Walk(program, roles).places()


@dataclass(frozen=True)
class _Roles:
    """What samples and tokens look like as terms and as symbolic sizes.

    Attributes:
        batch: The ways in which a dimension enumerates samples, each a list of factors.
        token: The same for tokens.
        symbols: Symbolic sizes (as text) that are the number of samples or of tokens.
        counts: Number of samples and of tokens in the example.
    """

    batch: tuple[Terms, ...]
    token: tuple[Terms, ...]
    symbols: Mapping[str, str]
    counts: tuple[int, int]

    @classmethod
    def of(cls, program: Program, source: str | None) -> _Roles | None:
        """Find the samples and tokens of an input, or of the stream that does the most work."""
        node = next((n for n in program.placeholders if n.name == source), None)
        chain = _chain(program, node)
        found: list[tuple[fx.Node, int, int]] = []
        if node is not None and node.meta["val"].dim() > 1:
            found.append((node, 0, 1))
        if chain is not None and chain.tokens is not None:
            found.append((chain.regions[0].entry, chain.batch_dims[0], chain.tokens.dims[0]))
            found.extend(
                (item, 0, 1)
                for item in program.placeholders
                if chain.tokens.inputs.get(item.name) == (1,)
            )
        if not found:
            return None
        axes = axes_of(program)
        symbols: dict[str, str] = {}
        for item, batch, token in found:
            shape = item.meta["val"].shape
            for role, dim in (("batch", batch), ("token", token)):
                if not isinstance(shape[dim], int):
                    symbols[str(shape[dim])] = role
        first, batch, token = found[0]
        shape = shape_of(first)
        return cls(
            tuple({_factors(axes.term(item)[batch]): None for item, batch, _ in found}),
            tuple({_factors(axes.term(item)[token]): None for item, _, token in found}),
            symbols,
            (shape[batch], shape[token]),
        )


def _chain(program: Program, source: fx.Node | None) -> Chain | None:
    """Return the chain of the residual stream whose tokens are meant.

    For an input: one that has the chain's tokens, or at least its sizes.
    """
    chains = [
        chain
        for chain in residual_stream(program).chains
        if chain.tokens is not None and len(chain.tokens.dims) == 1 and len(chain.batch_dims) == 1
    ]
    if source is None:
        wanted = token_axis(program)
        return next((chain for chain in chains if chain.tokens == wanted), None)
    for chain in chains:
        if chain.tokens is not None and source.name in chain.tokens.inputs:
            return chain
    shape = shape_of(source)[:2]
    for chain in chains:
        assert chain.tokens is not None
        stream = shape_of(chain.regions[0].entry)
        if (stream[chain.batch_dims[0]], chain.tokens.size) == shape:
            return chain
    return None


def _factors(term: Term) -> Terms:
    term = normal(term)
    return term.factors if isinstance(term, Product) else (term,)


class _Walk:
    """One walk over a program that finds the places and the nodes that keep rows apart."""

    def __init__(self, program: Program, roles: _Roles) -> None:
        self._program = program
        self._roles = roles
        self._terms = axes_of(program).nodes
        self._atoms = {
            axis for factors in (*roles.batch, *roles.token) for f in factors for axis in atoms(f)
        }
        self._outputs: dict[fx.Node, list[Place | None]] = {}
        self._dims: dict[fx.Node, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._carriers: set[fx.Node] = set()
        self._rowwise: set[fx.Node] = set()

    def places(self) -> RowPlaces:
        """Visit every node."""
        for node in self._program.graph.nodes:
            if node.op == "output":
                continue
            self._locate(node)
            body: fx.Graph | None = node.meta.get("body") if node.op == "call_module" else None
            if body is not None:
                self._visit_body(node, body)
            elif self._keeps_apart(node):
                self._rowwise.add(node)
        batch, tokens = self._roles.counts
        return RowPlaces(
            batch=batch,
            tokens=tokens,
            places={
                node: found[0]
                for node, found in self._outputs.items()
                if found[0] is not None and found.count(found[0]) == len(found)
            },
            carriers=frozenset(self._carriers),
            rowwise=frozenset(self._rowwise),
            dims=self._dims,
        )

    def _locate(self, node: fx.Node) -> None:
        """Find the dimensions of a node's outputs that count samples or tokens."""
        values = tensors_of(node.meta.get("val"))
        found = self._terms.get(node, ())
        terms = [found] if isinstance(found, tuple) else found
        if not values or len(terms) != len(values):
            return
        roles = [
            [self._role(term, size) for term, size in zip(dims, value.shape, strict=True)]
            for dims, value in zip(terms, values, strict=True)
            if len(dims) == value.dim()
        ]
        if len(roles) < len(values) or not any(any(dims) for dims in roles):
            return
        self._carriers.add(node)
        self._outputs[node] = [_place(dims) for dims in roles]
        if len(roles) == 1:
            self._dims[node] = (
                tuple(i for i, role in enumerate(roles[0]) if "batch" in role),
                tuple(i for i, role in enumerate(roles[0]) if "token" in role),
            )

    def _role(self, term: Term, size: int | torch.SymInt) -> str:
        """Return which roles a dimension has, slowest first: "" for none, "?" for no simple one."""
        factors = _factors(term)
        for batch in self._roles.batch:
            for token in self._roles.token:
                if self._starts(factors, (*batch, *token)):
                    return "batch token"
                if self._starts(factors, (*token, *batch)):
                    return "token batch"
        if any(self._starts(factors, batch) for batch in self._roles.batch):
            return "batch"
        if any(self._starts(factors, token) for token in self._roles.token):
            return "token"
        if not isinstance(size, int) and str(size) in self._roles.symbols:
            return self._roles.symbols[str(size)]
        return "?" if self._has_atoms(factors) else ""

    def _starts(self, factors: Terms, wanted: Terms) -> bool:
        """Say whether a dimension enumerates `wanted` first, and not again inside."""
        count = len(wanted)
        return bool(count) and factors[:count] == wanted and not self._has_atoms(factors[count:])

    def _has_atoms(self, factors: Iterable[Term]) -> bool:
        return any(axis in self._atoms for factor in factors for axis in atoms(factor))

    def _visit_body(self, call: fx.Node, body: fx.Graph) -> None:
        """A leaf call is rowwise if all that its own graph does with rows is."""
        apart = call in self._outputs and None not in self._outputs[call]
        for node in body.nodes:
            if node.op == "output" or _is_size_of_views(node):
                continue
            self._locate(node)
            reads = any(item in self._carriers for item in tensor_nodes(node))
            if reads and node.users and not self._keeps_apart(node):
                apart = False
        if apart:
            self._rowwise.add(call)

    def _keeps_apart(self, node: fx.Node) -> bool:
        """Say whether a node reads rows and computes each on its own."""
        sources = [item for item in tensor_nodes(node) if item in self._carriers]
        places = self._outputs.get(node, [None])
        if node.op != "call_function" or not sources or None in places:
            return False
        mixed = mixed_dims(node)
        if mixed is None:
            return False
        for source in sources:
            for place in self._outputs[source]:
                if place is None or {place.batch, place.token} & mixed.get(source, frozenset()):
                    return False
                if any(_loses(place, found) for found in places if found is not None):
                    return False
        return True


def _is_size_of_views(node: fx.Node) -> bool:
    """Say whether a node reads a size that only views take, so that they follow other sizes."""
    return node.target is torch.ops.aten.sym_size.int and all(
        operator_name(user) in ("view", "reshape", "_unsafe_view") for user in node.users
    )


def _place(roles: list[str]) -> Place | None:
    """Return the place of a value by the roles of its dimensions, None if it is not simple."""
    batch = [i for i, role in enumerate(roles) if "batch" in role]
    token = [i for i, role in enumerate(roles) if "token" in role]
    if "?" in roles or len(batch) > 1 or len(token) > 1:
        return None
    return Place(batch[0] if batch else None, token[0] if token else None, "token batch" in roles)


def _loses(source: Place, result: Place) -> bool:
    """Say whether a result has no samples or tokens where its source has them."""
    return (source.batch is not None and result.batch is None) or (
        source.token is not None and result.token is None
    )
