"""Linear layers over the same input as one matrix product.

before: q = x Wq^T;  k = x Wk^T;  v = x Wv^T
after:  q, k, v = split(x [Wq; Wk; Wv]^T)
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from graphopt.kernels import FusedLinear, FusedPart
from graphopt.passes.base import (
    Candidate,
    Change,
    Context,
    Miss,
    Pass,
    Proposal,
    State,
    replace_module,
)
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import PlanError
from graphopt.passes.facts import facts_of
from graphopt.passes.program import Program, shape_of
from graphopt.passes.replaceability import replacement_refusal

_SPLIT = torch.ops.aten.split_with_sizes.default


class _Fusion(Details):
    """What `apply` and `restore` need.

    Attributes:
        parts: Names of the layers, in the order of their outputs.
        in_features: Input size of all of them.
        sizes: Output size of each.
        bias: Whether they have biases.
    """

    parts: tuple[str, ...] = Field(min_length=2)
    in_features: int = Field(ge=1)
    sizes: tuple[int, ...]
    bias: bool


@final
@dataclass(frozen=True, kw_only=True)
class FuseProjections(Pass):
    """Compute linear layers of one module that read the same value in one product.

    The first layer becomes a `FusedLinear` that owns all weights, the others refer to it, so the
    model's own forward, which calls them one by one, computes the same. Where times are measured,
    only fusions that are faster are kept.
    """

    name: ClassVar[str] = "fuse-projections"
    exact: ClassVar[bool] = True

    def propose(self, program: Program, context: Context) -> Proposal:
        """Find sibling layers by their input; refuse those that must stay apart."""
        candidates: list[Candidate] = []
        misses: list[Miss] = []
        for siblings in _siblings(program):
            fitting: list[fx.Node] = []
            for node in siblings:
                reason = _layer_refusal(program, context, str(node.target))
                if reason is None:
                    fitting.append(node)
                else:
                    misses.append(self._miss(str(node.target), reason))
            for group in _alike(program, fitting):
                if len(group) == 1:
                    text = "no sibling is left with the same type, bias and trained parameters"
                    misses.append(self._miss(str(group[0].target), text))
                    continue
                candidate = self._candidate(program, group)
                reason = _order_refusal(group)
                if reason is None and context.costs is not None:
                    candidate, reason = _measured(program, group, candidate, context)
                if reason is None:
                    candidates.append(candidate)
                else:
                    misses.append(self._miss(str(group[0].target), reason))
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def _miss(self, target: str, reason: str) -> Miss:
        return Miss(pass_name=self.name, target=target, reason=reason)

    def _candidate(self, program: Program, group: Sequence[fx.Node]) -> Candidate:
        parts = tuple(str(node.target) for node in group)
        layers = [_linear(program, name) for name in parts]
        details = _Fusion(
            parts=parts,
            in_features=layers[0].in_features,
            sizes=tuple(layer.out_features for layer in layers),
            bias=layers[0].bias is not None,
        )
        cost = facts_of(program).cost(group)
        sizes = " + ".join(str(size) for size in details.sizes)
        return Candidate(
            change=Change(
                pass_name=self.name,
                target=parts[0],
                summary=f"{_short(parts)} as one GEMM: {details.in_features} -> {sizes}",
                details=details.model_dump(mode="json"),
            ),
            before=cost,
            after=cost,
            predicted_error=0.0,
        )

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Stack the weights and the biases."""
        details, layers = _layers(program, change)
        owner = details.parts[0]
        state = {f"{owner}.fused_weight": torch.cat([layer.weight.detach() for layer in layers])}
        if details.bias:
            state[f"{owner}.fused_bias"] = torch.cat([layer.bias.detach() for layer in layers])
        return state

    def apply(self, program: Program, change: Change) -> None:
        """Put the owner and its parts in the places of the layers; call the owner once."""
        details, layers = _layers(program, change)
        calls = [program.calls(name) for name in details.parts]
        first = layers[0].weight
        owner = FusedLinear(details.in_features, details.sizes, details.bias, device="meta")
        owner = owner.to(first.dtype).to_empty(device=first.device).train(layers[0].training)
        for parameter in owner.parameters():
            parameter.requires_grad_(first.requires_grad)
        replace_module(program.model, details.parts[0], owner)
        for index, name in enumerate(details.parts[1:], 1):
            part = FusedPart(owner, index).train(layers[index].training)
            replace_module(program.model, name, part)
        _call_owner(program, details, calls)
        program.changed()

    def restore(self, model: nn.Module, change: Change) -> None:
        """Put separate linear layers back, each with its rows of the weight."""
        details = read_details(_Fusion, change)
        owner = model.get_submodule(details.parts[0])
        if not isinstance(owner, FusedLinear) or owner.sizes != details.sizes:
            raise PlanError(f"{details.parts[0]} is not the fused layer that the plan describes")
        weight = owner.fused_weight
        for index, name in enumerate(details.parts):
            layer = nn.Linear(
                details.in_features, details.sizes[index], details.bias, device="meta"
            )
            layer.train(model.get_submodule(name).training)
            layer.weight = nn.Parameter(
                owner.part_weight(index).detach().clone(), requires_grad=weight.requires_grad
            )
            bias = owner.part_bias(index)
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=weight.requires_grad)
            replace_module(model, name, layer)


