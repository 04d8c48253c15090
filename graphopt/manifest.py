"""graphopt.json: what a checkpoint says besides its plan and its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graphopt.passes.errors import CheckpointError

from .dense_base import BaseKind
from .files import inside

MANIFEST_FILE = "graphopt.json"
_SCHEMA_VERSION = 1
_LARGEST_BYTES = 1 << 28


class Capture(BaseModel):
    """One captured call: of the model, or of a part where only parts could be captured.

    Attributes:
        call: The arguments (see `plain_values`); tensors by their names in the example file.
        rounding_modes: As in `Program`.
        eager_refusal: Why the eager forward must not run, None if it may.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    call: Any
    rounding_modes: tuple[tuple[bool, bool], ...]
    eager_refusal: str | None = None


class Manifest(BaseModel):
    """What graphopt.json holds.

    Attributes:
        schema_version: Version of this file format.
        base: How the dense model's structure is built again.
        description: What that needs, for some kinds.
        dtype: Type of the floating parameters, None if they have several.
        captures: The captured call of the model under "", or those of its parts by their names.
        aliases: For each tied tensor, the name under which it is stored.
        frozen: Parameters that do not require gradients.
        files: Every file that was written; only these may be replaced by another save.
        sha256: Checksums of the files with tensors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    base: BaseKind
    description: Any = None
    dtype: str | None = None
    captures: dict[str, Capture]
    aliases: dict[str, str] = Field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    sha256: dict[str, str] = Field(default_factory=dict)


def read_manifest(directory: Path) -> Manifest:
    """Read and check graphopt.json.

    Raises:
        CheckpointError: if it is missing, damaged or newer.
    """
    path = inside(directory, MANIFEST_FILE)
    if path.stat().st_size > _LARGEST_BYTES:
        raise CheckpointError(f"{path} is too large to be what graphopt writes")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > _SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has schema version {version}, this graphopt reads up to "
                f"{_SCHEMA_VERSION}; install a newer graphopt"
            )
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path} is damaged: {where}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
