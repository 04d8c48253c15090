"""Images are small at the beginning of a training, and grow to their full size.

before: y = net(images)
after:  y = net(gate(images))    in training, gate(images) has fewer rows and columns at first

A table of positions that is added to patches is averaged to as many as there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import fx, nn

from graphopt.kernels.position_grid import PositionGrid
from graphopt.kernels.resolution_gate import ResolutionGate
from graphopt.passes.base import Candidate, Change, Context, Miss, Pass, Proposal, State
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import ConfigError, PlanError
from graphopt.passes.facts import total_cost
from graphopt.passes.program import Program, shape_of
from graphopt.passes.snapshot import twin_of
from graphopt.passes.verifier import preserved

from .block_gates import show_argument
from .image_positions import PositionTable, fit_tables, position_tables

_GATE = "resolution_gate"
_GRID = "position_grid"


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
    behind a pooling of all positions or where a class token is read. Nets whose last layer reads
    every position are left as they are. Of a vision transformer the table of positions that is
    added to its patches is averaged to their grid, found by dataflow; sizes are then multiples of
    a patch. The gate acts in training, once a `ComputeClock` reports progress; evaluation and
    exports are those of the plain model.

    Sources: see `ResolutionGate` and `PositionGrid`.

    Attributes:
        start: Share of height and width at first, in (0, 1].
        hold: Progress up to which it stays.
        full_at: Progress from which images are full, above `hold`.
        multiple: What sizes are multiples of, with patches at least.
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
            found = (
                f"ignored by the pattern {pattern!r}"
                if pattern is not None
                else self._ramp(program, node)
            )
            if isinstance(found, _Ramp):
                candidates.append(self._candidate(program, found))
            else:
                misses.extend(self._refused(name, found).misses)
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
        fit_tables(program, position_tables(program, node), f"{name}_{_GRID}")
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
        show_argument(gated)
        node.replace_all_uses_with(gated, delete_user_cb=lambda user: user is not gated)
        program.changed()

    def trains_only(self, change: Change) -> bool:
        """Say that evaluation is as before."""
        return True

    def restore(self, model: nn.Module, change: Change) -> None:
        """Take the gate away, and what fits tables of positions."""
        name = _gate_name(read_details(_Ramp, change).image)
        if not isinstance(getattr(model, name, None), ResolutionGate):
            raise PlanError(f"the model has no gate {name!r}, which the plan describes")
        delattr(model, name)
        for grid, part in list(model.named_children()):
            if isinstance(part, PositionGrid) and grid.startswith(f"{name}_{_GRID}"):
                delattr(model, grid)

    def _refused(self, target: str, reason: str) -> Proposal:
        return Proposal(misses=(Miss(pass_name=self.name, target=target, reason=reason),))

    def _ramp(self, program: Program, node: fx.Node) -> _Ramp | str:
        """Return how an input is to grow, or why it must not."""
        if hasattr(program.model, _gate_name(str(node.target))):
            return "it has a gate already"
        tables = position_tables(program, node)
        height, width = shape_of(node)[-2:]
        found = _Ramp(
            image=str(node.target),
            start=self.start,
            hold=self.hold,
            full_at=self.full_at,
            multiple=_whole_patches(self.multiple, height, width, tables),
        )
        smallest = ResolutionGate(start=self.start, hold=1.0, full_at=2.0, multiple=found.multiple)
        smallest.advance(0, 0.0)
        if (smallest.shown(height), smallest.shown(width)) == (height, width):
            return f"an image of {height} x {width} is too small to be made smaller"
        return _size_matters(program, node, smallest) or found

    def _candidate(self, program: Program, details: _Ramp) -> Candidate:
        cost = total_cost(program)
        return Candidate(
            change=Change(
                pass_name=self.name,
                target=details.image,
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


def _whole_patches(multiple: int, height: int, width: int, tables: Sequence[PositionTable]) -> int:
    """Return what sizes are multiples of, so that no pixel is outside of all patches."""
    sides = [
        max(1, size // count)
        for table in tables
        for size, count in zip((height, width), table.module.grid, strict=True)
    ]
    patch = lcm(*sides)
    return patch * -(-multiple // patch)


def _size_matters(program: Program, node: fx.Node, gate: ResolutionGate) -> str | None:
    """Say why the model needs images of the captured size, None if it does not."""
    place = program.placeholders.index(node)
    tensors = list(program.few_rows())
    twin = twin_of(program)
    fit_tables(twin, position_tables(twin, twin.placeholders[place]), _GRID)
    with preserved(program.model), torch.no_grad():
        program.model.eval()
        twin.model.eval()
        before = program.run(*tensors)
        sizes = [gate.shown(size) for size in tensors[place].shape[-2:]]
        tensors[place] = F.interpolate(tensors[place], sizes, mode="area")
        try:
            after = twin.run(*tensors)
        except (RuntimeError, ValueError, IndexError) as error:
            return f"the model fails on smaller images: {str(error).splitlines()[0]}"
    for old, new in zip(before, after, strict=True):
        if isinstance(old, torch.Tensor) and old.shape != new.shape:
            return (
                f"an output of shape {list(old.shape)} has the shape {list(new.shape)} for "
                "smaller images"
            )
    return None
