"""Calibration data and the statistics that passes take from it."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import fx, nn

from .errors import InputError
from .gram import GramAccumulator
from .padding import padding_input, real_tokens
from .program import Program, compile_values, shape_of
from .sensitivity import sensitivity_function
from .structure import flatten

Progress = Callable[[str, int, int], None]
"""Called with a label, batches done and batches in all."""

_ROWS_PER_BATCH = 16384


class Calibration:
    """Batches of real inputs, read once for every statistic that is asked for.

    Statistics are streamed (see `GramAccumulator`): memory grows with the square of a layer's
    width, not with the data. With a `store` directory every finished statistic is kept in a
    safetensors file, and an interrupted run goes on where it stopped.
    """

    def __init__(
        self,
        batches: Iterable[Mapping[str, Any]],
        *,
        store: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Hold the batches.

        Args:
            batches: Canonical arguments of the model's forward; iterated many times.
            store: Directory for finished statistics.
            progress: Told about every batch.
        """
        self._batches = batches
        self._store = store
        self._progress = progress
        self._digest: str | None = None

    def batches(self) -> Iterator[Mapping[str, Any]]:
        """Yield the batches: canonical arguments of the model's forward."""
        yield from self._batches

    def statistics(
        self, program: Program, nodes: Sequence[tuple[fx.Node, int]], unfold: Unfold | None = None
    ) -> GramAccumulator:
        """Return the statistics of the values of some nodes, together.

        Padding tokens are not counted where an input masks them (`padding_input`).

        Args:
            program: The program as it is now; the graph runs up to the last of the nodes.
            nodes: The nodes and their channel dimensions.
            unfold: For a convolution's input: turns [batch, channels, *spatial] into rows
                [rows, channels * window].

        Raises:
            InputError: if a batch lacks an argument of the captured call or holds no rows.
        """
        key = "statistics " + " ".join(f"{node.name}/{dim}" for node, dim in nodes)
        key += f" {unfold.key}" if unfold else ""
        result: GramAccumulator = program.fact(
            key, lambda current: self._collect(current, nodes, unfold, key)
        )
        return result

    def weighted_statistics(
        self, program: Program, node: tuple[fx.Node, int], unfold: Unfold | None, place: fx.Node
    ) -> WeightedStatistics:
        """Return the statistics of a layer's inputs, each row weighed by what the outputs lose.

        Args:
            program: The program as it is now.
            node: The layer's input and its channel dimension.
            unfold: As in `statistics`.
            place: The node of the layer's output (see `sensitivity`).

        Raises:
            InputError: as `statistics`.
        """
        key = f"weighted statistics {node[0].name}/{node[1]} {place.name}"
        result: WeightedStatistics = program.fact(
            key, lambda current: self._collect_weighted(current, node, unfold, place, key)
        )
        return result

    def _collect_weighted(
        self,
        program: Program,
        node: tuple[fx.Node, int],
        unfold: Unfold | None,
        place: fx.Node,
        key: str,
    ) -> WeightedStatistics:
        path = self._path(program, key)
        if path is not None and path.exists():
            state = load_file(path)
            stored = GramAccumulator(state["sum_x"].numel(), state["sum_y"].numel())
            stored.load_state_dict(state)
            return WeightedStatistics(stored, state["metric"])
        run = sensitivity_function(program, [node[0]], place)
        gram: GramAccumulator | None = None
        metric = torch.zeros(())
        with evaluation_mode(program.model):
            for number, batch in enumerate(self._batches):
                mask = real_tokens(program, batch)
                (value,), gradient = run(program.model, bind(program, batch), mask)
                rows = unfold(value) if unfold else value.movedim(node[1], -1)
                rows = rows.reshape(-1, rows.shape[-1])
                slopes = gradient.flatten(2).transpose(1, 2) if unfold else gradient
                slopes = _thinned(slopes.reshape(-1, slopes.shape[-1]).double())
                weights = slopes.square().sum(-1)
                if gram is None:
                    gram = GramAccumulator(rows.shape[-1], device=rows.device)
                    metric = slopes.new_zeros(slopes.shape[-1], slopes.shape[-1])
                gram.update(_thinned(rows), weights=weights)
                metric += slopes.T @ slopes
                if self._progress:
                    self._progress(place.name, number + 1, self._count())
        if gram is None or gram.count == 0:
            raise InputError("the calibration data holds no batch; pass at least one")
        if path is not None:
            _save(path, {**gram.state_dict(), "metric": metric})
        return WeightedStatistics(gram, metric)

    def _collect(
        self,
        program: Program,
        nodes: Sequence[tuple[fx.Node, int]],
        unfold: Unfold | None,
        key: str,
    ) -> GramAccumulator:
        path = self._path(program, key)
        if path is not None and path.exists():
            state = load_file(path)
            stored = GramAccumulator(state["sum_x"].numel(), state["sum_y"].numel())
            stored.load_state_dict(state)
            return stored
        run = compile_values(program, [node for node, _ in nodes])
        mask_name = padding_input(program)
        result: GramAccumulator | None = None
        with evaluation_mode(program.model), torch.no_grad():
            for number, batch in enumerate(self._batches):
                tensors = bind(program, batch)
                values = run(program.model, *tensors)
                mask = real_tokens(program, batch)
                for value, (node, dim) in zip(values, nodes, strict=True):
                    rows = unfold(value) if unfold else value.movedim(dim, -1)
                    if result is None:
                        result = GramAccumulator(rows.shape[-1], device=rows.device)
                    masked = mask_name is not None and _has_tokens_of(program, mask_name, node)
                    if masked and mask is not None and mask.shape == rows.shape[:-1]:
                        rows = rows[mask.to(rows.device)]
                    result.update(_thinned(rows.reshape(-1, rows.shape[-1])))
                if self._progress:
                    self._progress(nodes[-1][0].name, number + 1, self._count())
        if result is None or result.count == 0:
            raise InputError("the calibration data holds no batch; pass at least one")
        if path is not None:
            _save(path, result.state_dict())
        return result

    def _count(self) -> int:
        return operator.length_hint(self._batches)

    def fingerprint(self) -> str:
        """Return a digest of all batches, made once."""
        if self._digest is None:
            digest = hashlib.sha256()
            for batch in self._batches:
                for tensor in flatten(dict(batch))[0]:
                    digest.update(str(tensor.shape).encode())
                    digest.update(
                        tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                    )
            self._digest = digest.hexdigest()
        return self._digest

    def _path(self, program: Program, key: str) -> Path | None:
        """Name a statistic by what it depends on: the place, the batches and the weights before."""
        if self._store is None:
            return None
        digest = hashlib.sha256(f"{key} {self.fingerprint()}".encode())
        for name, parameter in program.model.named_parameters():
            summary = parameter.detach().double().flatten()
            digest.update(f"{name}{summary.sum().item()}{summary.square().sum().item()}".encode())
        return self._store / f"{digest.hexdigest()[:32]}.safetensors"


