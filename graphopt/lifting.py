"""From the exporter's flat ATen graph to one that runs on the model's own modules.

before: linear = aten.linear(x, p_encoder_fc_weight, p_encoder_fc_bias)
after:  linear = self.encoder.fc(x)

A leaf module that was called with one tensor and returned one becomes a `call_module` node (its
ATen operations stay readable in `meta["body"]`); every other operation stays ATen. Training-time
constants (dropout rates, `training` flags) follow `module.training`, devices follow the inputs.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.export.graph_signature import InputKind

from .inlining import inline_regions
from .tracing import Trace

_ASSERTIONS = frozenset(
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)
_TRAINING_ARGUMENTS = frozenset({"train", "training"})
_STACK_PREFIX = "L__self__"
_RATE_ARGUMENTS = frozenset({"dropout_p"})


def lift(trace: Trace, model: nn.Module) -> fx.Graph:
    """Return the flat graph of a trace over the modules and parameters of `model`.

    Lifted constants become non-persistent buffers of the model (`_graphopt_constant_N`).

    Args:
        trace: The exporter's result.
        model: The traced model; its leaf modules become `call_module` targets.
    """
    return _Lift(trace, model).run()


class _Lift:
    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.trace = trace
        self.model = model
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.targets: dict[fx.Node, str] = {}
        self.attributes: dict[str, fx.Node] = {}
        self.device_input: fx.Node | None = None
        self.device: fx.Node | None = None

    def run(self) -> fx.Graph:
        source = inline_regions(self.trace.exported.graph_module)
        self._inputs(source)
        leaves, last = self._leaf_groups(source)
        for node in source.nodes:
            if node.op != "call_function":
                continue
            key = leaves.get(node)
            if key is None:
                if node.target not in _ASSERTIONS:
                    self._copy(node)
            elif node is last[key]:
                self._call(key, [n for n, k in leaves.items() if k == key])
        result = next(iter(reversed(source.nodes)))
        self.graph.output(fx.map_arg(result.args[0], self._value))
        self.graph.output_node().meta = {"modules": ("",), "calls": ("",)}
        _eliminate_dead_code(self.graph)
        return self.graph

    def _inputs(self, source: fx.Graph) -> None:
        specs = self.trace.exported.graph_signature.input_specs
        nodes = [node for node in source.nodes if node.op == "placeholder"]
        names = iter(self.trace.names)
        for node, spec in zip(nodes, specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                new = self.graph.placeholder(next(names))
                new.meta = {"val": node.meta["val"], "modules": ("",), "calls": ("",)}
                self.new[node] = new
                if self.device_input is None and isinstance(node.meta["val"], torch.Tensor):
                    self.device_input = new
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                assert spec.target is not None
                self.targets[node] = self._own_name(Trace.original_name(spec.target))
            else:
                assert spec.target is not None
                self.targets[node] = self._constant(self.trace.exported.constants[spec.target])

    def _own_name(self, name: str) -> str:
        """Return the name as the exporter gave it, or the constant's if the model lacks it."""
        parent, _, attribute = name.rpartition(".")
        assert hasattr(self.model.get_submodule(parent), attribute), name
        return name

    def _constant(self, value: Any) -> str:
        assert isinstance(value, torch.Tensor), type(value)
        number = sum(name.startswith("_graphopt_constant_") for name in self.model._buffers)
        name = f"_graphopt_constant_{number}"
        self.model.register_buffer(name, value.detach().clone(), persistent=False)
        return name

    def _value(self, node: fx.Node) -> fx.Node:
        """Return the new node for an old one, making `get_attr` nodes at first use."""
        if node not in self.new:
            self.new[node] = self._attribute(self.targets[node], node.meta["val"])
        return self.new[node]

    def _attribute(self, name: str, value: Any) -> fx.Node:
        node = self.graph.get_attr(name)
        modules = _chain(name.rpartition(".")[0])
        node.meta = {"val": value, "modules": modules, "calls": modules}
        return node

    def _leaf_groups(
        self, source: fx.Graph
    ) -> tuple[dict[fx.Node, tuple[str, int]], dict[tuple[str, int], fx.Node]]:
        """Find the nodes of each leaf call that can be one `call_module` node."""
        members: dict[tuple[str, int], list[fx.Node]] = defaultdict(list)
        for node in source.nodes:
            if node.op == "call_function":
                name, call = _innermost(node)
                if name in self.trace.leaf_calls and isinstance(name, str):
                    members[name, call].append(node)
        leaves: dict[fx.Node, tuple[str, int]] = {}
        last: dict[tuple[str, int], fx.Node] = {}
        for key, nodes in members.items():
            if self._is_simple_call(key, nodes):
                leaves.update(dict.fromkeys(nodes, key))
                last[key] = nodes[-1]
        return leaves, last

    def _is_simple_call(self, key: tuple[str, int], nodes: list[fx.Node]) -> bool:
        name, call = key
        calls = self.trace.leaf_calls[name]
        if call >= len(calls) or not calls[call]:
            return False
        inside = set(nodes)
        outputs = [n for n in nodes if any(user not in inside for user in n.users)]
        tensors = [n for n in self._outside(nodes) if isinstance(n.meta["val"], torch.Tensor)]
        if len(outputs) != 1 or len(tensors) != 1:
            return False
        own = {id(value) for value in self._own_tensors(name)}
        return isinstance(outputs[0].meta["val"], torch.Tensor) and all(
            id(_attribute_of(self.model, self.targets[used])) in own
            for n in nodes
            for used in n.all_input_nodes
            if used in self.targets
        )

    def _own_tensors(self, name: str) -> list[Any]:
        module = self.model.get_submodule(name)
        return [*module.parameters(), *module.buffers()]

    def _outside(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """Return the activations and sizes that a group of nodes reads, in order."""
        inside = set(nodes)
        read = dict.fromkeys(used for node in nodes for used in node.all_input_nodes)
        return [n for n in read if n not in inside and n not in self.targets]

    def _call(self, key: tuple[str, int], nodes: list[fx.Node]) -> None:
        inside = set(nodes)
        output = next(n for n in nodes if any(user not in inside for user in n.users))
        outside = self._outside(nodes)
        tensor = next(n for n in outside if isinstance(n.meta["val"], torch.Tensor))
        new = self.graph.call_module(key[0], (self._value(tensor),))
        new.meta = {
            "val": output.meta["val"],
            **_scope(output),
            "body": self._body(nodes, output, [tensor, *(n for n in outside if n is not tensor)]),
        }
        self.new[output] = new

    def _body(self, nodes: list[fx.Node], output: fx.Node, inputs: list[fx.Node]) -> fx.Graph:
        """Copy a leaf call's operations into a graph of their own; sizes come as inputs too."""
        body = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in inputs:
            copies[node] = body.placeholder(node.name)
            copies[node].meta = {"val": node.meta["val"]}

        def copy_of(node: fx.Node) -> fx.Node:
            if node not in copies:
                copies[node] = body.get_attr(self.targets[node])
                copies[node].meta = {"val": node.meta["val"]}
            return copies[node]

        for node in nodes:
            copies[node] = body.node_copy(node, copy_of)
            copies[node].meta = {"val": node.meta["val"]}
        body.output(copies[output])
        return body

    def _copy(self, node: fx.Node) -> None:
        new = self.graph.node_copy(node, self._value)
        new.meta = {"val": node.meta.get("val"), **_scope(node)}
        self.new[node] = new
        if isinstance(node.target, torch._ops.OpOverload):
            with self.graph.inserting_before(new):
                self._follow_training(new)
                self._follow_device(new)

    def _follow_training(self, node: fx.Node) -> None:
        """Make training-time constants depend on the `training` flag of the node's module."""
        assert isinstance(node.target, torch._ops.OpOverload)
        for position, argument in enumerate(node.target._schema.arguments):
            name = argument.name
            if name not in _TRAINING_ARGUMENTS | _RATE_ARGUMENTS:
                continue
            owner = node.meta["modules"][-1]
            value = (
                node.args[position] if position < len(node.args) else node.kwargs.get(name, False)
            )
            if not isinstance(value, (bool, float)) or not value:
                continue
            flag = self._attribute(f"{owner}.training" if owner else "training", True)
            if name in _RATE_ARGUMENTS:
                flag = self.graph.call_function(operator.mul, (value, flag))
                flag.meta = {**node.meta, "val": value}
            if position < len(node.args):
                node.update_arg(position, flag)
            else:
                node.update_kwarg(name, flag)

    def _follow_device(self, node: fx.Node) -> None:
        """Make device constants follow the first input, so that `model.to(device)` works."""

        def follow(value: Any) -> Any:
            return self._device() if isinstance(value, torch.device) and value == own else value

        if self.device_input is None:
            return
        own = self.device_input.meta["val"].device
        if any(isinstance(a, torch.device) for a in (*node.args, *node.kwargs.values())):
            node.args = tuple(follow(a) for a in node.args)
            node.kwargs = {name: follow(a) for name, a in node.kwargs.items()}

    def _device(self) -> fx.Node:
        if self.device is None:
            assert self.device_input is not None
            self.device = self.graph.call_function(getattr, (self.device_input, "device"))
            self.device.meta = {
                "val": self.device_input.meta["val"].device,
                "modules": ("",),
                "calls": ("",),
            }
        return self.device


def _innermost(node: fx.Node) -> tuple[str | None, int]:
    """Return the innermost module of a node and which of its calls this is (0 for the first)."""
    calls = _calls(node)
    name, _, call = calls[-1].partition("@")
    return (name, int(call or 0)) if name else (None, 0)


def _calls(node: fx.Node) -> tuple[str, ...]:
    """Return the module calls a node came from, outermost first: "" (the model), "block@1"."""
    stack = node.meta.get("nn_module_stack") or {}
    keys = [key.removeprefix(_STACK_PREFIX) for key in stack if key.startswith(_STACK_PREFIX)]
    return tuple(dict.fromkeys(["", *(Trace.original_name(key) for key in keys)]))


def _scope(node: fx.Node) -> dict[str, tuple[str, ...]]:
    calls = _calls(node)
    return {"modules": tuple(call.partition("@")[0] for call in calls), "calls": calls}


def _chain(name: str) -> tuple[str, ...]:
    parts = name.split(".") if name else []
    return ("", *(".".join(parts[: i + 1]) for i in range(len(parts))))


def _attribute_of(model: nn.Module, name: str) -> Any:
    parent, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(parent), attribute)


def _eliminate_dead_code(graph: fx.Graph) -> None:
    """Remove nodes nobody reads, but not inputs, module calls or operations that write."""

    def matters(node: fx.Node) -> bool:
        if node.op in ("placeholder", "output", "call_module"):
            return True
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            return target._schema.is_mutable
        return target in (_enter_autocast, _exit_autocast)

    graph.eliminate_dead_code(matters)
