"""Axis rules of matrix products, convolutions, attention, lookups and normalisations."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters

from torch import fx

from .axis_flow import Arguments, Flow, Terms, operator_name, rule, value_of
from .axis_terms import ONE, Product, Term, product_of, size_of


def contract(
    flow: Flow, node: fx.Node, operands: Sequence[fx.Node], labels: Sequence[str], result: str
) -> Terms:
    """Apply an Einstein sum over two tensors: one label per dimension.

    Labels in both operands and not in the result are contracted. With a weight on one side they
    are its consumed dimensions; between two activations (or two weights) they are pinned.
    """
    found: dict[str, list[Term]] = {}
    for operand, letters in zip(operands, labels, strict=True):
        for letter, term in zip(letters, flow.dims(operand), strict=True):
            found.setdefault(letter, []).append(term)
    terms = {letter: flow.unify_all(items) for letter, items in found.items()}
    inner = [letter for letter in terms if letter not in result]
    shared = [letter for letter in inner if all(letter in item for item in labels)]
    place = flow.where(node)
    flow.pin((terms[a] for a in inner if a not in shared), f"is summed over by {place}")
    weights = [operand for operand in operands if operand in flow.sources]
    if len(operands) != 2 or len(weights) == 2:
        flow.pin((terms[a] for a in shared), f"is contracted between two weights by {place}")
    elif not weights:
        flow.pin((terms[a] for a in shared), f"is contracted between two activations by {place}")
        flow.heads.extend(terms[a] for a in result if all(a in item for item in labels))
        flow.head_dims.extend(terms[a] for a in shared)
        flow.head_dims.extend(terms[a] for a in result if a in labels[1] and a not in labels[0])
    else:
        side = list(operands).index(weights[0])
        _record_weight(flow, node, list(operands), list(labels), side, shared, result)
    return tuple(terms[letter] for letter in result)


def _record_weight(
    flow: Flow,
    node: fx.Node,
    operands: list[fx.Node],
    labels: list[str],
    side: int,
    shared: list[str],
    result: str,
) -> None:
    weight, activation = operands[side], operands[1 - side]
    if not flow.sources[weight]:
        flow.pin(flow.dims(weight), f"meets a tensor that is not a parameter in {flow.where(node)}")
        return
    for letter, dim in zip(labels[side], flow.dims(weight), strict=True):
        if letter in shared:
            flow.use("consumer", weight, dim, activation=activation)
        elif letter in result and letter not in labels[1 - side]:
            flow.use("producer", weight, dim)


def _letters(count: int) -> str:
    return ascii_letters[:count]


@rule("linear")
def linear(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Map [..., in] with weight [out, in] and bias [out] to [..., out]."""
    batch = _letters(len(flow.dims(a["input"])) - 1)
    out = "Y" if len(flow.dims(a["weight"])) == 2 else ""
    operands, labels = (a["input"], a["weight"]), (batch + "Z", out + "Z")
    result = contract(flow, node, operands, labels, batch + out)
    return flow.broadcast([result, flow.dims(a["bias"])])


