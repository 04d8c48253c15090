"""Tokens enter a model with a vector for the n-gram that they end.

before: x = table[ids]
after:  x = table[ids] + ngram_embeddings(ids)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from pydantic import Field, PositiveInt
from torch import fx

from graphopt.kernels.ngram_embeddings import NgramEmbeddings
from graphopt.passes.axis_flow import operator_name, tensor_nodes
from graphopt.passes.base import Candidate, Change, Context, Cost, Miss, Pass, Proposal, State
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import ConfigError, PlanError
from graphopt.passes.program import Program, shape_of
from graphopt.passes.token_blocks import block_chains
from graphopt.passes.token_lookups import Lookup, lookups

_NAME = "ngram_embeddings"


class _Ngrams(Details):
    """What `apply` needs.

    Attributes:
        ids: Name of the input with token ids.
        width: Numbers of a vector.
        orders: Lengths of the n-grams.
        rows: Rows of the table for each of them.
    """

    ids: str
    width: PositiveInt
    orders: tuple[int, ...] = Field(min_length=1)
    rows: PositiveInt


class _Unsuited(Exception):
    """Why a program cannot have n-gram embeddings."""


@final
@dataclass(frozen=True, kw_only=True)
class AddNgramEmbeddings(Pass):
    """Add vectors of n-grams, all zero at first, to what a model's token ids are looked up as.

    A model that predicts tokens then need not spend its layers on what follows a few tokens most
    often, and reaches a loss after fewer operations; for that it has more parameters, and steps of
    the optimizer take longer. Outputs stay the same until it is trained. Calls with a cache are
    refused: they do not show the tokens before.

    Sources: hash n-gram embeddings (Byte Latent Transformer, arXiv 2412.09871).

    Attributes:
        longest: Length of the longest n-grams; all lengths from 2 on have vectors.
        rows: Rows of the table for each length; n-grams beyond it share vectors.
        ids: Name of the input with token ids; empty finds it.
    """

    name: ClassVar[str] = "add-ngram-embeddings"
    exact: ClassVar[bool] = False

    longest: int = 3
    rows: int = 16384
    ids: str = ""

    def __post_init__(self) -> None:
        """Check the options."""
        if not 2 <= self.longest <= 8 or self.rows < 1:
            raise ConfigError(
                "add-ngram-embeddings takes a longest n-gram of 2 to 8 tokens and at least one "
                f"row, got longest={self.longest}, rows={self.rows}"
            )

    def propose(self, program: Program, context: Context) -> Proposal:
        """Find where token ids are looked up."""
        try:
            source, lookup = _token_lookup(program, self.ids)
        except _Unsuited as reason:
            return self._refused("(model)", str(reason))
        pattern = context.ignored_by(lookup.table)
        if pattern is not None:
            return self._refused(lookup.table, f"ignored by the pattern {pattern!r}")
        return Proposal(candidates=(self._candidate(source, lookup),))

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return vectors of zeros."""
        details = read_details(_Ngrams, change)
        _, lookup = _found(program, details)
        value = lookup.node.meta["val"]
        shape = (len(details.orders) * details.rows, details.width)
        return {f"{_NAME}.weight": torch.zeros(shape, dtype=value.dtype, device=value.device)}

    def reconstruct(self, program: Program, change: Change, state: State) -> State:
        """Return nothing: vectors of zeros add nothing."""
        return {}

    def apply(self, program: Program, change: Change) -> None:
        """Add the vectors behind the lookup."""
        details = read_details(_Ngrams, change)
        source, lookup = _found(program, details)
        value = lookup.node.meta["val"]
        module = NgramEmbeddings(
            details.width,
            orders=details.orders,
            rows=details.rows,
            device=value.device,
            dtype=value.dtype,
        )
        program.model.add_module(_NAME, module.train(program.model.training))
        with program.graph.inserting_after(lookup.node):
            vectors = program.graph.call_module(_NAME, (source,))
        with program.graph.inserting_after(vectors):
            total = program.graph.call_function(torch.ops.aten.add.Tensor, (lookup.node, vectors))
        for node in (vectors, total):
            node.meta = {name: lookup.node.meta[name] for name in ("modules", "calls")}
        lookup.node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
        program.changed()

    def restore(self, model: torch.nn.Module, change: Change) -> None:
        """Take the vectors away; what they learned is lost."""
        read_details(_Ngrams, change)
        if not isinstance(getattr(model, _NAME, None), NgramEmbeddings):
            raise PlanError(f"the model has no {_NAME!r}, which the plan describes")
        delattr(model, _NAME)

    def _refused(self, target: str, reason: str) -> Proposal:
        return Proposal(misses=(Miss(pass_name=self.name, target=target, reason=reason),))

    def _candidate(self, source: fx.Node, lookup: Lookup) -> Candidate:
        orders = tuple(range(2, self.longest + 1))
        width = shape_of(lookup.node)[-1]
        details = _Ngrams(ids=source.name, width=width, orders=orders, rows=self.rows)
        item = lookup.node.meta["val"].element_size()
        before = Cost(
            flops=0, size_bytes=lookup.rows * width * item, parameters=lookup.rows * width
        )
        added = len(orders) * self.rows * width
        return Candidate(
            change=Change(
                pass_name=self.name,
                target=lookup.table,
                summary=f"{len(orders)} x {self.rows} vectors for n-grams of up to "
                f"{self.longest} tokens",
                details=details.model_dump(mode="json"),
            ),
            before=before,
            after=Cost(
                flops=0,
                size_bytes=before.size_bytes + added * item,
                parameters=before.parameters + added,
            ),
            predicted_error=0.0,
        )


