"""What a model can be read from: a Hugging Face directory, an exported program, plain weights."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram

from graphopt.passes.errors import CheckpointError, ConfigError

from .exported_archive import read_exported
from .exported_model import example_of, model_of
from .files import read_tensors
from .hugging_face import CONFIG_FILE, empty_model, read_model

Kind = Literal["hugging-face", "exported-program", "weights"]

_ORIGIN = "_graphopt_origin"
_LISTED = 4


@dataclass(frozen=True)
class Origin:
    """Where a model's structure comes from; kept on the model, shared by its copies.

    Attributes:
        kind: What was read.
        directory: The folder with configuration and tokenizer, None if there is none.
        factory: `package.module:function` that makes the model.
        exported: The exported program.
    """

    kind: Kind
    directory: Path | None = None
    factory: str | None = None
    exported: ExportedProgram | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        """Return this very object: it never changes."""
        return self


@dataclass(frozen=True)
class Source:
    """A model that was read.

    Attributes:
        model: The model, in evaluation mode.
        origin: Where it comes from; also found by `origin_of(model)`.
        example_inputs: Arguments by name that came with it; None if it has none.
    """

    model: nn.Module
    origin: Origin
    example_inputs: dict[str, Any] | None = None

    @property
    def kind(self) -> Kind:
        """What was read."""
        return self.origin.kind

    @property
    def directory(self) -> Path | None:
        """The folder with configuration and tokenizer, None if there is none."""
        return self.origin.directory


def origin_of(model: nn.Module) -> Origin | None:
    """Return where a model was read from, None if it was made in Python."""
    origin: Origin | None = vars(model).get(_ORIGIN)
    return origin


def open_source(
    path: str | Path, factory: str | None = None, *, device: Literal["cpu", "meta"] = "cpu"
) -> Source:
    """Read a model; no code that comes with it is run, nothing is unpickled.

    Args:
        path: A Hugging Face directory; a `.pt2` file of `torch.export.save`; or weights
            (`.safetensors`, or a state dict in `.pt`, `.pth`, `.bin`).
        factory: `package.module:function`; called without arguments, it returns the model that
            the weights belong to.
        device: "meta" builds the model without reading a directory's weights.

    Raises:
        CheckpointError: if a file is missing, damaged, or does not fit the model.
        ConfigError: if the factory is missing or cannot be used.
        MissingExtraError: if a Hugging Face directory is given without transformers.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"{path} has no {CONFIG_FILE}; expected a Hugging Face directory, a .pt2 file, or "
                "weights with --factory package.module:function"
            )
        origin = Origin("hugging-face", directory=path.absolute())
        return _source(empty_model(path) if device == "meta" else read_model(path), origin)
    if not path.is_file():
        raise CheckpointError(f"there is no file or directory at {path}")
    if path.suffix == ".pt2":
        program = read_exported(path)
        origin = Origin("exported-program", exported=program)
        model: nn.Module = model_of(program)
        source = _source(model.to("meta") if device == "meta" else model, origin)
        return Source(source.model, origin, example_of(program))
    if factory is None:
        raise ConfigError(
            f"{path} holds weights only; pass --factory package.module:function, a function that "
            "returns the model they belong to"
        )
    function = import_factory(factory)
    if device == "meta":
        return _source(call_factory(function, factory, meta=True), Origin("weights", None, factory))
    model = call_factory(function, factory)
    _load_strictly(model, _read_state(path), path)
    return _source(model, Origin("weights", path.parent.absolute(), factory))


def import_factory(name: str) -> Callable[[], Any]:
    """Import a function given as `package.module:function`.

    Raises:
        ConfigError: if there is none.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise ConfigError(f"--factory must be package.module:function, got {name!r}")
    try:
        found: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the factory {name!r} cannot be imported: {error}; is its folder on PYTHONPATH?"
        ) from error
    if not callable(found):
        raise ConfigError(f"the factory {name!r} must be a function, got {type(found).__name__}")
    function: Callable[[], Any] = found
    return function


def call_factory(function: Callable[[], Any], name: str, *, meta: bool = False) -> nn.Module:
    """Call a factory and check that it returns a model.

    Args:
        function: The factory.
        name: What to call it in errors.
        meta: Build on the meta device.

    Raises:
        ConfigError: if it needs arguments, fails, or returns something else.
    """
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ConfigError(f"the factory {name} must work without arguments: {error}") from error
    except ValueError:
        pass  # some classes in C have no signature
    try:
        if meta:
            with torch.device("meta"):
                model = function()
        else:
            model = function()
    except Exception as error:
        raise ConfigError(f"the factory {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the factory {name} must return a torch.nn.Module, got {type(model).__name__}"
        )
    return model


def remember(model: nn.Module, origin: Origin) -> None:
    """Keep on a model where it was read from."""
    setattr(model, _ORIGIN, origin)


def _source(model: nn.Module, origin: Origin) -> Source:
    remember(model, origin)
    return Source(model.eval(), origin)


def _read_state(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} does not hold plain weights: {str(error).splitlines()[0]}; save "
            "model.state_dict() with safetensors or torch.save"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise CheckpointError(
            f"{path} must hold a dictionary of tensors by name, got {type(state).__name__}; save "
            "model.state_dict()"
        )
    return state


def _load_strictly(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Load weights that must fit exactly; a tied weight may be stored under one of its names."""
    own = model.state_dict(keep_vars=True)
    stored = {id(own[name]) for name in state if name in own}
    missing = [name for name, value in own.items() if name not in state and id(value) not in stored]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} is {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    problems = [
        f"{what}: {', '.join(names[:_LISTED])}{' ...' if len(names) > _LISTED else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the weights in {path} do not fit {type(model).__name__}; {'; '.join(problems)}"
        )
    model.load_state_dict(state, strict=False)
