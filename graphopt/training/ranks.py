"""What the ranks of one training agree on, and tensors that are sharded over them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from graphopt.errors import TrainingError

Group = distributed.ProcessGroup

_Item = TypeVar("_Item")


def is_shared(group: Group | None) -> bool:
    """Say whether several ranks train this model."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size(group) > 1
    )


def group_size(group: Group | None) -> int:
    """Return how many ranks train this model, 1 without a process group."""
    return distributed.get_world_size(group) if is_shared(group) else 1


def group_rank(group: Group | None) -> int:
    """Return which of the ranks this is."""
    return distributed.get_rank(group) if is_shared(group) else 0


def is_first(group: Group | None) -> bool:
    """Say whether this rank writes what all ranks hold."""
    return group_rank(group) == 0


def gathered(tensor: Tensor, group: Group | None) -> Tensor:
    """Return a tensor of every rank [ranks, ...], on the CPU; they must have one shape."""
    if not is_shared(group):
        return tensor.detach().cpu()[None]
    mine = tensor.detach().contiguous().to(_device(group))
    parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, mine, group=group)
    return torch.stack(parts).cpu()


def collected(values: Sequence[float], group: Group | None) -> Tensor:
    """Return the numbers of every rank [ranks, values], float64; the same bits on every rank."""
    return gathered(torch.tensor(values, dtype=torch.float64), group)


def summed(tensor: Tensor, group: Group | None) -> Tensor:
    """Return the sum of a tensor over the ranks, on the CPU; the same bits on every rank."""
    total = tensor.detach().clone()
    if is_shared(group):
        total = total.to(_device(group))
        distributed.all_reduce(total, group=group)
    return total.cpu()


def in_step(batches: Iterable[_Item], *, process_group: Group | None = None) -> Iterator[_Item]:
    """Yield batches until the first rank has none left, so that no rank waits for another.

    A step of several ranks contains messages, in which each waits for all: a rank with one batch
    more than the others would wait for ever. What it has left is not used in this epoch.
    Cost: one message per batch.

    Args:
        batches: This rank's batches, a `DataLoader` for instance.
        process_group: The ranks that train together; all by default.
    """
    iterator = iter(batches)
    missing = object()
    while True:
        batch = next(iterator, missing)
        if not bool(collected([batch is not missing], process_group).all()):
            return
        yield batch  # type: ignore[misc]


def _device(group: Group | None) -> torch.device:
    """Return where the tensors of messages must lie."""
    if distributed.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def add_up(tensor: Tensor, group: Group | None) -> None:
    """Replace a tensor by its sum over the ranks."""
    if is_shared(group):
        distributed.all_reduce(tensor, group=group)


def require_same(what: str, text: str, tensors: Iterable[Tensor], group: Group | None) -> None:
    """Compare a text and tensors over the ranks, by their SHA-256.

    Args:
        what: What is compared, for the error.
        text: Must be the same on every rank.
        tensors: Must be the same bits on every rank.
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
    others = gathered(torch.tensor(number), group).tolist()
    different = [rank for rank, other in enumerate(others) if other != others[0]]
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
        local: Tensor = target.to_local()  # type: ignore[attr-defined]
        local.copy_(sharded_like(value, target).to_local())  # type: ignore[attr-defined]
    else:
        target.copy_(value)


def sharded_like(value: Tensor, target: Tensor) -> Tensor:
    """Return a whole tensor, which every rank has, sharded as another one is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    # Without a source rank nothing is sent.
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


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
