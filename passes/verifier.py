"""What must hold after every change-set: structure, shapes, outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx, nn

from .calls import expand_arguments
from .errors import VerificationError
from .fixed_draws import FixedDraws
from .program import Program, eager_forward, shape_of
from .propagation import refresh
from .structure import flatten, outside_objects
from .unread import read_part

_SLACK = 8
_CANCELLED = 1e-3
"""Share of the largest gradient below which rounding is measured against that one."""
_PART = 2**20
"""Values compared at once: their copies in float64 stay small beside any model."""


@dataclass(frozen=True)
class Observation:
    """What a program does on its example in one mode.

    Attributes:
        outputs: The float outputs.
        state: The float tensors inside plain objects (key/value caches), which shrink with heads.
        gradients: Gradients by parameter name, those that flow.
        trained: Names of the parameters that want one.
    """

    outputs: tuple[torch.Tensor, ...]
    state: tuple[torch.Tensor, ...]
    gradients: dict[str, torch.Tensor]
    trained: frozenset[str]


class Verifier:
    """Checks a program after each change-set against what it did before.

    Exact changes must keep outputs and gradients, in training and evaluation mode, within a
    rounding bound; approximate ones must keep the form of every output, keep all values finite and
    every gradient flowing. `eager_refusal` compares the graph with the eager forward.
    """

    def __init__(self, program: Program, *, training: bool = True) -> None:
        """Remember what the program does now.

        Args:
            program: The program before any change; on meta parameters only shapes are checked.
            training: Whether gradients and the training mode are checked too.
        """
        self._program = program
        self._numeric = not any(p.is_meta for p in program.model.parameters())
        wanted = [(True, True), (False, True)] if training else [(False, False), (False, True)]
        self._modes = [mode for mode in wanted if mode in program.modes]
        if not training:
            self._modes = self._modes[:1]
        self._before = self._observe() if self._numeric else []

    def check(self, pass_name: str, *, exact: bool, trains_only: bool = False) -> None:
        """Check the program as it is now, and remember it as the new reference.

        Args:
            pass_name: The pass whose changes are checked; named in the error.
            exact: Whether outputs and gradients must be unchanged.
            trains_only: Whether training mode is left out of that.

        Raises:
            VerificationError: naming the pass and what differs.
        """
        _check_structure(self._program, pass_name)
        refresh(self._program)
        if not self._numeric:
            return
        after = self._observe()
        bound = rounding_bound(self._program)
        for (training, _), old, new in zip(self._modes, self._before, after, strict=True):
            mode = "training" if training else "evaluation"
            _check_finite(pass_name, mode, old, new)
            if exact and not (training and trains_only):
                _check_equal(pass_name, mode, old, new, bound)
        self._before = after

    def eager_refusal(self) -> str | None:
        """Return why the eager forward cannot run over the rewritten modules, None if it can."""
        for module in self._program.model.modules():
            refusal: str | None = getattr(type(module), "eager_refusal", None)
            if refusal is not None:
                return refusal
        if not self._numeric:
            return None
        program = self._program
        tensors = program.few_rows()
        args, kwargs = expand_arguments(program.signature, program.inputs.rebuild(tensors))
        with preserved(program.model), torch.no_grad():
            program.model.eval()
            try:
                eager, _ = flatten(eager_forward(program.model)(*args, **kwargs))
            except Exception as error:  # whatever the model's own code raises
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                return f"the original forward fails over the rewritten modules ({reason})"
            values = program.run(*tensors)
            # A number that follows from sizes is a result of the graph, a constant of the eager
            # call.
            is_tensor = [isinstance(value, torch.Tensor) for value in values]
            if len(eager) != sum(is_tensor):
                return "the original forward gives another result over the rewritten modules"
            rest = iter(eager)
            aligned = [next(rest) if tensor else None for tensor in is_tensor]
            graph = read_part(program, tensors, values)
            references = read_part(program, tensors, aligned)
            bound = rounding_bound(program)
            for value, reference, tensor in zip(graph, references, is_tensor, strict=True):
                if not tensor:
                    continue
                if value.shape != reference.shape or relative_error(value, reference) > bound:
                    return "the original forward gives another result over the rewritten modules"
        return None

    def _observe(self) -> list[Observation]:
        return [observe(self._program, training=t, gradients=g) for t, g in self._modes]


def observe(program: Program, *, training: bool, gradients: bool) -> Observation:
    """Run a program on a few rows of its example; return outputs and, if asked, gradients.

    What nobody reads (see `unread`) counts as zero. The loss is the mean square of all float
    outputs; random numbers are fixed, and random masks keep everything (see `fixed_draws`);
    buffers, gradient fields and modes are left as they were.
    """
    model = program.model
    tensors = program.few_rows()
    with preserved(model), torch.set_grad_enabled(gradients), FixedDraws():
        model.train(training)
        pairs = [
            (value, outside)
            for value, outside in zip(
                read_part(program, tensors, program.run(*tensors)),
                outside_objects(program.outputs),
                strict=True,
            )
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        ]
        differentiable = [value for value, _ in pairs if value.requires_grad]
        found: dict[str, torch.Tensor] = {}
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if gradients and trained and differentiable:
            loss = torch.stack([value.double().square().mean() for value in differentiable]).sum()
            values = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            found = {
                name: value
                for name, value in zip(trained, values, strict=True)
                if value is not None
            }
    return Observation(
        tuple(value.detach() for value, outside in pairs if outside),
        tuple(value.detach() for value, outside in pairs if not outside),
        found,
        frozenset(trained) if gradients else frozenset(),
    )


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return ||value - reference|| / ||reference|| in float64; positions NaN in both are equal.

    Tensors of different shapes differ infinitely.
    """
    if value.shape != reference.shape:
        return float("inf")
    if not reference.numel():
        return 0.0
    squares, energy = 0.0, 0.0
    parts = (tensor.flatten().split(_PART) for tensor in (value, reference))
    for found, wanted in zip(*parts, strict=True):
        a, b = found.double(), wanted.double()
        both = torch.isnan(a) & torch.isnan(b)
        a, b = a.masked_fill(both, 0), b.masked_fill(both, 0)
        finite = torch.isfinite(b)
        if not torch.equal(a[~finite], b[~finite]):
            return float("inf")
        energy += b[finite].square().sum().item()
        squares += (a[finite] - b[finite]).square().sum().item()
    return float((squares / energy) ** 0.5 if energy else squares**0.5)


