"""What the solver estimated and measured, kept in a file so that a second run goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from graphopt.passes.base import Candidate, Change, Context, Pass
from graphopt.passes.program import Program
from graphopt.passes.registry import format_pipeline

_logger = logging.getLogger(__name__)
_SCHEMA = 1
_PAUSE_S = 5.0


class Journal:
    """Estimated candidates and measured losses of choices, for one model, data and pipeline.

    The file is written every few seconds and at the end; losses do not depend on a budget, so that
    all budgets share it. A damaged file is ignored with a logged warning.
    """

    def __init__(self, path: Path | None) -> None:
        """Read what is there; None keeps everything in memory."""
        self._path = path
        self._estimates, self._losses = _read(path) if path is not None else ({}, {})
        self._written_s = time.monotonic()

    def estimate(self, candidate: Candidate) -> Candidate | None:
        """Return a candidate as it was estimated before, None if it was not."""
        found = self._estimates.get(_key([candidate.change]))
        if found is None:
            return None
        change = replace(candidate.change, summary=found["summary"], details=found["details"])
        return replace(
            candidate,
            change=change,
            loss=found["loss"],
            loss_source=found["loss_source"],
            predicted_error=found["predicted_error"],
        )

    def add_estimate(self, candidate: Candidate, estimate: Candidate) -> None:
        """Keep what a candidate was estimated to be."""
        self._estimates[_key([candidate.change])] = {
            "summary": estimate.change.summary,
            "details": dict(estimate.change.details),
            "loss": estimate.loss,
            "loss_source": estimate.loss_source,
            "predicted_error": estimate.predicted_error,
        }
        self._write_sometimes()

    def loss(self, changes: Sequence[Change]) -> float | None:
        """Return the loss that was measured for changes together, None if none was."""
        return self._losses.get(_key(changes))

    def add_loss(self, changes: Sequence[Change], loss: float) -> None:
        """Keep the measured loss of changes together."""
        self._losses[_key(changes)] = loss
        self._write_sometimes()

    def write(self) -> None:
        """Write the file, under a temporary name first."""
        if self._path is None:
            return
        content = {"schema": _SCHEMA, "estimates": self._estimates, "losses": self._losses}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(content, file)
                os.replace(temporary, self._path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            _logger.warning("the solver's losses cannot be written to %s: %s", self._path, error)

    def _write_sometimes(self) -> None:
        if time.monotonic() - self._written_s > _PAUSE_S:
            self.write()
            self._written_s = time.monotonic()


def journal_path(
    store: Path | None, program: Program, steps: Sequence[Pass], context: Context
) -> Path | None:
    """Return the file for a program's weights, the calibration data and a pipeline.

    None without a directory, or where the program has no numbers.
    """
    parameters = list(program.model.named_parameters())
    if store is None or any(value.is_meta for _, value in parameters):
        return None
    data = "" if context.calibration is None else context.calibration.fingerprint()
    digest = hashlib.sha256(f"{format_pipeline(steps)} {data}".encode())
    for name, parameter in parameters:
        value = parameter.detach().double().flatten()
        digest.update(f"{name}{value.sum().item()}{value.square().sum().item()}".encode())
    return store / f"allocation-{digest.hexdigest()[:32]}.json"


def _key(changes: Sequence[Change]) -> str:
    texts = sorted(
        json.dumps([change.pass_name, change.target, change.details], sort_keys=True, default=str)
        for change in changes
    )
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, float]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            raise ValueError(f"expected schema {_SCHEMA}, got {content['schema']!r}")
        estimates: dict[str, Any] = {
            str(key): {
                "summary": str(found["summary"]),
                "details": dict(found["details"]),
                "loss": None if found["loss"] is None else float(found["loss"]),
                "loss_source": str(found["loss_source"]),
                "predicted_error": (
                    None if found["predicted_error"] is None else float(found["predicted_error"])
                ),
            }
            for key, found in content["estimates"].items()
        }
        losses = {str(key): float(value) for key, value in content["losses"].items()}
        if any(math.isnan(value) for value in losses.values()):
            raise ValueError("a loss is not a number")
    except FileNotFoundError:
        return {}, {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _logger.warning("the file of the solver's losses %s is ignored: %r", path, error)
        return {}, {}
    return estimates, losses
