"""Assertions for tests of passes: what every pass must hold to, on a model and a call.

```python
program, plan = assert_pass_contract(MyPass(), make_model, example, context=Context(budget=0.6))
assert_graph(program, {"Linear": 4, "BatchNorm2d": 0}, edges=[("Linear", "ReLU")])
```
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from graphopt.passes.axis_flow import operator_name
from graphopt.passes.base import Change, Context, Pass
from graphopt.passes.calls import expand_arguments
from graphopt.passes.errors import PlanError
from graphopt.passes.manager import PassManager, apply_plan, load_state
from graphopt.passes.plan import Plan
from graphopt.passes.program import Program
from graphopt.passes.snapshot import Snapshot
from graphopt.passes.structure import flatten, outside_objects
from graphopt.passes.unread import read_part
from graphopt.passes.verifier import (
    Verifier,
    observe,
    preserved,
    relative_error,
    rounding_bound,
)

from .capture import capture
from .float64 import Float64Arithmetic

__all__ = ["assert_graph", "assert_pass_contract", "assert_same_outputs"]

_GRADIENT_FACTOR = 8
"""Gradients pass through the graph twice, and through norms that amplify rounding."""


def assert_same_outputs(actual: Any, expected: Any, *, bound: float = 0.0) -> None:
    """Assert that two results have the same structure, shapes, types and values.

    Args:
        actual: Any nesting of tensors.
        expected: What it should be.
        bound: Largest ||actual - expected|| / ||expected|| of a tensor; 0 asks for equal bits.
            Derive it (`rounding_bound`) or compare with float64; do not choose it.
    """
    values, structure = flatten(actual)
    references, wanted = flatten(expected)
    assert structure == wanted, f"the structure is {structure}, expected {wanted}"
    for index, (value, reference) in enumerate(zip(values, references, strict=True)):
        assert value.shape == reference.shape, (
            f"tensor {index} is {list(value.shape)}, expected {list(reference.shape)}"
        )
        assert value.dtype == reference.dtype, (
            f"tensor {index} is {value.dtype}, expected {reference.dtype}"
        )
        error = relative_error(value, reference)
        assert error <= bound, f"tensor {index} differs by {error:.2e}, allowed is {bound:.2e}"


def assert_graph(
    program: Program, counts: Mapping[str, int], *, edges: Iterable[tuple[str, str]] = ()
) -> None:
    """Assert what a graph holds; state only what the pass is about.

    Args:
        program: The program.
        counts: How often an operation occurs: a leaf module by its class's name, an ATen operator
            by its name without overload ("linear").
        edges: Pairs of operations of which the first feeds the second, at least once.
    """
    found = Counter(_operation(program, node) for node in program.graph.nodes)
    for name, count in counts.items():
        assert found[name] == count, f"{name} occurs {found[name]} times, expected {count}"
    present = {
        (_operation(program, source), _operation(program, node))
        for node in program.graph.nodes
        for source in node.all_input_nodes
    }
    for edge in edges:
        assert edge in present, f"no {edge[0]} feeds a {edge[1]}"


def assert_pass_contract(
    step: Pass,
    build: Callable[[], nn.Module],
    example: Any,
    *,
    context: Context | None = None,
    other_example: Any = None,
) -> tuple[Program, Plan]:
    """Assert that a pass keeps the promises of every pass, on a model that it can change.

    It proposes without touching anything, obeys `ignore`, keeps outputs and gradients if it is
    exact, leaves gradients that equal a float64 reference, finds nothing more once it is done,
    refuses changed details, replays on a fresh model, on another call and on the meta device, and
    can be undone.

    Args:
        step: The pass.
        build: Makes the model, always with the same values.
        example: Its inputs.
        context: What the pass may know.
        other_example: Inputs of another signature (with labels), for the replay.

    Returns:
        The changed program and its plan.
    """
    context = context or Context(training=not step.inference_only)
    program = capture(build(), example)
    _assert_only_proposes(step, program, context)
    _assert_obeys_ignore(step, program, context)
    plan = PassManager(passes=(step,), context=context).run(program)
    assert plan.changes, f"{step.name} changed nothing"
    fresh = capture(build(), example)
    if step.exact:
        _assert_exact(program, fresh)
    if not step.inference_only:
        _assert_gradients(program)
    again = replace(context, budget=None if context.budget is None else 1.0)
    found = step.propose(program, again).candidates
    assert not found, f"a second run proposes {found[0].change.summary}"
    _assert_refuses_tampering(step, fresh, plan.changes[0].change)
    plan = Plan.from_json(plan.to_json())
    _assert_replays(program, plan, fresh, same_call=True)
    if other_example is not None:
        _assert_replays(program, plan, capture(build(), other_example), same_call=False)
    _assert_replays_on_meta(program, plan, build, example)
    _assert_restores(step, program, plan, build)
    return program, plan


def _operation(program: Program, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(program.module(str(node.target))).__name__
    return operator_name(node) if node.op == "call_function" else node.op


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _assert_only_proposes(step: Pass, program: Program, context: Context) -> None:
    before, code = _values(program.model), program.code
    step.requires(program, context)
    step.propose(program, context)
    assert program.code == code, f"{step.name} edited the graph while proposing"
    assert_same_outputs(_values(program.model), before)


def _assert_obeys_ignore(step: Pass, program: Program, context: Context) -> None:
    ignoring = step.propose(program, replace(context, ignore=("re:.",)))
    assert not ignoring.candidates, f"{step.name} does not obey ignore"
    reasons = [miss.reason for miss in ignoring.misses]
    assert any("ignored by the pattern" in reason for reason in reasons), (
        f"{step.name} does not say that a pattern ignores its targets, it says {reasons}"
    )


def _assert_exact(program: Program, dense: Program) -> None:
    """Compare with the dense program, both in float64 arithmetic over float32 weights."""
    with Float64Arithmetic():
        old = observe(dense, training=False, gradients=False)
        new = observe(program, training=False, gradients=False)
    assert_same_outputs(new.outputs, old.outputs, bound=rounding_bound(program))


def _assert_gradients(program: Program) -> None:
    """Assert that gradients reach what they reached, with the values of a float64 run."""
    found = observe(program, training=False, gradients=True).gradients
    reference = _float64_gradients(program)
    assert found.keys() == reference.keys(), (
        f"gradients reach other parameters than in float64: {found.keys() ^ reference.keys()}"
    )
    assert found, "no gradient reaches a parameter"
    bound = rounding_bound(program) * _GRADIENT_FACTOR
    largest = max(value.norm().item() for value in reference.values())
    for name, value in found.items():
        wanted = reference[name]
        error = (value.double() - wanted.double()).norm().item()
        # Gradients that cancel to nothing (a key's bias under softmax) have only rounding in them.
        allowed = bound * max(wanted.norm().item(), 1e-3 * largest)
        assert error <= allowed, f"the gradient of {name} is off by {error:.2e} > {allowed:.2e}"


def _float64_gradients(program: Program) -> dict[str, torch.Tensor]:
    """Return the gradients that `observe` takes, of a float64 forward."""
    model = program.model
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with preserved(model), torch.enable_grad():
        model.eval()
        tensors = program.few_rows()
        with Float64Arithmetic():
            outputs = read_part(program, tensors, program.run(*tensors))
        losses = [value.square().mean() for value in outputs if _is_differentiable(value)]
        values = torch.autograd.grad(
            torch.stack(losses).sum(), list(trained.values()), allow_unused=True
        )
    return {n: value for n, value in zip(trained, values, strict=True) if value is not None}


def _is_differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _assert_refuses_tampering(step: Pass, program: Program, change: Change) -> None:
    for key in change.details:
        less = {name: value for name, value in change.details.items() if name != key}
        _assert_refused(step, program, replace(change, details=less), f"without {key!r}")
        wrong = {**change.details, key: "not a value"}
        _assert_refused(step, program, replace(change, details=wrong), f"with another {key!r}")
    more = {**change.details, "unknown": 1}
    _assert_refused(step, program, replace(change, details=more), "with an unknown detail")


def _assert_refused(step: Pass, program: Program, change: Change, what: str) -> None:
    code = program.code
    snapshot = Snapshot(program)
    try:
        step.apply(program, change)
    except PlanError:
        assert program.code == code, f"{step.name} edited the graph before refusing {what}"
    else:
        snapshot.restore()
        raise AssertionError(f"{step.name} applied a change {what}")


def _assert_replays(program: Program, plan: Plan, fresh: Program, *, same_call: bool) -> None:
    apply_plan(fresh, plan)
    state = program.model.state_dict()
    assert fresh.model.state_dict().keys() == state.keys()
    load_state(fresh, state)
    if same_call:
        new = observe(fresh, training=False, gradients=False)
        old = observe(program, training=False, gradients=False)
        assert_same_outputs(new.outputs, old.outputs)
    reason = Verifier(fresh, training=False).eager_refusal()
    wanted = Verifier(program, training=False).eager_refusal()
    assert (reason is None) == (wanted is None), f"replayed, {reason or wanted}"


def _assert_replays_on_meta(
    program: Program, plan: Plan, build: Callable[[], nn.Module], example: Any
) -> None:
    fresh = capture(build().to("meta"), _on_meta(example))
    apply_plan(fresh, plan)
    shapes = {name: value.shape for name, value in fresh.model.state_dict().items()}
    wanted = {name: value.shape for name, value in program.model.state_dict().items()}
    assert shapes == wanted
    assert all(value.is_meta for value in fresh.model.state_dict().values())


def _on_meta(example: Any) -> Any:
    tensors, structure = flatten(example)
    return structure.rebuild([tensor.to("meta") for tensor in tensors])


def _assert_restores(
    step: Pass, program: Program, plan: Plan, build: Callable[[], nn.Module]
) -> None:
    """Assert that undoing gives a model of the original form with the compressed one's function."""
    dense = copy.deepcopy(program.model)
    for record in reversed(plan.changes):
        step.restore(dense, record.change)
    original = build()
    original.load_state_dict(dense.state_dict(), strict=False)
    shapes = {name: value.shape for name, value in dense.state_dict().items()}
    for name, value in original.state_dict().items():
        assert shapes.get(name, value.shape) == value.shape, f"{name} is {shapes[name]} restored"
    tensors = program.few_rows()
    args, kwargs = expand_arguments(program.signature, program.inputs.rebuild(tensors))
    with preserved(program.model), torch.no_grad():
        program.model.eval()
        expected = read_part(program, tensors, program.run(*tensors))
        actual = read_part(program, tensors, flatten(dense.eval()(*args, **kwargs))[0])
    outside = outside_objects(program.outputs)
    for value, reference, plain in zip(actual, expected, outside, strict=True):
        if plain:
            assert_same_outputs(value, reference, bound=rounding_bound(program))
