"""The details of a change, read back with every field checked."""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .base import Change
from .errors import PlanError


class Details(BaseModel):
    """Base of what a pass writes into `Change.details`: JSON values, no field it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


T = TypeVar("T", bound=Details)


def read_details(kind: type[T], change: Change) -> T:
    """Return the details of a change.

    Raises:
        PlanError: if a field is missing, unknown or of the wrong type or range.
    """
    try:
        return kind.model_validate_json(json.dumps(dict(change.details)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "its value"
        raise PlanError(
            f"the details of {change.pass_name} at {change.target!r} are not valid: "
            f"{where}: {first['msg']}; make the plan again"
        ) from error
