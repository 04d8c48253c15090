"""Recipes by name, from files and from lists of passes, with the recipes that they include."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from graphopt.passes.base import Pass
from graphopt.passes.errors import ConfigError
from graphopt.passes.registry import options_of, parse_pipeline, pass_names

from .recipe_schema import PassSpec, Recipe, checked_recipe

__all__ = ["PassSpec", "Recipe", "load_recipe", "preset_description", "preset_names"]

_SUFFIXES = (".yaml", ".yml")


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


def preset_description(name: str) -> str:
    """Return what a preset says about itself: the comment at its beginning, as one line."""
    text = (resources.files(__package__) / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.removeprefix("#").strip() for line in comment)


def load_recipe(source: str | Path | Iterable[str | Pass] | Recipe) -> Recipe:
    """Return a recipe, with those that it includes put in.

    Args:
        source: The name of a preset (see `preset_names`), the path of a YAML file, a textual
            pipeline such as `prune-channels{round_to=16},fuse-projections`, a list of passes and
            such texts, or a recipe.

    Raises:
        ConfigError: if there is no such recipe, it has unknown keys, passes, options or values, or
            recipes include each other.
    """
    if isinstance(source, Recipe):
        return _complete(source, f"the recipe {source.name!r}", Path(), ())
    if isinstance(source, (str, Path)):
        return _load_named(source, Path(), ())
    if not isinstance(source, Iterable):
        raise ConfigError(
            "a recipe is a name, the path of a YAML file, or a list of passes, "
            f"got {type(source).__name__}"
        )
    steps: list[Pass] = []
    for item in source:
        if not isinstance(item, (Pass, str)):
            raise ConfigError(
                f"a list of passes holds names or passes, got {type(item).__name__} in it"
            )
        steps += parse_pipeline(item) if isinstance(item, str) else [item]
    specs = [{"name": step.name, "options": options_of(step)} for step in steps]
    what = "the list of passes"
    return _complete(_validated({"passes": specs}, what), what, Path(), ())


def _load_named(source: str | Path, folder: Path, including: tuple[str, ...]) -> Recipe:
    """Return a recipe by its name, its path relative to a folder, or its passes as text."""
    text = str(source)
    if text in preset_names():
        entry = resources.files(__package__) / "presets" / f"{text}.yaml"
        what = f"the preset {text!r}"
        data = _parsed(entry.read_text(encoding="utf-8"), what)
        return _complete(_validated({"name": text, **data}, what), what, Path(), including)
    path = folder / source
    if path.suffix in _SUFFIXES:
        what = f"the recipe {path.resolve()}"
        try:
            data = _parsed(path.read_text(encoding="utf-8"), what)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{what} cannot be read: {error}") from error
        recipe = _validated({"name": path.stem, **data}, what)
        return _complete(recipe, what, path.parent, including)
    if "," in text or "{" in text or text in pass_names():
        return load_recipe(parse_pipeline(text))
    near = difflib.get_close_matches(text, preset_names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "pass one of them,"
    raise ConfigError(
        f"no recipe is called {text!r}; there are {', '.join(preset_names())}: {hint} "
        "or the path of a .yaml file, or a comma-separated list of passes"
    )


def _complete(recipe: Recipe, what: str, folder: Path, including: tuple[str, ...]) -> Recipe:
    """Return a recipe with what it includes, if its passes can be made.

    Args:
        recipe: The recipe as written.
        what: What an error calls it; the same for the same recipe.
        folder: Where the paths of what it includes begin.
        including: What the recipes are called that include it, the outermost first.
    """
    if what in including:
        raise ConfigError(f"{what} includes itself on this way; take one of the includes out")
    own = recipe.model_copy(update={"include": ()})
    try:
        base: Recipe | None = None
        for name in recipe.include:
            added = _load_named(name, folder, (*including, what))
            base = added if base is None else added.on_top_of(base)
        whole = own if base is None else own.on_top_of(base)
        if not whole.passes:
            raise ConfigError("it has no passes; list some under 'passes', or include a recipe")
        whole.build_passes()
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error
    return whole


def _parsed(text: str, what: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None) or type(error).__name__
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{what} is not valid YAML{where}: {problem}") from error
    if not isinstance(data, dict):
        raise ConfigError(
            f"{what} must be a mapping with the key 'passes', got {type(data).__name__}"
        )
    return data


def _validated(data: dict[str, Any], what: str) -> Recipe:
    try:
        return checked_recipe(data)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from error
