"""Axis rules of operators that compute elements: element-wise, reducing, resizing, creating."""

from __future__ import annotations

import torch
from torch import fx

from .axis_flow import Arguments, Flow, Terms, operator_name, rule, tensors_of, value_of
from .axis_shapes import dimensions
from .axis_terms import ONE


@rule(
    "where",
    "masked_fill",
    "rsub",
    "hardswish",
    "log_sigmoid",
    "type_as",
    "expand_as",
    "copy",
    "floor_divide",
    "special_expit",
    "bernoulli",
    "fill",
    "gelu",
    "lerp",
)
def pointwise(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Combine tensors element by element."""
    return flow.broadcast([flow.dims(item) for item in node.all_input_nodes])


@rule(
    "to",
    "_to_copy",
    "clone",
    "contiguous",
    "detach",
    "alias",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "lift_fresh_copy",
    "lift_fresh",
    "float",
    "bucketize",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "randn_like",
    "native_dropout",
    "_assert_tensor_metadata",
    "normal",
    "uniform",
    "zero",
    "exponential",
    "conj",
    "resolve_conj",
    "requires_grad",
)
def same(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Keep the shape of the first tensor."""
    dims = flow.dims(node.all_input_nodes[0])
    value = node.meta.get("val")
    return dims if isinstance(value, torch.Tensor) else [dims] * len(tensors_of(value))


_SYMMETRIC = frozenset({"sum", "mean", "amax", "amin", "prod", "var", "std", "norm", "var_mean"})
"""Reductions whose result does not depend on the order of what they reduce."""


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "argmax",
    "argmin",
    "prod",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "logsumexp",
    "norm",
    "linalg_vector_norm",
    "any",
    "all",
    "median",
    "count_nonzero",
    "nansum",
)
def reduce(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Reduce over dimensions."""
    tensors = [item for item in node.all_input_nodes if flow.dims(item)]
    if len(tensors) > 1:
        return pointwise(flow, node, a)
    dims = flow.dims(node.all_input_nodes[0])
    gone = dimensions(a.get("dim"), len(dims)) if dims else []
    alike = operator_name(node) in _SYMMETRIC
    place = f"is reduced over by {flow.where(node)}"
    flow.pin((dims[i] for i in gone), place, symmetric=alike)
    keep = bool(a.get("keepdim"))
    rest = tuple(ONE if i in gone else term for i, term in enumerate(dims) if keep or i not in gone)
    value = node.meta["val"]
    return rest if isinstance(value, torch.Tensor) else [rest] * len(value)


@rule(
    "softmax",
    "_softmax",
    "_safe_softmax",
    "log_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "cummax",
    "cummin",
    "sort",
    "argsort",
    "flip",
    "roll",
    "tril",
    "triu",
    "rot90",
)
def mix(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Combine the elements along dimensions, keeping the shape."""
    dims = flow.dims(a["self"])
    where = a.get("dim", a.get("dims", [-2, -1]))
    flow.pin((dims[i] for i in dimensions(where, len(dims))), f"is mixed by {flow.where(node)}")
    value = node.meta["val"]
    return dims if isinstance(value, torch.Tensor) else [dims] * len(value)


@rule(
    *(
        f"{kind}{rank}d"
        for rank in (1, 2, 3)
        for kind in (
            "avg_pool",
            "max_pool",
            "adaptive_avg_pool",
            "_adaptive_avg_pool",
            "adaptive_max_pool",
            "upsample_nearest",
            "_upsample_nearest_exact",
            "reflection_pad",
            "replication_pad",
        )
    ),
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "upsample_bilinear2d",
    "upsample_linear1d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "pad",
    "constant_pad_nd",
    "topk",
)
def resample(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Change the size of some dimensions (pooling, padding, choosing), keeping the others."""
    source = node.all_input_nodes[0]
    dims = flow.dims(source)
    name = operator_name(node)
    if name == "topk":
        moved = {a["dim"] % len(dims)}
    elif "pad" in a:
        moved = {len(dims) - 1 - i // 2 for i, amount in enumerate(a["pad"]) if amount != 0}
    else:
        rank = next(int(letter) for letter in name if letter.isdigit())
        moved = set(range(len(dims) - rank, len(dims)))
    place = f"is resized by {flow.where(node)}"
    flow.pin((dims[i] for i in moved), place)
    outputs: list[Terms] = [
        tuple(
            flow.new_dim(size, place) if i in moved else dims[i]
            for i, size in enumerate(value.shape)
        )
        for value in tensors_of(node.meta["val"])
    ]
    return outputs[0] if isinstance(node.meta["val"], torch.Tensor) else outputs


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "rand",
    "randn",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
)
def fill(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Create a tensor whose elements are all alike, so that any size will do."""
    result = flow.new(node)
    assert isinstance(result, tuple)
    flow.sizes(node, "size", a["size"], result)
    return result


@rule("arange", "linspace", "eye", "scalar_tensor", "tensor", "tril_indices", "triu_indices")
def constant(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Create a tensor whose elements depend on their position."""
    return flow.new(node, f"meets a tensor that is not a parameter, made by {flow.where(node)}")


@rule("one_hot")
def one_hot(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Add a dimension of classes."""
    size = value_of(node).shape[-1]
    return (*flow.dims(a["self"]), flow.new_dim(size, f"is made by {flow.where(node)}"))


@rule("view_as_complex", "view_as_real")
def complex_view(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Trade a last dimension of size 2 for complex numbers."""
    dims, place = flow.dims(a["self"]), f"holds complex numbers in {flow.where(node)}"
    if operator_name(node) == "view_as_complex":
        flow.pin(dims[-1], place)
        return dims[:-1]
    return (*dims, flow.new_dim(2, place))
