"""Optimized models on disk: safetensors, the plan, and how to build the dense model's structure.

    plan.json             what was changed
    graphopt.json         how to build the dense structure, the captured call, checksums
    model.safetensors     parameters and persistent buffers
    buffers.safetensors   the other buffers, and constants of the graph
    example.safetensors   the captured call's tensors

A Hugging Face directory stays one: config.json, generation_config.json and the tokenizer's files
lie beside them. Loading builds the structure on the meta device, captures it, applies the plan and
then reads the tensors: dense weights never exist, nothing is unpickled, no named code is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from graphopt.passes.base import set_tensor
from graphopt.passes.errors import CheckpointError, GraphoptError, PlanError
from graphopt.passes.manager import apply_plan
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.passes.structure import map_tensors

from .capture import capture
from .dense_base import STRUCTURE_FILE, Base, BaseKind, meta_copy, read_base, write_base
from .densify import WEIGHTS_FILE, companions_of, densify, save_dense, stored_tensors
from .files import (
    TensorHeader,
    inside,
    new_directory,
    read_tensors,
    sha256_of,
    tensor_headers,
    write_tensors,
)
from .hugging_face import CONFIG_FILE, copy_companions
from .plain_values import decode, encode
from .runtime import install, installation_of
from .sources import Origin, remember

__all__ = ["densify", "load", "save", "save_dense"]

PLAN_FILE = "plan.json"
MANIFEST_FILE = "graphopt.json"
BUFFERS_FILE = "buffers.safetensors"
EXAMPLE_FILE = "example.safetensors"
_TENSOR_FILES = (WEIGHTS_FILE, BUFFERS_FILE, EXAMPLE_FILE)
_CHECKED_FILES = (*_TENSOR_FILES, STRUCTURE_FILE)
_OWN_FILES = frozenset({PLAN_FILE, MANIFEST_FILE, CONFIG_FILE, *_CHECKED_FILES})
_SCHEMA_VERSION = 1
_LARGEST_JSON_BYTES = 1 << 28
_LISTED = 4
_CONSTANT = "_graphopt_constant_"


class _Manifest(BaseModel):
    """What graphopt.json holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = _SCHEMA_VERSION
    base: BaseKind
    description: Any = None
    dtype: str | None = None
    call: Any
    eager_refusal: str | None = None
    aliases: dict[str, str] = Field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    sha256: dict[str, str] = Field(default_factory=dict)


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    factory: str | None = None,
    source: str | Path | None = None,
) -> None:
    """Write an optimized model; the directory appears whole or not at all.

    The example call's tensors are written too, for exports and timings of the loaded model.

    Args:
        model: A model that `optimize` returned.
        directory: A new or empty directory, or an earlier output, which is replaced.
        factory: `package.module:function` that makes the dense model, for models that neither
            transformers nor modules of torch alone describe.
        source: Directory whose tokenizer and similar files are copied; found by itself for a model
            that was read from a directory.

    Raises:
        CheckpointError: if the model is not optimized, or the directory cannot be written.
    """
    installation = installation_of(model)
    if installation is None:
        raise CheckpointError(
            f"{type(model).__name__} is not optimized; pass what graphopt.optimize returned"
        )
    directory = Path(directory)
    tensors, aliases = stored_tensors(model)
    example: dict[str, torch.Tensor] = {}

    def stored(value: torch.Tensor) -> str:
        name = f"tensor_{len(example)}"
        example[name] = value.clone()
        return name

    call = encode(installation.program.example, stored)
    floating = {str(p.dtype) for p in model.parameters() if p.is_floating_point()}
    with new_directory(directory, replaceable=_previous_files(directory)) as target:
        dense = densify(meta_copy(model))
        base, description = write_base(dense, type(dense), target, factory)
        (target / PLAN_FILE).write_text(installation.plan.to_json(), encoding="utf-8")
        write_tensors(target / WEIGHTS_FILE, tensors)
        write_tensors(target / BUFFERS_FILE, _hidden_buffers(installation.program, model))
        write_tensors(target / EXAMPLE_FILE, example)
        companions = Path(source) if source else companions_of(model)
        if base == "hugging-face" and companions is not None:
            copy_companions(companions, target, skip=_OWN_FILES)
        files = [str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()]
        manifest = _Manifest(
            base=base,
            description=description,
            dtype=floating.pop().removeprefix("torch.") if len(floating) == 1 else None,
            call=call,
            eager_refusal=installation.eager_refusal,
            aliases=aliases,
            frozen=tuple(n for n, p in model.named_parameters() if not p.requires_grad),
            files=(*sorted(files), MANIFEST_FILE),
            sha256={n: sha256_of(target / n) for n in _CHECKED_FILES if (target / n).exists()},
        )
        (target / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")


def load(directory: str | Path, *, base: Base | None = None) -> nn.Module:
    """Read an optimized model, in evaluation mode on the CPU.

    Args:
        directory: What `save` wrote.
        base: For models that files alone do not describe: the dense model (its values are not
            read), a function that makes it, or `package.module:function`.

    Raises:
        CheckpointError: if a file is missing, damaged or does not fit.
        PlanError: if the plan is damaged, newer, or does not fit the model.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"there is no directory {directory}; pass what graphopt.save wrote")
    plan = Plan.load(inside(directory, PLAN_FILE))
    manifest = _read_manifest(directory)
    files = {name: inside(directory, name) for name in _TENSOR_FILES}
    stored = {name: tensor_headers(path) for name, path in files.items()}
    try:
        model = read_base(manifest.base, manifest.description, manifest.dtype, directory, base)
        _match_dtypes(model, {**stored[WEIGHTS_FILE], **stored[BUFFERS_FILE]})
        example = decode(manifest.call, read_tensors(files[EXAMPLE_FILE]).__getitem__)
        program = capture(model.eval(), map_tensors(example, lambda tensor: tensor.to("meta")))
        apply_plan(program, plan)
    except GraphoptError:
        raise
    except Exception as error:
        raise PlanError(
            f"the files in {directory} do not fit each other: {type(error).__name__}: {error}; "
            "save the model again"
        ) from error
    constants = _numbered_constants(program)
    _drop_constants(model, keep=frozenset(constants.values()))
    hidden = _hidden_names(model)
    _check_names(
        {
            name: value
            for name, value in _named_tensors(model)
            if name not in hidden and name not in constants.values()
        },
        stored[WEIGHTS_FILE],
        manifest.aliases,
        files[WEIGHTS_FILE],
    )
    others = {name: model.get_buffer(name) for name in hidden}
    others |= {number: model.get_buffer(name) for number, name in constants.items()}
    _check_names(others, stored[BUFFERS_FILE], {}, files[BUFFERS_FILE])
    for name, digest in manifest.sha256.items():
        if sha256_of(inside(directory, name)) != digest:
            raise CheckpointError(
                f"{directory / name} was damaged or changed after it was written; copy or save it "
                "again"
            )
    for name, value in read_tensors(files[BUFFERS_FILE]).items():
        set_tensor(model, constants.get(name, name), value.clone())  # graphs may write to them
    _assign(model, read_tensors(files[WEIGHTS_FILE]), manifest)
    program.example = example
    program.modes = frozenset(plan.modes)
    program.changed()
    install(program, plan, eager_refusal=manifest.eager_refusal)
    if manifest.base == "hugging-face":
        remember(model, Origin("hugging-face", directory.absolute()))
    return model.eval()


def _previous_files(directory: Path) -> frozenset[str]:
    """Return the files of an earlier output in this directory, which may be replaced."""
    try:
        return frozenset(_read_manifest(directory).files)
    except CheckpointError:
        return frozenset()


def _read_manifest(directory: Path) -> _Manifest:
    path = inside(directory, MANIFEST_FILE)
    if path.stat().st_size > _LARGEST_JSON_BYTES:
        raise CheckpointError(f"{path} is too large to be what graphopt writes")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > _SCHEMA_VERSION:
            raise CheckpointError(
                f"{path} has schema version {version}, this graphopt reads up to "
                f"{_SCHEMA_VERSION}; install a newer graphopt"
            )
        return _Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path} is damaged: {where}: {first['msg']}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error


def _named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _hidden_names(model: nn.Module) -> set[str]:
    """Return the names of the model's own non-persistent buffers."""
    names = {
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules(remove_duplicate=False)
        for buffer in module._non_persistent_buffers_set
        if module._buffers.get(buffer) is not None
    }
    return {name for name in names if not name.startswith(_CONSTANT)}


def _numbered_constants(program: Program) -> dict[str, str]:
    """Return the graph's lifted constants by their number in the graph, with their names."""
    names = dict.fromkeys(
        str(node.target)
        for node in program.graph.nodes
        if node.op == "get_attr" and str(node.target).startswith(_CONSTANT)
    )
    return {f"{_CONSTANT}{number}": name for number, name in enumerate(names)}


def _drop_constants(model: nn.Module, keep: frozenset[str]) -> None:
    """Remove lifted constants that the changed graph does not read."""
    for name in [n for n in model._buffers if n.startswith(_CONSTANT) and n not in keep]:
        delattr(model, name)


def _hidden_buffers(program: Program, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the values of non-persistent buffers and of the graph's constants, by name."""
    values = {name: model.get_buffer(name) for name in _hidden_names(model)}
    for number, name in _numbered_constants(program).items():
        values[number] = model.get_buffer(name)
    return {name: value.clone() for name, value in values.items()}


def _match_dtypes(model: nn.Module, stored: Mapping[str, TensorHeader]) -> None:
    """Give the empty model's tensors the types of the stored ones, which capture depends on."""
    for name, value in _named_tensors(model):
        if name in stored and stored[name].dtype != value.dtype:
            set_tensor(model, name, torch.empty_like(value, dtype=stored[name].dtype))


def _check_names(
    expected: Mapping[str, torch.Tensor],
    stored: Mapping[str, TensorHeader],
    aliases: Mapping[str, str],
    path: Path,
) -> None:
    """Refuse a file whose tensors are not exactly the expected ones.

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


def _assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], manifest: _Manifest) -> None:
    """Give the model its stored values; tied names share one parameter."""
    for name, value in tensors.items():
        set_tensor(model, name, value)
    for name, first in manifest.aliases.items():
        parent, _, attribute = name.rpartition(".")
        owner, _, other = first.rpartition(".")
        shared = getattr(model.get_submodule(owner), other)
        if isinstance(shared, nn.Parameter):
            setattr(model.get_submodule(parent), attribute, shared)
        else:
            model.get_submodule(parent)._buffers[attribute] = shared
    frozen = set(manifest.frozen)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name not in frozen)
