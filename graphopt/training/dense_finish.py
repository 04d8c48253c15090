"""The last part of a training with dense layers in the place of block-sparse ones."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt.errors import PlanError, TrainingError
from graphopt.kernels import BlockSparseLinear
from graphopt.passes.base import replace_module
from graphopt.passes.dense_form import dense_form
from graphopt.passes.linear_layers import LinearLayer
from graphopt.runtime import installation_of

from .installed_plan import InstalledPlan
from .ranks import refuse_wrapped
from .sparse_layers import exchange, require_held, sparse_layers, state_tensors


def densify_in_place(model: nn.Module, optimizer: Optimizer | None = None) -> tuple[str, ...]:
    """Put dense layers in the place of all block-sparse ones, and go on training.

    Outputs stay the same: missing blocks are zeros, and so is the optimizer's state for them; that
    of stored blocks, numbers such as the step count, and gradients are carried over. A layer's
    `values` [blocks, block_out, block_in] become a new parameter, `weight`
    [out_features, in_features] of an `nn.Linear` or what the pass replaced, in the same parameter
    group; `bias` stays the same object.

    An optimized model stays one: the changes that made those layers leave its plan, so `save`,
    `report` and `densify` tell what it is now. `graphopt.densify` makes a dense copy instead.

    Args:
        model: Any model, optimized or hand-built, in the middle of its training.
        optimizer: The optimizer of those layers; None if one is made afterwards.

    Returns:
        The names of the layers.

    Raises:
        TrainingError: There is no such layer, the model is wrapped for distributed training, a
            layer of an optimized model was not made by its plan, or the optimizer does not hold a
            layer or keeps state that cannot be carried. Nothing is changed then.

    Source: Dao et al., Monarch, ICML 2022 ("reverse sparsification").
    """
    refuse_wrapped(model, "densifying")
    layers = sparse_layers(model, trained=False)
    if not layers or isinstance(model, BlockSparseLinear):
        raise TrainingError(
            f"expected a model that contains BlockSparseLinear layers, got {type(model).__name__}; "
            "there is nothing to put in the place of"
        )
    if optimizer is not None:
        require_held(layers, optimizer)
        _require_dense_state(layers, optimizer)
    names = {
        name: layers[first]
        for first, layer in layers.items()
        for name, module in model.named_modules(remove_duplicate=False)
        if module is layer
    }
    installation = installation_of(model)
    plan = None if installation is None else InstalledPlan(model, installation)
    dense = {id(layer): _dense(layer, optimizer, name) for name, layer in layers.items()}
    for name, layer in names.items():
        replace_module(model, name, dense[id(layer)])
    if plan is not None:
        plan.drop(layers)
        plan.install(model)
    return tuple(layers)


def _require_dense_state(layers: dict[str, BlockSparseLinear], optimizer: Optimizer) -> None:
    for name, layer in layers.items():
        for key, item in state_tensors(optimizer, layer.values, name).items():
            if item.shape != layer.values.shape:
                raise TrainingError(
                    f"expected state {list(layer.values.shape)} for the values of {name!r}, got "
                    f"{key} {list(item.shape)}, which a dense weight has no place for; make a new "
                    "optimizer after densify_in_place(model)"
                )


def _dense(layer: BlockSparseLinear, optimizer: Optimizer | None, name: str) -> nn.Module:
    """Return the dense layer, of the class it once had, and let the optimizer go on with it."""
    form = _form(layer)
    dense = form.filled(layer.weight.detach(), layer.bias, trained=layer.values.requires_grad)

    def carry(tensor: Tensor) -> Tensor:
        matrix = layer.layout.unpack(tensor)
        return (matrix.t() if form.transposed else matrix).contiguous()

    exchange(optimizer, layer.values, dense.get_parameter(form.weight_name), name, carry)
    return dense.train(layer.training)


def _form(layer: BlockSparseLinear) -> LinearLayer:
    with suppress(PlanError):
        return dense_form(layer)
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    return LinearLayer(linear, "weight", "bias" if layer.bias is not None else None, False)
