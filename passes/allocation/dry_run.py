"""What a choice really costs: its changes made, without values, on a twin of the program."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from graphopt.passes.base import Context, Cost, Pass
from graphopt.passes.budget import Resource, spent
from graphopt.passes.errors import PlanError
from graphopt.passes.facts import facts_of, total_cost
from graphopt.passes.latency import Source
from graphopt.passes.program import Program
from graphopt.passes.program_times import compare_programs
from graphopt.passes.propagation import refresh
from graphopt.passes.rewriting import make_change
from graphopt.passes.snapshot import twin_of

from .offers import Offer


@dataclass(frozen=True)
class Realized:
    """What a choice costs.

    Attributes:
        cost: Of the whole program; with a time where the dry run times.
        steps: Cost of the whole program after each pass of the pipeline, without times.
        unfit: Offers that cannot be made beside the others: position -> the sentence.
    """

    cost: Cost
    steps: tuple[Cost, ...]
    unfit: Mapping[int, str]


class DryRun:
    """Makes choices on twins of a program; remembers what each one cost.

    Without numbers (on the meta device) their savings are added up instead.

    A twin shares all tensors that a change does not replace. The exact passes of the pipeline run
    where they stand, as they will when the changes are made.
    """

    def __init__(
        self,
        program: Program,
        steps: Sequence[Pass],
        context: Context,
        offers: Sequence[Offer],
        dense: Program,
    ) -> None:
        """Hold the parts.

        Args:
            program: The program the offers were made for; it is not changed.
            steps: The rest of the pipeline.
            context: What the passes may know; calibration data plays no part.
            offers: What may be chosen.
            dense: The program before any change: times are compared with its.
        """
        self._program = program
        self._steps = steps
        self._context = replace(context, calibration=None, budget=None)
        self._offers = offers
        self._dense = dense
        self._found: dict[tuple[int, ...], Realized] = {}
        self._timed: dict[tuple[int, ...], Realized] = {}
        self._nodes: dict[int | None, Mapping[str, Cost]] = {}
        self._dense_ms: float | None = None
        self._source: Source = "measured"

    @property
    def dense(self) -> Cost:
        """Cost of the program before any change, with its time once a choice was timed."""
        cost = total_cost(self._dense)
        return cost if self._dense_ms is None else cost.timed(self._dense_ms, self._source)

    @property
    def start(self) -> Cost:
        """Cost of the program the offers were made for, without a time."""
        return total_cost(self._program)

    def realize(self, chosen: Sequence[int], *, timed: bool = False) -> Realized:
        """Return what a choice costs.

        Args:
            chosen: Positions of the chosen offers.
            timed: Whether to time the whole program too, in turns with the dense one.
        """
        key = tuple(sorted(chosen))
        found = self._timed if timed else self._found
        if key not in found:
            found[key] = self._made(key, timed)
        return found[key]

    @property
    def has_numbers(self) -> bool:
        """Whether changes can be made: their details may depend on values."""
        return not any(parameter.is_meta for parameter in self._program.model.parameters())

    def _made(self, chosen: tuple[int, ...], timed: bool) -> Realized:
        if not self.has_numbers:
            return self._predicted(chosen, timed)
        unfit: dict[int, str] = {}
        while True:
            fitting = [index for index in chosen if index not in unfit]
            refused, program, costs = self._attempt(fitting)
            if not refused:
                break
            # What was made of the change is in the way of the others: they start anew.
            unfit.update(refused)
        cost = costs[-1]
        if timed:
            _fill(program, self._dense)
            cost = self.timed(cost, program)
        return Realized(cost, tuple(costs), unfit)

    def _attempt(self, chosen: Sequence[int]) -> tuple[dict[int, str], Program, list[Cost]]:
        """Make changes on a new twin; return the one that does not fit, the twin, and costs.

        The costs are those after each pass; there are none for changes that do not fit.
        """
        program = twin_of(self._program)
        costs: list[Cost] = []
        for place, step in enumerate(self._steps):
            if step.exact:
                for candidate in step.propose(program, self._context).candidates:
                    make_change(step, program, candidate, self._context)
            for index in chosen:
                if self._offers[index].place == place:
                    reason = self._place(program, self._offers[index])
                    if reason is not None:
                        return {index: reason}, program, []
            refresh(program)
            costs.append(total_cost(program))
        return {}, program, costs

    def _predicted(self, chosen: tuple[int, ...], timed: bool) -> Realized:
        """Return what a choice costs if savings add up."""
        cost = self.start
        if timed:
            cost = self.timed(cost, self._program)
        dense = self.dense
        resources: tuple[Resource, ...] = ("flops", "bytes", "parameters", "latency")
        steps = []
        for place in range(len(self._steps)):
            for offer in (self._offers[i] for i in chosen if self._offers[i].place == place):
                saved = {
                    resource: offer.saved(resource, spent(dense, resource), dense.flops)
                    for resource in (resources if timed else resources[:3])
                }
                cost = replace(
                    cost,
                    flops=max(cost.flops - round(saved["flops"]), 0),
                    size_bytes=max(cost.size_bytes - round(saved["bytes"]), 0),
                    parameters=max(cost.parameters - round(saved["parameters"]), 0),
                    latency_ms=(cost.latency_ms or 0.0) - saved["latency"] if timed else None,
                )
            steps.append(cost)
        return Realized(steps[-1], tuple(steps), {})

    def _place(self, program: Program, offer: Offer) -> str | None:
        """Make the structure of a change; return why it does not fit, None if it does.

        It is made as it was settled on the dense program: which values stay costs nothing. Where
        that does not fit any more, it takes the sizes that are there.
        """
        try:
            try:
                offer.step.apply(program, offer.candidate.change)
            except PlanError:
                resized = offer.step.resized(program, offer.offered, self._context)
                offer.step.apply(program, resized.change)
        except PlanError as error:
            return str(error)
        return None

    def nodes(self, index: int | None) -> Mapping[str, Cost]:
        """Return the cost of every operation with one offer's change, None for without any.

        Exact passes play no part, nor does an offer that does not fit.
        """
        if index not in self._nodes:
            self._nodes[index] = self._counted(index)
        return self._nodes[index]

    def _counted(self, index: int | None) -> Mapping[str, Cost]:
        program = self._program
        if index is not None:
            candidate = self._offers[index].candidate
            calls = program.calls(candidate.change.target)
            if len(calls) == 1 and facts_of(program).cost(calls) == _untimed(candidate.before):
                # It rewrites a single operation, and says what it leaves of that.
                return {**self.nodes(None), calls[0].name: _untimed(candidate.after)}
            program = twin_of(program)
            self._place(program, self._offers[index])
            refresh(program)
        facts = facts_of(program)
        return {node.name: facts.cost([node]) for node in facts.nodes}

    def timed(self, cost: Cost, program: Program) -> Cost:
        """Return the cost of a program with its time: its part of the dense program's.

        They run in turns.

        Programs are told apart by their code and sizes, so that measured times can be kept.
        """
        costs, training = self._context.costs, self._context.training
        assert costs is not None
        form, dense_form = _form(program), _form(self._dense)
        what = hashlib.sha256(form.encode()).hexdigest()[:24]
        times = compare_programs(costs, self._dense, program, what, training=training)
        if self._dense_ms is None:
            self._dense_ms, self._source = times.dense_ms, times.source
        ratio = 1.0 if form == dense_form else times.ratio
        return cost.timed(self._dense_ms / ratio, times.source)


def _untimed(cost: Cost) -> Cost:
    return replace(cost, latency_ms=None, latency_source="")


def _form(program: Program) -> str:
    """Return code, kinds and sizes of all that a program computes with."""
    model = program.model
    kinds = [f"{name}: {type(module).__name__}" for name, module in model.named_modules()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    sizes = [f"{name}: {list(value.shape)} {value.dtype}" for name, value in tensors]
    return "\n".join([program.code, *kinds, *sizes])


def _fill(program: Program, dense: Program) -> None:
    """Give numbers to tensors that a dry run made without any: odd ones take longer to multiply."""
    kept = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*dense.model.parameters(), *dense.model.buffers())
    }
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*program.model.parameters(), *program.model.buffers()):
            if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in kept:
                tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
