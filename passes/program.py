"""A captured model: one flat graph that runs on the user's own modules.

Nodes are placeholders (one per input tensor), `get_attr` (parameters, buffers and `training`
flags, by their names in the model), `call_module` (leaf modules of the model) and
`call_function` (ATen). Every node carries `meta["val"]` (a fake value: shape with symbols for
dynamic dimensions) and `meta["modules"]` (the names of the modules it came from, outermost
first). A `call_module` node captured from the model also carries `meta["body"]`, the ATen graph
of that call, so that analyses need no table of module classes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from .calls import canonical_arguments, signature_of
from .errors import PlanError
from .lazy_branches import with_lazy_branches
from .structure import Structure, flatten


def hint(size: int | torch.SymInt) -> int:
    """Return a size as a number: a dynamic one has the value it had in the example."""
    if isinstance(size, int):
        return size
    if is_concrete_int(size):
        return int(size)
    return int(size.node.hint)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return a tensor node's shape as numbers, at the example's sizes."""
    return tuple(hint(size) for size in node.meta["val"].shape)


@dataclass(frozen=True)
class InputLimit:
    """The type of an input tensor and, for each dimension, its smallest and largest size."""

    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Leaf:
    """A traced call of a leaf module: its name, its ATen graph and its result, without values."""

    name: str
    body: fx.Graph
    value: Any


Mode = tuple[bool, bool]
"""Whether the model is in training mode, and whether gradients are recorded."""


def eager_forward(model: nn.Module) -> Callable[..., Any]:
    """Return the forward the model's author wrote, also when a program is installed."""
    original = getattr(type(model), "_graphopt_original_class", None)
    forward: Callable[..., Any] = original.forward.__get__(model) if original else model.forward
    return forward


