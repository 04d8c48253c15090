"""What stands against rewriting the parameters of a leaf module: other readers of them, hooks."""

from __future__ import annotations

from torch import nn

from graphopt.kernels import FusedLinear

from .base import Context, shared_names
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


def left_dense(program: Program, context: Context, name: str, heads: frozenset[str]) -> str | None:
    """Say why a linear layer is not to be replaced by a cheaper one, None if it may be.

    Args:
        program: The program that calls it.
        context: Its patterns are obeyed.
        name: The layer.
        heads: The modules that compute the model's results (`output_heads`).
    """
    pattern = context.ignored_by(name)
    if pattern is not None:
        return f"ignored by the pattern {pattern!r}"
    if name in heads:
        return "its output is a result of the model, and output heads stay dense"
    if isinstance(program.module(name), FusedLinear):
        return "it is several layers fused into one; let fuse-projections come later"
    return replacement_refusal(program, name, once=False)


def holds_parameters(module: nn.Module, *names: str) -> bool:
    """Say whether a module stores these parameters itself, not computed by a parametrization."""
    return all(name in module._parameters for name in names)
