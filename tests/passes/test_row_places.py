"""The table of rowwise operators against brute force: one row changed, one row changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from zoo import EXAMPLE, find_case, without_dropout

from graphopt.capture import capture
from graphopt.passes.axis_flow import tensor_nodes, tensors_of
from graphopt.passes.padding import padding_input
from graphopt.passes.program import Program
from graphopt.passes.row_places import Place, RowPlaces, row_places
from graphopt.passes.structure import flatten
from graphopt.passes.verifier import preserved

ROW = (1, 2)
"""The sample and the token that are changed."""


def captured(name: str, *, labels: bool = False) -> tuple[Program, RowPlaces]:
    case = find_case(name)
    args, kwargs = case.call(*EXAMPLE, labels=labels)
    program = capture(without_dropout(case.build()), kwargs or args)
    places = row_places(program, padding_input(program))
    assert places is not None
    return program, places


class Values(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.model, graph=program.graph)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def rows_of(value: Tensor, place: Place, places: RowPlaces) -> Tensor:
    """Return which elements belong to the row, to all tokens of its sample or to its token."""
    sample, token = ROW
    chosen = torch.ones(value.shape, dtype=torch.bool)
    roles = {place.batch: [(places.batch, sample)], place.token: [(places.tokens, token)]}
    if place.merged:
        roles = {place.batch: [(places.batch, sample), (places.tokens, token)]}
        if place.token_first:
            roles[place.batch].reverse()
    for dim, sizes in roles.items():
        if dim is None:
            continue
        inner = value.shape[dim]
        index = torch.arange(inner)
        belongs = torch.ones(inner, dtype=torch.bool)
        for size, wanted in sizes:
            inner //= size
            belongs &= index // inner % size == wanted
        shape = [1] * value.dim()
        shape[dim] = -1
        chosen &= belongs.view(shape)
    return chosen


def disturbed(value: Tensor, chosen: Tensor) -> Tensor:
    """Return other values at the chosen elements, valid ones for integers."""
    result = value.clone()  # of the same strides, so that products round alike
    if value.is_floating_point():
        other = value + torch.randn_like(value)
    else:
        other = ~value if value.dtype == torch.bool else value.amin() + value.amax() - value
    result[chosen] = other[chosen]
    return result


def changed_rows(program: Program, places: RowPlaces) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield rowwise nodes and their operands, where other rows than those disturbed change."""
    interpreter = Values(program)
    tensors, _ = flatten(program.example)
    program.model.eval()
    with preserved(program.model), torch.no_grad():
        program.model.eval()
        interpreter.run(*tensors)
        values = interpreter.values
        for node in program.graph.nodes:
            if not places.rowwise(node):
                continue
            for source in tensor_nodes(node):
                place = places.place(source)
                if place is None or not isinstance(values[source], Tensor):
                    continue
                chosen = rows_of(values[source], place, places)
                env = {**values, source: disturbed(values[source], chosen)}
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                before = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                run = getattr(interpreter, node.op)
                old = run(node.target, *_copied(before))
                new = run(node.target, *_copied((args, kwargs)))
                for a, b in zip(tensors_of(old), tensors_of(new), strict=True):
                    found = places.place(node)
                    assert found is not None, node
                    # What only has tokens (a table) may change that token of every sample.
                    allowed = rows_of(a, _narrowed(found, place), places)
                    differs = (a != b) & ~(torch.isnan(a) & torch.isnan(b))
                    if (differs & ~allowed).any():
                        yield node, source


def _copied(arguments: Any) -> Any:
    """Return arguments that an in-place operator may write to."""
    values, structure = flatten(arguments)
    return structure.rebuild([value.clone() for value in values])


def _narrowed(found: Place, source: Place) -> Place:
    """Return the place of a result without the roles that its source does not have."""
    if found.merged:
        return found
    return Place(
        found.batch if source.batch is not None else None,
        found.token if source.token is not None else None,
    )


MODELS = (
    *("bert-classifier", "roberta", "modernbert", "gpt2-padded", "llama-padded", "gemma3"),
    *("mpt", "t5", "vit", "transformer-encoder-padded", "shared-block"),
)


@pytest.mark.parametrize("name", MODELS)
def test_rowwise_nodes_keep_rows_apart_and_leaf_modules_are_rowwise(name: str) -> None:
    program, places = captured(name)
    wrong = [f"{node.name} by {source.name}" for node, source in changed_rows(program, places)]
    assert not wrong
    calls = [
        node
        for node in program.graph.nodes
        if node.op == "call_module" and len(places.token_dims(node)) == 1
    ]
    assert len(calls) > 3
    assert not [node for node in calls if not places.rowwise(node)]


class Mixers(nn.Module):
    """Operators that mix tokens, each next to one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.width = nn.Linear(8, 8)
        self.tokens = nn.Linear(6, 6)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        x = x + self.width(x)
        scores = (x @ x.transpose(1, 2)).masked_fill(~mask[:, None], -1e9).softmax(-1)
        return (
            scores @ x,
            self.tokens(x.transpose(1, 2)),
            self.convolution(x.transpose(1, 2)),
            x.cumsum(1),
            x.flip(1),
            x.roll(1, 1),
            functional.pad(x, (0, 0, 1, -1)),
            x.softmax(1),
            x.mean(1),
            x[:, 0],
            x.argsort(1),
            functional.layer_norm(x, (6, 8)),
        )


class Flattened(nn.Module):
    """A residual layer on [batch*token, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = self.layer(x.reshape(-1, 8))
        return x + flat.reshape(x.shape)


def test_operators_over_tokens_mix() -> None:
    torch.manual_seed(0)
    example = {"x": torch.randn(3, 6, 8), "mask": torch.ones(3, 6, dtype=torch.bool)}
    program = capture(Mixers(), example)
    places = row_places(program, "mask")
    assert places is not None
    results = program.result.all_input_nodes
    assert len(results) == 12
    assert [node.name for node in results if places.rowwise(node)] == []
    assert places.rowwise(program.calls("width")[0])


def test_places_of_merged_and_moved_dimensions() -> None:
    program, places = captured("transformer-encoder-padded")
    found = {places.place(node) for node in program.graph.nodes}
    assert Place(0, 1) in found
    assert Place(1, 0) in found
    assert Place(0, 2) in found
    assert Place(0, 0, token_first=True) in found
    program = capture(Flattened(), torch.randn(3, 6, 8))
    flat = row_places(program)
    assert flat is not None
    (layer,) = program.calls("layer")
    assert flat.place(layer) == Place(0, 0)
    assert flat.rowwise(layer)


def test_a_program_without_tokens_has_no_places() -> None:
    assert row_places(capture(nn.Linear(4, 4), torch.randn(2, 4))) is None
