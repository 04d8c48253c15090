"""Recipes: which passes run, in which order, and how much of the model they keep."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from graphopt.passes.base import Pass, matches, parse_share
from graphopt.passes.errors import ConfigError
from graphopt.passes.registry import options_of, parse_pipeline, pass_named, pass_names

_SUFFIXES = (".yaml", ".yml")


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
        name: What reports call it.
        passes: The passes in the order in which they run.
        budget: Share of the dense forward FLOPs to keep, in (0, 1]; "60%" is read as 0.6. None
            leaves it to the passes.
        training: Whether a rewrite must pay in a training step, else in inference.
        ignore: Target patterns to leave alone.
        keep: Share of units to keep, by target pattern, in place of the budget's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "custom"
    passes: tuple[PassSpec, ...] = Field(min_length=1)
    budget: float | None = None
    training: bool = False
    ignore: tuple[str, ...] = ()
    keep: dict[str, float] = Field(default_factory=dict)

    @field_validator("passes", mode="before")
    @classmethod
    def _name_passes(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return [{"name": item} if isinstance(item, str) else item for item in value]

    @field_validator("budget", mode="before")
    @classmethod
    def _read_budget(cls, value: Any) -> float | None:
        return parse_share(value, "the budget")

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

    def build_passes(self) -> tuple[Pass, ...]:
        """Return the passes, made with their options.

        Raises:
            ConfigError: if a pass or an option is unknown.
        """
        return tuple(pass_named(spec.name, **spec.options) for spec in self.passes)

    def to_yaml(self) -> str:
        """Return the recipe as a YAML document that `load_recipe` reads back."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def preset_names() -> tuple[str, ...]:
    """Return the names of the recipes that come with graphopt."""
    folder = resources.files(__package__) / "presets"
    return tuple(
        sorted(
            entry.name.removesuffix(".yaml")
            for entry in folder.iterdir()
            if entry.name.endswith(".yaml")
        )
    )


def load_recipe(source: str | Path | Iterable[str | Pass] | Recipe) -> Recipe:
    """Return a recipe.

    Args:
        source: The name of a preset (see `preset_names`), the path of a YAML file, a textual
            pipeline such as `prune-channels{round_to=16},fuse-projections`, passes or their names
            in order, or a recipe.

    Raises:
        ConfigError: if there is no such recipe, or it has unknown keys, passes, options or values.
    """
    if isinstance(source, Recipe):
        return _checked(source, f"the recipe {source.name!r}")
    if isinstance(source, (str, Path)):
        return _load_named(source)
    if not isinstance(source, Iterable):
        raise ConfigError(
            "a recipe is a name, the path of a YAML file, or a list of passes, "
            f"got {type(source).__name__}"
        )
    specs = []
    for item in source:
        if isinstance(item, Pass):
            specs.append({"name": item.name, "options": options_of(item)})
        elif isinstance(item, str):
            specs.append({"name": item, "options": {}})
        else:
            raise ConfigError(
                f"a list of passes holds names or passes, got {type(item).__name__} in it"
            )
    return _validated({"passes": specs}, "the list of passes")


def _load_named(source: str | Path) -> Recipe:
    text = str(source)
    if text in preset_names():
        entry = resources.files(__package__) / "presets" / f"{text}.yaml"
        return _parsed(entry.read_text(encoding="utf-8"), f"the preset {text!r}", text)
    path = Path(source)
    if path.suffix in _SUFFIXES:
        try:
            return _parsed(path.read_text(encoding="utf-8"), f"the recipe {path}", path.stem)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the recipe {path} cannot be read: {error}") from error
    if "," in text or "{" in text or text in pass_names():
        steps = parse_pipeline(text)
        return load_recipe(steps)
    near = difflib.get_close_matches(text, preset_names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "pass one of them,"
    raise ConfigError(
        f"no recipe is called {text!r}; there are {', '.join(preset_names())}: {hint} "
        "or the path of a .yaml file, or a comma-separated list of passes"
    )


def _parsed(text: str, source: str, name: str) -> Recipe:
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None) or type(error).__name__
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{source} is not valid YAML{where}: {problem}") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{source} must be a mapping with the key 'passes', got {type(data).__name__}"
        )
    return _validated({"name": name, **data}, source)


def _validated(data: dict[str, Any], source: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_sentence(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return _checked(recipe, source)


def _checked(recipe: Recipe, source: str) -> Recipe:
    """Return the recipe if its passes can be made."""
    try:
        recipe.build_passes()
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    return recipe


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
