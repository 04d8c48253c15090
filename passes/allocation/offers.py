"""What the passes offer for a program, with what each offer would lose."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from graphopt.passes.base import Candidate, Context, Miss, Pass
from graphopt.passes.budget import Resource, spent
from graphopt.passes.facts import total_cost
from graphopt.passes.program import Program


class Losses(Protocol):
    """Estimates and measures losses (see `loss_model`)."""

    def estimate(self, step: Pass, candidate: Candidate) -> Candidate:
        """Return the candidate settled, with its loss and the source of that."""
        ...

    def measure(self, chosen: Sequence[tuple[Pass, Candidate]]) -> float:
        """Return the loss of settled candidates together."""
        ...

    def made(self, chosen: Sequence[tuple[Pass, Candidate]]) -> AbstractContextManager[Program]:
        """Make settled candidates for a while; the program that has them."""
        ...


@dataclass(frozen=True)
class Offer:
    """One candidate of one pass.

    Attributes:
        place: Position of the pass in the pipeline.
        step: The pass.
        offered: The candidate as offered: it is settled again when it is made.
        candidate: The candidate as estimated, with its loss.
    """

    place: int
    step: Pass
    offered: Candidate
    candidate: Candidate

    def saved(self, resource: Resource, dense: float, dense_flops: int) -> float:
        """Return what it saves where nothing else changes.

        A time that was not measured is predicted from the share of the FLOPs.

        Args:
            resource: What to save.
            dense: What the whole dense model spends of it.
            dense_flops: The FLOPs of the whole dense model.
        """
        before, after = self.candidate.before, self.candidate.after
        if resource == "latency" and None in (before.latency_ms, after.latency_ms):
            return dense * (before.flops - after.flops) / max(dense_flops, 1)
        return spent(before, resource) - spent(after, resource)


def collect_offers(
    program: Program, steps: Sequence[Pass], context: Context
) -> tuple[list[Offer], list[Miss]]:
    """Return what all approximate passes of a pipeline offer for a program, and what they refuse.

    Args:
        program: The program.
        steps: The pipeline; positions in it are the offers' places.
        context: What the passes may know.
    """
    offers: list[Offer] = []
    misses: list[Miss] = []
    for place, step in enumerate(steps):
        if step.exact:
            continue
        proposal = step.offer(program, context)
        misses.extend(proposal.misses)
        offers.extend(Offer(place, step, item, item) for item in proposal.candidates)
    return offers, misses


def with_estimate(offer: Offer, estimate: Candidate) -> Offer:
    """Return the offer with an estimate of its loss, which both of its candidates carry."""
    offered = replace(
        offer.offered,
        loss=estimate.loss,
        loss_source=estimate.loss_source,
        predicted_error=estimate.predicted_error,
    )
    return replace(offer, offered=offered, candidate=estimate)


def without_numbers(program: Program, offer: Offer) -> Offer:
    """Return the offer with a loss from sizes alone, for programs without numbers.

    Removing a share s of the work of a part loses s^2 of what the part contributes, which counts
    as its share of the program's FLOPs and parameters.
    """
    total = total_cost(program)
    before, after = offer.candidate.before, offer.candidate.after
    loss = 0.0
    for all_of_it, old, new in (
        (total.flops, before.flops, after.flops),
        (total.size_bytes, before.size_bytes, after.size_bytes),
    ):
        if old and all_of_it:
            loss = max(loss, old / all_of_it * (max(old - new, 0) / old) ** 2)
    return with_estimate(offer, replace(offer.candidate, loss=loss, loss_source="weights"))
