"""Random masks that keep everything: what dropout computes, without what it draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


class FixedDraws(TorchDispatchMode):
    """Draw ones from every Bernoulli distribution, so that dropout only scales.

    Two programs that draw different numbers of random masks can then be compared: one that drops
    the rows of padding draws fewer.
    """

    def __init__(self) -> None:
        """Start; nothing is changed before the mode is entered."""
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator, or return what it would be if all its draws were 1."""
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None:
            return replacement(*args)
        return func(*args, **(kwargs or {}))


def _fill(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.fill_(1)


def _ones(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.ones_like(x)


def _dropout(x: torch.Tensor, rate: float, train: bool | None) -> tuple[torch.Tensor, torch.Tensor]:
    scale = 1 / (1 - rate) if train and rate < 1 else 1.0
    return x * scale, torch.ones_like(x, dtype=torch.bool)


_REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    _aten.bernoulli_.float: _fill,
    _aten.bernoulli_.Tensor: _fill,
    _aten.bernoulli.default: _ones,
    _aten.bernoulli.p: _ones,
    _aten.native_dropout.default: _dropout,
}
