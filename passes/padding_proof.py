"""Proof by perturbation: other values at padding change nothing that anybody reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .packing import Packing
from .padding import marks_real, padding_input, real_tokens
from .program import Program
from .row_places import Place
from .structure import flatten
from .unread import read_part
from .verifier import preserved, relative_error, rounding_bound

_IGNORED_LABEL = -100
"""`ignore_index` of torch's losses."""


def padded_rows(program: Program) -> list[Tensor]:
    """Return a few rows of the example with padding; it is made where the example has none.

    Made padding is at the end of a row, and labels of its tokens (integers [batch, token] that
    select no embedding) are those that losses ignore.
    """
    tensors, _ = flatten(program.example)
    names = [node.name for node in program.placeholders]
    name = padding_input(program)
    assert name is not None
    number = names.index(name)
    real = real_tokens(program, {name: tensors[number]})
    assert real is not None
    if bool(real.all()):
        return _with_made_padding(program, number)
    dynamic = program.dynamic_dimensions()
    if not all(0 in dynamic[item] for item in names):
        return tensors
    counts = real.sum(1)
    chosen = [int(counts.where(counts > 0, counts.max()).argmin()), int(counts.argmax())]
    return [tensor[chosen] for tensor in tensors]


def _with_made_padding(program: Program, number: int) -> list[Tensor]:
    """Return the first rows; the last third of the tokens of the first one is padding."""
    tensors = list(program.few_rows())
    mask = tensors[number].clone()
    start = mask.shape[1] - max(1, mask.shape[1] // 3)
    mask[0, start:] = 0 if marks_real(program) else 1
    for other, node in enumerate(program.placeholders):
        value = tensors[other]
        labels = value.shape == mask.shape and value.dtype == torch.int64 and other != number
        if labels and not _selects_embedding(node):
            tensors[other] = value.clone()
            tensors[other][0, start:] = _IGNORED_LABEL
    tensors[number] = mask
    return tensors


def _selects_embedding(node: fx.Node) -> bool:
    """Say whether an input reaches the indices of a lookup in a leaf module or operator."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.op == "call_module" or user.target is torch.ops.aten.embedding.default:
                return True
            if user.op == "call_function" and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def output_that_reads_padding(program: Program, packing: Packing) -> int | None:
    """Return the position of an output that depends on packed values at padding, None if none.

    The program runs in evaluation mode on a few rows three times: as it is, with other values at
    padding in everything that enters the packed part but the mask itself, and with zeros at
    padding in everything that leaves it, as if it were packed.
    """
    tensors = padded_rows(program)
    batch = {node.name: t for node, t in zip(program.placeholders, tensors, strict=True)}
    real = real_tokens(program, batch)
    assert real is not None
    with preserved(program.model), torch.no_grad():
        program.model.eval()
        expected, *others = (
            read_part(program, tensors, run.run(*tensors))
            for run in (
                fx.Interpreter(program.model, graph=program.graph),
                _OtherEntries(program, packing, real),
                _ZeroExits(program, packing, real),
            )
        )
    bound = rounding_bound(program)
    for values in others:
        for position, (value, reference) in enumerate(zip(values, expected, strict=True)):
            if isinstance(value, Tensor) and not relative_error(value, reference) <= bound:
                return position
    return None


class _OtherEntries(fx.Interpreter):
    """Runs a program with other values at padding where values enter the packed part."""

    def __init__(self, program: Program, packing: Packing, real: Tensor) -> None:
        super().__init__(program.model, graph=program.graph)
        self._places = packing.places
        self._inside = set(packing.nodes)
        self._entries = _entries_besides_mask(program, packing)
        self._real = real

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Return the arguments of a node, perturbed if they enter the packed part."""

        def value(source: fx.Node) -> Any:
            place = self._places.place(source)
            if n not in self._inside or source not in self._entries or place is None:
                return self.env[source]
            return _perturbed(self.env[source], place, self._real)

        return fx.map_arg(n.args, value), fx.map_arg(n.kwargs, value)


class _ZeroExits(fx.Interpreter):
    """Runs a program with zeros at padding in what leaves the packed part."""

    def __init__(self, program: Program, packing: Packing, real: Tensor) -> None:
        super().__init__(program.model, graph=program.graph)
        self._places = packing.places
        self._inside = set(packing.nodes)
        self._real = real

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        result = super().run_node(n)
        place = self._places.place(n)
        if n not in self._inside or place is None or self._inside.issuperset(n.users):
            return result
        return result.masked_fill(_padding(result, place, self._real), 0)


def _entries_besides_mask(program: Program, packing: Packing) -> set[fx.Node]:
    """Return what enters the packed part and depends on more than the mask."""
    name = padding_input(program)
    informed: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name != name:
                informed.add(node)
        elif any(source in informed for source in node.all_input_nodes):
            informed.add(node)
    places = packing.places
    return {
        source
        for source, _ in packing.entries()
        if source in informed
        and (place := places.place(source)) is not None
        and place.batch is not None
        and place.token is not None
    }


def _padding(value: Tensor, place: Place, real: Tensor) -> Tensor:
    """Return which elements of a value are at padding, for broadcasting."""
    assert place.batch is not None
    assert place.token is not None
    shape = [1] * value.dim()
    if place.merged:
        shape[place.batch] = real.numel()
        return ~real.reshape(shape)
    shape[place.batch], shape[place.token] = real.shape
    ordered = real if place.batch < place.token else real.t()
    return ~ordered.reshape(shape)


def _perturbed(value: Tensor, place: Place, real: Tensor) -> Tensor:
    """Return a value with others at padding: noise, or integers that occur elsewhere in it."""
    if value.is_floating_point():
        other = torch.randn_like(value) * (1 + value.abs().amax())
    else:
        other = value.flatten()[torch.randperm(value.numel(), device=value.device)].view_as(value)
    return torch.where(_padding(value, place, real), other, value)
