"""An optimized model: the user's own object, whose class became a subclass with another forward.

The subclass runs the generated functions for the captured call and the original forward, over
the same rewritten modules, for every other one. Nothing is duplicated: parameters, buffers,
hooks, `state_dict` and `isinstance` are those of the user's model.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from graphopt.passes.calls import canonical_arguments, is_default
from graphopt.passes.errors import InputError, PlanError
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.passes.structure import Constant, Container, Leaf, Structure, flatten

from .emission import emit

_PREFIX = "Optimized"
_FUNCTIONS = "_graphopt_functions"
_OF_EVERY_CLASS = ("__dict__", "__weakref__")


@dataclass(frozen=True)
class Installation:
    """What an optimized model's class knows.

    Attributes:
        program: The program; only its call structure is used at run time. None for a model of
            which only parts could be captured.
        plan: The plan that made it.
        code: The generated Python.
        eager_refusal: Why the eager forward must not run, None if it may.
    """

    program: Program | None
    plan: Plan
    code: str
    eager_refusal: str | None = None


def installation_of(model: nn.Module) -> Installation | None:
    """Return the installation of an optimized model, None for any other model."""
    installation: Installation | None = getattr(type(model), "_graphopt_installation", None)
    if installation is None or installation.program is None or installation.program.model is model:
        return installation
    return replace(installation, program=installation.program.of_copy(model))


def install(program: Program, plan: Plan, *, eager_refusal: str | None = None) -> nn.Module:
    """Make the program's model run its graph; return that same model.

    Args:
        program: The program, all changes applied.
        plan: What was applied.
        eager_refusal: A sentence, if the original forward cannot run over the rewritten modules.
    """
    model = program.model
    emission = emit(program)
    for name, functions in emission.blocks.items():
        block = model.get_submodule(name)
        block.__class__ = _block_class(type(block), functions)
    installation = Installation(program, plan, emission.code, eager_refusal)
    model.__class__ = _model_class(type(model), program, emission.root, installation)
    return model


def install_beside(program: Program) -> Callable[..., Any]:
    """Let the blocks of an optimized model run the parts of another graph over it, too.

    Args:
        program: That graph, on the same model.

    Returns:
        Its root function: (model, *input tensors) -> tuple of output tensors.
    """
    model = program.model
    blocks = {
        name: functions
        for name, module in model.named_modules()
        if (functions := getattr(type(module), _FUNCTIONS, None)) is not None
    }
    emission = emit(program, present={name: len(found) for name, found in blocks.items()})
    for name, functions in emission.blocks.items():
        if name in blocks:
            blocks[name].extend(functions)
        else:
            block = model.get_submodule(name)
            block.__class__ = _block_class(type(block), functions)
    return emission.root


def install_parts(model: nn.Module, plan: Plan) -> nn.Module:
    """Remember the plan on a model whose parts were installed one by one; it runs as before."""
    installation = Installation(None, plan, "")
    model.__class__ = _subclass(type(model), {"_graphopt_installation": installation})
    return model


def replace_plan(model: nn.Module, plan: Plan) -> None:
    """Give an optimized model a plan that says more of the same changes; copies keep theirs."""
    kind = type(model)
    own = {key: value for key, value in vars(kind).items() if key not in _OF_EVERY_CLASS}
    own["_graphopt_installation"] = replace(own["_graphopt_installation"], plan=plan)
    model.__class__ = type(kind.__name__, kind.__bases__, own)


def uninstall(model: nn.Module) -> None:
    """Give the model and its blocks their original classes back; modules stay as they are."""
    for module in model.modules():
        original = type(module).__dict__.get("_graphopt_original_class")
        if original is not None:
            module.__class__ = original


def _block_class(original: type[nn.Module], functions: list[Callable[..., Any]]) -> type[nn.Module]:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, _graph: int | None = None, **kwargs: Any) -> Any:
        if _graph is None:
            return original.forward(self, *args, **kwargs)
        return functions[_graph](self, *args)

    return _subclass(original, {"forward": forward, _FUNCTIONS: functions})


def _model_class(
    original: type[nn.Module],
    program: Program,
    function: Callable[..., Any],
    installation: Installation,
) -> type[nn.Module]:
    match = _matcher(program)
    outputs = program.outputs
    modes = program.modes if installation.eager_refusal is None else program.rounding_modes

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors = match(self, args, kwargs)
        if tensors is not None and (self.training, torch.is_grad_enabled()) in modes:
            return outputs.rebuild(function(self, *tensors))
        if installation.eager_refusal is not None:
            raise PlanError(
                f"this call differs from the captured one (in its arguments, sizes, types or mode) "
                f"and cannot run: {installation.eager_refusal}; "
                f"optimize again with these inputs as the example"
            )
        return original.forward(self, *args, **kwargs)

    return _subclass(original, {"forward": forward, "_graphopt_installation": installation})


def _subclass(original: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    members["__module__"] = original.__module__
    members["__doc__"] = original.__doc__
    members["__qualname__"] = _PREFIX + original.__name__
    members["_graphopt_original_class"] = original

    def copied(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        reduced: Any = original.__reduce_ex__(self, 4)
        make, arguments, state, *_ = reduced
        twin: Any = make(*arguments)
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(state, memo))
        return cast(nn.Module, twin)

    def refuse_pickling(self: nn.Module, protocol: Any) -> Any:
        raise PlanError(
            f"an optimized {original.__name__} cannot be pickled, because its class exists in this "
            "process only; use graphopt.save(model, directory) or save model.state_dict()"
        )

    members.setdefault("__deepcopy__", getattr(original, "__deepcopy__", copied))
    members["__reduce_ex__"] = refuse_pickling
    # Libraries write the class's name into files, so it stays; the qualified name tells them apart.
    return type(original.__name__, (original,), members)


def _matcher(
    program: Program,
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], list[torch.Tensor] | None]:
    """Return a function from a call to the graph's input tensors, None if it is another call.

    A call that does not even fit the signature is another call: the eager forward says so.
    """
    signature = program.signature
    names = _argument_names(program.inputs)
    flat = _flat_arguments(program.inputs)
    positional = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.kind
        in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    defaults = {name: p.default for name, p in signature.parameters.items()}

    def match(
        model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[torch.Tensor] | None:
        if len(args) > len(positional) and flat is not None:
            return None
        if kwargs.keys() & positional[: len(args)]:
            return None
        if flat is None:
            try:
                arguments = canonical_arguments(signature, args, kwargs)
            except InputError:
                return None
            if set(arguments) != names:
                return None
            tensors, structure = flatten(arguments)
            if structure != program.inputs:
                return None
        else:
            given = dict(zip(positional, args, strict=False))
            given.update(kwargs)
            found: dict[str, Any] = {}
            for name, value in given.items():
                if name in flat:
                    found[name] = value
                elif not is_default(value, defaults.get(name, inspect.Parameter.empty)):
                    return None
            tensors = []
            for name, expected in flat.items():
                value = found.get(name, defaults.get(name))
                if isinstance(expected, Leaf):
                    if not isinstance(value, torch.Tensor):
                        return None
                    tensors.append(value)
                elif type(value) is not type(expected.value) or value != expected.value:
                    return None
        return tensors if program.fits(tensors, model) else None

    return match


def _argument_names(inputs: Structure) -> set[str]:
    assert isinstance(inputs, Container)
    return set(inputs.context)


def _flat_arguments(inputs: Structure) -> dict[str, Leaf | Constant] | None:
    """Return argument name -> tensor or constant, None where an argument is a container."""
    assert isinstance(inputs, Container)
    pairs = dict(zip(inputs.context, inputs.children, strict=True))
    simple = {k: v for k, v in pairs.items() if isinstance(v, (Leaf, Constant))}
    return simple if len(simple) == len(pairs) else None
