"""An exported program as an ordinary module with ordinary layers.

before: linear = aten.linear(x, self.encoder.fc.weight, self.encoder.fc.bias)
after:  linear = self.encoder.fc(x)          # an nn.Linear under the same name

Passes see the layers they know, parameters keep the names they were exported with, and `train()`
and `eval()` work again, because dropout and batch norm are layers that look at `training`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree

from graphopt.passes.errors import CheckpointError
from graphopt.passes.program import compile_graph

from .inlining import inline_regions

_GUARDS = "_guards_fn"
_aten = torch.ops.aten


class ExportedModel(nn.Module):
    """The base class of models made from exported programs; each has its own forward."""


def model_of(program: ExportedProgram) -> ExportedModel:
    """Return a module with the forward, the parameter names and the layers of a program.

    Args:
        program: An exported program; its tensors are shared, and may be on the meta device.

    Raises:
        CheckpointError: if it holds custom objects.
    """
    source: Any = program.module()
    for node in list(source.graph.nodes):
        if node.op == "call_module" and node.target == _GUARDS:
            source.graph.erase_node(node)
    graph = fx.Graph()
    results: Any = graph.graph_copy(inline_regions(source), {})
    graph.output(tuple(results))
    model = ExportedModel()
    _make_layers(graph, source, model)
    _own_the_rest(graph, source, model)
    _follow_device(graph)
    graph.eliminate_dead_code(_matters)
    model.__class__ = type(
        ExportedModel.__name__, (ExportedModel,), {"forward": _forward(program, graph)}
    )
    return model.eval()


def example_of(program: ExportedProgram) -> dict[str, Any] | None:
    """Return the arguments the program was exported with, by name; None if it has none."""
    if program.example_inputs is None:
        return None
    args, kwargs = program.example_inputs
    return {**dict(zip(_argument_names(program)[0], args, strict=True)), **kwargs}


def _argument_names(program: ExportedProgram) -> tuple[list[str], list[str]]:
    """Return the names of the positional and of the keyword arguments."""
    positional, keywords = program.call_spec.in_spec.children()
    call = program.module_call_graph[0].signature
    names = list(call.forward_arg_names or []) if call is not None else []
    count = positional.num_children
    if len(names) < count:
        names = [f"input_{index}" for index in range(count)]
    return names[:count], list(keywords.context)


def _forward(program: ExportedProgram, graph: fx.Graph) -> Callable[..., Any]:
    positional, keywords = _argument_names(program)
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    function = compile_graph(graph)
    signature = _signature(program, positional, keywords)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = bound.arguments
        call = (
            tuple(values[name] for name in positional),
            {name: values[name] for name in keywords},
        )
        flat, spec = pytree.tree_flatten(call)
        if spec != in_spec:
            raise TypeError(f"arguments of another structure than exported: {spec} != {in_spec}")
        return pytree.tree_unflatten(function(self, *flat), out_spec)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _signature(
    program: ExportedProgram, positional: list[str], keywords: list[str]
) -> inspect.Signature:
    """Return the forward's signature; constants of the export are defaults."""
    constants: dict[str, Any] = {}
    specs = [s.arg for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    parts = [
        *program.call_spec.in_spec.child(0).children(),
        *program.call_spec.in_spec.child(1).children(),
    ]
    start = 0
    for name, part in zip([*positional, *keywords], parts, strict=True):
        argument = specs[start] if part.is_leaf() else None
        start += part.num_leaves
        if isinstance(argument, ConstantArgument):
            constants[name] = argument.value
    kind = inspect.Parameter
    parameters = [kind("self", kind.POSITIONAL_OR_KEYWORD)]
    required = len(positional)
    while required and positional[required - 1] in constants:
        required -= 1
    for index, name in enumerate(positional):
        default = constants[name] if index >= required else kind.empty
        parameters.append(kind(name, kind.POSITIONAL_OR_KEYWORD, default=default))
    for name in keywords:
        parameters.append(kind(name, kind.KEYWORD_ONLY, default=constants.get(name, kind.empty)))
    return inspect.Signature(parameters)


def _make_layers(graph: fx.Graph, source: nn.Module, model: nn.Module) -> None:
    """Replace operations on parameters of one owner by a call of that owner, a real layer."""
    for node in list(graph.nodes):
        build = _BUILDERS.get(node.target) if node.op == "call_function" else None
        if build is None:
            continue
        owner = _owner(node)
        if owner is None or _has_children(source, owner):
            continue
        found = build(node, _arguments(node))
        if found is None:
            continue
        layer, data = found
        if not _adopt(model, owner, layer, source, node):
            continue
        with graph.inserting_before(node):
            call = graph.call_module(owner, (data,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)


def _owner(node: fx.Node) -> str | None:
    """Return the one module whose tensors the node reads, or the module it came from."""
    owners = {str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr"}
    if not owners:
        stack = node.meta.get("nn_module_stack") or {}
        path = next((p for p, _ in reversed(list(stack.values()))), "")
        owners = {path.partition("@")[0]}
    return owners.pop() if len(owners) == 1 and "" not in owners else None


def _has_children(source: nn.Module, owner: str) -> bool:
    try:
        return next(source.get_submodule(owner).children(), None) is not None
    except AttributeError:
        return False


def _adopt(
    model: nn.Module, owner: str, layer: nn.Module, source: nn.Module, node: fx.Node
) -> bool:
    """Put a layer with the owner's tensors into the model; False if they do not fit."""
    read = {str(n.target).rpartition(".")[2] for n in node.all_input_nodes if n.op == "get_attr"}
    names = {name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]}
    if read != names - {"num_batches_tracked"}:
        return False
    present = _submodule(model, owner)
    if present is not None:
        return type(present) is type(layer) and _settings(present) == _settings(layer)
    for name in names:
        value = _attribute(source, f"{owner}.{name}")
        if value is None:
            value = torch.zeros((), dtype=torch.long, device=_device(source))
        if value.shape != getattr(layer, name).shape:
            return False
        if name in layer._parameters:
            layer._parameters[name] = (
                value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
            )
        else:
            layer._buffers[name] = value
    _container(model, owner.rpartition(".")[0]).add_module(owner.rpartition(".")[2], layer)
    return True


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(layer).items() if not k.startswith("_")}


def _own_the_rest(graph: fx.Graph, source: nn.Module, model: nn.Module) -> None:
    """Give the model every tensor that is still read by name."""
    counted = {
        f"{name}.num_batches_tracked"
        for name, module in model.named_modules()
        if getattr(module, "num_batches_tracked", None) is not None
    }
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name in counted:  # the layer counts its batches itself
            for user in list(node.users):
                user.replace_all_uses_with(node)
                graph.erase_node(user)
            graph.erase_node(node)
            continue
        value = _attribute(source, name)
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"the exported program reads {name}, a {type(value).__name__}; only tensors are "
                "supported, export the model without custom objects"
            )
        parent, _, attribute = name.rpartition(".")
        owner = _container(model, parent)
        if attribute in owner._parameters or attribute in owner._buffers:
            continue
        if isinstance(value, nn.Parameter):
            owner.register_parameter(attribute, value)
        else:
            holder = source.get_submodule(parent)
            persistent = attribute not in holder._non_persistent_buffers_set
            owner.register_buffer(attribute, value, persistent and attribute in holder._buffers)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _container(model: nn.Module, name: str) -> nn.Module:
    """Return the module of this name, making empty ones on the way."""
    for part in name.split(".") if name else []:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    return model


