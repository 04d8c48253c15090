"""What is computed from index tensors once and kept until they change or are gone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

__all__ = ["Derived"]

Value = TypeVar("Value")


class Derived(Generic[Value]):
    """Values derived from small tensors; it keeps none of them alive and saves nothing.

    While torch counts no change of the tensors, nothing is read back from the device: unlike
    `kernels.derived`, no call waits for it. After a change (`load_state_dict`, `copy_`, the
    broadcast of buffers by DistributedDataParallel at every forward) their contents are compared,
    and values are computed again if these differ. Tensors made in inference mode count no changes:
    theirs are compared at every call. A write through `.data` is not counted.
    """

    def __init__(self) -> None:
        self._entries = WeakTensorKeyDictionary()

    def get(
        self, tensors: tuple[Tensor, ...], key: Hashable, compute: Callable[[], Value]
    ) -> Value:
        """Return the value of this key for these tensors, computed if it is not there."""
        entry: _Entry | None = self._entries.get(tensors[0])
        if entry is None or not entry.is_of(tensors):
            entry = _Entry(tensors)
            self._entries[tensors[0]] = entry
        if key not in entry.values:
            entry.values[key] = compute()
        return cast("Value", entry.values[key])


class _Entry:
    """What is kept for some tensors, and what they were like."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.values: dict[Hashable, Any] = {}
        self._contents = tuple(tensor.clone() for tensor in tensors)
        self._look_at(tensors)

    def is_of(self, tensors: tuple[Tensor, ...]) -> bool:
        """Return whether these tensors hold what they held."""
        same = all(
            reference() is tensor for reference, tensor in zip(self._seen, tensors, strict=True)
        )
        if same and self._stamps == tuple(map(_stamp, tensors)):
            return True
        equal = all(
            held.device == tensor.device and torch.equal(held, tensor)
            for held, tensor in zip(self._contents, tensors, strict=True)
        )
        if equal:
            self._look_at(tensors)
        return equal

    def _look_at(self, tensors: tuple[Tensor, ...]) -> None:
        self._seen = [TensorWeakRef(tensor) for tensor in tensors]
        self._stamps = tuple(map(_stamp, tensors))


def _stamp(tensor: Tensor) -> Hashable:
    """Return what changes when torch counts a change; nothing equals it where none are counted."""
    if tensor.is_inference():
        return object()
    return tensor.data_ptr(), tensor._version
