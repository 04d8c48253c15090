"""Exported programs (`.pt2`) read without trusting the file.

`torch.export.load` unpickles tensors and inputs that are not plain, evaluates size expressions,
resolves operator names by attribute lookup and generates code from node names: a crafted file runs
any code. Here everything it would act on is checked first, in the same archive reader, and what
plain models do not need is refused.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.pt2_archive import _package as archive

from graphopt.passes.errors import CheckpointError
from graphopt.passes.structure import map_tensors

_MODEL = "models/model.json"
_INPUTS = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_RECORDS = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|archive_format|archive_version|byteorder|"
    r"\.data/\w+|data/weights/(weight_\d+|model_weights_config\.json)|"
    r"data/constants/(tensor_\d+|model_constants_config\.json)|extra/.*",
)
_TARGETS = re.compile(
    r"torch\.ops\.(aten|prims|torchvision)\.((?!__)\w+|__i?(and|or|xor)__)\.(?!__)\w+|"
    r"torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)|"
    r"_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_)|"
    r"math\.(ceil|floor|trunc|sqrt)|torch\.(sym_\w+|_sym_sqrt)"
)
_NAME = re.compile(r"(?!__)\w*")
_PATH = re.compile(r"(?!__)[\w.]*")
_NAME_KEYS = frozenset({"name"})
_PATH_KEYS = frozenset(
    {"parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "fqn"}
)
_UNSAFE_TREES = ("__enum__", "collections.defaultdict")
_EXPRESSION_NODES = (ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword)
_LIBRARY_RECORDS = re.compile(r'\\?"type\\?": \\?"(transformers)\.')


def read_exported(path: Path) -> ExportedProgram:
    """Read an exported program whose parts are all plain.

    Args:
        path: A file written by `torch.export.save`.

    Raises:
        CheckpointError: if it is damaged, or holds anything that could run code.
    """
    try:
        with open(path, "rb") as file:
            with archive.PT2ArchiveReader(file) as reader:
                _check_archive(reader, path)
            file.seek(0)
            with _quiet():
                program = torch.export.load(file)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} is not an exported program that torch {torch.__version__} reads: "
            f"{_first_line(error)}; write it with torch.export.save"
        ) from error
    # Conditions on inputs come as Python source, which .module() would execute.
    program._guards_code = []
    # Tensors without values share one record, and with it its requires_grad.
    program._state_dict = {
        name: value if isinstance(value, nn.Parameter) else value.detach()
        for name, value in program.state_dict.items()
    }
    return program


def write_structure(program: ExportedProgram, path: Path) -> None:
    """Write an exported program without the values of its weights and example inputs.

    Reading it gives the same program on meta tensors; lifted constants keep their values.
    """
    state, inputs = program._state_dict, program._example_inputs
    program._state_dict = {name: _on_meta(value) for name, value in state.items()}
    program._example_inputs = map_tensors(inputs, torch.zeros_like)
    try:
        with _quiet():
            torch.export.save(program, path)
    finally:
        program._state_dict, program._example_inputs = state, inputs


def _on_meta(value: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(value, device="meta")
    return nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty


def _check_archive(reader: Any, path: Path) -> None:
    names = reader.get_file_names()
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path} has several records of one name; it was tampered with")
    for name in names:
        if not _RECORDS.fullmatch(name):
            raise _refused(path, f"it has the record {name!r}")
    for name in (_MODEL, _INPUTS, *_CONFIGS):
        if name not in names:
            raise CheckpointError(f"{path} lacks the record {name}; is it an exported program?")
    for name in _CONFIGS:
        for key, entry in json.loads(reader.read_string(name))["config"].items():
            if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                raise _refused(path, f"{key!r} is not stored as a plain tensor")
    inputs = reader.read_bytes(_INPUTS)
    if inputs:
        try:
            torch.load(io.BytesIO(inputs), weights_only=True)
        except Exception as error:
            raise _refused(path, "its example inputs are not plain tensors") from error
    text = reader.read_string(_MODEL)
    _check_value(json.loads(text), path)
    if _LIBRARY_RECORDS.search(text):
        _register_result_types()


def _check_value(value: Any, path: Path) -> None:
    """Check every part of the program's JSON that torch looks up, evaluates or prints as code."""
    for key, item in _items(value):
        if key == "target" and not _TARGETS.fullmatch(item):
            raise _refused(path, f"it calls {item!r}")
        if key in _NAME_KEYS and not _NAME.fullmatch(item):
            raise _refused(path, f"{item!r} is not a name")
        if key in _PATH_KEYS and not _PATH.fullmatch(item):
            raise _refused(path, f"{item!r} is not a name")
        if key == "expr_str" and not _is_size_expression(item):
            raise _refused(path, f"{item!r} is not a size")
        if any(word in item for word in _UNSAFE_TREES):
            raise _refused(path, "its inputs or outputs hold an enum or a defaultdict")


def _items(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string with the key it stands under."""
    if isinstance(value, str):
        yield ("name" if key == "forward_arg_names" else key), value
    elif isinstance(value, list):
        for item in value:
            yield from _items(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _items(item, name)


def _is_size_expression(text: str) -> bool:
    """Say whether a text is calls of names with constants only: no attributes, no operators."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, (*_EXPRESSION_NODES, ast.UnaryOp, ast.USub)):
            return False
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Name) and _is_function(node.func.id)
        ):
            return False
        constant = node.value if isinstance(node, ast.Constant) else None
        if isinstance(constant, str) and not re.fullmatch(r"\w+", constant):
            return False
    return True


def _is_function(name: str) -> bool:
    """Say whether a name in a size expression is one of the sympy classes torch prints."""
    import sympy  # type: ignore[import-untyped]
    from torch.utils._sympy import functions

    found = getattr(sympy, name, None) or getattr(functions, name, None)
    return isinstance(found, type) and issubclass(found, sympy.Basic)


def _register_result_types() -> None:
    """Import the module whose result classes the program returns, so that torch knows them."""
    try:
        import transformers.modeling_outputs  # noqa: F401 - importing registers them
    except ImportError as error:
        from graphopt.passes.errors import MissingExtraError

        raise MissingExtraError(
            "this exported program returns transformers results; pip install 'graphopt[hf]'"
        ) from error


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is refused, because {reason}: reading it could run code; export the model again "
        "from its source with torch.export.save"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and log lines from the user."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
