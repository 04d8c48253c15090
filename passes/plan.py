"""A plan: the ordered list of changes, as a file that can be trusted and replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .base import Candidate, Change, Cost, Miss
from .errors import PlanError

SCHEMA_VERSION: Literal[1] = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CostRecord(_Record):
    """`Cost` in a plan file."""

    flops: int = Field(ge=0)
    size_bytes: int = Field(ge=0)
    parameters: int = Field(ge=0)
    latency_ms: float | None = None
    latency_source: Literal["", "measured", "interpolated", "predicted"] = ""

    def timed(self, latency_ms: float) -> CostRecord:
        """Return the cost with a measured time."""
        return self.model_copy(update={"latency_ms": latency_ms, "latency_source": "measured"})


class ChangeRecord(_Record):
    """An accepted change, its costs and its errors; `loss` as in `Candidate`."""

    pass_name: str = Field(alias="pass", serialization_alias="pass")
    target: str
    summary: str
    details: dict[str, Any]
    before: CostRecord
    after: CostRecord
    predicted_error: float | None = None
    measured_error: float | None = None
    loss: float | None = None
    loss_source: str = ""

    @property
    def change(self) -> Change:
        """The change itself."""
        return Change(
            pass_name=self.pass_name,
            target=self.target,
            summary=self.summary,
            details=self.details,
        )


class MissRecord(_Record):
    """A refusal and its reason."""

    pass_name: str = Field(alias="pass", serialization_alias="pass")
    target: str
    reason: str


class InputRecord(_Record):
    """Shape and type of an example input tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Totals(_Record):
    """The whole model before and after."""

    before: CostRecord
    after: CostRecord


class GuardRecord(_Record):
    """What a guard asked for and what it found at last (see `guard`).

    Attributes:
        max_drift: Largest relative error of the outputs that was allowed.
        min_cosine: Smallest mean cosine of the outputs' rows that was asked for.
        max_drop: How much lower than before the score might be, None without a score.
        score: Name of the score, None without one.
        batches: How many batches it was checked on.
        drift: Relative error of the outputs.
        cosine: Mean cosine of the outputs' rows.
        score_before: The dense model's score.
        score_after: The score with all changes.
    """

    max_drift: float | None = None
    min_cosine: float | None = None
    max_drop: float | None = None
    score: str | None = None
    batches: int = Field(ge=1)
    drift: float
    cosine: float
    score_before: float | None = None
    score_after: float | None = None


class Plan(_Record):
    """What was decided for one model.

    `Plan.model_validate_json` checks types and unknown keys; `load` also checks the schema
    version. Applying a plan is deterministic (see `manager.apply_plan`).

    Attributes:
        schema_version: Version of this file format.
        graphopt_version: Version that wrote it.
        torch_version: PyTorch it was made with.
        model_class: Class name of the model it fits.
        recipe: The recipe as resolved.
        pipeline: The passes in order, as text.
        inputs: The example's tensors.
        constants: The example's other arguments.
        modes: Modes in which the graph equals the eager forward.
        changes: Accepted changes in order.
        misses: Everything left alone, with reasons.
        totals: Cost of the whole model.
        guard: What the model was checked against and with what result, None without a guard.
        notes: What capture and the manager want a user to know.
        parts: Where the model could not be captured as a whole: the plans of its parts, by name.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    graphopt_version: str = ""
    torch_version: str = torch.__version__
    model_class: str = ""
    recipe: dict[str, Any] = Field(default_factory=dict)
    pipeline: str = ""
    inputs: tuple[InputRecord, ...] = ()
    constants: dict[str, Any] = Field(default_factory=dict)
    modes: tuple[tuple[bool, bool], ...] = ()
    changes: tuple[ChangeRecord, ...] = ()
    misses: tuple[MissRecord, ...] = ()
    totals: Totals | None = None
    guard: GuardRecord | None = None
    notes: tuple[str, ...] = ()
    parts: dict[str, Plan] = Field(default_factory=dict)

    def to_json(self) -> str:
        """Return the plan as indented JSON."""
        return self.model_dump_json(by_alias=True, indent=1)

    @classmethod
    def from_json(cls, text: str, *, source: str = "plan.json") -> Plan:
        """Read a plan, checking schema version and every field.

        Raises:
            PlanError: if it is not a plan this version can apply.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise PlanError(f"{source} is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise PlanError(f"{source} must hold a JSON object, got {type(data).__name__}")
        version = data.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise PlanError(
                f"{source} has schema version {version}, this graphopt reads up to "
                f"{SCHEMA_VERSION}; install a newer graphopt"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PlanError(f"{source} is not a valid plan: {where}: {first['msg']}") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            PlanError: if there is none or it is damaged.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error
        return cls.from_json(text, source=str(path))


def cost_record(cost: Cost) -> CostRecord:
    """Return a cost as stored."""
    return CostRecord(
        flops=cost.flops,
        size_bytes=cost.size_bytes,
        parameters=cost.parameters,
        latency_ms=cost.latency_ms,
        latency_source=cost.latency_source,
    )


def change_record(
    candidate: Candidate, change: Change, measured_error: float | None
) -> ChangeRecord:
    """Return an accepted candidate, with the change as it was settled."""
    values: Mapping[str, Any] = {
        "pass": change.pass_name,
        "target": change.target,
        "summary": change.summary,
        "details": dict(change.details),
        "before": cost_record(candidate.before),
        "after": cost_record(candidate.after),
        "predicted_error": candidate.predicted_error,
        "measured_error": measured_error,
        "loss": candidate.loss,
        "loss_source": candidate.loss_source,
    }
    return ChangeRecord.model_validate(values)


def miss_record(miss: Miss) -> MissRecord:
    """Return a miss as stored."""
    return MissRecord.model_validate(
        {"pass": miss.pass_name, "target": miss.target, "reason": miss.reason}
    )
