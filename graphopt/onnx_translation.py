"""ATen graphs as ONNX models."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphopt.passes.errors import ExportError, MissingExtraError

from .flat_model import first_line

if TYPE_CHECKING:
    import onnx_ir

OPSETS = (23, 20)
"""Opsets in the order they are tried.

23 has attention as one operation: faster in ONNX Runtime, and equal to torch where a mask hides
every position, unlike 20. ONNX Runtime refuses some models in 23 (rotary tables that broadcast).
"""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's warnings and log lines from the user; failures still raise."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Compute attention from matrix products.

    The fused kernels have other strides, on which views are possible that fail on ONNX's, and the
    fused encoder layer has no ONNX form.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def translate(
    program: torch.export.ExportedProgram,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    version: int,
) -> onnx_ir.Model:
    """Turn an ATen graph into an ONNX model.

    Args:
        program: The graph, traced under `plain_attention`.
        input_names: Names of its inputs in order; None leaves them to torch.
        output_names: The same for its outputs.
        version: ONNX opset.

    Raises:
        ExportError: if torch cannot write it in this opset.
        MissingExtraError: if onnx or onnxscript is not installed.
    """
    try:
        with plain_attention():
            translated = torch.onnx.export(
                program,
                input_names=input_names,
                output_names=output_names,
                opset_version=version,
                dynamo=True,
                verbose=False,
            )
    except ImportError as error:
        raise MissingExtraError(
            f"ONNX export needs onnx and onnxscript: pip install onnx onnxscript ({error})"
        ) from error
    except Exception as error:
        raise ExportError(
            f"torch.onnx cannot write the model in opset {version}: {first_line(error)}"
        ) from error
    assert translated is not None
    return translated.model
