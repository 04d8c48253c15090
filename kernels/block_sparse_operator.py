"""The operators `graphopt::block_sparse_linear*`: schema, shapes, gradients, autocast, FLOPs.

The dispatcher is the registry: the CPU form is `cpu.tile_gather`, the CUDA form `gpu.dispatch`,
imported at the first call on such a device. The specification is
`block_sparse_linear_reference`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, functional
from torch.utils.flop_counter import register_flop_formula

from .block_layout import BlockLayout
from .derived import derived

__all__ = [
    "ACTIVATIONS",
    "apply_activation",
    "block_sparse_linear",
    "block_sparse_linear_reference",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}

_LIBRARY = torch.library.Library("graphopt", "DEF")
_LIBRARY.define(
    "block_sparse_linear(Tensor x, Tensor values, Tensor? bias, Tensor rows, Tensor columns, "
    "SymInt out_features, str activation='none', bool inference=False) -> Tensor"
)
_LIBRARY.define(
    "block_sparse_linear_input_gradient(Tensor gradient, Tensor values, Tensor rows, "
    "Tensor columns, SymInt in_features) -> Tensor"
)
_LIBRARY.define(
    "block_sparse_linear_weight_gradient(Tensor gradient, Tensor x, Tensor rows, Tensor columns, "
    "SymInt block_out, SymInt block_in) -> Tensor"
)
_OPERATORS = torch.ops.graphopt


def block_sparse_linear_reference(
    x: Tensor, values: Tensor, bias: Tensor | None, layout: BlockLayout, activation: str = "none"
) -> Tensor:
    """Return `activation(x W^T + bias)` with the dense W that the blocks stand for."""
    return apply_activation(functional.linear(x, layout.unpack(values), bias), activation)


def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    out_features: int,
    activation: str = "none",
    *,
    inference: bool = False,
) -> Tensor:
    """Return `activation(x W^T + bias)` [tokens, out_features] over the stored blocks of W.

    Numerics: products accumulate in float32 (float64 for float64). Gradients reach x, values and
    bias, once: a double backward raises. Equal inputs give equal bits.
    Cost: `2 * tokens * values.numel()` FLOPs forward, twice that backward.

    Args:
        x: [tokens, in_features].
        values: [blocks, block_out, block_in], see `BlockLayout`.
        bias: [out_features] or None.
        rows: Row tile of every block [blocks], int32.
        columns: Column group of every block [blocks], int32.
        out_features: Rows of W.
        activation: One of `ACTIVATIONS`; other than "none" with `inference` only.
        inference: Let the kernel keep rearranged copies of the values between calls and fuse the
            activation; no gradient is possible.
    """
    result: Tensor = _OPERATORS.block_sparse_linear.default(
        x, values, bias, rows, columns, out_features, activation, inference
    )
    return result


def apply_activation(x: Tensor, activation: str) -> Tensor:
    """Return x after the activation of this name, one of `ACTIVATIONS`."""
    return ACTIVATIONS[activation](x)


def _shape(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    out_features: int,
    activation: str = "none",
    inference: bool = False,
) -> Tensor:
    check_operands(x, values, bias, out_features, activation, inference)
    return x.new_empty(x.shape[0], out_features)


def _input_gradient_shape(
    gradient: Tensor, values: Tensor, rows: Tensor, columns: Tensor, in_features: int
) -> Tensor:
    return gradient.new_empty(gradient.shape[0], in_features)


def _weight_gradient_shape(
    gradient: Tensor, x: Tensor, rows: Tensor, columns: Tensor, block_out: int, block_in: int
) -> Tensor:
    return gradient.new_empty(rows.shape[0], block_out, block_in)


def check_operands(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    inference: bool,
) -> None:
    """Refuse operands that do not fit each other, on any device and in the fake kernel.

    Raises:
        ValueError: with what was expected and what came.
    """
    if x.dim() != 2 or values.dim() != 3:
        raise ValueError(
            f"expected x [tokens, in_features] and values [blocks, block_out, block_in], got "
            f"{list(x.shape)} and {list(values.shape)}"
        )
    if x.dtype != values.dtype or (bias is not None and bias.dtype != x.dtype):
        got = f"{x.dtype}, {values.dtype}" + ("" if bias is None else f", {bias.dtype}")
        raise ValueError(f"expected x, values and bias of one dtype, got {got}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"expected a bias [{out_features}], got {list(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation != "none" and not inference:
        raise ValueError(f"{activation} is fused in inference only; apply it to the result")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, rows, columns, _, _, inference = inputs
    # Programs exported without gradients may run where gradients are enabled, so the forward pass
    # is no reason to refuse yet.
    ctx.inference = inference
    ctx.save_for_backward(x, values, rows, columns)
    ctx.has_bias = bias is not None


def _backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if context.inference:
        raise RuntimeError(
            "block_sparse_linear with inference=True has no gradient; call it without"
        )
    x, values, rows, columns = context.saved_tensors
    for_x = for_values = for_bias = None
    if context.needs_input_grad[0]:
        for_x = _OPERATORS.block_sparse_linear_input_gradient(
            gradient, values, rows, columns, x.shape[1]
        )
    if context.needs_input_grad[1]:
        for_values = _OPERATORS.block_sparse_linear_weight_gradient(
            gradient, x, rows, columns, values.shape[1], values.shape[2]
        )
    if context.has_bias and context.needs_input_grad[2]:
        # torch sums half types in float32.
        for_bias = gradient.sum(0)
    return for_x, for_values, for_bias, None, None, None, None, None


def _refuse_double_backward(context: Any, gradient: Tensor) -> None:
    raise RuntimeError(
        "block_sparse_linear cannot be differentiated twice; densify the layer for that"
    )


def _flops(x_shape: Any, values_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    blocks, block_out, block_in = values_shape
    return 2 * int(x_shape[0]) * int(blocks) * int(block_out) * int(block_in)


def _weight_gradient_flops(
    gradient_shape: Any,
    x_shape: Any,
    rows_shape: Any,
    columns_shape: Any,
    block_out: int,
    block_in: int,
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    return 2 * int(x_shape[0]) * int(rows_shape[0]) * block_out * block_in


def _implementation(module: str, function: str) -> Any:
    """Return a kernel that imports its module when it is called first.

    The dispatcher leaves out arguments that equal the schema's defaults.
    """

    @cache
    def implementation() -> Any:
        return getattr(importlib.import_module(module, __package__), function)

    def kernel(*args: Any) -> Tensor:
        result: Tensor = implementation()(*args)
        return result

    return kernel


def _autocast(device: str, key: torch._C.DispatchKey) -> Any:
    """Return the kernel that casts the floating operands, as autocast does for `linear`."""

    def kernel(x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)

        def cast(item: Tensor) -> Tensor:
            # Autocast leaves float64 alone everywhere.
            if item.dtype in (dtype, torch.float64):
                return item
            # The same tensor at every call, so that its packed form is found again. Tensors of
            # other types are traced or sharded.
            if item is x or torch.is_grad_enabled() or type(item) not in (Tensor, Parameter):
                return item.to(dtype)
            return derived(("cast", dtype), (item,), lambda: item.to(dtype))

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            result: Tensor = _OPERATORS.block_sparse_linear(
                cast(x), cast(values), None if bias is None else cast(bias), *rest
            )
            return result

    return kernel


for _name, _fake in (
    ("block_sparse_linear", _shape),
    ("block_sparse_linear_input_gradient", _input_gradient_shape),
    ("block_sparse_linear_weight_gradient", _weight_gradient_shape),
):
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_LIBRARY)
    _LIBRARY.impl(_name, _implementation(".cpu.tile_gather", _name), "CPU")
    _LIBRARY.impl(_name, _implementation(".gpu.dispatch", _name), "CUDA")
    if _name.endswith("gradient"):
        torch.library.register_autograd(f"graphopt::{_name}", _refuse_double_backward, lib=_LIBRARY)
torch.library.register_autograd(
    "graphopt::block_sparse_linear", _backward, setup_context=_setup_context, lib=_LIBRARY
)
for _device, _key in (
    ("cpu", torch._C.DispatchKey.AutocastCPU),
    ("cuda", torch._C.DispatchKey.AutocastCUDA),
):
    _LIBRARY.impl("block_sparse_linear", _autocast(_device, _key), _key.name)
register_flop_formula(
    [_OPERATORS.block_sparse_linear, _OPERATORS.block_sparse_linear_input_gradient]
)(_flops)
register_flop_formula(_OPERATORS.block_sparse_linear_weight_gradient)(_weight_gradient_flops)
