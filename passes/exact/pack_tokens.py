"""Padding elimination: what works on every token alone runs on the real tokens only.

before: [batch, token, width] -> linear, norm, activation ... -> [batch, token, width]
after:  the same on [1, real token, width]; attention gets its rows back, with zeros at padding
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import fx, nn

from graphopt.passes.attention_masks import padding_attentions
from graphopt.passes.base import Candidate, Change, Context, Miss, Pass, Proposal, State
from graphopt.passes.calibration import Calibration, bind
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import ConfigError, PlanError
from graphopt.passes.facts import total_cost
from graphopt.passes.packed_graph import is_packed, run_packed
from graphopt.passes.packing import Packing, packing_of
from graphopt.passes.padding import marks_real, padding_input, real_tokens
from graphopt.passes.padding_proof import output_that_reads_padding
from graphopt.passes.program import Program, shape_of
from graphopt.passes.program_times import compare_programs
from graphopt.passes.row_places import row_places
from graphopt.passes.snapshot import copied_graph
from graphopt.passes.structure import flatten
from graphopt.passes.unread import output_rows

_TARGET = "(padding)"


class _Packed(Details):
    """What `apply` needs.

    Attributes:
        mask: Name of the input that marks padding.
        marks_real: Whether it is non-zero at real tokens, else at padding.
    """

    mask: str = Field(min_length=1)
    marks_real: bool


@final
@dataclass(frozen=True, kw_only=True)
class PackTokens(Pass):
    """Compute linear layers, norms and activations for real tokens only.

    The input that masks attention says which tokens are real. Outputs at padding come back as
    zeros. Proved before it is proposed: other values at padding change nothing that is read.
    Where times are measured and the example has padding, packing is kept only if it is faster; an
    example without padding says nothing about the batches to come, so that packing is kept.

    Attributes:
        mask: Name of the input that marks padding [batch, token], non-zero at real tokens;
            empty: the one that masks attention.
    """

    name: ClassVar[str] = "pack-tokens"
    exact: ClassVar[bool] = True

    mask: str = ""

    def note_unread(self, program: Program) -> None:
        """Note the mask that the user named."""
        if not self.mask:
            return
        refusal = _mask_refusal(program, self.mask)
        if refusal is not None:
            raise ConfigError(refusal)
        program.padding = self.mask

    def propose(self, program: Program, context: Context) -> Proposal:
        """Find the mask and what can be packed; prove that padding is not read; measure."""
        self.note_unread(program)
        pattern = context.ignored_by(_TARGET, *filter(None, [padding_input(program)]))
        if pattern is not None:
            return self._refusal(f"ignored by the pattern {pattern!r}")
        if is_packed(program):
            return self._refusal("runs on real tokens already")
        name = padding_input(program)
        if name is None:
            return self._refusal(
                "no input marks padding: none of [batch, token] reaches the mask of an attention; "
                "pass a padding mask in the example, or name it with the option mask"
            )
        packing = _packing(program, name)
        if packing is None:
            return self._refusal(f"nothing works on every token of {name} alone")
        if context.calibration is not None and not _has_padding(program, context.calibration, name):
            return self._refusal(
                "no row of the example and the calibration data has padding to leave out"
            )
        numeric = not any(parameter.is_meta for parameter in program.model.parameters())
        if numeric:
            reader = output_that_reads_padding(program, packing)
            if reader is not None:
                return self._refusal(
                    f"padded positions are read by output {reader}: other values there change it; "
                    "labels of padding must be those that the loss ignores"
                )
        return self._proposal(program, context, packing, name)

    def _refusal(self, reason: str) -> Proposal:
        miss = Miss(pass_name=self.name, target=_TARGET, reason=reason)
        return Proposal(misses=(miss,))

    def _proposal(
        self, program: Program, context: Context, packing: Packing, name: str
    ) -> Proposal:
        rows, positions = _count(program, name)
        details = _Packed(mask=name, marks_real=marks_real(program))
        share = rows / positions
        padding = (
            f"{1 - share:.0%} of the example's tokens are padding"
            if rows < positions
            else "the example has no padding, so nothing was measured"
        )
        before = total_cost(program)
        saved = packing.flops * (1 - share) + packing.attention_flops * (1 - share**2)
        candidate = Candidate(
            change=Change(
                pass_name=self.name,
                target=_TARGET,
                summary=f"{len(packing.nodes)} operations on real tokens of {name} only; {padding}",
                details=details.model_dump(mode="json"),
            ),
            before=before,
            after=replace(before, flops=before.flops - round(saved)),
            predicted_error=0.0,
        )
        if context.costs is not None and rows < positions:
            return self._measured(program, context, candidate)
        return Proposal(candidates=(candidate,))

    def _measured(self, program: Program, context: Context, candidate: Candidate) -> Proposal:
        """Keep the candidate only if the program is faster with it."""
        if any(parameter.is_meta for parameter in program.model.parameters()):
            return Proposal(candidates=(candidate,))
        assert context.costs is not None
        twin = program.of_copy(program.model)
        twin.graph = copied_graph(program.graph)
        twin.changed()
        self.apply(twin, candidate.change)
        rows, positions = _count(program, read_details(_Packed, candidate.change).mask)
        times = compare_programs(
            context.costs,
            program,
            twin,
            f"{rows} of {positions} tokens packed",
            training=context.training,
        )
        if times.ratio > 1:
            return Proposal(candidates=(candidate.timed(times),))
        return self._refusal(
            f"packed measured {times.ratio:.2f}x at the example's padding, kept padded"
        )

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Change no values."""
        return {}

    def apply(self, program: Program, change: Change) -> None:
        """Pack what works on every token alone."""
        details = read_details(_Packed, change)
        refusal = _mask_refusal(program, details.mask)
        if refusal is not None:
            raise PlanError(f"{refusal}; is this plan for another model?")
        packing = _packing(program, details.mask)
        if packing is None or is_packed(program):
            raise PlanError(f"nothing of this model can be packed by its input {details.mask!r}")
        mask = _input(program, details.mask)
        rows, _ = _count(program, details.mask)
        program.padding = details.mask
        program.call_fact("padding input marks real tokens", lambda _: details.marks_real)
        output_rows(program)
        # The saving is in the graph, so it runs wherever it is the eager forward up to rounding.
        program.modes = program.rounding_modes
        run_packed(program, packing, mask, marks_real=details.marks_real, rows=rows)

    def restore(self, model: nn.Module, change: Change) -> None:
        """Do nothing: modules are as they were."""
        read_details(_Packed, change)


