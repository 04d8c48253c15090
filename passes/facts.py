"""What every node of a program costs at the example's sizes: operations, bytes, parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx, nn

from .axis_flow import operator_name, tensor_nodes, tensors_of
from .base import Cost
from .flops import operator_flops
from .program import Program, hint


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What one node costs in one training step or one inference.

    Attributes:
        forward_flops: Operations of the forward pass; a multiply-add is 2, attention is counted
            in full also where it is causal, element-wise operations and normalisations are 0.
        backward_flops: Operations of the backward pass: the gradients of the inputs that need
            one and of the parameters that are trained.
        read_bytes: Bytes of the activations it reads.
        written_bytes: Bytes of the activations it writes; views move nothing.
        weights: Names of the parameters it reads; a tied one has its first name.
        parameters: Number of values in those.
        parameter_bytes: Bytes of those.
    """

    forward_flops: int = 0
    backward_flops: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    weights: frozenset[str] = frozenset()
    parameters: int = 0
    parameter_bytes: int = 0


@runtime_checkable
class HoldsWeights(Protocol):
    """A module that keeps weights in buffers, in another form than one number for each."""

    def weight_counts(self) -> Mapping[str, int]:
        """Return how many weights each of these buffers holds: none for scales."""


@dataclass(frozen=True)
class Weight:
    """A tensor that holds weights of the model: a parameter, or a buffer of `HoldsWeights`.

    Attributes:
        count: Number of weights in it.
        size_bytes: Their size as they are kept.
    """

    count: int
    size_bytes: int


@dataclass(frozen=True)
class Facts:
    """The costs of all nodes of a program.

    Attributes:
        nodes: Costs by node.
        weights: What the program reads of its weights, by its first name.
    """

    nodes: Mapping[fx.Node, NodeFacts]
    weights: Mapping[str, Weight]

    @property
    def forward_flops(self) -> int:
        """Operations of one forward pass."""
        return sum(facts.forward_flops for facts in self.nodes.values())

    @property
    def backward_flops(self) -> int:
        """Operations of one backward pass."""
        return sum(facts.backward_flops for facts in self.nodes.values())

    def cost(self, nodes: Iterable[fx.Node]) -> Cost:
        """Return the forward cost of some nodes; a parameter that several read counts once."""
        found = [self.nodes[node] for node in nodes]
        names: frozenset[str] = frozenset().union(*(facts.weights for facts in found))
        return Cost(
            flops=sum(facts.forward_flops for facts in found),
            size_bytes=sum(self.weights[name].size_bytes for name in names),
            parameters=sum(self.weights[name].count for name in names),
        )


def facts_of(program: Program) -> Facts:
    """Return the costs of a program's nodes; computed once per state of its graph.

    They follow the recorded shapes (`meta["val"]`) and the graphs of leaf calls (`meta["body"]`),
    so meta tensors do, and a changed program is counted as it is now.
    """
    facts: Facts = program.fact("facts", lambda current: _Counter(current).count())
    return facts


def node_cost(program: Program, node: fx.Node) -> NodeFacts:
    """Return what one node of the program's graph costs."""
    return facts_of(program).nodes[node]


def total_cost(program: Program) -> Cost:
    """Return what one forward of the program costs."""
    facts = facts_of(program)
    return facts.cost(facts.nodes)


def module_costs(program: Program) -> Mapping[str, Cost]:
    """Return the forward cost of every module by its name, in graph order.

    A leaf module called several times counts its operations per call and its parameters once.
    Operations outside leaf modules count for the innermost module they come from (the products
    of attention for the attention module); no module contains the cost of another one.
    """
    nodes: dict[str, list[fx.Node]] = {}
    for node in facts_of(program).nodes:
        if node.op == "call_module":
            owner = str(node.target)
        elif node.op == "call_function":
            owner = node.meta.get("modules", ("",))[-1]
        else:
            continue
        nodes.setdefault(owner, []).append(node)
    return {name: facts_of(program).cost(found) for name, found in nodes.items()}


def attribute_of(program: Program, name: str) -> Any:
    """Return what a `get_attr` node of this target reads: a parameter, a buffer or a flag."""
    module, _, attribute = name.rpartition(".")
    return getattr(program.module(module), attribute)


