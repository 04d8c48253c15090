"""The state of one walk over a graph that gives every tensor dimension its term.

Rules (see `axis_contractions`, `axis_shapes`) read the terms of an operator's inputs from a
`Flow`, say what is equal, and return the terms of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from .axis_terms import ONE, Term, Unifier
from .program import hint

Role = Literal["producer", "consumer", "pointwise", "buffer", "lookup"]
Terms = tuple[Term, ...]
Arguments = Mapping[str, Any]
Rule = Callable[["Flow", fx.Node, Arguments], Terms | list[Terms]]

RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of ATen operators, by name without overload."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


@dataclass(frozen=True)
class Use:
    """How an operator uses one dimension of a weight.

    Attributes:
        role: What the dimension is there.
        name: The parameter or buffer it comes from.
        dim: The weight's dimension as the operator saw it (identifies a parameter's own
            dimension while only moved around), never a normal form.
        term: The part of the dimension that has this role.
        node: The node of the program's graph that computes it.
        activation: For a consumer, the node whose value is contracted with it.
        convolution: Whether a convolution does it.
    """

    role: Role
    name: str
    dim: Term
    term: Term
    node: fx.Node
    activation: fx.Node | None = None
    convolution: bool = False


@dataclass(frozen=True)
class Site:
    """A number in a graph that is the size of a term.

    Attributes:
        node: The node that has it as an argument.
        argument: The argument's name in the operator's schema.
        position: The index in the argument if that is a list.
        term: What it counts.
        sign: -1 for a number that counts from the end.
        module: The innermost module whose code has it, "" for the model itself.
    """

    node: fx.Node
    argument: str
    position: int | None
    term: Term
    sign: int = 1
    module: str = ""


@dataclass
class Flow(Unifier):
    """Terms found so far, and everything learned about them on the way.

    Attributes:
        terms: Per node one term per dimension; a list of them for several outputs.
        parameters: Per name in the model the terms of its dimensions.
        sources: Per node computed from weights alone, the parameters and buffers it comes from.
        users: Per name the nodes of the program's graph that use it.
        pins: Terms that must keep their size, with the reason.
        symmetric: The reasons among those that treat all units alike: these may change places.
        uses: What contractions and lookups do with weights.
        sites: Static sizes in the graph.
        splits: Nodes that cut a dimension into parts of given sizes: the dimension, the parts and
            the innermost module.
        heads: Terms that a contraction of two activations runs side by side.
        head_dims: Terms inside each of those.
        outer: The node of the program's graph being analysed.
        module: The leaf module being analysed, None outside of one.
    """

    terms: dict[fx.Node, Terms | list[Terms]] = field(default_factory=dict)
    parameters: dict[str, Terms] = field(default_factory=dict)
    sources: dict[fx.Node, frozenset[str]] = field(default_factory=dict)
    users: dict[str, list[fx.Node]] = field(default_factory=dict)
    pins: list[tuple[Term, str]] = field(default_factory=list)
    symmetric: set[str] = field(default_factory=set)
    uses: list[Use] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    splits: list[tuple[fx.Node, int, Terms, str]] = field(default_factory=list)
    heads: list[Term] = field(default_factory=list)
    head_dims: list[Term] = field(default_factory=list)
    outer: fx.Node | None = None
    module: str | None = None

    def __post_init__(self) -> None:
        """Start without axes."""
        super().__init__()

    def dims(self, value: Any) -> Terms:
        """Return the terms of a tensor argument, none for anything else."""
        found = self.terms.get(value, ()) if isinstance(value, fx.Node) else ()
        return found if isinstance(found, tuple) else ()

    def new(self, node: fx.Node, pin: str | None = None) -> Terms | list[Terms]:
        """Return fresh terms for every output dimension of a node, pinned if a reason is given."""
        value = node.meta.get("val")
        outputs = [self.new_dims(item, pin) for item in tensors_of(value)]
        return outputs[0] if isinstance(value, torch.Tensor) else outputs

    def new_dims(self, value: torch.Tensor, pin: str | None = None) -> Terms:
        """Return fresh terms for the dimensions of a tensor."""
        return tuple(self.new_dim(size, pin) for size in value.shape)

    def new_dim(self, size: int | torch.SymInt, pin: str | None = None) -> Term:
        """Return a fresh term for a size, pinned if a reason is given."""
        term = self.fresh(hint(size), not is_concrete_int(size))
        if pin is not None:
            self.pin(term, pin)
        return term

    def pin(self, terms: Term | Iterable[Term], reason: str, *, symmetric: bool = False) -> None:
        """Say that dimensions must keep their size; if symmetric, units may still change places."""
        if symmetric:
            self.symmetric.add(reason)
        if isinstance(terms, Iterable):
            self.pins.extend((term, reason) for term in terms)
        else:
            self.pins.append((terms, reason))

    def new_part(self, size: int) -> tuple[Term, ...]:
        """Return a fresh term for a part of a dimension, none for an empty part."""
        return (self.fresh(size),) if size else ()

    def unify_all(self, terms: Iterable[Term]) -> Term:
        """Make broadcast dimensions the same one; those of size 1 stay out of it."""
        result: Term = ONE
        for term in terms:
            if result == ONE:
                result = term
            elif term != ONE:
                self.unify(result, term)
        return result

    def broadcast(self, dims: Sequence[Terms]) -> Terms:
        """Return the terms of tensors combined element by element, aligned at the right."""
        rank = max((len(item) for item in dims), default=0)
        return tuple(
            self.unify_all(item[i - rank] for item in dims if len(item) >= rank - i)
            for i in range(rank)
        )

    def site(
        self, node: fx.Node, argument: str, term: Term, position: int | None = None, sign: int = 1
    ) -> None:
        """Record that an argument of a node is the size of a term."""
        self.sites.append(Site(node, argument, position, term, sign, self.module_of(node)))

    def sizes(self, node: fx.Node, argument: str, values: Any, dims: Terms) -> None:
        """Record a list of sizes, one per dimension; those of -1 are left."""
        for position, (value, term) in enumerate(zip(values, dims, strict=False)):
            if isinstance(value, fx.Node) or value >= 0:
                self.site(node, argument, term, position)

    def use(
        self,
        role: Role,
        weight: fx.Node,
        dim: Term,
        term: Term | None = None,
        *,
        activation: fx.Node | None = None,
        convolution: bool = False,
    ) -> None:
        """Record what the current operator does with a dimension of a weight."""
        assert self.outer is not None
        for name in sorted(self.sources.get(weight, ())):
            self.uses.append(
                Use(
                    role,
                    name,
                    dim,
                    dim if term is None else term,
                    self.outer,
                    activation,
                    convolution,
                )
            )

    def where(self, node: fx.Node) -> str:
        """Return the operator of a node and the module it is in, for sentences."""
        name = node.name if node.op != "call_function" else operator_name(node)
        place = self.module_of(node)
        return f"{name} in {place}" if place else name

    def module_of(self, node: fx.Node) -> str:
        """Return the innermost module a node comes from, "" for the model itself."""
        if self.module is not None:
            return self.module
        modules = node.meta.get("modules", ())
        return str(modules[-1]) if modules else ""


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a node's recorded value, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def tensor_nodes(node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a node that are tensors or lists of them, in order."""
    return [item for item in node.all_input_nodes if tensors_of(item.meta.get("val"))]


def operator_name(node: fx.Node) -> str:
    """Return an ATen operator's name without namespace and overload, or a function's name."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).split("::")[1]
    return str(getattr(node.target, "__name__", node.target))


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an ATen call by their schema names, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value
    return values


def value_of(node: fx.Node) -> torch.Tensor:
    """Return the recorded value of a node with one tensor."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value