def _input(program: Program, name: str) -> fx.Node:
    return next(node for node in program.placeholders if node.name == name)


def _mask_refusal(program: Program, name: str) -> str | None:
    """Say why an input cannot mark padding, None if it can."""
    found = {node.name: node for node in program.placeholders}
    if name not in found:
        return f"the mask must name an input of the model ({', '.join(found)}), got {name!r}"
    shape = shape_of(found[name])
    if len(shape) != 2:
        return f"the mask must be [batch, token], but the input {name!r} is {list(shape)}"
    return None


def _packing(program: Program, name: str) -> Packing | None:
    """Return what runs on real tokens, None if that is nothing."""
    places = row_places(program, name)
    if places is None:
        return None
    packing = packing_of(program, places, attentions=padding_attentions(program, name))
    return packing if packing.nodes else None


def _has_padding(program: Program, calibration: Calibration, name: str) -> bool:
    """Say whether the example or any batch has padding."""
    batches = (program.example, *calibration.batches())
    counts = (_real(program, bind(program, batch), name) for batch in batches)
    return any(rows < positions for rows, positions in counts)


def _count(program: Program, name: str) -> tuple[int, int]:
    """Return the number of real tokens and of all positions in the example."""
    return _real(program, flatten(program.example)[0], name)


def _real(program: Program, tensors: Sequence[torch.Tensor], name: str) -> tuple[int, int]:
    """Return the number of real tokens and of all positions in some inputs."""
    batch = {node.name: value for node, value in zip(program.placeholders, tensors, strict=True)}
    mask = batch[name]
    real = None if mask.is_meta else real_tokens(program, batch)
    return (mask.numel() if real is None else int(real.sum())), mask.numel()
