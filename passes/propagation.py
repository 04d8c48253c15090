"""Fake values and leaf bodies of a program, made again after its graph or modules changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from .errors import VerificationError
from .program import Program


def refresh(program: Program) -> None:
    """Recompute every node's `meta["val"]`, and the `meta["body"]` of changed leaf calls.

    Runs the graph on fake tensors, so it costs no memory and works on meta parameters; it also
    proves that every shape in the graph fits.

    Raises:
        VerificationError: if an operation does not fit its operands any more, naming the node.
    """
    mode = _fake_mode(program)
    with mode, torch.no_grad():
        interpreter = _Propagation(program, mode)
        for node in program.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            try:
                node.meta["val"] = interpreter.value(node)
            except Exception as error:
                raise VerificationError(
                    f"the operation {node.name} ({node.target}) in {node.meta['modules'][-1]!r} "
                    f"does not fit its operands: {str(error).splitlines()[0]}"
                ) from error
    program.changed()


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

    def value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        if node.op == "call_function":
            assert callable(node.target)
            return node.target(*args, **kwargs)
        return self._call(node, args, kwargs)

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
        module = self.program.module(name)
        tensors = {
            key: self._fake(f"{name}.{key}", value)
            for key, value in [*module.named_parameters(), *module.named_buffers()]
        }
        if not _is_current(node, name, module, tensors, args):
            node.meta["body"] = _trace_body(name, module, tensors, args, kwargs)
            node.meta["body_class"] = type(module)
        return functional_call(module, tensors, args, kwargs)


def _is_current(
    node: fx.Node,
    name: str,
    module: nn.Module,
    tensors: dict[str, torch.Tensor],
    args: tuple[Any, ...],
) -> bool:
    """Say whether the body was made from this class of module and these shapes."""
    body: fx.Graph | None = node.meta.get("body")
    if body is None or node.meta.get("body_class") is not type(module):
        return False
    reads = {n.target: n for n in body.nodes if n.op == "get_attr"}
    source = next(n for n in body.nodes if n.op == "placeholder")
    return str(source.meta["val"].shape) == str(args[0].shape) and all(
        reads[full].meta["val"].shape == value.shape
        for key, value in tensors.items()
        if (full := f"{name}.{key}") in reads
    )


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
