"""Floating point operations of one operator call, forward and backward.

A multiply-add counts 2. Matrix products, convolutions, attention and recurrent layers have a
formula; an operator with a formula registered in `torch.utils.flop_counter` (a kernel's own) uses
that. Everything else, element-wise operations, normalisations and lookups, counts 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from graphopt.kernels.packed_attention import packed_attention, sample_starts

from .axis_flow import arguments_of, operator_name, tensor_nodes, tensors_of
from .program import hint, shape_of

GradientFlops = tuple[tuple[fx.Node, ...], int]
"""Operands and what the backward pass costs if any of them needs a gradient."""


@dataclass(frozen=True)
class OperatorFlops:
    """What one call of an operator costs.

    Attributes:
        forward: Operations of the forward pass.
        gradients: The parts of the backward pass, each with the operands that ask for it.
    """

    forward: int = 0
    gradients: tuple[GradientFlops, ...] = ()

    def backward(self, needs_gradient: Callable[[fx.Node], bool]) -> int:
        """Return the operations of the backward pass, given which operands need a gradient."""
        return sum(
            flops for operands, flops in self.gradients if any(map(needs_gradient, operands))
        )


Formula = Callable[[fx.Node, dict[str, Any]], OperatorFlops]

_FORMULAS: dict[str, Formula] = {}


def operator_flops(node: fx.Node) -> OperatorFlops:
    """Return what a `call_function` node costs at the example's sizes."""
    if node.target is packed_attention:
        return _packed_attention(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return OperatorFlops()
    name = operator_name(node)
    formula = _FORMULAS.get(name) or _FORMULAS.get(name.rstrip("_"))
    if formula is not None:
        return formula(node, arguments_of(node))
    if node.target.overloadpacket in flop_registry:
        return _registered(node)
    return OperatorFlops()


def _formula(*operators: str) -> Callable[[Formula], Formula]:
    """Register a function as the formula of operators, by name without overload."""

    def register(function: Formula) -> Formula:
        _FORMULAS.update(dict.fromkeys(operators, function))
        return function

    return register


def _product(flops: int, *operands: fx.Node) -> OperatorFlops:
    """Return the cost of a contraction: each operand's gradient is one of the same size."""
    return OperatorFlops(flops, tuple(((operand,), flops) for operand in operands))


def _size(node: fx.Node) -> int:
    return prod(shape_of(node))


@_formula("linear")
def _linear(node: fx.Node, a: dict[str, Any]) -> OperatorFlops:
    """[..., in] times [out, in]."""
    return _product(2 * _size(node) * shape_of(a["input"])[-1], a["input"], a["weight"])


@_formula("mm", "bmm", "matmul", "mv", "dot", "vdot", "inner", "_int_mm")
def _matrix_product(node: fx.Node, a: dict[str, Any]) -> OperatorFlops:
    """[..., n, k] times [..., k, m]; either side may be a vector."""
    left = a["self"]
    right = next(a[name] for name in ("mat2", "other", "vec", "tensor") if name in a)
    return _product(2 * _size(node) * shape_of(left)[-1], left, right)


@_formula("addmm", "baddbmm", "addbmm", "addmv")
def _added_product(node: fx.Node, a: dict[str, Any]) -> OperatorFlops:
    """[..., n, k] times [..., k, m], added to a tensor; `addbmm` also sums over the batch."""
    names = [name for name in ("mat1", "mat2", "batch1", "batch2", "mat", "vec") if name in a]
    left, right = (a[name] for name in names)
    columns = shape_of(right)[-1] if len(shape_of(right)) > 1 else 1
    return _product(2 * _size(left) * columns, left, right)


@_formula("bilinear")
def _bilinear(node: fx.Node, a: dict[str, Any]) -> OperatorFlops:
    """[..., i] and [..., j] with [out, i, j]: the sum over i, then that over j."""
    out, _, inner = shape_of(a["weight"])
    first = 2 * _size(a["input1"]) * out * inner
    second = 2 * _size(node) * inner
    return OperatorFlops(
        first + second,
        (((a["input1"],), first), ((a["weight"],), first), ((a["input2"],), second)),
    )


@_formula("einsum")
def _einsum(node: fx.Node, a: dict[str, Any]) -> OperatorFlops:
    """Contract the operands from left to right, as torch does without `opt_einsum`."""
    inputs, _, output = a["equation"].replace(" ", "").partition("->")
    if "->" not in a["equation"]:
        output = "".join(c for c in inputs if c.isalpha() and inputs.count(c) == 1)
        output = "..." * ("..." in inputs) + output
    operands: list[fx.Node] = list(a["tensors"])
    sizes: dict[str, int] = {}
    labels = [
        _dimension_labels(item, shape_of(operand), sizes)
        for item, operand in zip(inputs.split(","), operands, strict=True)
    ]
    kept = [{*output.replace("...", "")} | {c for c in sizes if c.isdigit()}, *labels[2:]]
    done, forward = labels[0], 0
    parts: list[GradientFlops] = []
    for position, (item, operand) in enumerate(zip(labels[1:], operands[1:], strict=True), 1):
        flops = 2 * prod(sizes[label] for label in done | item)
        forward += flops
        parts += [((operand,), flops), (tuple(operands[:position]), flops)]
        done = (done | item) & set().union(kept[0], *labels[position + 1 :])
    return OperatorFlops(forward, tuple(parts))


def _dimension_labels(item: str, shape: tuple[int, ...], sizes: dict[str, int]) -> set[str]:
    """Name the dimensions of an operand, those of `...` by their distance from its right end."""
    before, dots, after = item.partition("...")
    hidden = len(shape) - len(before) - len(after) if dots else 0
    names = [*before, *(str(index) for index in reversed(range(hidden))), *after]
    for name, size in zip(names, shape, strict=True):
        sizes[name] = max(size, sizes.get(name, 1))
    return set(names)


@_formula(
    *(f"conv{n}d" for n in (1, 2, 3)),
    *(f"conv_transpose{n}d" for n in (1, 2, 3)),
    "convolution",
    "_convolution",
)
def _convolution(node: fx.Node, a: dict[str, Any]) -> OperatorFlops:
    """Every output element (input element where transposed) meets one filter of its group."""
    transposed = operator_name(node).startswith("conv_transpose") or a.get("transposed", False)
    meets = shape_of(a["weight"])[1:]
    flops = 2 * _size(a["input"] if transposed else node) * prod(meets)
    return _product(flops, a["input"], a["weight"])


@_formula(
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
def _attention(node: fx.Node, a: dict[str, Any]) -> OperatorFlops:
    """QK^T and PV over all pairs of tokens, causal or masked ones included.

    The backward pass is 2.5 times the forward one: flash kernels compute QK^T again before the
    four products of the gradients (Dao et al. 2022, FlashAttention, algorithm 4).
    """
    query, key, value = a["query"], a["key"], a["value"]
    head_dims = shape_of(query)[-1] + shape_of(value)[-1]
    rows = _size(query) // shape_of(query)[-1]
    flops = 2 * rows * shape_of(key)[-2] * head_dims
    return OperatorFlops(flops, (((query, key, value), flops * 5 // 2),))


def _packed_attention(node: fx.Node) -> OperatorFlops:
    """Attention within samples of the mean length; see `_attention` for the backward pass."""
    query, key, value, *_ = tensor_nodes(node)
    starts = next(item for item in node.all_input_nodes if item.target is sample_starts)
    _, heads, rows, width = shape_of(query)
    samples = shape_of(starts)[0] - 1
    flops = 2 * heads * rows * rows * (width + shape_of(value)[-1]) // samples
    return OperatorFlops(flops, (((query, key, value), flops * 5 // 2),))


@_formula("_grouped_mm", "grouped_mm_fallback")
def _grouped_product(node: fx.Node, a: dict[str, Any]) -> OperatorFlops:
    """One matrix product per group: [token, k] times [group, k, m], each token in one group."""
    left, right = (item for item in tensor_nodes(node)[:2])
    flops = 2 * _size(left) * shape_of(right)[-1]
    if len(shape_of(left)) == 3 and len(shape_of(right)) == 2:
        flops //= shape_of(left)[0]
    return _product(flops, left, right)


@_formula("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(node: fx.Node, a: dict[str, Any]) -> OperatorFlops:
    """Every weight matrix of every layer and direction meets every token once."""
    source = a["input"] if "input" in a else a["data"]
    tokens = _size(source) // shape_of(source)[-1]
    matrices = [weight for weight in a["params"] if len(shape_of(weight)) == 2]
    flops = [2 * tokens * _size(weight) for weight in matrices]
    per_layer = len(matrices) // a["num_layers"]
    outside = per_layer // 2 if a["bidirectional"] else per_layer
    first = sum(flops[:per_layer:outside])
    weights = tuple(((weight,), count) for weight, count in zip(matrices, flops, strict=True))
    everything = (source, *matrices)
    return OperatorFlops(
        sum(flops), (*weights, ((source,), first), (everything, sum(flops) - first))
    )


@_formula("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _recurrent_cell(node: fx.Node, a: dict[str, Any]) -> OperatorFlops:
    """One step of a recurrent layer."""
    rows = _size(a["input"]) // shape_of(a["input"])[-1]
    state = a["hx"][0] if isinstance(a["hx"], (list, tuple)) else a["hx"]
    parts: list[GradientFlops] = []
    for operand, weight in ((a["input"], a["w_ih"]), (state, a["w_hh"])):
        parts += [((item,), 2 * rows * _size(weight)) for item in (operand, weight)]
    return OperatorFlops(sum(flops for _, flops in parts) // 2, tuple(parts))


def _registered(node: fx.Node) -> OperatorFlops:
    """Ask the formula that came with the operator; its first two operands are its factors."""
    assert isinstance(node.target, torch._ops.OpOverload)

    def sized(item: fx.Node) -> Any:
        value = item.meta.get("val")
        if isinstance(value, torch.Tensor):
            return torch.empty(shape_of(item), dtype=value.dtype, device="meta")
        return hint(value) if isinstance(value, torch.SymInt) else value

    args, kwargs = fx.map_arg((node.args, node.kwargs), sized)
    outputs = [
        torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device="meta")
        for value in tensors_of(node.meta["val"])
    ]
    result = outputs[0] if len(outputs) == 1 else tuple(outputs)
    flops = flop_registry[node.target.overloadpacket](*args, **kwargs, out_val=result)
    return _product(int(flops), *tensor_nodes(node)[:2])
