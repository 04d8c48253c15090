"""What a change must not disturb: a model's outputs, or its own loss where there are labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .program import Program
from .structure import Container, Leaf, Structure, outside_objects
from .unread import readable_positions


@dataclass(frozen=True)
class Objective:
    """The outputs that count.

    Attributes:
        positions: Their positions among the program's outputs.
        energies: Mean over samples of the squared norm of each, where it is read.
        loss: Whether the one output is the model's own loss.
        labels: Position of the input that only the loss depends on, None if there is none.
    """

    positions: tuple[int, ...]
    energies: tuple[float, ...]
    loss: bool
    labels: int | None

    def weight(self, tensors: Sequence[Tensor]) -> float:
        """Return how much a call counts: labels that are not ignored, or else samples."""
        if self.labels is not None:
            labels = tensors[self.labels]
            # Ignored labels are negative by convention (-100).
            return float(len(labels) if labels.is_floating_point() else (labels >= 0).sum())
        return float(tensors[0].shape[0]) if tensors and tensors[0].dim() else 1.0

    def projection(
        self, program: Program, tensors: Sequence[Tensor], outputs: Sequence[Any], seed: int
    ) -> Tensor:
        """Return a number whose gradient is that of the objective.

        The loss itself; or the outputs with random signs, each divided by the root of its energy:
        the square of the projection of a small change of the outputs is, in expectation, the mean
        over outputs of their squared relative error, times the number of samples.
        """
        if self.loss:
            result: Tensor = outputs[self.positions[0]].sum()
            return result
        generator = torch.Generator().manual_seed(seed)
        readable = readable_positions(program, tensors)
        terms = []
        for position, energy in zip(self.positions, self.energies, strict=True):
            value = outputs[position]
            signs = (torch.randint(0, 2, value.shape, generator=generator) * 2 - 1).to(value)
            where = readable[position]
            if where is not None:
                signs = torch.where(where.to(value.device), signs, 0)
            terms.append((value * signs).sum() / (energy * len(self.positions)) ** 0.5)
        return torch.stack([term.to(terms[0]) for term in terms]).sum()


def objective_of(program: Program, calls: Sequence[Sequence[Tensor]]) -> Objective:
    """Return the objective of a program, energies taken from some calls.

    Args:
        program: The program; run in the mode it is in.
        calls: Input tensors of a few calls.
    """
    position = None if program.compares_outputs else _loss_position(program)
    if position is not None:
        return Objective((position,), (1.0,), True, _label_input(program, position))
    positions = _readable_outputs(program)
    energies = dict.fromkeys(positions, 0.0)
    objective = Objective(tuple(positions), (), False, None)
    samples = 0.0
    for tensors in calls:
        with torch.no_grad():
            outputs = program.run(*tensors)
        samples += objective.weight(tensors)
        for where, value, index in _read(program, tensors, outputs, positions):
            energies[index] += float(torch.where(where, value.double(), 0).square().sum())
    found = {index: energy / samples for index, energy in energies.items() if energy > 0}
    return Objective(tuple(found), tuple(found.values()), False, None)


def squared_errors(
    program: Program,
    tensors: Sequence[Tensor],
    outputs: Sequence[Any],
    references: Sequence[Tensor],
    objective: Objective,
) -> list[float]:
    """Return, per output that counts, the squared norm of its difference where it is read."""
    found = _read(program, tensors, outputs, objective.positions)
    errors = []
    for (where, value, _), reference in zip(found, references, strict=True):
        difference = (value - reference).double()
        errors.append(float(torch.where(where, difference, 0).square().sum()))
    return errors


def _read(
    program: Program, tensors: Sequence[Tensor], outputs: Sequence[Any], positions: Sequence[int]
) -> list[tuple[Tensor, Tensor, int]]:
    """Return where some outputs are read, their values and positions."""
    readable = readable_positions(program, tensors)
    result = []
    for index in positions:
        where = readable[index]
        value = outputs[index].detach()
        everywhere = torch.ones((), dtype=torch.bool)
        result.append(((everywhere if where is None else where).to(value.device), value, index))
    return result


def _readable_outputs(program: Program) -> list[int]:
    """Return the float outputs outside of plain objects that somebody reads."""
    outside = outside_objects(program.outputs)
    (nodes,) = program.result.args
    assert isinstance(nodes, (tuple, list))
    return [
        index
        for index, node in enumerate(nodes)
        if isinstance(node, fx.Node)
        and isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].is_floating_point()
        and outside[index]
        and index not in program.unread_outputs
    ]


def _loss_position(program: Program) -> int | None:
    """Return the position of a float number among the outputs that is called loss."""
    structure: Structure = program.outputs
    if not isinstance(structure, Container) or not isinstance(structure.context, list):
        return None
    named = dict(zip(structure.context, structure.children, strict=False))
    leaf = named.get("loss")
    if not isinstance(leaf, Leaf):
        return None
    (nodes,) = program.result.args
    assert isinstance(nodes, (tuple, list))
    node = nodes[leaf.index]
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    scalar = isinstance(value, Tensor) and value.is_floating_point() and value.numel() == 1
    return leaf.index if scalar else None


def _label_input(program: Program, position: int) -> int | None:
    """Return the position of an input that reaches the loss and no other output."""
    (nodes,) = program.result.args
    assert isinstance(nodes, (tuple, list))
    others = {node for index, node in enumerate(nodes) if index != position}
    for index, source in enumerate(program.placeholders):
        reached = {source}
        for node in program.graph.nodes:
            if node.op != "output" and any(used in reached for used in node.all_input_nodes):
                reached.add(node)
        if nodes[position] in reached and not reached & others:
            return index
    return None
