"""Fake values and leaf bodies of a program, made again where its graph or modules changed."""

from __future__ import annotations

from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, free_unbacked_symbols
from torch.utils._python_dispatch import _disable_current_modes

from .errors import VerificationError
from .program import Leaf, Program

_PLAIN = (bool, int, float, str, torch.dtype, type(None))
_TABLES = frozenset(vars(nn.Module()))


def remember(graph: fx.Graph, model: nn.Module) -> None:
    """Note on every node what its value was computed from, so that `refresh` can keep it."""
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            node.meta["computed_from"] = _inputs(node, model)


def note_rows(program: Program, node: fx.Node, rows: int) -> None:
    """Give a node, whose result's length depends on data, a value [rows] of integers.

    The length is a new dynamic size; `refresh` keeps it.

    Args:
        program: The program.
        node: A node of its graph.
        rows: The length in the example, for costs; 0 and 1 count as 2, like no fixed size.
    """
    mode = _fake_mode(program)
    environment = mode.shape_env
    assert environment is not None
    source = ConstantSource(f"rows_{node.name}")
    symbol = environment.create_symbol(max(rows, 2), source, dynamic_dim=DimDynamic.DYNAMIC)
    size = environment.create_symintnode(symbol, hint=max(rows, 2), source=source)
    with mode:
        device = node.all_input_nodes[0].meta["val"].device
        node.meta["val"] = torch.empty((size,), dtype=torch.int64, device=device)
    node.meta["computed_from"] = _inputs(node, program.model)


def refresh(program: Program) -> None:
    """Recompute `meta["val"]` and `meta["body"]` of every node that changed, and of those it feeds.

    A node is computed again, on fake tensors, if its operation, its constants, the shapes of its
    operands or its module are not what they were; so every shape in the graph is proved to fit.
    Costs no memory for tensors and works on meta parameters.

    Raises:
        VerificationError: if an operation does not fit its operands any more, naming the node.
    """
    mode = _fake_mode(program)
    with _disable_current_modes(), mode, enable_python_dispatcher(), torch.no_grad():
        propagation = _Propagation(program, mode)
        for node in program.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            try:
                found = _inputs(node, program.model)
                if node.meta.get("computed_from") != found:
                    node.meta["val"] = propagation.value(node, found)
                    node.meta["computed_from"] = found
            except Exception as error:
                text = str(error) or type(error).__name__
                raise VerificationError(
                    f"the operation {node.name} ({node.target}) in {node.meta['modules'][-1]!r} "
                    f"does not fit its operands: {text.splitlines()[0]}"
                ) from error
    program.changed()


def _inputs(node: fx.Node, model: nn.Module) -> tuple[Any, ...]:
    """Return, as text and plain values, all that decides a node's shape."""
    operands = str(fx.map_arg((node.args, node.kwargs), lambda n: _description(n.meta.get("val"))))
    if node.op == "call_function":
        return node.target, operands
    name = str(node.target)
    if node.op == "call_module":
        module = model.get_submodule(name)
        return name, operands, _configuration(module), _tensors(module)
    parent, _, attribute = name.rpartition(".")
    value = getattr(model.get_submodule(parent), attribute)
    return name, _description(value) if isinstance(value, torch.Tensor) else type(value).__name__


def _description(value: Any) -> Any:
    """Return a tensor's shape, layout and type as text; other values as they are."""
    if isinstance(value, (tuple, list)):
        return tuple(_description(item) for item in value)
    if not isinstance(value, torch.Tensor):
        return str(value)
    return f"{list(value.shape)} {list(value.stride())} {value.dtype} {value.device.type}"


def _configuration(module: nn.Module) -> tuple[Any, ...]:
    """Return the classes and plain attributes of a module and of what it contains."""
    return tuple(
        (type(part), tuple((k, v) for k, v in vars(part).items() if k != "training" and _plain(v)))
        for part in module.modules()
    )


