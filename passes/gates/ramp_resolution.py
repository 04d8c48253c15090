"""Images are small at the beginning of a training, and grow to their full size.

before: y = net(images)
after:  y = net(gate(images))    in training, gate(images) has fewer rows and columns at first
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import fx, nn

from graphopt.kernels.resolution_gate import ResolutionGate
from graphopt.passes.base import Candidate, Change, Context, Miss, Pass, Proposal, State
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import ConfigError, PlanError
from graphopt.passes.facts import total_cost
from graphopt.passes.program import Program, shape_of
from graphopt.passes.verifier import preserved

_GATE = "resolution_gate"


class _Ramp(Details):
    """What `apply` needs.

    Attributes:
        image: Name of the input.
        start: Share of height and width at first.
        hold: Progress up to which it stays.
        full_at: Progress from which images are full.
        multiple: What sizes are multiples of.
    """

    image: str
    start: float = Field(gt=0, le=1)
    hold: float = Field(ge=0, lt=1)
    full_at: float = Field(gt=0, le=1)
    multiple: int = Field(ge=1)


@final
@dataclass(frozen=True, kw_only=True)
class RampResolution(Pass):
    """Show smaller images while progress is low; the model must not depend on their size.

    That is tried: the model is run on smaller images, and its outputs must keep their shapes, as
    behind a pooling of all positions. Nets with a table of positions, or whose last layer reads
    every position, are left as they are. The gate acts in training, once a `ComputeClock` reports
    progress; evaluation and exports are those of the plain model.

    Sources: see `ResolutionGate`.

    Attributes:
        start: Share of height and width at first, in (0, 1].
        hold: Progress up to which it stays.
        full_at: Progress from which images are full, above `hold`.
        multiple: What sizes are multiples of.
    """

    name: ClassVar[str] = "ramp-resolution"
    exact: ClassVar[bool] = False

    start: float = 0.5
    hold: float = 0.2
    full_at: float = 0.6
    multiple: int = 4

    def __post_init__(self) -> None:
        """Check the options."""
        if not (0 < self.start <= 1 and 0 <= self.hold < self.full_at <= 1 and self.multiple >= 1):
            raise ConfigError(
                "ramp-resolution takes a start above 0 and at most 1, 0 <= hold < full_at <= 1 "
                f"and a multiple of at least 1, got start={self.start}, hold={self.hold}, "
                f"full_at={self.full_at}, multiple={self.multiple}"
            )

    def propose(self, program: Program, context: Context) -> Proposal:
        """Find inputs that are images, and try smaller ones."""
        images = [node for node in program.placeholders if _is_image(node)]
        if not images:
            return self._refused("(model)", "it has no input [image, channel, height, width]")
        candidates: list[Candidate] = []
        misses: list[Miss] = []
        for node in images:
            name = str(node.target)
            pattern = context.ignored_by(name)
            reason = (
                f"ignored by the pattern {pattern!r}"
                if pattern is not None
                else self._refusal(program, node)
            )
            if reason is None:
                candidates.append(self._candidate(program, name))
            else:
                misses.extend(self._refused(name, reason).misses)
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return nothing: a gate has no values."""
        return {}

    def reconstruct(self, program: Program, change: Change, state: State) -> State:
        """Return nothing: evaluation is as before."""
        return {}

    def apply(self, program: Program, change: Change) -> None:
        """Put a gate behind the input."""
        details = read_details(_Ramp, change)
        node = next((n for n in program.placeholders if str(n.target) == details.image), None)
        name = _gate_name(details.image)
        if node is None or not _is_image(node) or hasattr(program.model, name):
            raise PlanError(f"the model has no image input {details.image!r} to put a gate behind")
        gate = ResolutionGate(
            start=details.start,
            hold=details.hold,
            full_at=details.full_at,
            multiple=details.multiple,
        )
        program.model.add_module(name, gate.train(program.model.training))
        users = tuple(node.users)
        with program.graph.inserting_before(users[0]):
            gated = program.graph.call_module(name, (node,))
        # Analyses see the gate as what it is in evaluation mode: its argument.
        body = fx.Graph()
        entry = body.placeholder("images")
        entry.meta["val"] = node.meta["val"]
        body.output(entry)
        gated.meta = {"val": node.meta["val"], "modules": ("",), "calls": ("",), "body": body}
        node.replace_all_uses_with(gated, delete_user_cb=lambda user: user is not gated)
        program.changed()

    def trains_only(self, change: Change) -> bool:
        """Say that evaluation is as before."""
        return True

    def restore(self, model: nn.Module, change: Change) -> None:
        """Take the gate away."""
        name = _gate_name(read_details(_Ramp, change).image)
        if not isinstance(getattr(model, name, None), ResolutionGate):
            raise PlanError(f"the model has no gate {name!r}, which the plan describes")
        delattr(model, name)

    def _refused(self, target: str, reason: str) -> Proposal:
        return Proposal(misses=(Miss(pass_name=self.name, target=target, reason=reason),))

    def _refusal(self, program: Program, node: fx.Node) -> str | None:
        if hasattr(program.model, _gate_name(str(node.target))):
            return "it has a gate already"
        gate = ResolutionGate(start=self.start, hold=1.0, full_at=2.0, multiple=self.multiple)
        gate.advance(0, 0.0)
        height, width = shape_of(node)[-2:]
        if (gate.shown(height), gate.shown(width)) == (height, width):
            return f"an image of {height} x {width} is too small to be made smaller"
        return _size_matters(program, node, gate)

    def _candidate(self, program: Program, name: str) -> Candidate:
        cost = total_cost(program)
        details = _Ramp(
            image=name,
            start=self.start,
            hold=self.hold,
            full_at=self.full_at,
            multiple=self.multiple,
        )
        return Candidate(
            change=Change(
                pass_name=self.name,
                target=name,
                summary=f"{self.start:.0%} of height and width up to {self.hold:.0%} of the "
                f"training, all from {self.full_at:.0%} on",
                details=details.model_dump(mode="json"),
            ),
            before=cost,
            after=cost,
            predicted_error=0.0,
        )


def _is_image(node: fx.Node) -> bool:
    value = node.meta["val"]
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dim() == 4
        and bool(node.users)
    )


def _gate_name(image: str) -> str:
    return f"{_GATE}_{image}"


def _size_matters(program: Program, node: fx.Node, gate: ResolutionGate) -> str | None:
    """Say why the model needs images of the captured size, None if it does not."""
    place = program.placeholders.index(node)
    tensors = list(program.few_rows())
    with preserved(program.model), torch.no_grad():
        program.model.eval()
        before = program.run(*tensors)
        sizes = [gate.shown(size) for size in tensors[place].shape[-2:]]
        tensors[place] = F.interpolate(tensors[place], sizes, mode="area")
        try:
            after = program.run(*tensors)
        except (RuntimeError, ValueError, IndexError) as error:
            return f"the model fails on smaller images: {str(error).splitlines()[0]}"
    for old, new in zip(before, after, strict=True):
        if isinstance(old, torch.Tensor) and old.shape != new.shape:
            return (
                f"an output of shape {list(old.shape)} has the shape {list(new.shape)} for "
                "smaller images"
            )
    return None
