"""What a recipe says: its keys, what they may hold, and how settings are put on top."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from graphopt.passes.base import Pass, matches, parse_share
from graphopt.passes.budget import parse_budget
from graphopt.passes.errors import ConfigError
from graphopt.passes.registry import pass_named

RECIPE_VERSION = 1
_RUNTIME = re.compile(r"torch|onnxruntime(:\w+ExecutionProvider)?")

Allocation = Literal["uniform", "solver"]


class PassSpec(BaseModel):
    """A pass by name, with the options that differ from its defaults.

    In YAML it is a mapping with the keys `name` and `options`, or only the name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    options: dict[str, JsonValue] = Field(default_factory=dict)


class Recipe(BaseModel):
    """What to do with a model; the same in Python, in YAML and in `plan.json`.

    Attributes:
        version: Version of these keys.
        name: What reports call it.
        include: Recipes that this one builds on: names of presets, or paths of YAML files relative
            to the file that includes them. `load_recipe` puts them in: their passes come first,
            but one that is named again runs at its new place with its new options; their
            settings hold where this recipe has none of its own, patterns and shares are added.
        passes: The passes in the order in which they run; `pack-tokens` belongs at the end.
        budget: What one forward pass may cost, as `parse_budget` reads it: 0.6 or "60%" of the
            dense FLOPs, "60% latency", "12ms", "5M parameters", "40MB". A share of the FLOPs is
            kept as a number, all else as text. None leaves it to the passes.
        allocation: "uniform" compresses all layers by the same share of their FLOPs; "solver"
            chooses one candidate per layer by loss and cost. Default: uniform, and the solver for
            budgets that are not a share of the FLOPs.
        training: Whether a rewrite must pay in a training step, else in inference.
        runtime: Where inference is timed: "torch", "onnxruntime", or "onnxruntime:" and the name
            of an execution provider.
        max_drift: Largest relative error of the outputs on held-out data, 0.1 or "10%"; changes
            that break it are taken back. None does not check.
        min_cosine: Smallest mean cosine between outputs before and after, None does not check.
        ignore: Target patterns to leave alone.
        keep: Share of units to keep, by target pattern, in place of the budget's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = RECIPE_VERSION
    name: str = "custom"
    include: tuple[str, ...] = ()
    passes: tuple[PassSpec, ...] = ()
    budget: float | str | None = None
    allocation: Allocation = Field(default=None, validate_default=True)
    training: bool = False
    runtime: str = "torch"
    max_drift: float | None = None
    min_cosine: float | None = None
    ignore: tuple[str, ...] = ()
    keep: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _check_version(cls, data: Any) -> Any:
        """Look at the version before all else: a newer one may have other keys."""
        version = data.get("version", RECIPE_VERSION) if isinstance(data, Mapping) else None
        if isinstance(version, int) and not 1 <= version <= RECIPE_VERSION:
            raise ConfigError(
                f"it has version {version}, and this graphopt reads version {RECIPE_VERSION}; "
                "install a newer graphopt"
            )
        return data

    @field_validator("passes", mode="before")
    @classmethod
    def _name_passes(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [{"name": item} if isinstance(item, str) else item for item in value]

    @field_validator("budget", mode="before")
    @classmethod
    def _read_budget(cls, value: Any) -> float | str | None:
        budget = parse_budget(value)
        if budget is None:
            return None
        is_flops_share = budget.relative and budget.resource == "flops"
        return budget.amount if is_flops_share else str(budget)

    @field_validator("allocation", mode="before")
    @classmethod
    def _choose_allocation(cls, value: Any, info: ValidationInfo) -> Any:
        budget = info.data.get("budget")
        if value is None:
            return "solver" if isinstance(budget, str) else "uniform"
        if value == "uniform" and isinstance(budget, str):
            raise ConfigError(
                f"a uniform allocation keeps a share of the FLOPs, and the budget is {budget!r}; "
                "leave out the allocation, or set it to solver"
            )
        return value

    @field_validator("runtime")
    @classmethod
    def _check_runtime(cls, value: str, info: ValidationInfo) -> str:
        if not _RUNTIME.fullmatch(value):
            raise ConfigError(
                "the runtime must be torch, onnxruntime, or an execution provider such as "
                f"onnxruntime:CPUExecutionProvider, got {value!r}"
            )
        if value != "torch" and info.data.get("training"):
            raise ConfigError(
                f"training steps run in torch, not in {value}; set the runtime to torch, or "
                "training to false"
            )
        return value

    @field_validator("max_drift", mode="before")
    @classmethod
    def _read_drift(cls, value: Any) -> float | None:
        return _fraction(value, "max_drift", "a relative error such as 0.1 or '10%'", math.inf)

    @field_validator("min_cosine", mode="before")
    @classmethod
    def _read_cosine(cls, value: Any) -> float | None:
        return _fraction(value, "min_cosine", "a cosine between 0 and 1 such as 0.99", 1.0)

    @field_validator("keep", mode="before")
    @classmethod
    def _read_keep(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            pattern: parse_share(share, f"the share to keep of {pattern}")
            for pattern, share in value.items()
        }

    @field_validator("ignore", "keep")
    @classmethod
    def _check_patterns(cls, value: Any) -> Any:
        for pattern in value:
            matches(pattern, "")
        return value

    def with_settings(self, **settings: Any) -> Recipe:
        """Return the recipe with settings on top; those that are None stay as they are.

        `ignore` is added to, `keep` and the other settings win over the recipe's own. A budget
        that is not a share of the FLOPs takes the solver.

        Raises:
            ConfigError: if a value is not valid, or does not go with the others.
        """
        return self._changed_by({k: v for k, v in settings.items() if v is not None})

    def on_top_of(self, included: Recipe) -> Recipe:
        """Return this recipe with what another one has and it has not (see `include`)."""
        named = {spec.name for spec in self.passes}
        kept = tuple(spec for spec in included.passes if spec.name not in named)
        return included._changed_by(
            {**self._own(), "name": self.name, "passes": (*kept, *self.passes)}
        )

    def _own(self) -> dict[str, Any]:
        """Return the settings that were given."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def _changed_by(self, given: Mapping[str, Any]) -> Recipe:
        own = self._own()
        if "budget" in given and own.get("allocation") == "uniform":
            del own["allocation"]
        return checked_recipe(
            {
                **own,
                **given,
                "ignore": tuple(dict.fromkeys((*self.ignore, *given.get("ignore", ())))),
                "keep": {**self.keep, **given.get("keep", {})},
            }
        )

    def build_passes(self) -> tuple[Pass, ...]:
        """Return the passes, made with their options.

        Raises:
            ConfigError: if a pass or an option is unknown.
        """
        return tuple(pass_named(spec.name, **spec.options) for spec in self.passes)

    def to_yaml(self) -> str:
        """Return the recipe as a YAML document that `load_recipe` reads back."""
        return as_yaml(self.model_dump(mode="json"))


