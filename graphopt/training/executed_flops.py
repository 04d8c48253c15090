"""Floating point operations that are really executed, counted while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_ATEN = torch.ops.aten

Formula = Callable[..., int]


class ExecutedFlops(TorchDispatchMode):
    """Counts the operations of everything that runs inside it, forward and backward.

    Every matrix product, convolution and attention counts at the shapes it ran with, so dropped
    tokens, packed rows, missing blocks and skipped layers cost nothing, and routers, teachers and
    what activation checkpointing computes again do. A multiply-add is 2; attention is counted in
    full also where it is causal, its backward pass 2.5 times that, because flash kernels compute
    the scores again; element-wise operations, normalisations, lookups and optimizers are 0.

    Under `torch.compile` the library calls of the compiled code are counted; products that a
    `max-autotune` template computes are not.

        with ExecutedFlops() as executed:
            loss(model(batch)).backward()
        planned_flops = executed.flops * steps

    Cost: 5 to 20 microseconds per call of an operator, by machine, most of them torch's; meanwhile
    torch adds gradients in new memory instead of in place.

    Attributes:
        flops: Operations so far.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run; without this the compiler steps aside for any such mode."""
        return True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        formula = _FORMULAS.get(packet) or flop_registry.get(packet)
        if formula is None and _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=result))
        return result


@cache
def _is_composite(operator: Any) -> bool:
    """Say whether an operator consists of others: without gradients it arrives whole.

    Those called `prim` ask for properties, such as the device of a fake tensor.
    """
    if not isinstance(operator, torch._ops.OpOverload) or operator.namespace == "prim":
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """QK^T and PV over all pairs of tokens."""
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return _attention(query, key, value) * 5 // 2


def _matrix_vector(matrix: Tensor, *_: Any, **__: Any) -> int:
    return 2 * matrix.numel()


def _added_matrix_vector(addend: Tensor, matrix: Tensor, *_: Any, **__: Any) -> int:
    return 2 * matrix.numel()


def _added_products(addend: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


def _product(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


def _grouped_product(left: Tensor, right: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """One product per group: [token, k] with [group, k, m], or, for the weights, both flat."""
    if left.dim() == right.dim() == 2:
        return 2 * left.numel() * out_val.shape[-1]
    return 2 * out_val.numel() * left.shape[-1]


def _convolution(source: Tensor, weight: Tensor, *options: Any, out_val: Tensor, **_: Any) -> int:
    transposed = options[4]
    meets: Tensor = source if transposed else out_val
    return 2 * meets.numel() * prod(weight.shape[1:])


def _convolution_backward(
    gradient: Tensor, source: Tensor, weight: Tensor, *options: Any, **_: Any
) -> int:
    """Two products of the size of the forward one; torch's formula overlooks groups."""
    transposed, wanted = options[4], options[7]
    meets: Tensor = source if transposed else gradient
    return 2 * meets.numel() * prod(weight.shape[1:]) * sum(map(bool, wanted[:2]))


def _recurrent(source: Tensor, inner: Tensor, hidden: Tensor, *_: Any, **__: Any) -> int:
    """Both weight matrices of one layer and direction meet every token once."""
    return 2 * prod(source.shape[:-1]) * (inner.numel() + hidden.numel())


def _recurrent_backward(source: Tensor, inner: Tensor, hidden: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _recurrent(source, inner, hidden)


def _self_attention(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *_: Any, **__: Any
) -> int:
    """Projections and attention of `nn.MultiheadAttention` in one operator."""
    nested = query.is_nested
    sizes: list[Any] = query._nested_tensor_size().tolist() if nested else [query.shape]
    pairs: int = sum(prod(size[:-1]) * size[-2] for size in sizes)
    flops: int = 2 * width * (4 * width * (query.numel() // width) + 2 * pairs)
    return flops


def _encoder_layer(source: Tensor, width: int, heads: int, *rest: Any, **_: Any) -> int:
    """`nn.TransformerEncoderLayer` in one operator, as it runs in evaluation."""
    first, second = rest[11], rest[13]
    feed_forward: int = 2 * (source.numel() // width) * (first.numel() + second.numel())
    return _self_attention(source, source, source, width, heads) + feed_forward


# Operators that `torch.utils.flop_counter` does not know, counts otherwise than they run, or counts
# slowly although they run often: its formulas first replace every tensor by its shape.
_FORMULAS: dict[Any, Formula] = {
    _ATEN.mm: _product,
    _ATEN.bmm: _product,
    _ATEN.addmm: _added_products,
    _ATEN.baddbmm: _added_products,
    _ATEN.convolution: _convolution,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _ATEN.convolution_backward: _convolution_backward,
    _ATEN.mv: _matrix_vector,
    _ATEN.dot: _matrix_vector,
    _ATEN.addmv: _added_matrix_vector,
    _ATEN.addbmm: _added_products,
    _ATEN._int_mm: _product,
    _ATEN._grouped_mm: _grouped_product,
    _ATEN._native_multi_head_attention: _self_attention,
    _ATEN._transformer_encoder_layer_fwd: _encoder_layer,
    _ATEN.mkldnn_rnn_layer: _recurrent,
    _ATEN.mkldnn_rnn_layer_backward: _recurrent_backward,
}