@rule("quantized_linear")
def quantized_linear(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Map [rows, in] with integers [out, in] to [rows, out]; both keep their size."""
    rows, width = flow.dims(a["x"])
    reason = f"meets the integers of {flow.where(node)}"
    flow.pin((width, *flow.dims(a["codes"])), reason)
    return rows, flow.new_dim(value_of(node).shape[1], reason)


@rule("mm", "matmul", "bmm", "mv", "dot", "vdot", "inner")
def matmul(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Multiply [..., n, k] by [..., k, m]; either side may be a vector."""
    left = a["self"]
    right = next(a[name] for name in ("mat2", "other", "vec", "tensor") if name in a)
    return _matrix_product(flow, node, left, right)


def _matrix_product(flow: Flow, node: fx.Node, left: fx.Node, right: fx.Node) -> Terms:
    sides = [len(flow.dims(left)), len(flow.dims(right))]
    batch = _letters(max(0, max(sides) - 2))
    rows, columns = "X" if sides[0] > 1 else "", "Y" if sides[1] > 1 else ""
    labels = [
        batch[len(batch) - max(0, sides[0] - 2) :] + rows + "Z",
        batch[len(batch) - max(0, sides[1] - 2) :] + "Z" + columns,
    ]
    return contract(flow, node, (left, right), labels, batch + rows + columns)


@rule("addmm", "baddbmm", "addbmm", "addmv")
def add_product(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Add a broadcast tensor to a matrix product."""
    names = [name for name in ("mat1", "mat2", "batch1", "batch2", "mat", "vec") if name in a]
    result = _matrix_product(flow, node, a[names[0]], a[names[1]])
    return flow.broadcast([result, flow.dims(a["self"])])


@rule("einsum")
def einsum(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Apply an equation over one or two tensors."""
    inputs, _, output = a["equation"].replace(" ", "").partition("->")
    labels = inputs.split(",")
    if not output and "->" not in a["equation"]:
        letters = sorted({c for item in labels for c in item if c.isalpha()})
        output = "".join(c for c in letters if inputs.count(c) == 1)
        output = "..." + output if "..." in inputs else output
    spare = [c for c in reversed(ascii_letters) if c not in inputs]
    ranks = [len(flow.dims(item)) for item in a["tensors"]]
    extra = [r - len(s.replace("...", "")) for r, s in zip(ranks, labels, strict=True)]
    ellipsis = "".join(spare[: max(extra, default=0)])
    labels = [
        item.replace("...", ellipsis[len(ellipsis) - max(0, count) :])
        for item, count in zip(labels, extra, strict=True)
    ]
    if len(labels) > 2 or any(len(set(item)) < len(item) for item in labels):
        return unknown(flow, node, a)
    return contract(flow, node, a["tensors"], labels, output.replace("...", ellipsis))


@rule("scaled_dot_product_attention")
def attention(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Attend with query [..., H, L, E], key [..., H, S, E] and value [..., H, S, V]."""
    query, key, value = (flow.dims(a[name]) for name in ("query", "key", "value"))
    mask = flow.dims(a["attn_mask"])
    place = flow.where(node)
    flow.pin(
        flow.unify_all([query[-1], key[-1]]), f"is contracted between two activations by {place}"
    )
    flow.pin(flow.unify_all([key[-2], value[-2]]), f"is attended over by {place}")
    batch = [query[:-2], key[:-2], value[:-2]]
    if a.get("enable_gqa"):
        groups = flow.broadcast([key[-3:-2], value[-3:-2]])[0]
        count = flow.fresh(size_of(query[-3]) // size_of(groups))
        flow.unify(query[-3], Product((groups, count)))
        batch = [query[:-2], (*key[:-3], query[-3]), (*value[:-3], query[-3])]
    outer = flow.broadcast([*batch, mask[:-2]])
    flow.broadcast([(query[-2], key[-2]), mask[-2:]])
    flow.heads.extend(outer)
    flow.head_dims.extend([query[-1], value[-1]])
    return (*outer, query[-2], value[-1])


@rule(
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
def convolution(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Convolve [batch, in, ...] with [out, in / groups, ...] or, transposed, [in, out / groups]."""
    x, weight, bias = (flow.dims(a[name]) for name in ("input", "weight", "bias"))
    transposed = "transpose" in operator_name(node) or bool(a.get("transposed"))
    spatial = value_of(a["weight"]).dim() - 2
    groups = flow.fresh(a["groups"])
    channels_in = x[-spatial - 1]
    inner_in = flow.fresh(size_of(channels_in) // a["groups"])
    outer, inner = weight[0], weight[1]
    if transposed:
        inner_out = inner
        flow.unify(outer, Product((groups, inner_in)))
    else:
        inner_out = flow.fresh(size_of(outer) // a["groups"])
        flow.unify(outer, Product((groups, inner_out)))
        flow.unify(inner, inner_in)
    flow.unify(channels_in, Product((groups, inner_in)))
    produced = product_of([groups, inner_out])
    if bias:
        flow.unify(bias[0], produced)
    if a["groups"] > 1:
        flow.site(node, "groups", groups)
    if a["weight"] not in flow.sources or a["input"] in flow.sources:
        flow.pin([*x, *weight], f"is contracted between two activations by {flow.where(node)}")
    else:
        produces, consumes = (inner, outer) if transposed else (outer, inner)
        operand, x_node = a["weight"], a["input"]
        flow.use("producer", operand, produces, inner_out, convolution=True)
        flow.use("consumer", operand, consumes, inner_in, activation=x_node, convolution=True)
        flow.use("pointwise", operand, outer, groups, convolution=True)
    place = f"is a spatial dimension of {flow.where(node)}"
    moved = tuple(flow.new_dim(size, place) for size in value_of(node).shape[-spatial:])
    return (*x[: -spatial - 1], produced, *moved)


@rule("embedding")
def embedding(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Look up rows of [rows, width] by indices."""
    rows, width = flow.dims(a["weight"])
    flow.pin(rows, f"is looked up by index in {flow.where(node)}")
    flow.use("lookup", a["weight"], width)
    return (*flow.dims(a["indices"]), width)


@rule(
    "batch_norm",
    "native_batch_norm",
    "cudnn_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "instance_norm",
)
def batch_norm(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Normalise every channel (dimension 1) by itself."""
    x = flow.dims(a["input"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        for term in flow.dims(a.get(name)):
            flow.unify(x[1], term)
    return _first_output(flow, node, x)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Normalise over the last dimensions."""
    x = flow.dims(a["input"])
    count = len(a["normalized_shape"])
    flow.pin(x[-count:], f"is normalised over by {flow.where(node)}", symmetric=True)
    flow.broadcast([x, flow.dims(a.get("weight")), flow.dims(a.get("bias"))])
    return _first_output(flow, node, x)


@rule("group_norm", "native_group_norm")
def group_norm(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Normalise over groups of channels (dimension 1)."""
    x = flow.dims(a["input"])
    flow.pin(x[1], f"is normalised over by {flow.where(node)}")
    for name in ("weight", "bias"):
        for term in flow.dims(a.get(name)):
            flow.unify(x[1], term)
    return _first_output(flow, node, x)


def _first_output(flow: Flow, node: fx.Node, dims: Terms) -> Terms | list[Terms]:
    """Return `dims` for a single result, and for the first of several; the others are opaque."""
    fresh = flow.new(node, f"is a statistic of {flow.where(node)}")
    return dims if isinstance(fresh, tuple) else [dims, *fresh[1:]]


def unknown(flow: Flow, node: fx.Node, a: Arguments) -> Terms | list[Terms]:
    """Pin everything that touches an operator without a rule."""
    place = flow.where(node)
    for item in node.all_input_nodes:
        found = flow.terms.get(item, ())
        for dims in [found] if isinstance(found, tuple) else found:
            flow.pin(dims, f"reaches {place}, which has no axis rule")
    return flow.new(node, f"comes from {place}, which has no axis rule")


@rule("prelu")
def prelu(flow: Flow, node: fx.Node, a: Arguments) -> Terms:
    """Scale negative values per channel (dimension 1)."""
    x, weight = flow.dims(a["self"]), flow.dims(a["weight"])
    if weight and weight[0] != ONE:
        flow.unify(x[1] if len(x) > 1 else x[0], weight[0])
    return x
