"""A part of a graph that could run on chosen tokens: what must be rewritten for that.

Every value that enters the part with the tokens in its shape is taken along each of its dimensions
of tokens, every number of tokens in the part becomes the number of chosen ones; `routed_graph`
does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .axis_flow import operator_name, tensor_nodes, tensors_of
from .program import Program, shape_of
from .residual_adds import ResidualAdds
from .row_mixing import mixed_dims
from .structure import outside_objects
from .token_blocks import BlockChain, merged_dims, token_dims
from .tokens import TokenAxis

_SIZED = ("view", "reshape", "_unsafe_view", "expand", "broadcast_to")
_SETS = (
    *("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "logsumexp"),
    *("sum", "mean", "amax", "amin", "matmul", "mm", "bmm", "addmm", "baddbmm"),
)
"""Operators to which tokens are a set: they mean the same over some of them."""


class Unroutable(Exception):
    """Why a part cannot run on some tokens; a clause for a miss."""


@dataclass(frozen=True)
class Route:
    """What must be rewritten to run a part on chosen tokens.

    Attributes:
        entry: The value of the stream before the part.
        exit: The value after it.
        inside: The nodes of the part, in graph order, `exit` the last.
        taken: Values that enter it, with their dimensions of tokens and of samples (None where
            one choice is for all samples).
        token_dim: The stream's dimension of tokens.
        batch_dim: Its dimension of samples.
        returned: Values inside that the model returns as its state, with their dimensions of
            tokens and of samples.
        numbers: Nodes that read the number of tokens off a value inside.
        symbol: The number of tokens, an expression where it is dynamic.
        tokens: The token axis.
    """

    entry: fx.Node
    exit: fx.Node
    inside: tuple[fx.Node, ...]
    taken: dict[fx.Node, tuple[tuple[int, ...], int | None]]
    token_dim: int
    batch_dim: int
    returned: dict[fx.Node, tuple[int, int | None]]
    numbers: tuple[fx.Node, ...]
    symbol: Any
    tokens: TokenAxis


def find_route(
    program: Program, blocks: BlockChain, entry: fx.Node, exit_: fx.Node, *, per_sample: bool
) -> Route:
    """Return how to run what lies between two values of a stream on chosen tokens.

    Args:
        program: The program.
        blocks: The chain it is part of.
        entry: The value before the part.
        exit_: The value after it.
        per_sample: Whether every sample has tokens of its own.

    Raises:
        Unroutable: if some operation or size does not allow it.
    """
    return _Search(program, blocks, entry, exit_, per_sample).route()


class _Search:
    def __init__(
        self,
        program: Program,
        blocks: BlockChain,
        entry: fx.Node,
        exit_: fx.Node,
        per_sample: bool,
    ) -> None:
        self._program = program
        self._tokens = blocks.tokens
        self._blocks = blocks
        self._entry = entry
        self._exit = exit_
        self._per_sample = per_sample
        adds: ResidualAdds = program.fact("residual adds", ResidualAdds)
        self._inside = [*adds.between(entry, exit_), exit_]
        self._members = set(self._inside)
        self._symbol = self._size(entry, blocks.token_dim)
        self._taken: dict[fx.Node, tuple[tuple[int, ...], int | None]] = {}
        self._returned: dict[fx.Node, tuple[int, int | None]] = {}
        self._numbers: dict[fx.Node, None] = {}

    def route(self) -> Route:
        self._check_escapes()
        for node in self._inside:
            self._check_operation(node)
            self._check_sizes(node)
            for source in tensor_nodes(node):
                if source not in self._members and source is not self._entry:
                    self._enter(source, node)
        return Route(
            self._entry,
            self._exit,
            tuple(self._inside),
            self._taken,
            self._blocks.token_dim,
            self._blocks.batch_dim,
            self._returned,
            tuple(self._numbers),
            self._symbol,
            self._tokens,
        )

    def _size(self, node: fx.Node, dim: int) -> Any:
        size = node.meta["val"].shape[dim]
        return size if isinstance(size, int) else size.node.expr

    def _check_escapes(self) -> None:
        """What leaves the part must be state that the model hands to itself."""
        results = [n for n in _flat(self._program.result.args) if isinstance(n, fx.Node)]
        plain = {
            node
            for node, outside in zip(results, outside_objects(self._program.outputs), strict=True)
            if outside
        }
        pending = [node for node in self._inside if node is not self._exit]
        seen = set(pending)
        while pending:
            node = pending.pop()
            if node in plain:
                raise Unroutable(
                    f"the model returns {node.name}, which would lack the skipped tokens; "
                    "optimize with a call that does not ask for it"
                )
            for user in node.users:
                if user in self._members:
                    continue
                if node in self._members and (user.op == "output" or _is_tensor(user)):
                    self._return(node)
                if user.op == "output" or user in seen:
                    continue
                if not tensors_of(user.meta.get("val")):
                    self._read_size(user)
                    continue
                if any(item is self._exit or self._after(item) for item in tensor_nodes(user)):
                    raise Unroutable(f"{user.name}, outside of it, reads {node.name} inside")
                seen.add(user)
                pending.append(user)

    def _return(self, node: fx.Node) -> None:
        """Note a value inside that is read as state."""
        dims = token_dims(self._tokens, node)
        if merged_dims(self._tokens, node) or len(dims) > 1:
            raise Unroutable(f"{node.name}, which the model keeps, has no one place for tokens")
        batch = self._batch(node) if self._per_sample else None
        if self._per_sample and batch is None:
            raise Unroutable(f"{node.name}, which the model keeps, has no one place for samples")
        if dims:
            self._returned[node] = (dims[0], batch)

    def _read_size(self, user: fx.Node) -> None:
        """Note a node that reads a size off a value inside; others may read it too."""
        if not isinstance(user.meta.get("val"), torch.SymInt):
            return
        if self._is_tokens(user):
            self._numbers[user] = None
        elif self._symbol in user.meta["val"].node.expr.free_symbols:
            raise Unroutable(f"{user.name} counts tokens and more")

    def _after(self, node: fx.Node) -> bool:
        """Say whether a value depends on what the part computes."""
        adds: ResidualAdds = self._program.fact("residual adds", ResidualAdds)
        return bool(adds.depends(node, self._exit))

    def _check_operation(self, node: fx.Node) -> None:
        """Tokens must be a set to an operation, in an order only where they stay in it."""
        body: fx.Graph | None = node.meta.get("body") if node.op == "call_module" else None
        if node.op == "call_module":
            if body is None:
                raise Unroutable(f"{node.target} may depend on the places of tokens")
            sources = [n for n in tensor_nodes(node) if token_dims(self._tokens, n)]
            dims = {token_dims(self._tokens, item) for item in (*sources, node)}
            if len(dims) > 1:
                raise Unroutable(f"{node.target} changes the dimension of tokens")
            for inner in body.nodes:
                if inner.op == "call_function" and tensors_of(inner.meta.get("val")):
                    if operator_name(inner) == "scaled_dot_product_attention":
                        continue
                    if mixed_dims(inner) is None:
                        raise Unroutable(f"{node.target} may depend on the places of tokens")
            return
        if node.op != "call_function" or not tensors_of(node.meta.get("val")):
            return
        name = operator_name(node).rstrip("_")
        if name == "scaled_dot_product_attention" or name in _SETS:
            return
        mixed = mixed_dims(node)
        if mixed is None:
            raise Unroutable(f"{node.name} ({name}) may depend on the places of tokens")
        for source, dims_ in mixed.items():
            tokens = {*token_dims(self._tokens, source), *merged_dims(self._tokens, source)}
            if dims_ & tokens and not (name == "cat" and _joins_nothing(node)):
                raise Unroutable(f"{node.name} ({name}) depends on the places of tokens")

    def _check_sizes(self, node: fx.Node) -> None:
        """Every number of tokens among the arguments must be one that can be replaced."""
        for item in node.all_input_nodes:
            if isinstance(item.meta.get("val"), torch.SymInt) and item not in self._members:
                self._check_number(item, node)
        sizes = sizes_argument(node)
        if sizes is None:
            return
        merged = [
            dim
            for dim in merged_dims(self._tokens, node)
            if dim < len(sizes) and self._is_static(sizes[dim])
        ]
        if merged and (len(merged) > 1 or -1 in sizes):
            raise Unroutable(f"{node.name} has a number of tokens baked in")

    def _is_static(self, size: Any) -> bool:
        """Say whether a size that counts tokens and more does not follow their number."""
        if isinstance(size, fx.Node):
            return isinstance(self._symbol, int)
        return bool(size != -1)

    def _check_number(self, item: fx.Node, user: fx.Node) -> None:
        if isinstance(self._symbol, int) or self._is_tokens(item):
            return
        if self._symbol not in item.meta["val"].node.expr.free_symbols:
            return
        sources = item.all_input_nodes
        if item.op != "call_function" or not sources or any(map(_is_tensor, sources)):
            raise Unroutable(f"{user.name} needs {item.name}, which depends on the tokens")
        for source in sources:
            self._check_number(source, user)

    def _is_tokens(self, item: fx.Node) -> bool:
        value = item.meta.get("val")
        return isinstance(value, torch.SymInt) and bool(value.node.expr == self._symbol)

    def _enter(self, source: fx.Node, user: fx.Node) -> None:
        """Note how a value that enters the part is taken."""
        if user.op == "call_module" and merged_dims(self._tokens, source):
            raise Unroutable(f"{source.name} has tokens and more in one dimension")
        merged = merged_dims(self._tokens, source)
        if merged and self._counts_tokens(source, merged):
            raise Unroutable(f"{source.name} has tokens and more in one dimension")
        dims = token_dims(self._tokens, source)
        if not dims:
            return
        batch_dim = self._alignment(source, user) if self._per_sample else None
        if self._taken.setdefault(source, (dims, batch_dim)) != (dims, batch_dim):
            raise Unroutable(f"{source.name} is broadcast in two ways")

    def _counts_tokens(self, node: fx.Node, dims: Sequence[int]) -> bool:
        """Say whether dimensions follow the number of tokens, or just have a related size."""
        for dim in dims:
            size = self._size(node, dim)
            if isinstance(size, int) or self._symbol in size.free_symbols:
                return True
        return False

    def _alignment(self, source: fx.Node, user: fx.Node) -> int:
        """Return a value's dimension of samples, by where it meets the stream."""
        pointwise = isinstance(user.target, torch._ops.OpOverload) and (
            torch.Tag.pointwise in user.target.tags
            or operator_name(user) in ("where", "masked_fill", "scaled_dot_product_attention")
        )
        batch = self._batch(user)
        if not pointwise or batch is None:
            raise Unroutable(f"{user.name} does not say which sample {source.name} belongs to")
        place = batch - (len(shape_of(user)) - len(shape_of(source)))
        if place >= 0 and shape_of(source)[place] not in (1, shape_of(user)[batch]):
            raise Unroutable(f"{user.name} does not say which sample {source.name} belongs to")
        return place

    def _batch(self, node: fx.Node) -> int | None:
        """Return the dimension of samples of a value inside, None if there is no single one."""
        wanted = self._size(self._entry, self._blocks.batch_dim)
        found = [dim for dim in range(len(shape_of(node))) if self._size(node, dim) == wanted]
        if isinstance(wanted, int):
            found = [dim for dim in found if dim not in self._tokens.nodes.get(node, ())][:1]
        return found[0] if len(found) == 1 else None


def sizes_argument(node: fx.Node) -> list[Any] | None:
    """Return the sizes that an operation gives its result, None if it names none."""
    if node.op != "call_function" or operator_name(node) not in _SIZED:
        return None
    sizes = node.args[1]
    assert isinstance(sizes, (list, tuple))
    return list(sizes)


def _joins_nothing(node: fx.Node) -> bool:
    """Say whether all operands of a join but one are empty."""
    return sum(0 not in shape_of(item) for item in tensor_nodes(node)) == 1


def _is_tensor(node: fx.Node) -> bool:
    return bool(tensors_of(node.meta.get("val")))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [item for inner in value for item in _flat(inner)]
    return [value]
