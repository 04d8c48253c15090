"""Models made of torch's own modules as plain data: their structure, without values.

Every module of `torch.nn` keeps what its forward needs in attributes, so classes by name and
attributes as JSON rebuild it without calling a constructor or unpickling.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import nn

from graphopt.passes.errors import CheckpointError

from .plain_values import decode, encode, named_dtype

_PREFIX = "_graphopt_"
_PACKAGE = "torch.nn.modules."
_FILES = frozenset(name for name, value in vars(nn.modules).items() if inspect.ismodule(value))
_OWN = frozenset(vars(nn.Module())) - {"training"}


def describe(model: nn.Module) -> dict[str, Any]:
    """Return the structure of a model as JSON values: classes, attributes, shapes, ties.

    Raises:
        CheckpointError: if a module is not one of `torch.nn`.
    """
    return _describe(model, "", {}, {})


def build(data: Any) -> nn.Module:
    """Return the model of a description, its tensors on the meta device.

    Raises:
        CheckpointError: if it is not what `describe` makes.
    """
    try:
        return _build(data, "", {}, {})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the model's description is damaged: {error}") from error


def _describe(
    module: nn.Module, name: str, modules: dict[int, str], tensors: dict[int, str]
) -> dict[str, Any]:
    cls = type(module)
    if _class_named(_class_name(cls)) is not cls:
        raise CheckpointError(f"{name or 'the model'} is a {cls.__name__}, not a class of torch.nn")
    if id(module) in modules:
        return {"same": modules[id(module)]}
    modules[id(module)] = name
    own = {id(value): key for key, value in module._parameters.items() if value is not None}

    def reference(value: torch.Tensor) -> str:
        if id(value) not in own:
            raise CheckpointError(f"{name} keeps a tensor that is neither parameter nor buffer")
        return own[id(value)]

    return {
        "class": _class_name(cls),
        "attributes": {
            key: encode(value, reference)
            for key, value in vars(module).items()
            if key not in _OWN and not key.startswith(_PREFIX) and not _is_weak(value)
        },
        "tensors": {
            key: _describe_tensor(module, key, f"{name}.{key}", value, tensors)
            for key, value in [*module._parameters.items(), *module._buffers.items()]
            if not key.startswith(_PREFIX)
        },
        "children": {
            key: None
            if child is None
            else _describe(child, f"{name}.{key}" if name else key, modules, tensors)
            for key, child in module._modules.items()
        },
    }


def _class_name(cls: type[nn.Module]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix(_PACKAGE)


def _class_named(name: str) -> type[nn.Module] | None:
    """Return a class of `torch.nn.modules` by file and name ("linear.Linear")."""
    file, _, attribute = name.partition(".")
    cls = getattr(getattr(nn.modules, file), attribute, None) if file in _FILES else None
    own = isinstance(cls, type) and issubclass(cls, nn.Module) and _class_name(cls) == name
    return cls if own else None


def _is_weak(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, weakref.ref) for item in value)


def _describe_tensor(
    module: nn.Module, key: str, name: str, value: torch.Tensor | None, tensors: dict[int, str]
) -> dict[str, Any]:
    kind = "parameter" if key in module._parameters else "buffer"
    if value is None:
        return {"kind": kind, "none": True}
    if id(value) in tensors:
        return {"kind": kind, "same": tensors[id(value)]}
    tensors[id(value)] = name
    return {
        "kind": kind,
        "shape": list(value.shape),
        "dtype": str(value.dtype).removeprefix("torch."),
        "persistent": key not in module._non_persistent_buffers_set,
        "requires_grad": value.requires_grad,
    }


def _build(
    data: Any, name: str, modules: dict[str, nn.Module], tensors: dict[str, torch.Tensor]
) -> nn.Module:
    if "same" in data:
        return modules[data["same"]]
    cls = _class_named(data["class"])
    if cls is None:
        raise CheckpointError(f"{data['class']!r} is not a class of torch.nn")
    module: nn.Module = cls.__new__(cls)
    nn.Module.__init__(module)
    modules[name] = module
    for key, entry in data["tensors"].items():
        _build_tensor(module, key, f"{name}.{key}", entry, tensors)
    for key, child in data["children"].items():
        inner = f"{name}.{key}" if name else key
        module.add_module(key, None if child is None else _build(child, inner, modules, tensors))
    attributes = {
        key: decode(value, module._parameters.__getitem__)
        for key, value in data["attributes"].items()
    }
    for key in attributes:
        if key in _OWN or key.startswith("__") or callable(getattr(cls, key, None)):
            raise CheckpointError(f"{key!r} is not an attribute that graphopt writes")
    module.__setstate__(attributes)
    return module


def _build_tensor(
    module: nn.Module, key: str, name: str, entry: Any, tensors: dict[str, torch.Tensor]
) -> None:
    value: Any = None
    if "same" in entry:
        value = tensors[entry["same"]]
    elif "shape" in entry:
        value = torch.empty(entry["shape"], dtype=named_dtype(entry["dtype"]), device="meta")
        if entry["kind"] == "parameter":
            value = nn.Parameter(value, entry["requires_grad"])
        tensors[name] = value
    if entry["kind"] == "parameter":
        module.register_parameter(key, value)
    else:
        module.register_buffer(key, value, entry.get("persistent", True))
