"""The choice among candidates as a mixed-integer program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphopt.passes.base import Candidate
from graphopt.passes.errors import MissingExtraError

_GAP = 1e-6
"""Largest share by which the loss of a choice may exceed the least possible one."""
_NODES = 20_000
"""Branches tried before the best choice so far stands; a count, unlike a time, is deterministic."""


def conflict(first: Candidate, second: Candidate) -> bool:
    """Say whether two candidates cannot both be chosen."""
    return (
        owner_of(first) == owner_of(second)
        or not first.exclusive.isdisjoint(second.shared | second.exclusive)
        or not second.exclusive.isdisjoint(first.shared | first.exclusive)
    )


def owner_of(candidate: Candidate) -> tuple[str, str]:
    """Return pass and target: of the candidates that share both, one at most is chosen."""
    return candidate.change.pass_name, candidate.change.target


def select(
    candidates: Sequence[Candidate],
    saved: Sequence[float],
    *,
    lowest: float,
    highest: float = float("inf"),
    near: tuple[Sequence[int], int] | None = None,
) -> list[int] | None:
    """Choose the candidates that lose least in all and save enough.

        minimize  sum_i loss_i x_i   over  x_i in {0, 1}
        such that lowest <= sum_i saved_i x_i <= highest
        and       x_i + x_j <= 1   where i and j conflict (written as cliques)

    Args:
        candidates: With their losses.
        saved: What each saves, in units of the resource.
        lowest: What they must save together.
        highest: What they may save together.
        near: Another choice, and how many of its candidates may go and how many may come.

    Returns:
        Positions of the chosen candidates in order, None if no choice saves enough.

    Raises:
        MissingExtraError: if scipy is not installed.
    """
    losses = np.array([candidate.loss or 0.0 for candidate in candidates])
    return _solve(candidates, losses, np.array(saved, dtype=float), lowest, highest, near)


def select_strongest(candidates: Sequence[Candidate], saved: Sequence[float]) -> list[int]:
    """Choose the candidates that save most in all; arguments and result as in `select`."""
    values = np.array(saved, dtype=float)
    chosen = _solve(candidates, -np.maximum(values, 0), values, -np.inf, np.inf)
    return [] if chosen is None else [index for index in chosen if saved[index] > 0]


def _solve(
    candidates: Sequence[Candidate],
    objective: np.ndarray[Any, Any],
    saved: np.ndarray[Any, Any],
    lowest: float,
    highest: float,
    near: tuple[Sequence[int], int] | None = None,
) -> list[int] | None:
    if lowest > np.maximum(saved, 0).sum():
        return None
    if not candidates:
        return []
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise MissingExtraError(
            "choosing candidates under a budget needs scipy: pip install 'graphopt[solver]'"
        ) from error
    cliques = _cliques(candidates)
    rows = np.repeat(np.arange(len(cliques)), [len(clique) for clique in cliques])
    columns = np.concatenate([np.array(clique) for clique in cliques])
    shape = (len(cliques), len(candidates))
    matrix = csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)
    constraints = [LinearConstraint(matrix, -np.inf, 1)]
    # HiGHS compares with absolute tolerances, so all quantities are brought near to 1.
    unit = np.abs(saved).max() or 1.0
    if np.isfinite(lowest) or np.isfinite(highest):
        constraints.append(LinearConstraint(saved[None] / unit, lowest / unit, highest / unit))
    if near is not None:
        chosen_before, moves = near
        there = np.zeros((1, len(candidates)))
        there[0, list(chosen_before)] = 1
        constraints.append(LinearConstraint(there, len(chosen_before) - moves, np.inf))
        constraints.append(LinearConstraint(1 - there, -np.inf, moves))
    scale = np.abs(objective).max() or 1.0
    chosen: list[int] | None = None
    for _ in range(2):
        result = milp(
            objective / scale,
            constraints=constraints,
            integrality=np.ones(len(candidates)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": _GAP, "node_limit": _NODES},
        )
        if result.x is None:
            return chosen
        chosen = np.flatnonzero(result.x > 0.5).tolist()
        least = abs(float(objective[chosen].sum()))
        if least == 0 or least > 0.1 * scale:
            break
        scale = least
    return chosen


def _cliques(candidates: Sequence[Candidate]) -> list[tuple[int, ...]]:
    """Return sets of candidates of which at most one is chosen; they cover every conflict."""
    owners: dict[tuple[str, str], list[int]] = {}
    exclusive: dict[str, list[int]] = {}
    shared: dict[str, dict[tuple[str, str], list[int]]] = {}
    for index, candidate in enumerate(candidates):
        owner = owner_of(candidate)
        owners.setdefault(owner, []).append(index)
        for name in candidate.exclusive:
            exclusive.setdefault(name, []).append(index)
        for name in candidate.shared - candidate.exclusive:
            shared.setdefault(name, {}).setdefault(owner, []).append(index)
    found = [tuple(members) for members in owners.values()]
    for name in sorted(exclusive):
        sharing: Mapping[Any, list[int]] = shared.get(name, {})
        for members in sharing.values() or [[]]:
            found.append(tuple(sorted({*exclusive[name], *members})))
    return list(dict.fromkeys(found))
