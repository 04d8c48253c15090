"""What stands against rewriting the parameters of a leaf module: other readers of them, hooks."""

from __future__ import annotations

from torch import nn

from .base import shared_names
from .program import Program

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def replacement_refusal(program: Program, name: str, *, once: bool = True) -> str | None:
    """Say why the leaf module of this name must keep its parameters, None if it need not.

    Args:
        program: The program that calls it.
        name: The module.
        once: Whether it must be called exactly once.
    """
    module = program.module(name)
    calls = len(program.calls(name))
    if once and calls != 1:
        return f"{name} is called {calls} times"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return f"{name} has hooks, which expect the module as it is"
    own = {f"{name}.{key}" for key, _ in module.named_parameters(remove_duplicate=False)}
    for parameter in sorted(own):
        others = sorted(set(shared_names(program.model, parameter)) - own)
        if others:
            return f"{parameter} is tied to {others[0]}"
    if any(node.op == "get_attr" and node.target in own for node in program.graph.nodes):
        return f"the parameters of {name} are also read outside of it"
    return None


def holds_parameters(module: nn.Module, *names: str) -> bool:
    """Say whether a module stores these parameters itself, not computed by a parametrization."""
    return all(name in module._parameters for name in names)
