"""The list of passes and recipes that `graphopt passes` prints."""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass
from typing import Any

from graphopt.passes.registry import pass_class, pass_names

from .recipes import load_recipe, preset_description, preset_names

_WIDTH_COLUMNS = 100


@dataclass(frozen=True)
class PassList:
    """What there is to choose from.

    Attributes:
        passes: For each pass: its name, one line about it, whether it is exact, whether its result
            must not be trained, and its options with their defaults.
        recipes: For each preset: its passes.
        descriptions: For each preset: what it is for.
    """

    passes: tuple[dict[str, Any], ...]
    recipes: dict[str, list[str]]
    descriptions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the list as plain data."""
        return {
            "passes": list(self.passes),
            "recipes": self.recipes,
            "descriptions": self.descriptions,
        }

    def __str__(self) -> str:
        """Return the list as text."""
        lines = []
        for entry in self.passes:
            kinds = ["exact" if entry["exact"] else "approximate"]
            kinds += ["inference only"] if entry["inference_only"] else []
            lines.append(f"{entry['name']} ({', '.join(kinds)})")
            lines.append(f"    {entry['summary']}")
            lines += [f"    {name} = {value}" for name, value in entry["options"].items()]
        lines += ["", "recipes"]
        for name, steps in self.recipes.items():
            lines.append(f"    {name}: {', '.join(steps)}")
            lines += textwrap.wrap(
                self.descriptions[name],
                _WIDTH_COLUMNS,
                initial_indent=8 * " ",
                subsequent_indent=8 * " ",
            )
        return "\n".join(lines)


def describe_passes() -> PassList:
    """Return all passes and presets."""
    entries = []
    for name in pass_names():
        kind = pass_class(name)
        entries.append(
            {
                "name": name,
                "summary": (kind.__doc__ or "").strip().partition("\n")[0],
                "exact": kind.exact,
                "inference_only": kind.inference_only,
                "options": {
                    field.name: field.default
                    for field in dataclasses.fields(kind)  # type: ignore[arg-type]
                },
            }
        )
    recipes = {name: [step.name for step in load_recipe(name).passes] for name in preset_names()}
    descriptions = {name: preset_description(name) for name in preset_names()}
    return PassList(tuple(entries), recipes, descriptions)
