"""A training in the middle, on disk: resumed, it goes on as if it had never stopped.

    training.json          everything but tensors, and where which tensor belongs
    training.safetensors   parameters, buffers, optimizer states, scores, random generators

Nothing is unpickled. (`torch.distributed.checkpoint` unpickles its own metadata.)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt.errors import CheckpointError
from graphopt.files import inside, new_directory, read_tensors, write_tensors
from graphopt.plain_values import decode, encode
from graphopt.runtime import installation_of

from .optimizer_state import load_optimizer_state, optimizer_state
from .random_states import random_states, restore_random_states
from .ranks import (
    Group,
    collected,
    gathered,
    group_rank,
    group_size,
    is_first,
    require_same,
    whole,
    write,
)

STATE_FILE = "training.json"
TENSOR_FILE = "training.safetensors"
_FILES = frozenset({STATE_FILE, TENSOR_FILE})
_SCHEMA_VERSION = 1


class Resumable(Protocol):
    """What can be saved with a training: clock, sample gate, topology, ledger, scheduler."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Go on after them."""


def save_training(
    directory: str | Path,
    *,
    model: nn.Module,
    process_group: Group | None = None,
    **parts: Resumable,
) -> None:
    """Write everything that the next step depends on; call it between steps, on every rank.

        save_training("run/", model=model, optimizer=optimizer, clock=clock, ledger=ledger)

    Tensors that FSDP2 shards are gathered one by one and written whole by the first rank, so any
    number of ranks can load them. The directory appears at once when all is written: an
    interruption leaves the checkpoint before it.

    Args:
        directory: Where to write; a checkpoint that lies there is replaced.
        model: The model, wrapped or not.
        process_group: The ranks that train together; all by default.
        parts: Optimizers, and whatever has `state_dict` and `load_state_dict` of plain values and
            tensors: clock, sample gate, topology or density schedule, ledger, learning rate.

    Raises:
        CheckpointError: Something cannot be written as plain data, or the directory holds other
            files; on every rank.
    """
    inner = unwrapped(model)
    tensors = _Tensors(keeping=is_first(process_group))

    def plain(name: str, value: Any) -> Any:
        try:
            return encode(value, tensors.add)
        except CheckpointError as error:
            raise CheckpointError(f"the state of {name} holds what no file can: {error}") from error

    states = {
        name: optimizer_state(part, inner) if isinstance(part, Optimizer) else part.state_dict()
        for name, part in sorted(parts.items())
    }
    data = {
        "schema_version": _SCHEMA_VERSION,
        "changes": _changes(inner),
        "ranks": group_size(process_group),
        "model": plain("model", dict(inner.state_dict(keep_vars=True))),
        "parts": {name: plain(name, state) for name, state in states.items()},
        "random": plain(
            "random",
            {name: gathered(state, process_group) for name, state in random_states().items()},
        ),
    }
    failure: CheckpointError | None = None
    if is_first(process_group):
        try:
            with new_directory(Path(directory), replaceable=_FILES) as target:
                write_tensors(target / TENSOR_FILE, tensors.whole)
                (target / STATE_FILE).write_text(json.dumps(data), encoding="utf-8")
        except CheckpointError as error:
            failure = error
    # The others wait for the file, and learn of a failure.
    if bool(collected([failure is not None], process_group).any()):
        raise failure or CheckpointError(f"the first rank could not write {directory}")


