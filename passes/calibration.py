"""Calibration data and the statistics that passes take from it."""

from __future__ import annotations

import hashlib
import operator
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn

from .errors import InputError
from .gram import GramAccumulator
from .objective import Objective, objective_of
from .padding import padding_input, real_tokens
from .program import Program, compile_values, shape_of
from .row_chunks import first_rows, model_room_bytes, row_chunks, row_count
from .structure import flatten
from .unfold import Unfold
from .weighted_statistics import (
    LayerPlace,
    WeightedStatistics,
    collect_weighted,
    grouped,
    thinned,
)

Progress = Callable[[str, int, int], None]
"""Called with a label, batches done and batches in all."""

_PROBE_SAMPLES = 32
_DIGEST_PART = 2**20
"""Values digested at once: their copies in float64 stay small beside any model."""

T = TypeVar("T")


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
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

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
        return self._latest(program, key, lambda: self._collect(program, nodes, unfold, key))

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
        layer = LayerPlace(node[0], node[1] % node[0].meta["val"].dim(), unfold, place)

        def collect() -> WeightedStatistics:
            path = self._path(program, layer.key, self._store or self._gathered())
            if path is not None and path.exists():
                return WeightedStatistics.from_state(load_file(path))
            (found,) = self._sweep(program, [layer])
            if self._store is not None and path is not None:
                _save(path, found.state_dict())
            return found

        return self._latest(program, layer.key, collect)

    def gather(
        self, program: Program, layers: Iterable[LayerPlace], progress: Progress | None = None
    ) -> None:
        """Collect the weighted statistics of many layers in few sweeps over the data.

        As many layers share a sweep as memory allows: their sums and what a pass back keeps take
        about half of the model's size each, or one layer's sums. Finished ones are on disk, in the
        store or else in a directory that lives as long as this object.

        Args:
            program: The program as it is now.
            layers: The places of the layers, in graph order.
            progress: Told about every sweep.
        """
        folder = self._store or self._gathered(create=True)
        paths = {layer: self._path(program, layer.key, folder) for layer in layers}
        missing = [layer for layer, path in paths.items() if path and not path.exists()]
        groups = list(grouped(missing, model_room_bytes(program)))
        for number, group in enumerate(groups):
            found = self._sweep(program, group)
            for layer in group:
                path = paths[layer]
                assert path is not None
                _save(path, found.pop(0).state_dict())
            if progress:
                progress("statistics", number + 1, len(groups))

    def objective(self, program: Program) -> Objective:
        """Return what the statistics weigh rows by: decided once, when the model is still dense."""

        def decide(current: Program) -> tuple[Calibration, Objective]:
            with evaluation_mode(current.model):
                return self, objective_of(current, self.probe(current))

        # The fact holds the calibration too, so that its id is not given to another one.
        found: tuple[Calibration, Objective] = program.call_fact(f"objective {id(self)}", decide)
        return found[1]

    def probe(self, program: Program) -> list[list[torch.Tensor]]:
        """Return the calls with the first samples of the data: few, and small beside the model."""
        calls: list[list[torch.Tensor]] = []
        left = _PROBE_SAMPLES
        for batch in self._batches:
            tensors = bind(program, batch)
            rows = row_count(program, tensors)
            calls.append(first_rows(program, tensors, 0, left))
            left -= rows or 1
            if left <= 0:
                break
        if not calls:
            raise InputError("the calibration data holds no batch; pass at least one")
        return calls

    def _sweep(self, program: Program, layers: Sequence[LayerPlace]) -> list[WeightedStatistics]:
        objective = self.objective(program)
        label = layers[-1].output.name

        def calls() -> Iterator[list[torch.Tensor]]:
            room = model_room_bytes(program) // 2
            for number, batch in enumerate(self._batches):
                yield from row_chunks(program, bind(program, batch), room)
                if self._progress:
                    self._progress(label, number + 1, self._count())

        with evaluation_mode(program.model):
            found = collect_weighted(program, calls(), layers, objective)
        if not found:
            raise InputError("the calibration data holds no batch; pass at least one")
        return [
            # Nothing depends on such a layer: its rows count alike, its errors not at all.
            item
            if item.gram.count
            else replace(
                item,
                gram=self.statistics(program, [(layer.source, layer.dim)], layer.unfold),
            )
            for layer, item in zip(layers, found, strict=True)
        ]

    def _latest(self, program: Program, key: str, collect: Callable[[], T]) -> T:
        """Return a statistic, kept in memory until another one is asked for."""
        held: dict[str, Any] = program.fact(f"latest statistic {id(self)}", lambda _: {})
        if key not in held:
            held.clear()
            held[key] = collect()
        result: T = held[key]
        return result

    def _gathered(self, *, create: bool = False) -> Path | None:
        """Return the directory of what was gathered without a store."""
        if create and self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="graphopt-statistics-")
        return None if self._temporary is None else Path(self._temporary.name)

    def _collect(
        self,
        program: Program,
        nodes: Sequence[tuple[fx.Node, int]],
        unfold: Unfold | None,
        key: str,
    ) -> GramAccumulator:
        path = self._path(program, key, self._store)
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
                    result.update(thinned(rows.reshape(-1, rows.shape[-1])))
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

    def _path(self, program: Program, key: str, folder: Path | None) -> Path | None:
        """Name a statistic by what it depends on: the place, the batches and the weights before."""
        if folder is None:
            return None
        weights: str = program.fact("digest of the parameters", _parameter_digest)
        digest = hashlib.sha256(f"{key} {self.fingerprint()} {weights}".encode())
        return folder / f"{digest.hexdigest()[:32]}.safetensors"


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


def _parameter_digest(program: Program) -> str:
    digest = hashlib.sha256()
    for name, parameter in program.model.named_parameters():
        summary = torch.zeros(2, dtype=torch.float64)
        for part in parameter.detach().flatten().split(_DIGEST_PART):
            values = part.double()
            summary += torch.stack([values.sum(), values.square().sum()]).cpu()
        digest.update(f"{name}{summary.tolist()}".encode())
    return digest.hexdigest()


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
