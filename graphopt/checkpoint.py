"""Optimized models on disk: safetensors, the plan, and how to build the dense model's structure.

    plan.json             what was changed
    recipe.yaml           the recipe as resolved: `optimize` with it does the same again
    graphopt.json         how to build the dense structure, the captured call, checksums
    model.safetensors     parameters and persistent buffers
    buffers.safetensors   the other buffers, and constants of the graph
    example.safetensors   the captured call's tensors

A Hugging Face directory stays one: config.json, generation_config.json and the tokenizer's files
lie beside them. Loading builds the structure on the meta device, captures it, applies the plan and
then reads the tensors: dense weights never exist, nothing is unpickled, no named code is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from graphopt.passes.base import set_tensor
from graphopt.passes.errors import CheckpointError, GraphoptError, PlanError
from graphopt.passes.manager import apply_plan
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.passes.structure import map_tensors

from .capture import capture
from .dense_base import STRUCTURE_FILE, Base, meta_copy, read_base, write_base
from .densify import WEIGHTS_FILE, companions_of, densify, save_dense, stored_tensors
from .files import (
    TensorHeader,
    check_tensors,
    inside,
    new_directory,
    read_tensors,
    sha256_of,
    tensor_headers,
    write_tensors,
)
from .hugging_face import CONFIG_FILE, copy_companions
from .manifest import MANIFEST_FILE, Capture, Manifest, read_manifest
from .plain_values import decode, encode
from .recipe_schema import as_yaml
from .runtime import install, install_parts, installation_of
from .sources import Origin, remember

__all__ = ["densify", "load", "save", "save_dense"]

PLAN_FILE = "plan.json"
RECIPE_FILE = "recipe.yaml"
BUFFERS_FILE = "buffers.safetensors"
EXAMPLE_FILE = "example.safetensors"
_TENSOR_FILES = (WEIGHTS_FILE, BUFFERS_FILE, EXAMPLE_FILE)
_CHECKED_FILES = (*_TENSOR_FILES, STRUCTURE_FILE)
_OWN_FILES = frozenset({PLAN_FILE, RECIPE_FILE, MANIFEST_FILE, CONFIG_FILE, *_CHECKED_FILES})
_CONSTANT = "_graphopt_constant_"


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

    captures = {
        name: Capture(
            call=encode(part.program.example, stored),
            rounding_modes=tuple(sorted(part.program.rounding_modes)),
            eager_refusal=part.eager_refusal,
        )
        for name, part in _installed(model).items()
    }
    floating = {str(p.dtype) for p in model.parameters() if p.is_floating_point()}
    with new_directory(directory, replaceable=_previous_files(directory)) as target:
        dense = densify(meta_copy(model))
        base, description = write_base(dense, type(dense), target, factory)
        (target / PLAN_FILE).write_text(installation.plan.to_json(), encoding="utf-8")
        if installation.plan.recipe:
            text = as_yaml(installation.plan.recipe)
            (target / RECIPE_FILE).write_text(text, encoding="utf-8")
        write_tensors(target / WEIGHTS_FILE, tensors)
        write_tensors(target / BUFFERS_FILE, _hidden_buffers(model))
        write_tensors(target / EXAMPLE_FILE, example)
        companions = Path(source) if source else companions_of(model)
        if base == "hugging-face" and companions is not None:
            copy_companions(companions, target, skip=_OWN_FILES)
        files = [str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()]
        manifest = Manifest(
            base=base,
            description=description,
            dtype=floating.pop().removeprefix("torch.") if len(floating) == 1 else None,
            captures=captures,
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
    manifest = read_manifest(directory)
    if set(manifest.captures) != set(plan.parts or {""}):
        raise CheckpointError(
            f"{MANIFEST_FILE} and {PLAN_FILE} in {directory} do not belong together; save the "
            "model again"
        )
    files = {name: inside(directory, name) for name in _TENSOR_FILES}
    stored = {name: tensor_headers(path) for name, path in files.items()}
    try:
        model = read_base(manifest.base, manifest.description, manifest.dtype, directory, base)
        _match_dtypes(model, {**stored[WEIGHTS_FILE], **stored[BUFFERS_FILE]})
        tensors = read_tensors(files[EXAMPLE_FILE])
        programs = {
            name: _replayed(model.eval(), name, plan, capture_of, tensors)
            for name, capture_of in manifest.captures.items()
        }
    except GraphoptError:
        raise
    except Exception as error:
        raise PlanError(
            f"the files in {directory} do not fit each other: {type(error).__name__}: {error}; "
            "save the model again"
        ) from error
    constants = _numbered_constants(programs)
    _drop_constants(model, keep=frozenset(constants.values()))
    hidden = _hidden_names(model)
    check_tensors(
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
    check_tensors(others, stored[BUFFERS_FILE], {}, files[BUFFERS_FILE])
    for name, digest in manifest.sha256.items():
        if sha256_of(inside(directory, name)) != digest:
            raise CheckpointError(
                f"{directory / name} was damaged or changed after it was written; copy or save it "
                "again"
            )
    for name, value in read_tensors(files[BUFFERS_FILE]).items():
        set_tensor(model, constants.get(name, name), value.clone())  # graphs may write to them
    _assign(model, read_tensors(files[WEIGHTS_FILE]), manifest)
    for name, program in programs.items():
        part = _plan_of(plan, name)
        program.modes = frozenset(part.modes)
        program.rounding_modes = frozenset(manifest.captures[name].rounding_modes)
        program.changed()
        install(program, part, eager_refusal=manifest.captures[name].eager_refusal)
    if "" not in programs:
        install_parts(model, plan)
    if manifest.base == "hugging-face":
        remember(model, Origin("hugging-face", directory.absolute()))
    return model.eval()


class _Part(NamedTuple):
    program: Program
    eager_refusal: str | None


def _installed(model: nn.Module) -> dict[str, _Part]:
    """Return the model's program under "", or those of its parts by their names."""
    whole = installation_of(model)
    assert whole is not None
    if whole.program is not None:
        return {"": _Part(whole.program, whole.eager_refusal)}
    parts: dict[str, _Part] = {}
    for name in whole.plan.parts:
        part = installation_of(model.get_submodule(name))
        assert part is not None
        assert part.program is not None
        parts[name] = _Part(part.program, part.eager_refusal)
    return parts