def rounding_bound(program: Program) -> float:
    """Return the relative error that reordered float sums can cause in this program.

    Random-walk model: a sum of K terms errs by about eps sqrt(K); contractions in sequence add
    their variances; `_SLACK` covers the growth through norms and activations. A module that rounds
    its inputs to few bits says so (`unit_roundoff`): values that differ in their last bit may round
    to neighbouring numbers there.
    """
    terms, eps, coarse = 1, 0.0, 0.0
    for node in program.graph.nodes:
        if node.op == "call_module":
            coarse += float(getattr(program.module(str(node.target)), "unit_roundoff", 0.0)) ** 2
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            eps = max(eps, torch.finfo(value.dtype).eps)
            if node.op in ("call_module", "call_function") and value.dim():
                terms += shape_of(node)[-1]
    return float(_SLACK * (eps * terms**0.5 + coarse**0.5))


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Fix random numbers; restore the generator, modes and buffers of a model at the end."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def _check_structure(program: Program, pass_name: str) -> None:
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"{pass_name} left a malformed graph: {error}") from error
    for node in program.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            _check_name(program.model, node, pass_name)


def _check_name(model: nn.Module, node: fx.Node, pass_name: str) -> None:
    parent, _, attribute = str(node.target).rpartition(".")
    try:
        found = hasattr(model.get_submodule(parent), attribute)
    except AttributeError:
        found = False
    if not found:
        raise VerificationError(f"{pass_name} left a use of {node.target!r}, which is gone")


def _check_finite(pass_name: str, mode: str, old: Observation, new: Observation) -> None:
    for index, (before, after) in enumerate(zip(old.outputs, new.outputs, strict=True)):
        if before.shape != after.shape or before.dtype != after.dtype:
            raise VerificationError(
                f"{pass_name} changed output {index} in {mode} mode from {list(before.shape)} "
                f"{before.dtype} to {list(after.shape)} {after.dtype}"
            )
        if torch.isfinite(before).all() and not torch.isfinite(after).all():
            raise VerificationError(f"{pass_name} made output {index} not finite in {mode} mode")
    for before, after in zip(old.state, new.state, strict=True):
        if torch.isfinite(before).all() and not torch.isfinite(after).all():
            raise VerificationError(f"{pass_name} made the state not finite in {mode} mode")
    for name, gradient in new.gradients.items():
        earlier = old.gradients.get(name)
        was_finite = earlier is None or bool(torch.isfinite(earlier).all())
        if was_finite and not torch.isfinite(gradient).all():
            raise VerificationError(f"{pass_name} made the gradient of {name} not finite")
    lost = [name for name in old.gradients if name in new.trained - new.gradients.keys()]
    if lost:
        raise VerificationError(f"{pass_name} cut the gradient of {lost[0]}")


def _check_equal(
    pass_name: str, mode: str, old: Observation, new: Observation, bound: float
) -> None:
    values = zip((*old.outputs, *old.state), (*new.outputs, *new.state), strict=True)
    for index, (before, after) in enumerate(values):
        error = relative_error(after, before)
        if not error <= bound:
            raise VerificationError(
                f"{pass_name} promises unchanged outputs, but output {index} changed by "
                f"{error:.1e} in {mode} mode (rounding allows {bound:.1e})"
            )
    largest = max((value.norm().item() for value in old.gradients.values()), default=0.0)
    for name in old.gradients.keys() & new.gradients.keys():
        before, after = old.gradients[name], new.gradients[name]
        if before.shape == after.shape:
            # A gradient that cancels to nothing (behind a norm) has only rounding in it.
            scale = max(before.norm().item(), _CANCELLED * largest, 1e-30)
            error = (after.double() - before.double()).norm().item() / scale
            if not error <= bound * _SLACK:
                raise VerificationError(
                    f"{pass_name} promises unchanged gradients, but that of {name} changed by "
                    f"{error:.1e} in {mode} mode"
                )