def checked_recipe(data: Mapping[str, Any]) -> Recipe:
    """Return a recipe with these keys.

    Raises:
        ConfigError: if a key is unknown or a value is not valid, with the first problem.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from error


def as_yaml(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as a plan holds it as a YAML document that `load_recipe` reads back."""
    return str(yaml.safe_dump(dict(recipe), sort_keys=False))


def _fraction(value: Any, name: str, what: str, most: float) -> float | None:
    """Return a number in [0, most], given as one or as a percentage."""
    if value is None:
        return None
    text = str(value).strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and 0 <= number <= most):
        raise ConfigError(f"{name} must be {what}, got {value!r}")
    return number


def _sentence(error: ValidationError) -> str:
    """Say the first problem that a validation found, with a near match for an unknown key."""
    first = error.errors(include_input=False, include_url=False)[0]
    *parents, last = (str(part) for part in first["loc"])
    where = f" in {'.'.join(parents)}" if parents else ""
    if first["type"] == "extra_forbidden":
        known = (PassSpec if parents else Recipe).model_fields
        near = difflib.get_close_matches(last, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
        return f"unknown key {last!r}{where}; {hint}"
    if first["type"] == "missing":
        return f"the key {last!r} is missing{where}"
    return f"{last}{where}: {first['msg'][:1].lower()}{first['msg'][1:]}"