def _found(program: Program, details: _Ngrams) -> tuple[fx.Node, Lookup]:
    """Return the input and its lookup that the details name.

    Raises:
        PlanError: if they do not fit the program.
    """
    try:
        source, lookup = _token_lookup(program, details.ids)
    except _Unsuited as reason:
        raise PlanError(f"the plan does not fit this call: {reason}") from reason
    width = shape_of(lookup.node)[-1]
    if width != details.width:
        raise PlanError(
            f"the plan adds vectors of {details.width} numbers to {lookup.table}, whose rows have "
            f"{width}; is this plan for another model?"
        )
    return source, lookup


def _token_lookup(program: Program, wanted: str) -> tuple[fx.Node, Lookup]:
    """Return the input with token ids and where it is looked up.

    It lies along the tokens of a residual stream. Where several inputs do, the ids are those whose
    table has as many rows as the model's configuration has tokens.
    """
    if hasattr(program.model, _NAME):
        raise _Unsuited("it has n-gram embeddings already")
    along = {
        name
        for chain in block_chains(program)
        for name, dims in chain.tokens.inputs.items()
        if dims == (1,)
    }
    found = {
        source: lookup
        for source in program.placeholders
        if source.name in along and wanted in ("", source.name)
        for lookup in lookups(program, source)
        if shape_of(lookup.node)[:-1] == shape_of(source)
    }
    words = getattr(getattr(program.model, "config", None), "vocab_size", None)
    if len(found) > 1:
        found = {s: lookup for s, lookup in found.items() if lookup.rows == words} or found
    if not found:
        name = f"the input {wanted!r}" if wanted else "no input [batch, token]"
        raise _Unsuited(f"{name} is {'not ' if wanted else ''}looked up in a table of tokens")
    if len(found) > 1:
        names = [source.name for source in found]
        raise _Unsuited(
            f"{', '.join(names)} are all looked up; say which are token ids, such as ids={names[0]}"
        )
    ((source, lookup),) = found.items()
    _check_whole(program)
    return source, lookup


def _check_whole(program: Program) -> None:
    """Refuse calls that continue a sequence: what is computed is joined to an input's numbers."""
    for node in program.graph.nodes:
        if node.op != "call_function" or operator_name(node) != "cat":
            continue
        given = [n for n in tensor_nodes(node) if n.op == "placeholder" and _is_float(n)]
        if given and len(given) < len(tensor_nodes(node)):
            raise _Unsuited(
                f"this call continues a sequence from {given[0].name}, without showing its tokens"
            )


def _is_float(node: fx.Node) -> bool:
    return bool(node.meta["val"].is_floating_point())
