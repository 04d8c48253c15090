"""What a training really spent, step by step: operations, seconds, tokens, and the loss."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.errors import TrainingError

from .executed_flops import ExecutedFlops
from .ranks import Group, collected, is_first

if TYPE_CHECKING:
    from rich.table import Table

_COUNTS = ("entries", "flops", "seconds", "tokens", "samples")


@dataclass
class Entry:
    """One line of a ledger; of all ranks together.

    Attributes:
        step: Number of the training step, from 1; other kinds have that of the step before.
        kind: "train", or what else the operations were spent on.
        flops: Operations executed.
        seconds: Time, of the slowest rank.
        tokens: Tokens that went in, 0 if nobody said.
        samples: Samples that went in, 0 if nobody said.
        loss: Mean over the ranks; None if nobody said, or it is not a number.
    """

    step: int
    kind: str
    flops: int = 0
    seconds: float = 0.0
    tokens: int = 0
    samples: int = 0
    loss: float | Tensor | None = None


class Ledger:
    """Counts what every training step executes, and writes it down.

        ledger = Ledger("run.jsonl")
        with ledger.step(tokens=int(mask.sum())) as entry:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            entry.loss = loss
        clock.step(entry)

    Operations are counted as they run (`ExecutedFlops`), so whatever gates, packing, sparse blocks,
    caches and teachers add or save is in. The file has one JSON object per entry and is complete
    up to the last entry at any moment. After `load_state_dict` it goes on where the checkpoint was
    written: entries of steps that are done again are removed.

    Several ranks: the entry is made of those of all ranks, which therefore make the same steps;
    the first one writes the file.

    Cost: that of `ExecutedFlops`, which is in the seconds; on CUDA, one synchronisation per step.

    Args:
        path: File of JSON lines; None keeps totals only.
        process_group: The ranks that train together; all by default.
    """

    def __init__(
        self, path: str | Path | None = None, *, process_group: Group | None = None
    ) -> None:
        self.path = None if path is None else Path(path)
        self._group = process_group
        self._step = 0
        self._size_bytes = 0
        self._executed: ExecutedFlops | None = None
        self._started = 0.0
        self._totals: dict[str, dict[str, float]] = {}

    @property
    def total_flops(self) -> int:
        """Operations of all entries."""
        return int(sum(totals["flops"] for totals in self._totals.values()))

    @property
    def total_seconds(self) -> float:
        """Seconds of all entries."""
        return sum(totals["seconds"] for totals in self._totals.values())

    @property
    def totals(self) -> dict[str, dict[str, float]]:
        """Sums of all entries by kind: entries, flops, seconds, tokens, samples."""
        return {kind: dict(totals) for kind, totals in self._totals.items()}

    @contextmanager
    def step(self, *, tokens: int = 0, samples: int = 0, kind: str = "train") -> Iterator[Entry]:
        """Count what runs inside; the entry is complete, and written, when it ends.

        Args:
            tokens: Tokens of this rank's batch; may also be set on the entry.
            samples: Samples of this rank's batch; may also be set on the entry.
            kind: "train", which counts a step, or what else is done: "probe", "cache fill".

        Raises:
            TrainingError: The file belongs to another run, or a step is being counted already.
        """
        entry = self.begin(kind)
        entry.tokens, entry.samples = tokens, samples
        try:
            yield entry
        except BaseException:
            self.drop()
            raise
        self.finish(entry)

    def begin(self, kind: str = "train") -> Entry:
        """Count from here to `finish`, where a `with` does not fit; `drop` counts nothing."""
        if self._executed is not None:
            raise TrainingError(
                "expected one step at a time, got another within it; end the first, or write down "
                "what is done within it with charge()"
            )
        self._require_own_file()
        self._started = _seconds()
        self._executed = ExecutedFlops()
        self._executed.__enter__()  # type: ignore[no-untyped-call]
        return Entry(self._step + (kind == "train"), kind)

    def finish(self, entry: Entry) -> None:
        """Complete and write the entry of `begin`; all ranks do."""
        executed = self._executed
        if executed is None:
            raise TrainingError("expected a step that was begun, got none; call begin() before it")
        self.drop()
        entry.seconds = _seconds() - self._started
        entry.flops = executed.flops
        self._write(_of_all_ranks(entry, self._group))

    def drop(self) -> None:
        """Stop counting, if a step is being counted, and write nothing."""
        executed, self._executed = self._executed, None
        if executed is not None:
            executed.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def charge(self, flops: int, *, seconds: float = 0.0, kind: str) -> Entry:
        """Write down what was spent elsewhere, by all ranks together: a calibration, a cache."""
        self._require_own_file()
        entry = Entry(self._step, kind, flops=flops, seconds=seconds)
        self._write(entry)
        return entry

    def table(self) -> Table:
        """Return the totals as a table for `rich`, or for `print`."""
        from rich.table import Table

        table = Table("spent on", *_COUNTS, "GFLOP/s", "tokens/s")
        for kind, totals in self._totals.items():
            seconds = totals["seconds"] or math.inf
            table.add_row(
                kind,
                f"{totals['entries']:,.0f}",
                f"{totals['flops']:.3e}",
                f"{totals['seconds']:,.1f}",
                *(f"{totals[name]:,.0f}" for name in ("tokens", "samples")),
                f"{totals['flops'] / seconds / 1e9:,.1f}",
                f"{totals['tokens'] / seconds:,.0f}",
            )
        return table

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs, JSON values."""
        return {"step": self._step, "size_bytes": self._size_bytes, "totals": self.totals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last entry of a `state_dict`.

        Raises:
            TrainingError: The file lacks entries that the state counts.
        """
        self._step = int(state["step"])
        self._size_bytes = int(state["size_bytes"])
        self._totals = {kind: dict(totals) for kind, totals in state["totals"].items()}
        if self.path is None or not is_first(self._group):
            return
        present = self.path.stat().st_size if self.path.exists() else 0
        if present < self._size_bytes:
            raise TrainingError(
                f"expected the first {self._size_bytes} bytes of this run's ledger in {self.path}, "
                f"got {present}; copy the file there, or load the state before the path is set"
            )
        if present > self._size_bytes:
            with self.path.open("r+b") as file:
                file.truncate(self._size_bytes)

    def _require_own_file(self) -> None:
        if self.path is None or self._size_bytes or not is_first(self._group):
            return
        if self.path.exists() and self.path.stat().st_size:
            raise TrainingError(
                f"{self.path} holds the ledger of another run; load the checkpoint of that run to "
                "go on with it, or pass another path"
            )

    def _write(self, entry: Entry) -> None:
        self._step = entry.step
        totals = self._totals.setdefault(entry.kind, dict.fromkeys(_COUNTS, 0))
        for name in _COUNTS:
            totals[name] += 1 if name == "entries" else getattr(entry, name)
        if self.path is None or not is_first(self._group):
            return
        line = json.dumps(asdict(entry)) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(line.encode())
        self._size_bytes += len(line)


def _of_all_ranks(entry: Entry, group: Group | None) -> Entry:
    """Fill an entry with sums, the longest time and the mean loss over the ranks."""
    given = entry.loss.detach() if isinstance(entry.loss, Tensor) else entry.loss
    loss = math.nan if given is None else float(given)
    parts = collected([entry.flops, entry.tokens, entry.samples, entry.seconds, loss], group)
    entry.flops, entry.tokens, entry.samples = (int(parts[:, i].sum()) for i in range(3))
    entry.seconds = float(parts[:, 3].max())
    mean = float(parts[:, 4].mean())
    entry.loss = mean if math.isfinite(mean) else None
    return entry


def _seconds() -> float:
    """Return the time at which everything so far is done, also on a CUDA device."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
