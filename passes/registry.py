"""Passes by name, and pipelines as text: `prune-channels{round_to=16},fuse-projections`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import yaml

from .base import Pass
from .compress.factorize_low_rank import FactorizeLowRank
from .compress.prune_channels import PruneChannels
from .compress.quantize_weights import QuantizeWeights
from .compress.sparsify_blocks import SparsifyBlocks
from .errors import ConfigError
from .exact.drop_dead_tokens import DropDeadTokens
from .exact.fold_batch_norm import FoldBatchNorm
from .exact.fuse_projections import FuseProjections
from .exact.hoist_frozen_prefix import HoistFrozenPrefix
from .exact.pack_tokens import PackTokens
from .extend.add_ngram_embeddings import AddNgramEmbeddings
from .gates.freeze_blocks import FreezeBlocks
from .gates.gate_layers import GateLayers
from .gates.gate_tokens import GateTokens
from .gates.grow_depth import GrowDepth
from .gates.grow_width import GrowWidth
from .gates.ramp_resolution import RampResolution

P = TypeVar("P", bound=Pass)

_PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        FreezeBlocks,
        HoistFrozenPrefix,
        FoldBatchNorm,
        FuseProjections,
        PruneChannels,
        FactorizeLowRank,
        SparsifyBlocks,
        DropDeadTokens,
        PackTokens,
        GateTokens,
        GateLayers,
        GrowDepth,
        GrowWidth,
        RampResolution,
        AddNgramEmbeddings,
        QuantizeWeights,
    )
}


def register(cls: type[P], /) -> type[P]:
    """Make a pass of your own known by its name, for recipes and for loading its plans.

    Raises:
        ConfigError: if another pass has this name.
    """
    if _PASSES.get(cls.name, cls) is not cls:
        raise ConfigError(f"another pass is already called {cls.name!r}; choose another name")
    _PASSES[cls.name] = cls
    return cls


def pass_names() -> tuple[str, ...]:
    """Return the names of all passes."""
    return tuple(sorted(_PASSES))


def pass_class(name: str) -> type[Pass]:
    """Return the class of a pass.

    Raises:
        ConfigError: if there is none of this name; near matches are listed.
    """
    if name not in _PASSES:
        near = difflib.get_close_matches(name, _PASSES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(pass_names())}"
        raise ConfigError(f"no pass is called {name!r}; {hint}")
    return _PASSES[name]


def pass_named(name: str, **options: Any) -> Pass:
    """Return a pass with these options.

    Raises:
        ConfigError: if the name, an option or its type is unknown.
    """
    cls = pass_class(name)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for option, value in options.items():
        if option not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise ConfigError(f"{name} has no option {option!r}; its options are: {known}")
        default = fields[option].default
        if default is not None and not _fits(value, default):
            raise ConfigError(
                f"the option {option} of {name} must be {type(default).__name__}, got {value!r}"
            )
    return cls(**options)


def _fits(value: Any, default: Any) -> bool:
    """Say whether a value has the type of a default; a whole number is a float too."""
    if isinstance(value, bool) or isinstance(default, bool):
        return type(value) is type(default)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def options_of(step: Pass) -> dict[str, Any]:
    """Return the options of a pass that differ from their defaults."""
    return {
        field.name: getattr(step, field.name)
        for field in dataclasses.fields(step)  # type: ignore[arg-type]
        if getattr(step, field.name) != field.default
    }


def format_pipeline(passes: Iterable[Pass]) -> str:
    """Return passes as text; `parse_pipeline` reads it back."""
    return ",".join(step.name + _format_options(options_of(step)) for step in passes)


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """Return the passes of a textual pipeline.

    Raises:
        ConfigError: if it is malformed or names an unknown pass or option.
    """
    steps = []
    for part in _split(text):
        name, brace, rest = part.partition("{")
        if brace and not rest.endswith("}"):
            raise ConfigError(f"the pipeline step {part!r} lacks its closing brace")
        pairs = [pair for pair in rest.removesuffix("}").split(",") if pair.strip()]
        if any(pair.count("=") != 1 for pair in pairs):
            raise ConfigError(f"the options in {part!r} must be name=value, separated by commas")
        options = {key.strip(): _value(value, part) for key, value in (p.split("=") for p in pairs)}
        steps.append(pass_named(name.strip(), **options))
    return tuple(steps)


def _value(text: str, part: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value {text!r} in {part!r} cannot be read") from error
    if isinstance(value, str):
        with suppress(ValueError):  # YAML 1.1 takes 1e-05 for text
            return float(value)
    return value


def _format_options(options: Mapping[str, Any]) -> str:
    if not options:
        return ""
    return "{" + ",".join(f"{name}={_plain(value)}" for name, value in options.items()) + "}"


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _split(text: str) -> list[str]:
    """Split at the commas outside braces."""
    parts, depth = [""], 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