@dataclass(frozen=True)
class WeightedStatistics:
    """Statistics whose rows are weighed by their effect on the model's outputs.

    Attributes:
        gram: Of the layer's inputs.
        metric: Sum of the outer products of the gradients at its output [outputs, outputs].
    """

    gram: GramAccumulator
    metric: torch.Tensor


class Unfold:
    """The rows that a convolution's weight sees: one per output position."""

    def __init__(self, key: str, settings: Mapping[str, Any]) -> None:
        """Hold kernel_size, stride, padding and dilation of a 2-d convolution."""
        self.key = key
        self._settings = dict(settings)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Turn [batch, channels, height, width] into [batch, positions, channels * window]."""
        return F.unfold(value, **self._settings).transpose(1, 2)


def bind(program: Program, batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return a batch as the program's input tensors, on its device.

    Raises:
        InputError: if an argument of the captured call is missing or of another structure.
    """
    missing = [name for name in program.example if name not in batch]
    if missing:
        raise InputError(
            f"a calibration batch lacks {', '.join(missing)}, which the example inputs have; "
            f"it has {', '.join(batch)}"
        )
    tensors, structure = flatten({name: batch[name] for name in program.example})
    if structure != program.inputs:
        raise InputError(
            "a calibration batch has another structure than the example inputs; "
            f"both must hold {', '.join(program.example)} in the same form"
        )
    device = program.placeholders[0].meta["val"].device
    return [
        tensor.to(device, node.meta["val"].dtype if tensor.is_floating_point() else None)
        for tensor, node in zip(tensors, program.placeholders, strict=True)
    ]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run with the model in evaluation mode; restore every module's flag at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _has_tokens_of(program: Program, mask_name: str, node: fx.Node) -> bool:
    """Say whether a value has the mask's tokens, not others that are as many in this batch.

    Decided by the sizes of the captured example: symbols of one axis may differ by broadcasting.
    """
    mask = next(item for item in program.placeholders if item.name == mask_name)
    return shape_of(node)[:2] == shape_of(mask)


def _save(path: Path, state: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary)
    temporary.replace(path)


def _thinned(rows: torch.Tensor) -> torch.Tensor:
    """Keep evenly spaced rows where there are very many (convolutions see every pixel)."""
    step = -(-rows.shape[0] // _ROWS_PER_BATCH)
    return rows[::step]
