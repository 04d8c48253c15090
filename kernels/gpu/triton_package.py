"""Whether triton is there to compile kernels with."""

from __future__ import annotations

import importlib
import warnings
from functools import cache

__all__ = ["triton_is_installed"]


@cache
def triton_is_installed() -> bool:
    """Return whether triton can be imported; warn once if it cannot."""
    try:
        importlib.import_module("triton")
    except ImportError:
        pass
    else:
        return True
    warnings.warn(
        "triton is not installed, so on CUDA devices block-sparse layers multiply their dense "
        "weight and rows of tokens are moved by torch: install graphopt[triton] for the kernels",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
