"""Calibration data and the statistics that passes take from it."""

from __future__ import annotations

import hashlib
import operator
import shutil
import tempfile
import weakref
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
from .input_statistics import InputPlace, collect_inputs
from .latest import latest
from .objective import Objective, objective_of
from .program import Program
from .row_chunks import first_rows, model_room_bytes, row_chunks, row_count
from .structure import flatten
from .unfold import Unfold
from .weighted_statistics import (
    LayerPlace,
    WeightedStatistics,
    collect_weighted,
    grouped,
)

Progress = Callable[[str, int, int], None]
"""Called with a label, batches done and batches in all."""

P = TypeVar("P", LayerPlace, InputPlace)

_PROBE_SAMPLES = 32
_DIGEST_PART = 2**20
"""Values digested at once: their copies in float64 stay small beside any model."""


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
        self._temporary: Path | None = None

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
        place = InputPlace.of(nodes, unfold)

        def collect() -> GramAccumulator:
            path = self._path(program, place.key, self._store or self._gathered())
            if path is not None and path.exists():
                state = load_file(path)
                stored = GramAccumulator(state["sum_x"].numel(), state["sum_y"].numel())
                stored.load_state_dict(state)
                return stored
            (found,) = self._input_sweep(program, [place])
            if self._store is not None and path is not None:
                _save(path, found.state_dict())
            return found

        return latest(program, f"statistic {id(self)}", place.key, collect)

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

        return latest(program, f"statistic {id(self)}", layer.key, collect)

    def gather(
        self, program: Program, places: Sequence[LayerPlace], progress: Progress | None = None
    ) -> None:
        """Collect both kinds of statistics of many layers in few sweeps over the data.

        As many layers share a sweep as memory allows: their sums take about half of the model's
        size beside those of the largest layer. Finished ones are on disk, in the store or else in
        a directory that lives as long as this object.

        Args:
            program: The program as it is now.
            places: The places of the layers, in graph order.
            progress: Told about every sweep.
        """
        inputs = dict.fromkeys(InputPlace.of([(p.source, p.dim)], p.unfold) for p in places)
        self._gather(program, list(inputs), self._input_sweep, progress)
        self._gather(program, places, self._sweep, progress)

    def _gather(
        self,
        program: Program,
        places: Sequence[P],
        sweep: Callable[[Program, Sequence[P]], Sequence[GramAccumulator | WeightedStatistics]],
        progress: Progress | None,
    ) -> None:
        folder = self._store or self._gathered(create=True)
        paths = {place: self._path(program, place.key, folder) for place in places}
        missing = [place for place, path in paths.items() if path and not path.exists()]
        groups = list(grouped(missing, model_room_bytes(program)))
        for number, group in enumerate(groups):
            for place, found in zip(group, sweep(program, group), strict=True):
                path = paths[place]
                assert path is not None
                _save(path, found.state_dict())
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

    def _gathered(self, *, create: bool = False) -> Path | None:
        """Return the directory of what was gathered without a store."""
        if create and self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="graphopt-statistics-"))
            weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        return self._temporary

    def _input_sweep(self, program: Program, places: Sequence[InputPlace]) -> list[GramAccumulator]:
        label = places[-1].nodes[-1][0].name

        def calls() -> Iterator[tuple[Mapping[str, Any], list[torch.Tensor]]]:
            for number, batch in enumerate(self._batches):
                yield batch, bind(program, batch)
                if self._progress:
                    self._progress(label, number + 1, self._count())

        with evaluation_mode(program.model):
            found = collect_inputs(program, calls(), places)
        if not found or not found[0].count:
            raise InputError("the calibration data holds no batch; pass at least one")
        return found

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


def _save(path: Path, state: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary)
    temporary.replace(path)
