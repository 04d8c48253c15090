"""Fold a BatchNorm with fixed statistics into the convolution or linear layer before it.

before: y = batch_norm(conv(x, W, b));  s = weight / sqrt(running_var + eps)
after:  y = conv(x, s W, s (b - running_mean) + bias)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphopt.passes.axis_flow import arguments_of, operator_name
from graphopt.passes.base import (
    Candidate,
    Change,
    Context,
    Cost,
    Miss,
    Pass,
    Proposal,
    State,
    replace_module,
)
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import PlanError
from graphopt.passes.facts import facts_of
from graphopt.passes.program import Program
from graphopt.passes.replaceability import holds_parameters, replacement_refusal

_NORMS: dict[str, type[_BatchNorm]] = {
    kind.__name__: kind
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
}
_TRANSPOSED = frozenset(f"conv_transpose{n}d" for n in (1, 2, 3))
_PRODUCERS = frozenset({"linear", "conv1d", "conv2d", "conv3d"}) | _TRANSPOSED


class _Fold(Details):
    """What `apply` and `restore` need.

    Attributes:
        layer: Name of the convolution or linear layer.
        operator: Its ATen operator.
        had_bias: Whether it had a bias of its own.
        kind: Class of the BatchNorm.
        features: Its channels.
        eps: Its epsilon.
        momentum: Its momentum, None for cumulative averages.
        affine: Whether it had a weight and a bias.
    """

    layer: str
    operator: str
    had_bias: bool
    kind: str
    features: int = Field(ge=1)
    eps: float = Field(ge=0)
    momentum: float | None
    affine: bool


@final
@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Pass):
    """Scale the weights before a BatchNorm instead of their outputs; for inference only.

    The BatchNorm becomes an `nn.Identity`, so the model's own forward computes the same. Weights
    are folded in float64 and rounded once to their type.
    """

    name: ClassVar[str] = "fold-batch-norm"
    exact: ClassVar[bool] = True
    inference_only: ClassVar[bool] = True

    def propose(self, program: Program, context: Context) -> Proposal:
        """Find every BatchNorm whose input is the output of one layer that nobody else reads."""
        candidates: list[Candidate] = []
        misses: list[Miss] = []
        for target in dict.fromkeys(str(n.target) for n, _ in program.leaf_calls(_BatchNorm)):
            refusal = _refusal(program, context, target)
            if refusal is None:
                candidates.append(self._candidate(program, target))
            else:
                misses.append(Miss(pass_name=self.name, target=target, reason=refusal))
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def _candidate(self, program: Program, target: str) -> Candidate:
        node = program.calls(target)[0]
        source = node.args[0]
        assert isinstance(source, fx.Node)
        layer_name = str(source.target)
        layer, norm = program.module(layer_name), program.module(target)
        assert isinstance(norm, _BatchNorm)
        details = _Fold(
            layer=layer_name,
            operator=_producer(program, source) or "",
            had_bias=layer.bias is not None,
            kind=_kind(norm),
            features=norm.num_features,
            eps=norm.eps,
            momentum=norm.momentum,
            affine=norm.affine,
        )
        facts = facts_of(program)
        alone = facts.cost([source])
        added = 0 if details.had_bias else norm.num_features
        return Candidate(
            change=Change(
                pass_name=self.name,
                target=target,
                summary=f"folded into {layer_name}",
                details=details.model_dump(),
            ),
            before=facts.cost([source, node]),
            after=Cost(
                flops=alone.flops,
                size_bytes=alone.size_bytes + added * _weight(layer).element_size(),
                parameters=alone.parameters + added,
            ),
            predicted_error=0.0,
        )

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return the folded weight and bias of the layer."""
        details, layer, norm = _modules(program, change)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight = _weight(layer)
        scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
        shift = -norm.running_mean.detach().double()
        if isinstance(layer.bias, Tensor):
            shift = shift + layer.bias.detach().double()
        if norm.affine:
            scale = scale * norm.weight.detach().double()
            shift = shift * scale + norm.bias.detach().double()
        else:
            shift = shift * scale
        folded = _scaled(weight.detach().double(), scale, details.operator)
        return {
            f"{details.layer}.weight": folded.to(weight.dtype),
            f"{details.layer}.bias": shift.to(weight.dtype),
        }

    def apply(self, program: Program, change: Change) -> None:
        """Give the layer a bias and put an identity in the place of the BatchNorm."""
        details, layer, norm = _modules(program, change)
        calls = program.calls(change.target)
        for node in calls:
            source = node.args[0]
            if not isinstance(source, fx.Node) or source.target != details.layer:
                raise PlanError(
                    f"in this call {change.target} does not follow {details.layer}; "
                    "is this plan for another model?"
                )
        if any(set(node.users) - set(calls) for node in program.calls(details.layer)):
            raise PlanError(f"in this call the output of {details.layer} is also read elsewhere")
        weight = _weight(layer)
        if layer.bias is None:
            layer.bias = nn.Parameter(
                torch.empty(details.features, dtype=weight.dtype, device=weight.device),
                requires_grad=weight.requires_grad,
            )
        replace_module(program.model, change.target, nn.Identity().train(norm.training))
        for node in calls:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
        program.changed()

    def restore(self, model: nn.Module, change: Change) -> None:
        """Put a BatchNorm back that only adds what the layer's bias was not there to hold."""
        details = read_details(_Fold, change)
        layer = model.get_submodule(details.layer)
        training = model.get_submodule(change.target).training
        weight = _weight(layer)
        norm = _NORMS[details.kind](
            details.features, eps=details.eps, momentum=details.momentum, affine=details.affine
        ).to(device=weight.device, dtype=weight.dtype)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            norm.running_var.fill_(1 - details.eps)
            if not details.had_bias:
                assert isinstance(layer.bias, Tensor)
                norm.running_mean.copy_(-layer.bias)
                layer.register_parameter("bias", None)
        replace_module(model, change.target, norm.train(training))