class _Separate(nn.Module):
    """What is timed against a fusion: the layers one by one."""

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Return all outputs; in training joined, so that a gradient reaches each."""
        outputs = tuple(layer(x) for layer in self.layers)
        return torch.cat(outputs, -1) if self.training else outputs


class _Together(nn.Module):
    """A fusion as it runs in a graph."""

    def __init__(self, owner: FusedLinear) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Return what `_Separate` returns."""
        outputs = self.owner(x, part=None).split_with_sizes(self.owner.sizes, -1)
        return torch.cat(outputs, -1) if self.training else tuple(outputs)


def _measured(
    program: Program, group: Sequence[fx.Node], candidate: Candidate, context: Context
) -> tuple[Candidate, str | None]:
    """Return the candidate with its times, and why it is refused, None if it is faster."""
    assert context.costs is not None
    layers = [_linear(program, str(node.target)) for node in group]
    source = group[0].all_input_nodes[0]
    dtype = layers[0].weight.dtype
    sizes = [layer.out_features for layer in layers]
    bias = layers[0].bias is not None
    owner = FusedLinear(layers[0].in_features, sizes, bias, device="meta").to(dtype)
    owner.requires_grad_(layers[0].weight.requires_grad)
    times = context.costs.compare_modules(
        _Separate(layers),
        _Together(owner),
        shape_of(source),
        source.meta["val"].dtype,
        training=context.training,
    )
    timed = candidate.timed(times)
    if times.ratio > 1:
        return timed, None
    names = _short([str(node.target) for node in group])
    return timed, f"{names} as one GEMM measured {times.ratio:.2f}x, kept apart"


def _siblings(program: Program) -> list[list[fx.Node]]:
    """Return the linear calls of one module call that read the same value, two or more."""
    groups: dict[tuple[fx.Node, str], list[fx.Node]] = defaultdict(list)
    for node, layer in program.leaf_calls(nn.Linear):
        if type(layer) is nn.Linear:
            groups[node.all_input_nodes[0], _caller(node)].append(node)
    return [group for group in groups.values() if len(group) > 1]


def _caller(node: fx.Node) -> str:
    """Return which call of which module a leaf call belongs to."""
    return str(node.meta["calls"][-2])


def _layer_refusal(program: Program, context: Context, name: str) -> str | None:
    pattern = context.ignored_by(name)
    if pattern is not None:
        return f"ignored by the pattern {pattern!r}"
    return replacement_refusal(program, name)


def _alike(program: Program, nodes: Iterable[fx.Node]) -> list[list[fx.Node]]:
    """Part layers by what one stacked parameter must have in common."""
    groups: dict[tuple[object, ...], list[fx.Node]] = defaultdict(list)
    for node in nodes:
        layer = _linear(program, str(node.target))
        weight, bias = layer.weight, layer.bias
        trained = {p.requires_grad for p in layer.parameters()}
        mixed = node if len(trained) > 1 else None
        key = (weight.dtype, weight.device, bias is None, weight.requires_grad, mixed)
        groups[key].append(node)
    return list(groups.values())


