"""Linear layers, recognised by what a leaf module computes and not by its class."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from .axis_flow import arguments_of, operator_name, tensors_of
from .facts import attribute_of
from .program import Program, shape_of

_VIEWS = frozenset({"view", "reshape", "_unsafe_view"})
_TURNS = frozenset({"t", "transpose"})
_PRODUCTS = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2", None),
    "matmul": ("self", "other", None),
}


@dataclass(frozen=True)
class LinearLayer:
    """A leaf module that computes `y = x W^T + b` over the last dimension and nothing else.

    Attributes:
        module: The module; it holds its weight and bias itself and no other tensor.
        weight_name: Its attribute with W [out, in], or with W^T.
        bias_name: Its attribute with b [out], None if it has none.
        transposed: Whether the attribute holds W^T [in, out].
    """

    module: nn.Module
    weight_name: str
    bias_name: str | None
    transposed: bool

    @property
    def weight(self) -> nn.Parameter:
        """The weight as the module holds it."""
        return self.module.get_parameter(self.weight_name)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias."""
        return None if self.bias_name is None else self.module.get_parameter(self.bias_name)

    @property
    def matrix(self) -> torch.Tensor:
        """W [out_features, in_features], detached."""
        weight = self.weight.detach()
        return weight.t() if self.transposed else weight

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.matrix.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.matrix.shape[1]

    def emptied(self) -> LinearLayer:
        """Return the layer with a copy of its module on the meta device."""
        memo: dict[int, Any] = {
            id(value): nn.Parameter(value.detach().to("meta"), value.requires_grad)
            for value in self.module.parameters()
        }
        return replace(self, module=copy.deepcopy(self.module, memo))

    def filled(
        self, matrix: torch.Tensor, bias: nn.Parameter | None, *, trained: bool
    ) -> nn.Module:
        """Return a copy of the module with another W, trained or not, and another bias."""
        module = copy.deepcopy(self.module)
        value = (matrix.t() if self.transposed else matrix).contiguous()
        setattr(module, self.weight_name, nn.Parameter(value, requires_grad=trained))
        if self.bias_name is not None:
            setattr(module, self.bias_name, bias)
        return module


def linear_layers(program: Program) -> Iterator[tuple[str, LinearLayer]]:
    """Yield every linear layer that the program calls, by its name, in graph order."""
    names = dict.fromkeys(str(n.target) for n in program.graph.nodes if n.op == "call_module")
    for name in names:
        layer = linear_layer(program, name)
        if layer is not None:
            yield name, layer


def linear_layer(program: Program, name: str) -> LinearLayer | None:
    """Return the leaf module of this name as a linear layer, None if it is something else.

    Its recorded graph must be one product of its input with a 2-d parameter of its own, plus a
    bias of its own, between views that keep the leading dimensions.
    """
    calls = program.calls(name)
    body = calls[0].meta.get("body") if calls else None
    module = program.module(name)
    found = None if body is None else _product(body)
    if found is None or any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    operation, source = found
    x_name, weight_name, bias_name = _PRODUCTS[operator_name(operation)]
    arguments = arguments_of(operation)
    if any(arguments.get(scale, 1) != 1 for scale in ("alpha", "beta")):
        return None
    weight, turned = _through(arguments[weight_name], _TURNS)
    names = [_own_name(program, module, weight)]
    bias = arguments[bias_name] if bias_name is not None else None
    if bias is not None:
        names.append(_own_name(program, module, bias))
    x, _ = _through(arguments[x_name], _VIEWS)
    if x is not source or None in names or {*names} != {*dict(module.named_parameters())}:
        return None
    stored_as_product = operator_name(operation) != "linear"
    layer = LinearLayer(
        module,
        str(names[0]),
        str(names[1]) if bias is not None else None,
        transposed=stored_as_product != bool(turned % 2),
    )
    return layer if _fits(layer, calls[0]) else None


def _product(body: fx.Graph) -> tuple[fx.Node, fx.Node] | None:
    """Return the one product of a graph that else only changes views, and the graph's input."""
    operations = [
        node for node in body.nodes if node.op == "call_function" and tensors_of(node.meta["val"])
    ]
    products = [node for node in operations if operator_name(node) in _PRODUCTS]
    rest = {operator_name(node) for node in operations if node not in products}
    inputs = [n for n in body.nodes if n.op == "placeholder" and tensors_of(n.meta.get("val"))]
    result: Any = body.output_node().args[0]
    if isinstance(result, (tuple, list)) and len(result) == 1:
        result = result[0]
    if len(products) != 1 or len(inputs) != 1 or rest - _VIEWS - _TURNS:
        return None
    return (products[0], inputs[0]) if _through(result, _VIEWS)[0] is products[0] else None


def _through(node: Any, operators: frozenset[str]) -> tuple[Any, int]:
    """Follow first operands back through some operators; return the origin and their number."""
    count = 0
    while isinstance(node, fx.Node) and node.op == "call_function":
        if operator_name(node) not in operators:
            break
        node, count = node.args[0], count + 1
    return node, count


def _own_name(program: Program, module: nn.Module, node: Any) -> str | None:
    """Return the attribute of a module that a node reads, None if it reads something else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = attribute_of(program, str(node.target))
    return next((name for name, own in module.named_parameters() if own is value), None)


def _fits(layer: LinearLayer, call: fx.Node) -> bool:
    """Say whether the recorded shapes are those of a product over the last dimension."""
    if layer.weight.dim() != 2:
        return False
    source = shape_of(call.all_input_nodes[0])
    return (source[-1], shape_of(call)) == (layer.in_features, (*source[:-1], layer.out_features))
