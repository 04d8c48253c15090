"""The contractions of a program as places of statistics, by the weight that they multiply with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .axes import axes_of
from .calibration import Calibration
from .contractions import Contraction, contraction_of
from .output_heads import output_heads
from .program import Program
from .sensitivity import reaches_outputs
from .weighted_statistics import LayerPlace


@dataclass(frozen=True)
class PlacedContraction:
    """A contraction and where it reads and writes, once for every use."""

    contraction: Contraction
    places: tuple[LayerPlace, ...]


@dataclass(frozen=True)
class ContractionPlaces:
    """The contractions whose changes a quadratic model can tell, by the name of their weight.

    Output heads are not among them: their outputs may be as many as a vocabulary has words.
    """

    by_weight: Mapping[str, PlacedContraction]

    @property
    def all(self) -> list[LayerPlace]:
        """All places in graph order."""
        return list(
            dict.fromkeys(place for found in self.by_weight.values() for place in found.places)
        )

    def loss(
        self, program: Program, calibration: Calibration, deltas: Mapping[str, torch.Tensor]
    ) -> float | None:
        """Return the loss of what is added to the parameters of one contraction.

        None if they are parameters of several, or others.
        """
        weights = [name for name in deltas if name in self.by_weight]
        biases = [name for name in deltas if name not in self.by_weight]
        if not deltas:
            return 0.0
        if len(weights) != 1 or len(biases) > 1:
            return None
        found = self.by_weight[weights[0]]
        if biases and biases[0] != found.contraction.bias:
            return None
        change = found.contraction.matrix(deltas[weights[0]])
        bias = deltas[biases[0]] if biases else None
        return sum(
            calibration.weighted_statistics(
                program, (place.source, place.dim), place.unfold, place.output
            ).loss(change, bias)
            for place in found.places
        )


def contraction_places(program: Program) -> ContractionPlaces:
    """Return the contractions of a program; found once per state of its graph."""
    found: ContractionPlaces = program.fact("contraction places", _find)
    return found


def _find(program: Program) -> ContractionPlaces:
    heads = output_heads(program)
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    result: dict[str, PlacedContraction] = {}
    for group in axes_of(program).groups():
        for member in group.of("consumer"):
            if member.parameter in result:
                continue
            contraction = contraction_of(program, member)
            if contraction is None or any(str(node.target) in heads for node in member.nodes):
                continue
            places = tuple(
                LayerPlace(source, dim % source.meta["val"].dim(), contraction.unfold, node)
                for node, (source, dim) in zip(member.nodes, member.inputs, strict=True)
                if reaches_outputs(program, node)
            )
            if places:
                result[member.parameter] = PlacedContraction(contraction, places)
    ordered = sorted(result.items(), key=lambda item: order[item[1].places[0].output])
    return ContractionPlaces(dict(ordered))
