"""A gate behind the add of a residual block: where it stands in the model and in the graph."""

from __future__ import annotations

from itertools import chain, count

from torch import fx, nn

from graphopt.kernels.gates import Gate
from graphopt.passes.errors import PlanError
from graphopt.passes.lazy_branches import make_lazy
from graphopt.passes.program import Program
from graphopt.passes.tokens import Region

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def gate_name(program: Program, region: Region, kind: str, taken: set[str]) -> str:
    """Return a free name, such as `layer_gate`, in the module whose forward adds."""
    owner = _owner(program, region)[-1]
    ends = chain([""], map(str, count(1)))
    names = (f"{owner}.{kind}{end}".lstrip(".") for end in ends)
    return next(
        name
        for name in names
        if name not in taken and not hasattr(program.module(owner), name.rpartition(".")[2])
    )


def insert_gate(program: Program, region: Region, name: str, gate: Gate) -> None:
    """Put a gate behind a region's add.

    Raises:
        PlanError: if the gate's name is not the one that is free there.
    """
    modules = _owner(program, region)
    owner, _, attribute = name.rpartition(".")
    holder = program.module(owner)
    if owner != modules[-1] or hasattr(holder, attribute):
        raise PlanError(f"the gate {name!r} does not fit the model; is this plan for another one?")
    holder.add_module(attribute, gate.train(holder.training))
    add, graph = region.add, program.graph
    with graph.inserting_after(add):
        node = graph.call_module(name, (add,), {"entry": region.entry})
    calls = tuple(add.meta["calls"])[: len(modules)]
    # Analyses see the gate as what it is in evaluation mode: its first argument.
    body = fx.Graph()
    x = body.placeholder("x")
    x.meta["val"] = add.meta["val"]
    body.output(x)
    node.meta = {"val": add.meta["val"], "modules": modules, "calls": calls, "body": body}
    make_lazy(node)
    add.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def remove_gate(model: nn.Module, name: str, kind: type[Gate]) -> None:
    """Take a gate out of a model.

    Raises:
        PlanError: if the model has no gate of that kind there.
    """
    owner, _, attribute = name.rpartition(".")
    if not isinstance(getattr(model.get_submodule(owner), attribute, None), kind):
        raise PlanError(f"the model has no gate {name!r}, which the plan describes")
    delattr(model.get_submodule(owner), attribute)


def _owner(program: Program, region: Region) -> tuple[str, ...]:
    """Return the names of the module that gets the gate and of all around it, outermost first.

    It is no container, if there is a choice: those are counted, indexed and called by position.
    """
    modules = tuple(region.add.meta["modules"])
    while len(modules) > 1 and isinstance(program.module(modules[-1]), _CONTAINERS):
        modules = modules[:-1]
    return modules