class Program:
    """A model, its graph and the call it was captured from.

    Attributes:
        model: The user's model; the graph refers to its modules and parameters by name.
        graph: The flat graph.
        inputs: Structure of the canonical arguments (see `calls`).
        outputs: Structure of the result.
        example: Canonical arguments it was captured with.
        notes: What capture wants a user to know: static dimensions, fallbacks.
        modes: The modes in which the graph equals the eager forward; in others a call runs that.
        rounding_modes: The modes in which it equals that up to rounding: what is left to run where
            the eager forward cannot run over rewritten modules.
        dtype: Type of the first float parameter; the graph holds constants of that type.
        ranges: Smallest and largest value of a dynamic size, by its symbol, where it is limited.
        padding: Name of the input that marks padding, where somebody said so; None finds it.
        unread_outputs: Positions of the output tensors that nobody reads: they may be anything.
        compares_outputs: Whether changes are judged by the outputs even where the model gives its
            own loss.
        leaves: Leaf calls traced so far, by all that decides the result; copies share them.
        results: Fake results of other operations that were computed again so far, likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        *,
        inputs: Structure,
        outputs: Structure,
        example: dict[str, Any],
        notes: tuple[str, ...] = (),
        ranges: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    ) -> None:
        """Hold the parts; nothing is computed."""
        self.model = model
        self.graph = graph
        self.inputs = inputs
        self.outputs = outputs
        self.example = example
        self.notes = notes
        self.modes: frozenset[Mode] = frozenset(product((True, False), (True, False)))
        self.rounding_modes = self.modes
        self.dtype = _float_dtype(model)
        self.ranges = ranges
        self.padding: str | None = None
        self.unread_outputs: frozenset[int] = frozenset()
        self.compares_outputs = False
        self.leaves: dict[Hashable, Leaf] = {}
        self.results: dict[Hashable, torch.Tensor] = {}
        self._call_facts: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._function: Callable[..., Any] | None = None

    @property
    def signature(self) -> inspect.Signature:
        """The signature of the model's forward."""
        return signature_of(self.model)

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def result(self) -> fx.Node:
        """The output node."""
        return self.graph.output_node()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph like the model: same arguments, same result type.

        A call of another structure, of sizes outside the captured ranges, in a mode in which the
        graph is not the model's forward, or of a model converted to another type, runs the eager
        forward.
        """
        arguments = canonical_arguments(self.signature, args, kwargs)
        tensors, structure = flatten(arguments)
        if structure == self.inputs and self.accepts(tensors):
            return self.outputs.rebuild(self.run(*tensors))
        return eager_forward(self.model)(*args, **kwargs)

    def accepts(self, tensors: Sequence[torch.Tensor], model: nn.Module | None = None) -> bool:
        """Say whether the graph may run on these tensors now: mode, types and sizes.

        Args:
            tensors: The call's tensors in order.
            model: The model to run on, if it is not the captured one but a copy of it.
        """
        model = model or self.model
        return (model.training, torch.is_grad_enabled()) in self.modes and self.fits(tensors, model)

    def fits(self, tensors: Sequence[torch.Tensor], model: nn.Module) -> bool:
        """Say whether the graph can run on these tensors: types and sizes, in any mode.

        Types are what they are, also where a mode of torch functions shows others.
        """
        with torch._C.DisableTorchFunction():
            return self._fits(tensors, model)

    def _fits(self, tensors: Sequence[torch.Tensor], model: nn.Module) -> bool:
        if _float_dtype(model) != self.dtype:
            return False
        for tensor, limit in zip(tensors, self.limits, strict=True):
            if tensor.dim() != len(limit.sizes) or tensor.dtype != limit.dtype:
                return False
            for size, (smallest, largest) in zip(tensor.shape, limit.sizes, strict=True):
                if not smallest <= size <= largest:
                    return False
        return True

    @property
    def limits(self) -> tuple[InputLimit, ...]:
        """What each input tensor must look like."""
        limits: tuple[InputLimit, ...] = self.fact("limits", _limits)
        return limits

    def run(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Run the graph on flat input tensors and return its flat output tensors."""
        if self._function is None:
            self._function = compile_graph(self.graph)
        result: tuple[Any, ...] = self._function(self.model, *tensors)
        return result

    def few_rows(self) -> list[torch.Tensor]:
        """Return the example's tensors with at most two rows where the batch is dynamic."""
        tensors, _ = flatten(self.example)
        dynamic = self.dynamic_dimensions()
        sizes = {
            tensor.shape[0]
            for tensor, node in zip(tensors, self.placeholders, strict=True)
            if 0 in dynamic[node.name]
        }
        if len(sizes) != 1:
            return tensors
        return [
            tensor[:2] if 0 in dynamic[node.name] else tensor
            for tensor, node in zip(tensors, self.placeholders, strict=True)
        ]

    def changed(self) -> None:
        """Drop everything derived from the graph; call it after every edit."""
        self._facts.clear()
        self._function = None

    def of_copy(self, model: nn.Module) -> Program:
        """Return this program on a copy of its model."""
        other = copy.copy(self)
        other.model = model
        other._facts = {}
        other._call_facts = dict(self._call_facts)
        return other

    def fact(self, name: str, compute: Callable[[Program], Any]) -> Any:
        """Return a cached analysis, computing it when the graph changed since."""
        if name not in self._facts:
            self._facts[name] = compute(self)
        return self._facts[name]

    def call_fact(self, name: str, compute: Callable[[Program], Any]) -> Any:
        """Return a cached analysis of the call, which is the same after every change."""
        if name not in self._call_facts:
            self._call_facts[name] = compute(self)
        return self._call_facts[name]

    def module(self, name: str) -> nn.Module:
        """Return a submodule by name.

        Raises:
            PlanError: if the model has no such module.
        """
        try:
            return self.model.get_submodule(name)
        except AttributeError as error:
            raise PlanError(
                f"the model {type(self.model).__name__} has no module {name!r}; "
                "is this plan for another model?"
            ) from error

    def calls(self, module: str) -> list[fx.Node]:
        """Return the nodes that call the leaf module of this name."""
        return [n for n in self.graph.nodes if n.op == "call_module" and n.target == module]

    def leaf_calls(self, kind: type[nn.Module]) -> Iterator[tuple[fx.Node, nn.Module]]:
        """Yield every `call_module` node of a kind with its module, in graph order."""
        for node in self.graph.nodes:
            if node.op == "call_module":
                module = self.module(str(node.target))
                if isinstance(module, kind):
                    yield node, module

    def dynamic_dimensions(self) -> dict[str, dict[int, str]]:
        """Return, for each input, its dynamic dimensions and their symbols."""
        return {
            node.name: {
                index: str(size)
                for index, size in enumerate(node.meta["val"].shape)
                if not is_concrete_int(size)
            }
            for node in self.placeholders
        }

    @property
    def code(self) -> str:
        """The graph as a Python function of the model (`self`) and the input tensors."""
        return self.graph.python_code("self").src.strip()

    def __str__(self) -> str:
        """Return the program as readable code, with inputs and notes on top."""
        lines = [f"# {type(self.model).__name__}"]
        for node in self.placeholders:
            sizes = ", ".join(str(size) for size in node.meta["val"].shape)
            lines.append(f"#   {node.name}: {node.meta['val'].dtype} [{sizes}]")
        lines.extend(f"# note: {note}" for note in self.notes)
        return "\n".join([*lines, self.code])


def compile_graph(graph: fx.Graph) -> Callable[..., Any]:
    """Turn a graph into a Python function `forward(self, *tensors)` of the model."""
    code = with_lazy_branches(graph, compile_graph).python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<graphopt program>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    return function


def _float_dtype(model: nn.Module) -> torch.dtype | None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return None


def compile_values(program: Program, nodes: Sequence[fx.Node]) -> Callable[..., Any]:
    """Compile the part of a program that some nodes depend on; it returns their values."""
    needed = set(nodes)
    for node in reversed(program.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in nodes))
    return compile_graph(graph)


_UNLIMITED = (0, 2**63 - 1)


def _limits(program: Program) -> tuple[InputLimit, ...]:
    def size_range(size: int | torch.SymInt) -> tuple[int, int]:
        if is_concrete_int(size):
            return int(size), int(size)
        return program.ranges.get(str(size), _UNLIMITED)

    return tuple(
        InputLimit(value.dtype, tuple(size_range(size) for size in value.shape))
        for value in (node.meta["val"] for node in program.placeholders)
    )