def _plain(value: Any) -> bool:
    return all(map(_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def _tensors(module: nn.Module) -> tuple[tuple[str, str], ...]:
    return tuple(
        (name, f"{list(value.shape)} {value.dtype}")
        for name, value in [*module.named_parameters(), *module.named_buffers()]
    )


def _leaf_key(
    module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Return what two leaf calls have in common that compute the same, up to names of tensors."""
    others: list[Any] = []
    for part in module.modules():
        for key, value in vars(part).items():
            if key in _TABLES and not value:
                continue
            if isinstance(value, (FunctionType, BuiltinFunctionType)):
                others.append((key, value))
            elif key not in ("_parameters", "_buffers", "_modules") and not _plain(value):
                others.append((key, name))  # nothing is known of it: no other module shares it
    operands = str(_description((*args, *kwargs.items())))
    return operands, _configuration(module), _tensors(module), tuple(others)


def _renamed(body: fx.Graph, old: str, new: str) -> fx.Graph:
    """Return a copy of a leaf's graph for the same leaf under another name."""
    result = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in body.nodes:
        copy = copies[node] = result.node_copy(node, copies.__getitem__)
        copy.meta = dict(node.meta)
        if node.op == "get_attr":
            copy.target = new + str(node.target).removeprefix(old)
    return result


def _fake_mode(program: Program) -> FakeTensorMode:
    for node in program.placeholders:
        if isinstance(node.meta["val"], FakeTensor):
            return node.meta["val"].fake_mode
    raise VerificationError("a program without tensor inputs has no shapes to propagate")


class _Propagation:
    def __init__(self, program: Program, mode: FakeTensorMode) -> None:
        self.program = program
        self.mode = mode
        self.fakes: dict[str, torch.Tensor] = {}

    def value(self, node: fx.Node, computed_from: tuple[Any, ...]) -> Any:
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        if node.op == "call_module":
            return self._call(node, args, kwargs)
        known = self.program.results.get(computed_from)
        if known is not None:
            return known
        assert callable(node.target)
        value = node.target(*args, **kwargs)
        if isinstance(value, torch.Tensor) and not free_unbacked_symbols(value):
            self.program.results[computed_from] = value
        return value

    def _attribute(self, name: str) -> Any:
        parent, _, attribute = name.rpartition(".")
        value = getattr(self.program.module(parent), attribute)
        return self._fake(name, value) if isinstance(value, torch.Tensor) else value

    def _fake(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in self.fakes:
            self.fakes[name] = self.mode.from_tensor(value, static_shapes=True)
        return self.fakes[name]

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = str(node.target)
        key = _leaf_key(self.program.module(name), name, args, kwargs)
        known = self.program.leaves.get(key)
        if known is not None:
            node.meta["body"] = _renamed(known.body, known.name, name)
            return known.value
        found = self._rerun(node, args, kwargs)
        if found is None:
            module, tensors = self._leaf(name)
            body = self.body(node, args, kwargs)
            found = body, functional_call(module, tensors, args, kwargs)
        body, value = node.meta["body"], _ = found
        if body is not None and not free_unbacked_symbols(value):
            # Passes edit the graphs of leaf calls: a copy stays as it is.
            self.program.leaves[key] = Leaf(name, _renamed(body, name, name), value)
        return value

    def _rerun(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[fx.Graph | None, Any] | None:
        """Return the leaf's graph and result where only its operand's sizes are other ones.

        None if the module is another one, or its graph is made for the old sizes.
        """
        body: fx.Graph | None = node.meta.get("body")
        before = node.meta.get("computed_from")
        if body is None or before is None or len(args) != 1 or kwargs:
            return None
        name, _, *module = _inputs(node, self.program.model)
        if (before[0], *before[2:]) != (name, *module):
            return None
        result = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        values: dict[fx.Node, Any] = {}
        operands = iter(args)
        try:
            for item in body.nodes:
                copies[item] = result.node_copy(item, copies.__getitem__)
                inputs = fx.map_arg((item.args, item.kwargs), values.__getitem__)
                if item.op == "placeholder":
                    values[item] = next(operands)
                elif item.op == "get_attr":
                    values[item] = self._attribute(str(item.target))
                elif item.op == "output":
                    return result, inputs[0][0]
                else:
                    values[item] = item.target(*inputs[0], **inputs[1])
                copies[item].meta["val"] = values[item]
        except Exception:  # sizes of the old operand are part of the graph: trace it again
            return None
        return None

    def body(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph | None:
        name = str(node.target)
        return _trace_body(name, *self._leaf(name), args, kwargs)

    def _leaf(self, name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """Return a leaf module and its tensors as fakes."""
        module = self.program.module(name)
        tensors = {
            key: self._fake(f"{name}.{key}", value)
            for key, value in [*module.named_parameters(), *module.named_buffers()]
        }
        return module, tensors


def _trace_body(
    name: str,
    module: nn.Module,
    tensors: dict[str, torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> fx.Graph | None:
    """Trace a leaf call into ATen operations on its input and its parameters' full names."""
    if len(args) != 1 or not isinstance(args[0], torch.Tensor):
        return None

    def call(values: list[torch.Tensor], x: torch.Tensor) -> Any:
        return functional_call(module, dict(zip(tensors, values, strict=True)), (x,), kwargs)

    traced = make_fx(call, pre_dispatch=True, tracing_mode="real")(list(tensors.values()), args[0])
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    copies[placeholders[-1]] = body.placeholder("x")
    names = dict(zip(placeholders, tensors, strict=False))
    for node in traced.graph.nodes:
        if node in names:
            copies[node] = body.get_attr(f"{name}.{names[node]}")
        elif node.op == "output":
            result = node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
            body.output(fx.map_arg(result, copies.__getitem__))
        elif node.op != "placeholder":
            copies[node] = body.node_copy(node, copies.__getitem__)
        if node in copies:
            copies[node].meta = {"val": node.meta.get("val")}
    return body


def evaluation_body(program: Program, node: fx.Node) -> fx.Graph:
    """Return the ATen graph of a leaf call as it is in evaluation mode.

    Raises:
        VerificationError: if the call has not exactly one tensor argument.
    """
    module = program.module(str(node.target))
    modes = [(part, part.training) for part in module.modules()]
    mode = _fake_mode(program)
    try:
        module.eval()
        with mode, enable_python_dispatcher(), torch.no_grad():
            propagation = _Propagation(program, mode)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            body = propagation.body(node, args, kwargs)
    finally:
        for part, training in modes:
            part.training = training
    if body is None:
        raise VerificationError(f"{node.target} has not one tensor argument, so it has no graph")
    return body
