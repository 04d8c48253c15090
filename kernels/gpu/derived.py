"""What is computed from tensors once and kept until they change or are gone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

__all__ = ["Derived"]

Value = TypeVar("Value")


@dataclass
class _Entry:
    stamp: tuple[Hashable, ...]
    others: list[TensorWeakRef]
    values: dict[Hashable, Any] = field(default_factory=dict)


class Derived(Generic[Value]):
    """Values derived from tensors; it keeps no tensor alive and saves nothing.

    A value is computed again after any in-place change that torch counts (`load_state_dict`, an
    optimizer step, `copy_`). A write through `.data` is not counted: write under `torch.no_grad()`.
    Tensors made in inference mode count no changes, so nothing is kept for them.
    """

    def __init__(self) -> None:
        self._entries = WeakTensorKeyDictionary()

    def get(
        self, tensors: tuple[Tensor, ...], key: Hashable, compute: Callable[[], Value]
    ) -> Value:
        """Return the value of this key for these tensors, computed if it is not there."""
        if any(tensor.is_inference() for tensor in tensors):
            return compute()
        stamp = tuple((t._version, t.data_ptr(), t.device, t.dtype, t.shape) for t in tensors)
        entry = self._entries.get(tensors[0])
        if entry is None or entry.stamp != stamp or not _same(entry.others, tensors[1:]):
            entry = _Entry(stamp, [TensorWeakRef(tensor) for tensor in tensors[1:]])
            self._entries[tensors[0]] = entry
        if key not in entry.values:
            entry.values[key] = compute()
        return cast("Value", entry.values[key])


def _same(references: list[TensorWeakRef], tensors: tuple[Tensor, ...]) -> bool:
    return len(references) == len(tensors) and all(
        reference() is tensor for reference, tensor in zip(references, tensors, strict=True)
    )