def load_training(
    directory: str | Path,
    *,
    model: nn.Module,
    process_group: Group | None = None,
    **parts: Resumable,
) -> None:
    """Go on where `save_training` stopped; call it on every rank, before the first step.

    Build everything as at the start, then load: same losses, to the last bit, as without the stop,
    dropout included, if the data comes in the same order: after the end of an epoch, or within one
    from a `SampleGate`. Another number of ranks may load it; random generators then go on from
    those of the rank of the same number, and are left alone where there was none.

    Args:
        directory: What `save_training` wrote, to be read by every rank.
        model: A model with the same parameters, wrapped or not, on any device.
        process_group: The ranks that train together; all by default.
        parts: The same parts by the same names.

    Raises:
        CheckpointError: A file is damaged, or does not fit the model or the parts.
    """
    directory = Path(directory)
    inner = unwrapped(model)
    path = inside(directory, STATE_FILE)
    data = _read(path)
    tensors = read_tensors(inside(directory, TENSOR_FILE))

    def found(name: Any) -> Tensor:
        if name not in tensors:
            raise CheckpointError(f"{directory} lacks the tensor {name!r}; was it copied whole?")
        return tensors[name]

    text = hashlib.sha256(path.read_bytes()).hexdigest()
    require_same("checkpoint", text, (), process_group)
    if set(parts) != set(data["parts"]):
        raise CheckpointError(
            f"expected the parts that were saved in {directory}, "
            f"{', '.join(sorted(data['parts'])) or 'none'}, got "
            f"{', '.join(sorted(parts)) or 'none'}; pass the same ones"
        )
    states = {name: decode(data["parts"][name], found) for name in sorted(parts)}
    # First, because a density schedule gives layers the sizes that they had.
    for name, part in parts.items():
        if not isinstance(part, Optimizer):
            part.load_state_dict(states[name])
    if _changes(inner) != data["changes"]:
        raise CheckpointError(
            f"{directory} was written by a model with other changes than this one; optimize it "
            "with the same recipe, or load it with graphopt.load from where it was saved"
        )
    _load_model(inner, decode(data["model"], found), directory)
    for name, part in parts.items():
        if isinstance(part, Optimizer):
            load_optimizer_state(part, inner, states[name])
    states_by_name = decode(data["random"], found)
    rank = group_rank(process_group)
    if rank < data["ranks"]:
        restore_random_states({name: state[rank] for name, state in states_by_name.items()})


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and `torch.compile`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


class _Tensors:
    """The tensors to write, whole, numbered; a tied parameter once.

    Only the first rank writes, so only there they pile up. What is tied is told by identity, which
    is the same on all ranks: each of them must take part in gathering.
    """

    def __init__(self, *, keeping: bool) -> None:
        self.whole: dict[str, Tensor] = {}
        self._keeping = keeping
        self._names: dict[int, tuple[str, Tensor]] = {}
        self._storages: set[int] = set()

    def add(self, value: Tensor) -> str:
        """Return the name under which a tensor is written."""
        if id(value) not in self._names:
            name = str(len(self._names))
            self._names[id(value)] = (name, value)
            complete = whole(value.detach())
            if self._keeping:
                self.whole[name] = self._on_its_own(complete.cpu())
        return self._names[id(value)][0]

    def _on_its_own(self, value: Tensor) -> Tensor:
        """Return a tensor that shares no memory with the others, which the file format wants."""
        place = value.untyped_storage().data_ptr()
        if place in self._storages:
            return value.clone()
        self._storages.add(place)
        return value


@torch.no_grad()
def _load_model(model: nn.Module, saved: dict[str, Tensor], directory: Path) -> None:
    present = model.state_dict(keep_vars=True)
    different = [
        *(f"{name} is missing" for name in present if name not in saved),
        *(f"{name} is too much" for name in saved if name not in present),
        *(
            f"{name} is {list(saved[name].shape)} {saved[name].dtype} instead of "
            f"{list(value.shape)} {value.dtype}"
            for name, value in present.items()
            if name in saved
            and (saved[name].shape != value.shape or saved[name].dtype != value.dtype)
        ),
    ]
    if different:
        raise CheckpointError(
            f"{directory} does not fit this model: {', '.join(different[:4])}; build the model as "
            "the training did that was saved"
        )
    for name, value in present.items():
        write(value, saved[name].to(value.device))


def _changes(model: nn.Module) -> list[Any]:
    """Return what was changed in an optimized model, JSON values."""
    installation = installation_of(model)
    if installation is None:
        return []
    made = [
        [name, record.pass_name, record.target, record.details]
        for name, plan in {"": installation.plan, **installation.plan.parts}.items()
        for record in plan.changes
    ]
    listed: list[Any] = json.loads(json.dumps(made))
    return listed


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["schema_version"]
        complete = {"changes", "ranks", "model", "parts", "random"} <= set(data)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not what graphopt writes: {error}") from error
    if version != _SCHEMA_VERSION or not complete:
        raise CheckpointError(
            f"{path} has schema version {version}, this graphopt reads {_SCHEMA_VERSION}; install "
            "the version that wrote it"
        )
    return dict(data)
