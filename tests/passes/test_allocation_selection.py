"""The mixed-integer program against brute force, on random candidates with random claims."""

from __future__ import annotations

import itertools
import random

import pytest

from graphopt.passes.allocation.selection import conflict, select, select_strongest
from graphopt.passes.base import Candidate, Change, Cost

COST = Cost(flops=0, size_bytes=0, parameters=0)


def candidate(
    owner: int, target: int, loss: float, shared: set[str], exclusive: set[str]
) -> Candidate:
    return Candidate(
        change=Change(pass_name=f"pass-{owner}", target=f"layer.{target}", summary=""),
        before=COST,
        after=COST,
        loss=loss,
        shared=frozenset(shared),
        exclusive=frozenset(exclusive),
    )


def instance(seed: int) -> tuple[list[Candidate], list[float]]:
    """Return candidates of three passes for four targets: two claim, one shares."""
    draw = random.Random(seed)
    candidates: list[Candidate] = []
    saved: list[float] = []
    for owner, target, _ in itertools.product(range(3), range(4), range(draw.choice((1, 2)))):
        names = {f"{target} structure"} | (
            {f"{(target + 1) % 4} structure"} if owner == 0 else set()
        )
        loss = 10 ** draw.uniform(-6, 0)
        if owner == 0:
            candidates.append(candidate(owner, target, loss, names, set()))
        elif owner == 1:
            candidates.append(candidate(owner, target, loss, set(), names | {f"{target} format"}))
        else:
            candidates.append(candidate(owner, target, loss, set(), {f"{target} format"}))
        saved.append(draw.choice((-1, 1, 1, 1)) * draw.uniform(0.1, 100))
    return candidates, saved


def choices(candidates: list[Candidate]) -> list[tuple[int, ...]]:
    """Return every choice without a conflict."""
    found: list[tuple[int, ...]] = [()]
    for index, item in enumerate(candidates):
        found += [
            (*chosen, index)
            for chosen in found
            if not any(conflict(item, candidates[other]) for other in chosen)
        ]
    return found


@pytest.mark.parametrize("seed", range(12))
def test_the_program_finds_what_brute_force_finds(seed: int) -> None:
    candidates, saved = instance(seed)
    allowed = choices(candidates)
    total = [sum(saved[i] for i in chosen) for chosen in allowed]
    strongest = max(total)
    assert sum(saved[i] for i in select_strongest(candidates, saved)) == pytest.approx(strongest)
    for share in (0.2, 0.5, 0.8, 0.99):
        lowest, highest = share * strongest, (share + 0.05) * strongest
        losses = [
            sum(candidates[i].loss or 0 for i in chosen)
            for chosen, value in zip(allowed, total, strict=True)
            if lowest <= value <= highest
        ]
        chosen = select(candidates, saved, lowest=lowest, highest=highest)
        if not losses:
            assert chosen is None
            continue
        assert chosen is not None
        assert tuple(chosen) in allowed
        assert lowest * (1 - 1e-6) <= sum(saved[i] for i in chosen) <= highest * (1 + 1e-6)
        assert sum(candidates[i].loss or 0 for i in chosen) == pytest.approx(min(losses), rel=1e-5)


def test_what_cannot_be_saved_is_not_chosen() -> None:
    candidates, saved = instance(0)
    assert select(candidates, saved, lowest=sum(map(abs, saved)) + 1) is None
    assert select(candidates, saved, lowest=0) == []
    assert select([], [], lowest=1) is None
    assert select([], [], lowest=0) == []


def test_small_losses_are_told_apart() -> None:
    small = [candidate(0, n, loss, set(), set()) for n, loss in enumerate((3e-9, 1e-9, 2e-9, 1.0))]
    assert select(small, [1.0] * 4, lowest=2) == [1, 2]
