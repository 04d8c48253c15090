"""The state of an optimizer as plain values and whole tensors, however it is sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt.errors import CheckpointError

from .ranks import is_sharded, sharded_like, whole


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the groups with the names of their parameters, and the state of every parameter.

    Call it on every rank: what is sharded is gathered.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key != "params"}
        held = [
            {
                "name": names.get(id(parameter), ""),
                "state": {
                    key: whole(value) if isinstance(value, Tensor) else value
                    for key, value in optimizer.state.get(parameter, {}).items()
                },
            }
            for parameter in group["params"]
        ]
        groups.append({"options": options, "parameters": held})
    return {"groups": groups}


def load_optimizer_state(optimizer: Optimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    """Give an optimizer the state of `optimizer_state`; each rank keeps its part of it.

    Raises:
        CheckpointError: The optimizer holds other parameters, or in another order.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        present = [names.get(id(parameter), "") for parameter in group["params"]]
        stored = [
            item["name"]
            for part in saved["groups"][index : index + 1]
            for item in part["parameters"]
        ]
        if present != stored or len(optimizer.param_groups) != len(saved["groups"]):
            raise CheckpointError(
                f"expected an optimizer with {len(saved['groups'])} groups of parameters, of which "
                f"group {index} holds {', '.join(stored[:3])} ..., got "
                f"{len(optimizer.param_groups)} with {', '.join(present[:3])} ...; make it as the "
                "training did that was saved"
            )
    for group, data in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(data["options"])
        for parameter, item in zip(group["params"], data["parameters"], strict=True):
            if item["state"]:
                optimizer.state[parameter] = {
                    key: _placed(value, parameter, group) for key, value in item["state"].items()
                }
            else:
                optimizer.state.pop(parameter, None)


def _placed(value: Any, parameter: nn.Parameter, group: dict[str, Any]) -> Any:
    """Return a state value where the optimizer wants it: step counts often stay on the CPU."""
    if not isinstance(value, Tensor):
        return value
    if is_sharded(parameter) and value.shape == parameter.shape:
        return sharded_like(value.to(parameter.device), parameter)
    beside = value.dim() or group.get("capturable") or group.get("fused")
    return value.to(parameter.device if beside else torch.device("cpu"))