def _attribute(module: nn.Module, name: str) -> Any:
    parent, _, attribute = name.rpartition(".")
    owner = _submodule(module, parent)
    return getattr(owner, attribute, None)


def _device(module: nn.Module) -> torch.device:
    return next((value.device for value in module.parameters()), torch.device("cpu"))


def _follow_device(graph: fx.Graph) -> None:
    """Make new tensors appear where the first input is, so that `model.to(device)` works."""
    first = next(
        (
            n
            for n in graph.nodes
            if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)
        ),
        None,
    )
    if first is None:
        return
    own = first.meta["val"].device
    device: fx.Node | None = None
    for node in list(graph.nodes):
        if node.op == "call_function" and node.kwargs.get("device") == own:
            if device is None:
                last = [n for n in graph.nodes if n.op == "placeholder"][-1]
                with graph.inserting_after(last):
                    device = graph.call_function(getattr, (first, "device"))
            node.kwargs = {**node.kwargs, "device": device}


def _matters(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.op != "get_attr" and node.target not in (getattr, operator.getitem)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Return an operator's arguments by name, with the schema's defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            values[argument.name] = node.args[position]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return values


_Built = tuple[nn.Module, fx.Node] | None


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


def _linear(node: fx.Node, given: dict[str, Any]) -> _Built:
    if given["weight"].op != "get_attr" or _value(given["weight"]).dim() != 2:
        return None
    rows, columns = _value(given["weight"]).shape
    return nn.Linear(columns, rows, given["bias"] is not None, device="meta"), given["input"]


def _convolution(node: fx.Node, given: dict[str, Any]) -> _Built:
    if given["weight"].op != "get_attr":
        return None
    shape = _value(given["weight"]).shape
    dimensions = len(shape) - 2
    kinds: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layer: nn.Module = kinds[dimensions - 1](
        shape[1] * given["groups"],
        shape[0],
        tuple(shape[2:]),
        stride=_sizes(given["stride"], dimensions),
        padding=given["padding"]
        if isinstance(given["padding"], str)
        else _sizes(given["padding"], dimensions),
        dilation=_sizes(given["dilation"], dimensions),
        groups=given["groups"],
        bias=given["bias"] is not None,
        device="meta",
    )
    return layer, given["input"]


def _sizes(value: Any, dimensions: int) -> Any:
    sizes = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return sizes * dimensions if len(sizes) == 1 else sizes


def _embedding(node: fx.Node, given: dict[str, Any]) -> _Built:
    if given["weight"].op != "get_attr" or given["sparse"] or given["scale_grad_by_freq"]:
        return None
    rows, width = _value(given["weight"]).shape
    padding = given["padding_idx"] if given["padding_idx"] >= 0 else None
    return nn.Embedding(rows, width, padding_idx=padding, device="meta"), given["indices"]


def _layer_norm(node: fx.Node, given: dict[str, Any]) -> _Built:
    shape = list(given["normalized_shape"])
    if not all(isinstance(size, int) for size in shape):
        return None
    affine = given["weight"] is not None
    layer = nn.LayerNorm(shape, given["eps"], affine, given["bias"] is not None, device="meta")
    return layer, given["input"]


def _group_norm(node: fx.Node, given: dict[str, Any]) -> _Built:
    if given["weight"] is None or given["bias"] is None:
        return None
    channels = _value(given["weight"]).shape[0]
    return nn.GroupNorm(given["num_groups"], channels, given["eps"], device="meta"), given["input"]


def _batch_norm(node: fx.Node, given: dict[str, Any]) -> _Built:
    if any(given[name] is None for name in ("weight", "bias", "running_mean", "running_var")):
        return None
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    channels = _value(given["weight"]).shape[0]
    layer = kinds[_value(given["input"]).dim()](
        channels, given["eps"], given["momentum"], device="meta"
    )
    return layer, given["input"]


def _dropout(node: fx.Node, given: dict[str, Any]) -> _Built:
    return nn.Dropout(given["p"]), given["input"]


_BUILDERS: dict[Any, Callable[[fx.Node, dict[str, Any]], _Built]] = {
    _aten.linear.default: _linear,
    _aten.conv1d.default: _convolution,
    _aten.conv2d.default: _convolution,
    _aten.conv3d.default: _convolution,
    _aten.conv1d.padding: _convolution,
    _aten.conv2d.padding: _convolution,
    _aten.conv3d.padding: _convolution,
    _aten.embedding.default: _embedding,
    _aten.layer_norm.default: _layer_norm,
    _aten.group_norm.default: _group_norm,
    _aten.batch_norm.default: _batch_norm,
    _aten.dropout.default: _dropout,
}
"""Operators that are a layer's whole forward, with functions that build the layer on meta."""