class _Counter:
    """One walk over a graph that also learns which values need a gradient."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._names: dict[int, str] = {}
        self._weights: dict[str, Weight] = {}
        self._sources: dict[fx.Node, str] = {}
        self._needs_gradient: set[fx.Node] = set()

    def count(self) -> Facts:
        nodes: dict[fx.Node, NodeFacts] = {}
        for node in self._program.graph.nodes:
            if node.op == "call_module":
                nodes[node] = self._call(node)
            else:
                nodes[node] = self._visit(node)
        return Facts(nodes, self._weights)

    def _call(self, node: fx.Node) -> NodeFacts:
        """Sum over a leaf module's own graph."""
        inputs = iter(tensor_nodes(node))
        found: list[NodeFacts] = []
        for item in node.meta["body"].nodes:
            if item.op == "placeholder":
                if tensors_of(item.meta.get("val")) and next(inputs) in self._needs_gradient:
                    self._needs_gradient.add(item)
            elif item.op == "output":
                if any(source in self._needs_gradient for source in item.all_input_nodes):
                    self._needs_gradient.add(node)
            else:
                found.append(self._visit(item))
        weights: frozenset[str] = frozenset().union(*(facts.weights for facts in found))
        return NodeFacts(
            forward_flops=sum(facts.forward_flops for facts in found),
            backward_flops=sum(facts.backward_flops for facts in found),
            read_bytes=sum(facts.read_bytes for facts in found),
            written_bytes=sum(facts.written_bytes for facts in found),
            **self._parameters(weights),
        )

    def _visit(self, node: fx.Node) -> NodeFacts:
        if node.op == "get_attr":
            self._remember(node)
        if node.op != "call_function":
            return NodeFacts()
        operands = tensor_nodes(node)
        if _is_differentiable(node) and any(item in self._needs_gradient for item in operands):
            self._needs_gradient.add(node)
        flops = operator_flops(node)
        moves = not _is_free(node)
        activations = [item for item in operands if item not in self._sources]
        return NodeFacts(
            forward_flops=flops.forward,
            backward_flops=flops.backward(self._needs_gradient.__contains__),
            read_bytes=sum(map(_node_bytes, activations)) if moves else 0,
            written_bytes=_node_bytes(node) if moves else 0,
            **self._parameters(
                frozenset(self._sources[item] for item in operands if item in self._sources)
            ),
        )

    def _remember(self, node: fx.Node) -> None:
        value = attribute_of(self._program, str(node.target))
        if not isinstance(value, torch.Tensor):
            return
        count = self._weight_count(str(node.target), value)
        if count is None:
            return
        name = self._names.setdefault(id(value), str(node.target))
        self._weights[name] = Weight(count, _bytes(value))
        self._sources[node] = name
        if value.requires_grad:
            self._needs_gradient.add(node)

    def _weight_count(self, target: str, value: torch.Tensor) -> int | None:
        """Return how many weights a tensor holds, None if it is a buffer without any."""
        if isinstance(value, nn.Parameter):
            return value.numel()
        parent, _, attribute = target.rpartition(".")
        module = self._program.module(parent)
        return module.weight_counts().get(attribute) if isinstance(module, HoldsWeights) else None

    def _parameters(self, weights: frozenset[str]) -> dict[str, Any]:
        return {
            "weights": weights,
            "parameters": sum(self._weights[name].count for name in weights),
            "parameter_bytes": sum(self._weights[name].size_bytes for name in weights),
        }


def _is_differentiable(node: fx.Node) -> bool:
    if operator_name(node).rstrip("_") == "detach":
        return False
    return any(
        value.is_floating_point() or value.is_complex()
        for value in tensors_of(node.meta.get("val"))
    )


def _is_free(node: fx.Node) -> bool:
    """Say whether a node moves no data: a view, or a conversion to what a tensor already is."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    if not node.target.is_view:
        return False
    source = next(iter(tensors_of(tensor_nodes(node)[0].meta["val"])))
    return all(
        value.dtype == source.dtype
        and value.device == source.device
        and (_is_contiguous(source) or not _is_contiguous(value))
        for value in tensors_of(node.meta["val"])
    )


def _is_contiguous(value: torch.Tensor) -> bool:
    """Say whether a tensor lies in memory in order, without adding guards on symbolic sizes."""
    expected = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if hint(size) != 1 and hint(stride) != expected:
            return False
        expected *= hint(size)
    return True


def _node_bytes(node: fx.Node) -> int:
    return sum(map(_bytes, tensors_of(node.meta.get("val"))))


def _bytes(value: torch.Tensor) -> int:
    count = value.element_size()
    for size in value.shape:
        count *= hint(size)
    return count
