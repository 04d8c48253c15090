"""A gate behind a value of the graph, such as the add of a residual block: where it stands."""

from __future__ import annotations

from itertools import chain, count

from torch import fx, nn

from graphopt.kernels.gates import Gate
from graphopt.passes.errors import PlanError
from graphopt.passes.lazy_branches import make_lazy
from graphopt.passes.program import Program

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def gate_name(program: Program, value: fx.Node, kind: str, taken: set[str]) -> str:
    """Return a free name, such as `layer_gate`, in the module whose forward computes a value."""
    owner = _owner(program, value)[-1]
    ends = chain([""], map(str, count(1)))
    names = (f"{owner}.{kind}{end}".lstrip(".") for end in ends)
    return next(
        name
        for name in names
        if name not in taken and not hasattr(program.module(owner), name.rpartition(".")[2])
    )


def insert_gate(program: Program, value: fx.Node, entry: fx.Node, name: str, gate: Gate) -> None:
    """Put a gate behind a value, which it may compute in another way from an earlier one.

    Raises:
        PlanError: if the gate's name is not one that is free there.
    """
    modules = _owner(program, value)
    owner, _, attribute = name.rpartition(".")
    holder = program.module(owner)
    if owner != modules[-1] or hasattr(holder, attribute):
        raise PlanError(f"the gate {name!r} does not fit the model; is this plan for another one?")
    holder.add_module(attribute, gate.train(holder.training))
    with program.graph.inserting_after(value):
        node = program.graph.call_module(name, (value,), {"entry": entry})
    show_argument(node, modules, tuple(value.meta["calls"])[: len(modules)])
    make_lazy(node)
    value.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def show_argument(
    node: fx.Node, modules: tuple[str, ...] = ("",), calls: tuple[str, ...] = ("",)
) -> None:
    """Let analyses see a gate as what it is in evaluation mode: its first argument.

    Args:
        node: The call of the gate.
        modules: Names of the modules that the call belongs to, outermost first.
        calls: The same for calls.
    """
    argument = node.args[0]
    assert isinstance(argument, fx.Node)
    body = fx.Graph()
    x = body.placeholder("x")
    x.meta["val"] = argument.meta["val"]
    body.output(x)
    node.meta = {"val": x.meta["val"], "modules": modules, "calls": calls, "body": body}


def remove_gate(model: nn.Module, name: str, kind: type[Gate]) -> None:
    """Take a gate out of a model.

    Raises:
        PlanError: if the model has no gate of that kind there.
    """
    owner, _, attribute = name.rpartition(".")
    if not isinstance(getattr(model.get_submodule(owner), attribute, None), kind):
        raise PlanError(f"the model has no gate {name!r}, which the plan describes")
    delattr(model.get_submodule(owner), attribute)


def _owner(program: Program, value: fx.Node) -> tuple[str, ...]:
    """Return the names of the module that gets the gate and of all around it, outermost first.

    It is no container, if there is a choice: those are counted, indexed and called by position.
    """
    modules = tuple(value.meta["modules"])
    if value.op == "call_module" and modules[-1] == value.target:
        modules = modules[:-1]
    while len(modules) > 1 and isinstance(program.module(modules[-1]), _CONTAINERS):
        modules = modules[:-1]
    return modules