def _plan_of(plan: Plan, name: str) -> Plan:
    return plan.parts[name] if name else plan


def _replayed(
    model: nn.Module, name: str, plan: Plan, made: Capture, tensors: Mapping[str, torch.Tensor]
) -> Program:
    """Capture the empty model, or a part of it, as it was captured, and make the plan's changes."""
    example = decode(made.call, tensors.__getitem__)
    empty = map_tensors(example, lambda tensor: tensor.to("meta"))
    program = capture(model.get_submodule(name), empty)
    apply_plan(program, _plan_of(plan, name))
    program.example = example
    return program


def _previous_files(directory: Path) -> frozenset[str]:
    """Return the files of an earlier output in this directory, which may be replaced."""
    try:
        return frozenset(read_manifest(directory).files)
    except CheckpointError:
        return frozenset()


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
    return {name for name in names if not _is_constant(name)}


def _is_constant(name: str) -> bool:
    return name.rpartition(".")[2].startswith(_CONSTANT)


def _numbered_constants(programs: Mapping[str, Program]) -> dict[str, str]:
    """Return the graphs' lifted constants by their number in the graph, with their names."""
    constants: dict[str, str] = {}
    for part, program in programs.items():
        prefix = f"{part}." if part else ""
        names = dict.fromkeys(
            str(node.target)
            for node in program.graph.nodes
            if node.op == "get_attr" and _is_constant(str(node.target))
        )
        constants |= {f"{prefix}{_CONSTANT}{i}": prefix + name for i, name in enumerate(names)}
    return constants


def _drop_constants(model: nn.Module, keep: frozenset[str]) -> None:
    """Remove lifted constants that the changed graphs do not read."""
    for name in [n for n, _ in model.named_buffers() if _is_constant(n) and n not in keep]:
        parent, _, attribute = name.rpartition(".")
        delattr(model.get_submodule(parent), attribute)


def _hidden_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the values of non-persistent buffers and of the graphs' constants, by name."""
    programs = {name: part.program for name, part in _installed(model).items()}
    names = {name: name for name in _hidden_names(model)} | _numbered_constants(programs)
    return {number: model.get_buffer(name).clone() for number, name in names.items()}


def _match_dtypes(model: nn.Module, stored: Mapping[str, TensorHeader]) -> None:
    """Give the empty model's tensors the types of the stored ones, which capture depends on."""
    for name, value in _named_tensors(model):
        wanted = stored[name].dtype if name in stored else value.dtype
        if wanted != value.dtype and wanted.is_floating_point == value.is_floating_point():
            set_tensor(model, name, torch.empty_like(value, dtype=wanted))


def _assign(model: nn.Module, tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
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
