"""Directories that appear whole or not at all, and tensor files that are checked when read."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from graphopt.passes.errors import CheckpointError

_CHUNK_BYTES = 1 << 22
_LISTED = 4
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of safetensors files by their names in the header."""


class TensorHeader(NamedTuple):
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@contextmanager
def new_directory(target: Path, *, replaceable: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Give a temporary directory beside `target` that takes its place at the end.

    After an error, or Ctrl-C, the target is what it was and nothing else is left.

    Args:
        target: The directory to make; missing parents are made.
        replaceable: Names of the files that may be in the target already; it is then replaced.

    Raises:
        CheckpointError: if the target holds anything else, or cannot be written.
    """
    target = Path(os.path.realpath(target))
    check_target(target, replaceable=replaceable)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        _exchange(temporary, target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(target: Path, *, replaceable: frozenset[str] = frozenset()) -> None:
    """Refuse a target that holds files which would be lost.

    Raises:
        CheckpointError: with their names.
    """
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; pass a directory that does not exist")
    if target.is_dir():
        present = {str(p.relative_to(target)) for p in target.rglob("*") if not p.is_dir()}
        others = sorted(present - replaceable)
        if others:
            raise CheckpointError(
                f"{target} holds {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}, which "
                "graphopt did not write; pass a directory that does not exist, or is empty"
            )


def _exchange(temporary: Path, target: Path) -> None:
    """Move a finished directory to its place; the old one is kept until that has worked."""
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    try:
        temporary.rename(target)
    except BaseException:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def inside(directory: Path, name: str) -> Path:
    """Return the path of a file that must lie in a directory itself.

    Raises:
        CheckpointError: if the name leads elsewhere, also by a link, or there is no such file.
    """
    path = directory / name
    if name != Path(name).name or name in ("", ".", ".."):
        raise CheckpointError(f"{name!r} is not a file name inside {directory}")
    if path.is_symlink() and path.resolve().parent != directory.resolve():
        raise CheckpointError(f"{path} is a link that leads out of its directory; copy the file")
    if not path.is_file():
        raise CheckpointError(f"{directory} lacks {name}; was it written completely?")
    return path


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        if tensor.untyped_storage().nbytes() != tensor.nbytes:  # a view of something larger
            plain[name] = tensor.clone()
    save_file(plain, path, metadata={"format": "pt"})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: if it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: {error}; write or copy it again"
        ) from error


def tensor_headers(path: Path) -> dict[str, TensorHeader]:
    """Return the names, shapes and types in a safetensors file; only its header is read.

    Raises:
        CheckpointError: if it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    headers: dict[str, TensorHeader] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                dtype = _DTYPES[part.get_dtype()]
                headers[name] = TensorHeader(tuple(part.get_shape()), dtype)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: {error}; write or copy it again"
        ) from error
    return headers


def check_tensors(
    expected: Mapping[str, torch.Tensor],
    stored: Mapping[str, TensorHeader],
    aliases: Mapping[str, str],
    path: Path,
) -> None:
    """Refuse a file whose tensors are not exactly the expected ones.

    Args:
        expected: Tensors by name; only shapes and types are read.
        stored: What the file holds.
        aliases: For each tied tensor, the name under which it is stored.
        path: The file, for the error.

    Raises:
        CheckpointError: with the first names.
    """
    strange = [name for name, first in aliases.items() if first not in expected]
    missing = [name for name in expected if name not in stored and name not in aliases]
    unexpected = [name for name in stored if name not in expected or name in aliases]
    unexpected += [name for name in aliases if name not in expected]
    different = [
        f"{name} is {stored[found].dtype} {list(stored[found].shape)} instead of "
        f"{value.dtype} {list(value.shape)}"
        for name, value in expected.items()
        if (found := aliases.get(name, name)) in stored
        and (stored[found].shape != tuple(value.shape) or stored[found].dtype != value.dtype)
    ]
    for what, names in (
        ("lacks", [*missing, *strange]),
        ("has unexpected tensors", unexpected),
        ("does not fit the plan", different),
    ):
        if names:
            raise CheckpointError(
                f"{path} {what}: {', '.join(names[:_LISTED])}"
                f"{' ...' if len(names) > _LISTED else ''}; save the model again"
            )
