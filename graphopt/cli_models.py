"""Models by path, their example inputs, and the folders that commands write to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_terminal import activity
from .errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import nn

PLAN_FILE = "plan.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pt2")


@dataclass(frozen=True)
class OpenModel:
    """A model that was read from a path.

    Attributes:
        model: The model, in evaluation mode.
        directory: The folder with its configuration and tokenizer, None if there is none.
        example: Inputs that came with it, None if it has none.
    """

    model: nn.Module
    directory: Path | None = None
    example: dict[str, Any] | None = None


def open_model(path: Path, factory: str | None = None, *, meta: bool = False) -> OpenModel:
    """Read a source or what graphopt wrote.

    Args:
        path: A Hugging Face directory, a `.pt2` file, weights, or a folder with a `plan.json`.
        factory: `package.module:function` that makes the dense model, where files alone do not.
        meta: Build it on the meta device, without reading weights.

    Raises:
        GraphoptError: if there is no model at the path, or it cannot be read.
    """
    with activity(f"Reading {path}"):
        return _read(path, factory, meta)


def _read(path: Path, factory: str | None, meta: bool) -> OpenModel:
    if factory is not None:
        sys.path.append(str(Path.cwd()))  # where users keep their modules; libraries come first
    if not path.exists():
        raise CheckpointError(
            f"there is nothing at {path}; expected a Hugging Face directory, a .pt2 file, "
            "weights (with --factory), or a directory that graphopt wrote"
        )
    if (path / PLAN_FILE).exists():
        from .checkpoint import load
        from .runtime import installation_of

        model = load(path, base=factory)
        installation = installation_of(model)
        program = installation.program if installation is not None else None
        return OpenModel(model, path, program.example if program is not None else None)
    from .sources import open_source

    source = open_source(path, factory, device="meta" if meta else "cpu")
    return OpenModel(source.model, source.directory, source.example_inputs)


def exceeds_memory(path: Path) -> bool:
    """Say whether a checkpoint's weights are larger than the memory that is available now."""
    files = [path] if path.is_file() else [file for file in path.glob("*") if file.is_file()]
    size_bytes = sum(file.stat().st_size for file in files if file.suffix in _WEIGHTS)
    available = _available_bytes()
    return available is not None and size_bytes > available


def example_inputs(opened: OpenModel, batch: int | None, length: int | None) -> Any:
    """Return example inputs of the wanted sizes, or those that came with the model.

    Returns:
        Keyword arguments by name, or None: then they are inferred where they are needed.

    Raises:
        ConfigError: if a size is below one.
        InputError: if sizes are given and inputs cannot be inferred.
    """
    from .inputs import infer_inputs

    sizes = {
        name: value for name, value in (("batch", batch), ("length", length)) if value is not None
    }
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")
    return infer_inputs(opened.model, **sizes) if sizes else opened.example


def check_output(output: Path, source: Path, *, replaceable: bool) -> None:
    """Refuse a folder with files that would be lost, before a model is read.

    Args:
        output: The folder to write.
        source: What is read.
        replaceable: Whether an earlier output may be replaced.

    Raises:
        CheckpointError: with the reason.
    """
    from .files import check_target

    if output.exists() and source.exists() and output.samefile(source):
        raise CheckpointError(f"{output} is the source itself; write to another directory")
    if not (replaceable and (output / PLAN_FILE).is_file()):
        check_target(output)


def check_file(path: Path | None, what: str) -> None:
    """Refuse a file that is not there, before a model is read for it.

    Raises:
        CheckpointError: if there is no such file.
    """
    if path is not None and not path.is_file():
        raise CheckpointError(f"there is no {what} file at {path}")


def keep_shares(pairs: Sequence[str]) -> dict[str, float]:
    """Return target pattern -> share for texts such as `layer.0.mlp=50%`.

    Raises:
        ConfigError: if one has no "=" or no share.
    """
    from graphopt.passes.base import parse_share

    shares: dict[str, float] = {}
    for pair in pairs:
        pattern, equals, text = pair.rpartition("=")
        if not equals or not pattern:
            raise ConfigError(f"--keep must be PATTERN=SHARE such as layer.0.mlp=50%, got {pair!r}")
        share = parse_share(text, f"the share to keep of {pattern}")
        assert share is not None
        shares[pattern] = share
    return shares


def _available_bytes() -> int | None:
    """Return the memory that can be had without swapping, None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kilobytes = {
        name: value.split()[0] for name, _, value in (line.partition(":") for line in lines)
    }
    return int(kilobytes["MemAvailable"]) * 1024 if "MemAvailable" in kilobytes else None
