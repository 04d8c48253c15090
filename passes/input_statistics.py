"""Statistics of layers' inputs, all real tokens counting the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .gram import GramAccumulator
from .padding import padding_input, real_tokens
from .program import Program, compile_values, shape_of
from .unfold import Unfold
from .weighted_statistics import thinned


@dataclass(frozen=True)
class InputPlace:
    """Values whose statistics are taken together.

    Attributes:
        nodes: The nodes and their channel dimensions.
        unfold: For a convolution's input, how it becomes rows.
    """

    nodes: tuple[tuple[fx.Node, int], ...]
    unfold: Unfold | None

    @classmethod
    def of(cls, nodes: Sequence[tuple[fx.Node, int]], unfold: Unfold | None) -> InputPlace:
        """Return the place of some nodes; negative dimensions count from the end."""
        return cls(tuple((node, dim % node.meta["val"].dim()) for node, dim in nodes), unfold)

    @property
    def key(self) -> str:
        """A name that the same graph always gives it."""
        key = "statistics " + " ".join(f"{node.name}/{dim}" for node, dim in self.nodes)
        return key + (f" {self.unfold.key}" if self.unfold else "")

    @property
    def size_bytes(self) -> int:
        """Bytes of its statistics, about."""
        node, dim = self.nodes[0]
        window = 1 if self.unfold is None else self.unfold.window
        return 8 * (shape_of(node)[dim] * window) ** 2


def collect_inputs(
    program: Program,
    calls: Iterable[tuple[Mapping[str, Any], Sequence[Tensor]]],
    places: Sequence[InputPlace],
) -> list[GramAccumulator]:
    """Collect the statistics of some places in one sweep over the data.

    Padding tokens are not counted where an input masks them (`padding_input`).

    Args:
        program: The program, in evaluation mode.
        calls: Batches, and the same as input tensors.
        places: The places; the graph runs up to the last of them.
    """
    nodes = list(dict.fromkeys(node for place in places for node, _ in place.nodes))
    run = compile_values(program, nodes)
    mask_name = padding_input(program)
    result: list[GramAccumulator] = []
    for batch, tensors in calls:
        with torch.no_grad():
            values = dict(zip(nodes, run(program.model, *tensors), strict=True))
        mask = real_tokens(program, batch)
        for index, place in enumerate(places):
            for node, dim in place.nodes:
                value = values[node]
                rows = place.unfold(value) if place.unfold else value.movedim(dim, -1)
                if index == len(result):
                    result.append(GramAccumulator(rows.shape[-1], device=rows.device))
                masked = mask_name is not None and _has_tokens_of(program, mask_name, node)
                if masked and mask is not None and mask.shape == rows.shape[:-1]:
                    rows = rows[mask.to(rows.device)]
                result[index].update(thinned(rows.reshape(-1, rows.shape[-1])))
    return result


def _has_tokens_of(program: Program, mask_name: str, node: fx.Node) -> bool:
    """Say whether a value has the mask's tokens, not others that are as many in this batch.

    Decided by the sizes of the captured example: symbols of one axis may differ by broadcasting.
    """
    mask = next(item for item in program.placeholders if item.name == mask_name)
    return shape_of(node)[:2] == shape_of(mask)
