"""What changes cost in quality: estimated one by one, measured together.

One unit for all: the increase of the squared relative error of the outputs that are read, on
average over outputs, against the dense program; where the calibration batches carry labels and the
program returns a loss, the increase of that loss.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from .base import Candidate, Change, Context, Pass
from .calibration import Progress
from .contraction_places import ContractionPlaces, contraction_places
from .deltas import DeltaStore, added, delta_of
from .facts import attribute_of, facts_of, total_cost
from .probe import Probe, probe_of
from .program import Program
from .replay import load_state
from .snapshot import Snapshot, copied_graph


class LossModel:
    """Losses of changes of one program, as long as that stays as it is.

    With calibration data a change of one contraction is estimated from the contraction's
    statistics in closed form (`WeightedStatistics.loss`; Martens & Grosse 2015, arXiv 1503.05671):
    those of all contractions are gathered in a few sweeps at the first estimate. Changes of several
    parameters, and of structure, are made for the time of one measurement. Without data the loss is
    a proxy: the squared relative error of every changed weight, times the share that its products
    have of all operations.

    Memory: beside the model, one layer's statistics or about half of the model's size, whichever
    is more; when measuring, a copy of the changed parameters.
    """

    def __init__(
        self,
        program: Program,
        context: Context,
        *,
        store: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Hold the parts; nothing is computed.

        Args:
            program: The dense program; it must not change while this is used.
            context: Its calibration data is used, if it has some.
            store: Directory for deltas of changes; None takes a temporary one.
            progress: Told about the sweeps over the data.
        """
        self._program = program
        self._context = context
        self._progress = progress
        if store is None:
            store = Path(tempfile.mkdtemp(prefix="graphopt-losses-"))
            weakref.finalize(self, shutil.rmtree, store, ignore_errors=True)
        self._deltas = DeltaStore(store)
        self._probe: Probe | None = None

    def estimate(self, step: Pass, candidate: Candidate) -> Candidate:
        """Return the candidate settled on the dense program, with its loss and how that was found.

        Raises:
            GraphoptError: if the pass cannot settle it.
        """
        program = self._program
        if self._is_meta:
            return replace(candidate, loss=self._share_removed(candidate), loss_source="weights")
        places = self._places()
        settled = step.settle(program, candidate, self._context)
        deltas = delta_of(program, step, settled.change, self._context)
        if deltas is None:
            return replace(settled, loss=self.measure([(step, settled)]), loss_source="measured")
        if self._context.calibration is None:
            return replace(settled, loss=self._proxy(deltas), loss_source="weights")
        found = places.loss(program, self._context.calibration, deltas)
        if found is not None:
            return replace(settled, loss=found, loss_source="data")
        self._deltas.save(step, settled.change, deltas)
        return replace(settled, loss=self.measure([(step, settled)]), loss_source="measured")

    def measure(self, chosen: Sequence[tuple[Pass, Candidate]]) -> float:
        """Return the loss of some estimated candidates together, on the probe samples.

        One forward pass. What dense parameters can compute (`Pass.reconstruct`) is added to them,
        the rest is done to the program; afterwards everything is as it was, also after errors and
        interrupts. On the meta device it is the sum of the estimates.
        """
        if self._is_meta:
            return sum(candidate.loss or 0.0 for _, candidate in chosen)
        probe = self._prepared()
        with self.made(chosen) as program:
            return probe.loss(program) - probe.dense_loss

    @contextmanager
    def made(self, chosen: Sequence[tuple[Pass, Candidate]]) -> Iterator[Program]:
        """Make changes for a while, as `measure` does; yield the program that has them."""
        files: list[Path] = []
        structural: list[tuple[Pass, Change]] = []
        for step, candidate in chosen:
            path = self._deltas.path(step, candidate.change)
            if not path.exists():
                deltas = delta_of(self._program, step, candidate.change, self._context)
                if deltas is None:
                    structural.append((step, candidate.change))
                    continue
                self._deltas.save(step, candidate.change, deltas)
            files.append(path)
        with added(self._program, files):
            if not structural:
                yield self._program
                return
            # The twin has the same modules and another graph, so that facts of this one stay.
            twin = self._program.of_copy(self._program.model)
            twin.graph = copied_graph(self._program.graph)
            twin.changed()
            snapshot = Snapshot(twin)
            try:
                for step, change in structural:
                    state = step.transfer(twin, change, self._context)
                    step.apply(twin, change)
                    load_state(twin, state)
                yield twin
            finally:
                snapshot.restore()

    @property
    def _is_meta(self) -> bool:
        return any(parameter.is_meta for parameter in self._program.model.parameters())

    def _prepared(self) -> Probe:
        """Return the probe of the dense program, made once."""
        if self._probe is None:
            self._probe = probe_of(self._program, self._context.calibration)
        return self._probe

    def _places(self) -> ContractionPlaces:
        """Return the contractions, their statistics gathered."""
        places = contraction_places(self._program)
        calibration = self._context.calibration
        if calibration is not None:
            calibration.gather(self._program, places.all, self._progress)
        return places

    def _proxy(self, deltas: Mapping[str, torch.Tensor]) -> float:
        """Return the sum over weights of ||dW||^2 / ||W||^2 times their share of the operations."""
        total = max(total_cost(self._program).flops, 1)
        facts = facts_of(self._program)
        loss = 0.0
        for name, delta in deltas.items():
            weight = attribute_of(self._program, name).detach()
            flops = sum(n.forward_flops for n in facts.nodes.values() if name in n.weights)
            energy = max(float(weight.double().square().sum()), 1e-300)
            loss += float(delta.double().square().sum()) / energy * flops / total
        return loss

    def _share_removed(self, candidate: Candidate) -> float:
        """Return the proxy of weights without values: all of them count alike."""
        total = max(total_cost(self._program).flops, 1)
        return max(0, candidate.before.flops - candidate.after.flops) / total