def _order_refusal(group: Sequence[fx.Node]) -> str | None:
    """Say why the calls cannot happen at once, None if they can."""
    node = group[0]
    while node is not group[-1]:
        node = node.next
        if node not in group and _writes(node):
            return f"{node.name} writes in place between {_short([str(n.target) for n in group])}"
    for node in group:
        if _is_written(node):
            return f"the output of {node.target} is changed in place"
    return None


def _writes(node: fx.Node) -> bool:
    """Say whether an operation or a leaf call writes to a tensor."""
    body: fx.Graph | None = node.meta.get("body")
    if node.op == "call_module" and body is not None:
        return any(_writes(inner) for inner in body.nodes)
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_written(node: fx.Node) -> bool:
    """Say whether an operation writes to this value or to an alias of it."""
    for user in node.users:
        body: fx.Graph | None = user.meta.get("body")
        if user.op == "call_module" and body is not None:
            if any(n.op == "placeholder" and _is_written(n) for n in body.nodes):
                return True
        elif isinstance(user.target, torch._ops.OpOverload):
            schema = user.target._schema
            aliases = any(item.alias_info is not None for item in schema.returns)
            if schema.is_mutable or (aliases and _is_written(user)):
                return True
    return False


def _call_owner(program: Program, details: _Fusion, calls: Sequence[Sequence[fx.Node]]) -> None:
    """Replace the calls of the layers by calls of the owner, joined where they can be.

    Another call of the model may give the layers different inputs (attention to an encoder); they
    are then called alone, part by part.
    """
    graph, owner = program.graph, details.parts[0]
    order = {node: index for index, node in enumerate(graph.nodes)}
    together: dict[tuple[fx.Node, str, int], dict[int, fx.Node]] = defaultdict(dict)
    for part, nodes in enumerate(calls):
        seen: Counter[tuple[fx.Node, str]] = Counter()
        for node in nodes:
            source, caller = node.all_input_nodes[0], _caller(node)
            together[source, caller, seen[source, caller]][part] = node
            seen[source, caller] += 1
    for (source, _, _), found in together.items():
        nodes = sorted(found.values(), key=order.__getitem__)
        joined = len(found) == len(calls) and _order_refusal(nodes) is None
        if joined:
            with graph.inserting_before(nodes[0]):
                outputs = _joined_call(graph, details, source, nodes[0])
        else:
            outputs = {}
            for part, node in found.items():
                with graph.inserting_before(node):
                    outputs[part] = graph.call_module(owner, (source,), {"part": part})
                outputs[part].meta = _scope(node)
        for part, node in found.items():
            output = outputs[part]
            output.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(output)
            graph.erase_node(node)


def _joined_call(
    graph: fx.Graph, details: _Fusion, source: fx.Node, first: fx.Node
) -> dict[int, fx.Node]:
    """Insert one call of the owner and a split of its result; return the outputs by part."""
    call = graph.call_module(details.parts[0], (source,), {"part": None})
    split = graph.call_function(_SPLIT, (call, list(details.sizes), -1))
    outputs = {
        part: graph.call_function(operator.getitem, (split, part))
        for part in range(len(details.sizes))
    }
    for node in (call, split, *outputs.values()):
        node.meta = _scope(first)
    return outputs


def _scope(node: fx.Node) -> dict[str, object]:
    return {"modules": node.meta["modules"], "calls": node.meta["calls"]}


def _linear(program: Program, name: str) -> nn.Linear:
    layer = program.module(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _layers(program: Program, change: Change) -> tuple[_Fusion, list[nn.Linear]]:
    """Return the checked details and the layers of a change.

    Raises:
        PlanError: if they do not fit each other.
    """
    details = read_details(_Fusion, change)
    if len(details.parts) != len(details.sizes) or len(set(details.parts)) < len(details.parts):
        raise PlanError(f"the fusion at {change.target!r} must name each layer once, with its size")
    layers: list[nn.Linear] = []
    for name, size in zip(details.parts, details.sizes, strict=True):
        layer = program.module(name)
        expected = (details.in_features, size, details.bias)
        if type(layer) is not nn.Linear or expected != (
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
        ):
            raise PlanError(
                f"{name} must be a linear layer {details.in_features} -> {size} to be fused, "
                f"it is {layer}; is this plan for another model?"
            )
        layers.append(layer)
    return details, layers


def _short(names: Sequence[str]) -> str:
    return ", ".join(name.rpartition(".")[2] for name in names)
