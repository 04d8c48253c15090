"""What the ranks of one training agree on, and tensors that are sharded over them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn

from graphopt.errors import TrainingError

Group = distributed.ProcessGroup


def is_shared(group: Group | None) -> bool:
    """Say whether several ranks train this model."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size(group) > 1
    )


def add_up(tensor: Tensor, group: Group | None) -> None:
    """Replace a tensor by its sum over the ranks."""
    if is_shared(group):
        distributed.all_reduce(tensor, group=group)


def require_same(what: str, text: str, tensors: Iterable[Tensor], group: Group | None) -> None:
    """Compare a text and tensors over the ranks, by their SHA-256.

    Args:
        what: What is compared, for the error.
        text: Must be the same on every rank.
        tensors: One or more on one device, must be the same bits on every rank.
        group: The ranks.

    Raises:
        TrainingError: on every rank, if one holds something else.
    """
    if not is_shared(group):
        return
    digest = hashlib.sha256(text.encode())
    items = [tensor.detach() for tensor in tensors]
    for item in items:
        digest.update(item.cpu().contiguous().numpy().tobytes())
    number = int.from_bytes(digest.digest()[:8], "big", signed=True)
    mine = torch.tensor([number], device=items[0].device)
    others = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(others, mine, group=group)
    different = [rank for rank, other in enumerate(others) if not torch.equal(other, others[0])]
    if different:
        raise TrainingError(
            f"expected the same {what} on every rank, got others on ranks {different} than on "
            "rank 0; start all ranks from the same checkpoint and call step() on all of them after "
            "the same steps"
        )


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, as FSDP2 makes parameters and optimizer state."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; of a sharded one, gathered from every rank."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def write(target: Tensor, value: Tensor) -> None:
    """Overwrite a tensor in place; every rank writes its own part of a sharded one."""
    if is_sharded(target):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        # Without a source rank nothing is sent: every rank has the whole value.
        parts = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(parts.to_local())
    else:
        target.copy_(value)


def refuse_wrapped(model: nn.Module, action: str) -> None:
    """Refuse to exchange parameters that DistributedDataParallel or FSDP holds on to.

    Raises:
        TrainingError: if the model is, contains or lies under such a wrapper, as far as it shows.
    """
    wrappers = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if wrappers or any(is_sharded(parameter) for parameter in model.parameters()):
        raise TrainingError(
            f"{action} makes new parameters, which DistributedDataParallel and FSDP would not "
            "notice; do it on the module inside, on every rank, and wrap it again"
        )
