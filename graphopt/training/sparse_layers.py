"""The block-sparse layers of a model, and their parameters in an optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt.errors import TrainingError
from graphopt.kernels import BlockSparseLinear


def sparse_layers(model: nn.Module, *, trained: bool) -> dict[str, BlockSparseLinear]:
    """Return the block-sparse layers by name; a shared layer once.

    Args:
        model: Any model, optimized or hand-built.
        trained: Leave out layers whose values are frozen.

    Raises:
        TrainingError: if two layers share their values, or they are flattened as by FSDP1.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BlockSparseLinear) and (module.values.requires_grad or not trained)
    }
    first: dict[int, str] = {}
    for name, layer in layers.items():
        other = first.setdefault(id(layer.values), name)
        if other != name:
            raise TrainingError(
                f"{other!r} and {name!r} share their values but not the places of their blocks; "
                "use one module twice, or give each its own values"
            )
        if layer.values.dim() != 3:
            raise TrainingError(
                f"expected values [blocks, block_out, block_in] in {name!r}, got "
                f"{list(layer.values.shape)}; shard with torch.distributed.fsdp.fully_shard, which "
                "keeps parameters as they are"
            )
    return layers


def require_held(layers: dict[str, BlockSparseLinear], optimizer: Optimizer) -> None:
    """Make sure that an optimizer updates the values of these layers.

    Raises:
        TrainingError: if it does not hold one of them.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        if layer.values.requires_grad and id(layer.values) not in held:
            raise TrainingError(
                f"the optimizer does not hold the values of {name!r}; pass the optimizer that "
                "trains them, made from this very model"
            )


def state_tensors(optimizer: Optimizer, values: nn.Parameter, name: str) -> dict[str, Tensor]:
    """Return the state that an optimizer keeps for every block: tensors [blocks, ...] by name.

    Numbers, such as a step count, belong to the whole parameter and are left out.

    Raises:
        TrainingError: if state of another form is kept, which cannot be moved with its blocks.
    """
    found = {}
    for key, value in optimizer.state.get(values, {}).items():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == values.shape[0]:
            found[key] = value
        elif isinstance(value, (list, tuple, dict)) or (
            isinstance(value, Tensor) and value.numel() > 1
        ):
            form = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TrainingError(
                f"expected state [blocks, ...] for the values of {name!r}, got {key} of {form}, "
                f"which {type(optimizer).__name__} keeps; use an optimizer with state per element"
            )
    return found


def exchange(
    optimizer: Optimizer | None,
    old: nn.Parameter,
    new: nn.Parameter,
    name: str,
    carry: Callable[[Tensor], Tensor],
) -> None:
    """Let an optimizer update another parameter, with the state of the old one carried over.

    Args:
        optimizer: The optimizer; None carries the gradient only.
        old: Values of a block-sparse layer.
        new: What takes their place, with values already in it.
        name: Name of the layer, for errors.
        carry: From a tensor like `old` to one like `new`.

    Raises:
        TrainingError: before anything is changed, if some state cannot be carried.
    """
    if optimizer is not None:
        moved = {key: carry(item) for key, item in state_tensors(optimizer, old, name).items()}
        for group in optimizer.param_groups:
            group["params"] = [new if item is old else item for item in group["params"]]
        if old in optimizer.state:
            optimizer.state[new] = {**optimizer.state.pop(old), **moved}
    if old.grad is not None:
        new.grad = carry(old.grad)


def block_norms(values: Tensor) -> Tensor:
    """Return the norm of every block [blocks], float64."""
    norms: Tensor = torch.linalg.vector_norm(values.detach(), dim=(1, 2), dtype=torch.float64)
    return norms
