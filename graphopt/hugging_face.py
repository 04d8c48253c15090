"""Hugging Face checkpoint directories: the model of a configuration, and the files around it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt.passes.errors import CheckpointError, MissingExtraError

CONFIG_FILE = "config.json"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_COPIED_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken"})


def transformers_library() -> Any:
    """Return the transformers package.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "Hugging Face checkpoints need transformers; pip install 'graphopt[hf]'"
        ) from error
    return transformers


def is_rebuildable(model: nn.Module, cls: type[nn.Module]) -> bool:
    """Say whether a model is of a class that transformers itself has, with a configuration."""
    if not hasattr(getattr(model, "config", None), "to_json_string"):
        return False
    return getattr(transformers_library(), cls.__name__, None) is cls


def read_model(directory: Path) -> nn.Module:
    """Read a checkpoint with its weights, on the CPU.

    Raises:
        CheckpointError: if a file is missing or damaged, or weights do not fit the model.
    """
    config, cls = _config_and_class(directory)
    for name in _INDEXES:
        if (directory / name).exists():
            _check_index(directory, name)
    try:
        model, loading = cls.from_pretrained(
            directory,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise CheckpointError(
            f"{directory} cannot be read as a {cls.__name__}: {_first_line(error)}"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{directory} lacks weights that {cls.__name__} has: {', '.join(missing[:4])}"
            f"{' ...' if len(missing) > 4 else ''}; is the checkpoint complete?"
        )
    checked: nn.Module = model
    return checked


def empty_model(directory: Path) -> nn.Module:
    """Build the model of a directory's configuration on the meta device; weights are not read.

    Raises:
        CheckpointError: if the configuration is missing or damaged.
    """
    config, cls = _config_and_class(directory)
    build = cls._from_config if hasattr(cls, "_from_config") else cls.from_config
    try:
        with torch.device("meta"):
            model: nn.Module = build(config)
    except Exception as error:
        raise CheckpointError(
            f"{directory / CONFIG_FILE} does not describe a {cls.__name__}: {_first_line(error)}"
        ) from error
    return model


def write_config(model: nn.Module, cls: type[nn.Module], directory: Path) -> None:
    """Write config.json, with the original class as architecture, and generation_config.json."""
    config: Any = copy.deepcopy(model.config)
    config.architectures = [cls.__name__]
    config.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    config.to_json_file(directory / CONFIG_FILE)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        text = generation.to_json_string(use_diff=True)
        (directory / "generation_config.json").write_text(text, encoding="utf-8")


def source_directory(model: nn.Module) -> Path | None:
    """Return the directory a model was read from, if it is on this machine."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    return Path(name) if name and (Path(name) / CONFIG_FILE).is_file() else None


def copy_companions(source: Path, directory: Path, *, skip: frozenset[str]) -> None:
    """Copy tokenizer, processor and other small text files; never weights, code or hidden files."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        wanted = path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json")
        hidden = any(part.startswith(".") for part in name.parts)
        if wanted and not hidden and path.is_file() and str(name) not in skip:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            if not (directory / name).exists():
                shutil.copyfile(path, directory / name)


def _config_and_class(directory: Path) -> tuple[Any, Any]:
    transformers = transformers_library()
    path = directory / CONFIG_FILE
    data = _read_json(path)
    attention = data.get("_attn_implementation") or data.get("attn_implementation")
    if isinstance(attention, str) and "/" in attention:
        raise CheckpointError(f"{path} asks for code from elsewhere ({attention!r}); remove that")
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a configuration that transformers {transformers.__version__} knows: "
            f"{_first_line(error)}"
        ) from error
    names = data.get("architectures") or []
    if not names:
        return config, transformers.AutoModel
    cls = getattr(transformers, str(names[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{path} names the architecture {names[0]!r}, which transformers "
            f"{transformers.__version__} does not have; code from checkpoints is never run"
        )
    return config, cls


def _check_index(directory: Path, name: str) -> None:
    shards = _read_json(directory / name).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
        raise CheckpointError(f"{directory / name} has no weight_map of tensor and file names")
    for shard in set(shards.values()):
        if shard != Path(shard).name or not (directory / shard).is_file():
            raise CheckpointError(
                f"{directory / name} names {shard!r}, which is not a file in {directory}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {path.name} in {path.parent}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