def _refusal(program: Program, context: Context, target: str) -> str | None:
    """Say why this BatchNorm stays, None if it can be folded."""
    node, norm = program.calls(target)[0], program.module(target)
    assert isinstance(norm, _BatchNorm)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    operator = _producer(program, source)
    layer_name = str(source.target) if operator else target
    pattern = context.ignored_by(target, layer_name)
    if pattern is not None:
        return f"ignored by the pattern {pattern!r}"
    if context.training:
        return "training needs its batch statistics"
    if norm.running_mean is None:
        return "it tracks no running statistics, so it normalises by each batch"
    refusal = replacement_refusal(program, target)
    if refusal is not None:
        return refusal
    if _batch_norm_operator(node) is None or not _kind(norm):
        return f"{type(norm).__name__} computes more than a batch normalisation"
    if operator is None:
        return f"its input {source.name} is not the output of a convolution or linear layer"
    readers = [user.name for user in source.users if user is not node]
    if readers:
        return f"the output of {layer_name} is also read by {readers[0]}"
    layer = program.module(layer_name)
    if not holds_parameters(layer, "weight", "bias"):
        return f"the weight of {layer_name} is computed by a parametrization"
    if source.meta["val"].ndim != _weight(layer).ndim:
        return f"it normalises another axis than the outputs of {layer_name}"
    return replacement_refusal(program, layer_name)


def _producer(program: Program, node: fx.Node) -> str | None:
    """Return the operator of a layer call that ends in `W x + b` on its own parameters."""
    last = _last_operation(node)
    if last is None or operator_name(last) not in _PRODUCERS:
        return None
    layer, arguments = program.module(str(node.target)), arguments_of(last)
    own = all(
        _read(program, arguments[name]) is getattr(layer, name, None) for name in ("weight", "bias")
    )
    return operator_name(last) if own else None


def _batch_norm_operator(node: fx.Node) -> str | None:
    last = _last_operation(node)
    name = operator_name(last) if last is not None else ""
    return name if "batch_norm" in name else None


def _last_operation(node: fx.Node) -> fx.Node | None:
    body: fx.Graph | None = node.meta.get("body")
    if node.op != "call_module" or body is None:
        return None
    result = next(iter(reversed(body.nodes))).args[0]
    return result if isinstance(result, fx.Node) and result.op == "call_function" else None


def _read(program: Program, node: object) -> object:
    """Return the parameter that a node of a leaf's body reads, None if it reads none."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    parent, _, attribute = str(node.target).rpartition(".")
    return getattr(program.module(parent), attribute)


def _kind(norm: nn.Module) -> str:
    """Return the torch class of a BatchNorm, also for a subclass; empty if it has none."""
    return next((kind.__name__ for kind in type(norm).__mro__ if kind in _NORMS.values()), "")


def _modules(program: Program, change: Change) -> tuple[_Fold, nn.Module, _BatchNorm]:
    """Return the checked details, the layer and the BatchNorm of a change.

    Raises:
        PlanError: if they do not fit each other.
    """
    details = read_details(_Fold, change)
    layer, norm = program.module(details.layer), program.module(change.target)
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        raise PlanError(
            f"{change.target} must be a BatchNorm with running statistics to be folded, "
            f"it is {type(norm).__name__}"
        )
    if (
        details.operator not in _PRODUCERS
        or details.kind not in _NORMS
        or not holds_parameters(layer, "weight", "bias")
        or details.had_bias != (layer.bias is not None)
        or not norm.num_features == details.features == _outputs(layer, details.operator)
    ):
        raise PlanError(
            f"{details.layer} ({type(layer).__name__}) does not fit the fold of {change.target} "
            f"with {norm.num_features} channels; is this plan for another model?"
        )
    return details, layer, norm


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _outputs(layer: nn.Module, operator: str) -> int:
    shape = _weight(layer).shape
    return shape[1] * _groups(layer) if operator in _TRANSPOSED else shape[0]


def _groups(layer: nn.Module) -> int:
    groups = getattr(layer, "groups", 1)
    assert isinstance(groups, int)
    return groups


def _scaled(weight: Tensor, scale: Tensor, operator: str) -> Tensor:
    """Scale the output channels of a weight [out, in, ...], transposed: [in, out / groups, ...]."""
    if operator not in _TRANSPOSED:
        return weight * scale.view(-1, *[1] * (weight.ndim - 1))
    groups = scale.numel() // weight.shape[1]
    split = weight.view(groups, -1, *weight.shape[1:])
    factors = scale.view(groups, 1, weight.shape[1], *[1] * (weight.ndim - 2))
    return (split * factors).view_as(weight)
