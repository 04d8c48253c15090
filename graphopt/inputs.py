"""Inputs for a model that came without any, and the same inputs at other sizes.

What a model reads is told by its configuration (vocabulary, image size, positions) or else by its
first layers (channels, features, embedding rows). No model class is named: settings and layers
are recognised by their attributes, and a guess counts only if the model's forward runs on it.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from graphopt.passes.calls import canonical_arguments, expand_arguments, signature_of
from graphopt.passes.errors import InputError
from graphopt.passes.structure import flatten, tensor_names

_SEED = 0
_IMAGE_SIZES_PIXELS = (32, 28, 64, 224, 96, 128, 256)
_MOST_PIXELS = 64**3
_AUDIO_SAMPLES = 16_000
_LAYERS_TRIED = 8
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

# Fake tensors have no contents: a forward that asks for them fits as far as shapes can tell.
_NEEDS_CONTENTS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


def infer_inputs(model: nn.Module, *, batch: int = 8, length: int = 128) -> dict[str, Any]:
    """Return example arguments for a model, found from its configuration or its first layers.

    The values are the same in every call. They lie on the device of the model's parameters, and
    floating ones have the dtype of its first floating parameter. Token sequences take at most half
    of the model's positions, so that an offset of its position table and longer inputs fit too;
    where there is an attention mask, some rows are padded at the end.

    A model with a configuration is tried on fake tensors, at no cost in arithmetic. Any other is
    run for real, in eval mode, because sizes do not tell how long its position table is.

    Args:
        model: Any model; its parameters may be on the meta device.
        batch: Rows; 1 where the model accepts no more.
        length: Most tokens per row.

    Raises:
        InputError: if nothing that was tried runs; the text shows the line to write.
    """
    sampler = _Sampler(model)
    meta = sampler.device.type == "meta"
    failure: Exception | None = None
    for arguments in _from_config(model, sampler, batch, length):
        refused = _failure(model, arguments, fake=True)
        if refused and not meta:  # some operators are stricter on fake tensors than on real ones
            refused = _failure(model, arguments, fake=False)
        if refused is None:
            return arguments
        failure = failure or refused
    for arguments in _from_layers(model, sampler, batch, length):
        refused = _failure(model, arguments, fake=meta)
        if refused is None:
            return arguments
        failure = failure or refused
    raise _not_inferred(model, failure) from failure


def variants(
    arguments: dict[str, Any],
    dynamic: Mapping[str, Mapping[int, str]],
    *,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """Return three calls like the example's, at other sizes of its dynamic dimensions.

    Batches become 1, 3 and 5; token dimensions shrink, short ones also grow; image dimensions grow.
    All dimensions of one symbol change together. Contents come from the example: token ids and
    other integers are its own, shuffled; floats are drawn from its values; masks keep their
    shape (padding stays at its end, every row keeps a real position), and an attention mask
    without padding gets some. With no dynamic dimension, one call with other contents.

    Args:
        arguments: Canonical arguments, nested as the model takes them.
        dynamic: For each tensor (named as by `structure.tensor_names`), the symbol or expression
            ("s53", "2*s1") of each dynamic dimension: `Program.dynamic_dimensions()`.
        generator: Where random choices come from, on the CPU.

    Raises:
        InputError: if the example's sizes do not determine the symbols of an expression.
    """
    tensors, structure = flatten(arguments)
    names = tensor_names(structure)
    results = []
    for sizes in _other_sizes(dict(zip(names, tensors, strict=True)), dynamic):
        positions: dict[str, torch.Tensor] = {}
        resized = []
        for name, tensor in zip(names, tensors, strict=True):
            dimensions = dynamic.get(name, {})
            for index, symbol in dimensions.items():
                if symbol not in positions:
                    positions[symbol] = _kept_positions(
                        tensor.shape[index], sizes[symbol], generator
                    )
            chosen = {index: positions[symbol] for index, symbol in dimensions.items()}
            resized.append(_resize(name, tensor.detach(), chosen, generator))
        results.append(structure.rebuild(resized))
    return results


class _Sampler:
    """Draws seeded values on the device and in the dtype of a model."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        floating = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = next(floating, torch.get_default_dtype())
        self.generator = torch.Generator().manual_seed(_SEED)

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def ids(self, shape: tuple[int, ...], allowed: torch.Tensor) -> torch.Tensor:
        chosen = torch.randint(len(allowed), shape, generator=self.generator)
        return allowed[chosen].to(self.device)


def _not_inferred(model: nn.Module, failure: Exception | None) -> InputError:
    parameters = signature_of(model).parameters.values()
    shown = ", ".join(
        str(p).split(":")[0] if p.default is p.empty else f"{p.name}=..." for p in parameters
    )
    tried = f" (tried: {str(failure).strip().splitlines()[0]})" if str(failure or "") else ""
    return InputError(
        f"the inputs of {type(model).__name__}, whose forward is forward({shown}), could not be "
        f"inferred{tried}; pass one batch, graphopt.optimize(model, example_inputs), where "
        "example_inputs is a tensor, a tuple or a dict of keyword arguments"
    )


def _failure(model: nn.Module, arguments: dict[str, Any], *, fake: bool) -> Exception | None:
    """Run forward in eval mode without gradients and return what it raised."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    training = [(module, module.training) for module in model.modules()]
    silent, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
            warnings.simplefilter("ignore")
            model.eval()
            if fake:
                _run_on_fake_tensors(model, arguments)
            else:
                args, kwargs = expand_arguments(signature_of(model), arguments)
                model(*args, **kwargs)
    except _NEEDS_CONTENTS:
        return None
    except Exception as error:
        return error
    finally:
        logger.disabled = silent
        for module, mode in training:
            module.training = mode
    return None


def _run_on_fake_tensors(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Run a copy without weights, so that nothing a forward stores reaches the user's model."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = itertools.chain(model.parameters(), model.buffers())
    memo: dict[int, Any] = {id(tensor): mode.from_tensor(tensor) for tensor in tensors}
    fake_model = copy.deepcopy(model, memo)
    values = {
        name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    args, kwargs = expand_arguments(signature_of(model), values)
    with mode:
        fake_model(*args, **kwargs)


def _from_config(
    model: nn.Module, sampler: _Sampler, batch: int, length: int
) -> Iterator[dict[str, Any]]:
    """Yield arguments that a configuration (vocabulary, image size, ...) describes."""
    signature, config = signature_of(model), getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    if main not in signature.parameters and not open_ended:
        main = next(iter(signature.parameters), None)
    if not hasattr(config, "__dict__") or main not in _VALUES:
        return
    for rows in dict.fromkeys((batch, 1)):
        for value in _VALUES[main](config, sampler, rows, length):
            arguments = {main: value}
            if main == "input_ids" and "attention_mask" in signature.parameters:
                arguments |= _pad_rows(config, value)
            others = {
                name: made
                for name in _VALUES
                if name in signature.parameters and name not in arguments
                for made in itertools.islice(_VALUES[name](config, sampler, rows, length), 1)
            }
            decoder = others.pop("decoder_input_ids", None)
            if decoder is not None and getattr(config, "is_encoder_decoder", False):
                # Another length than the encoder's: equal sizes are taken for one dimension.
                arguments["decoder_input_ids"] = decoder[:, : max(2, decoder.shape[1] // 2)]
            yield canonical_arguments(signature, (), arguments)
            if others:
                yield canonical_arguments(signature, (), arguments | others)


def _configurations(config: Any) -> list[Any]:
    """Return a configuration and those inside it (of a text or a vision part), outermost first."""
    inside = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    return [config, *(part for value in inside for part in _configurations(value))]


def _setting(config: Any, *names: str) -> Any:
    """Return the first of the settings that is there."""
    values = (getattr(part, name, None) for part in _configurations(config) for name in names)
    return next((value for value in values if value is not None), None)


def _token_ids(config: Any, sampler: _Sampler, rows: int, length: int) -> Iterator[torch.Tensor]:
    """Yield ids [row, token] of ordinary tokens, closed by the end token if there is one."""
    vocabulary = _setting(config, "vocab_size")
    if not isinstance(vocabulary, int):
        return
    positions = _setting(
        config, "max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions"
    )
    if isinstance(positions, int) and positions > 0:
        length = max(2, min(length, positions // 2))
    ordinary = torch.ones(vocabulary, dtype=torch.bool)
    for part in _configurations(config):
        for name, value in vars(part).items():
            if name.endswith(("_token_id", "_token_index")):
                for token in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(token, int) and 0 <= token < vocabulary:
                        ordinary[token] = False
    allowed = ordinary.nonzero().flatten() if ordinary.any() else torch.arange(vocabulary)
    ids = sampler.ids((rows, length), allowed)
    end = _setting(config, "eos_token_id")
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[:, -1] = end
    yield ids


def _pad_rows(config: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return ids and attention mask where row i is i % 4 eighths shorter than the first."""
    rows, length = ids.shape
    row = torch.arange(rows, device=ids.device)
    lengths = length - (row % 4) * length // 8
    mask = (torch.arange(length, device=ids.device) < lengths[:, None]).long()
    padding = _setting(config, "pad_token_id")
    padded = ids.clone()
    padded[row, lengths - 1] = ids[:, -1]
    if isinstance(padding, int) and padding >= 0:
        padded = torch.where(mask.bool(), padded, padding)
    return {"input_ids": padded, "attention_mask": mask}


def _images(config: Any, sampler: _Sampler, rows: int, length: int) -> Iterator[torch.Tensor]:
    """Yield images [row, channel, height, width], then clips with a frame dimension."""
    channels = _setting(config, "num_channels", "in_channels", "in_chans") or 3
    size = _setting(config, "image_size", "img_size")
    if isinstance(size, Mapping):
        size = list(size.values())
    sizes = [(n, n) if isinstance(n, int) else tuple(n) for n in ([size] if size else (224, 32))]
    for height_width in sizes:
        yield sampler.floats(rows, channels, *height_width)
    frames = _setting(config, "num_frames")
    if frames:
        yield sampler.floats(rows, frames, channels, *sizes[0])


def _audio_features(
    config: Any, sampler: _Sampler, rows: int, length: int
) -> Iterator[torch.Tensor]:
    """Yield spectrograms: [row, bin, frame] of a fixed length, then [row, frame, bin]."""
    bins = _setting(
        config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"
    )
    positions = _setting(config, "max_source_positions")
    if bins and positions:
        yield sampler.floats(rows, bins, 2 * positions)  # two strides: frames halve once
    if bins:
        yield sampler.floats(rows, length, bins)


def _audio(config: Any, sampler: _Sampler, rows: int, length: int) -> Iterator[torch.Tensor]:
    """Yield waveforms [row, sample], then spectrograms [row, frame, bin]."""
    yield sampler.floats(rows, _AUDIO_SAMPLES)
    bins, frames = _setting(config, "num_mel_bins"), _setting(config, "max_length")
    if bins and frames:
        yield sampler.floats(rows, frames, bins)


_VALUES: dict[str, Callable[[Any, _Sampler, int, int], Iterator[torch.Tensor]]] = {
    "input_ids": _token_ids,
    "decoder_input_ids": _token_ids,
    "pixel_values": _images,
    "input_features": _audio_features,
    "input_values": _audio,
}


def _from_layers(
    model: nn.Module, sampler: _Sampler, batch: int, length: int
) -> Iterator[dict[str, Any]]:
    """Yield one-argument calls of the sizes that the first layers read."""
    signature = signature_of(model)
    required = [
        p for p in signature.parameters.values() if p.default is p.empty and p.kind not in _VARIABLE
    ]
    if len(required) > 1:
        return
    shapes = (list(_layer_inputs(layer, batch, length)) for layer in model.modules())
    first = itertools.islice((found for found in shapes if found), _LAYERS_TRIED)
    for shape, rows in dict.fromkeys(itertools.chain.from_iterable(first)):
        value = sampler.floats(*shape) if rows is None else sampler.ids(shape, torch.arange(rows))
        if required and required[0].kind is inspect.Parameter.KEYWORD_ONLY:
            yield {required[0].name: value}
        else:
            yield canonical_arguments(signature, (value,), {})


def _layer_inputs(
    layer: nn.Module, batch: int, length: int
) -> Iterator[tuple[tuple[int, ...], int | None]]:
    """Yield the input shapes a layer may read; for ids also the number of embedding rows.

    Layers are told apart by the attributes that torch gives them; for others nothing is yielded.
    """
    has = vars(layer)
    width = has.get("input_size", has.get("embed_dim"))
    if isinstance(rows := has.get("num_embeddings"), int):
        for halvings in range(length.bit_length() - 1):
            yield (batch, length >> halvings), rows
    elif isinstance(channels := has.get("in_channels"), int) and "kernel_size" in has:
        for size in _IMAGE_SIZES_PIXELS:
            spatial = tuple(size for _ in has["kernel_size"])
            if torch.Size(spatial).numel() <= _MOST_PIXELS:
                yield (batch, channels, *spatial), None
    elif isinstance(features := has.get("in_features"), int):
        yield (batch, features), None
        yield (batch, length, features), None
    elif isinstance(width, int) and isinstance(first := has.get("batch_first"), bool):
        yield (batch, length, width) if first else (length, batch, width), None
    elif isinstance(shape := has.get("normalized_shape"), tuple):
        yield (batch, length, *shape), None
        yield (batch, *shape), None
    elif isinstance(features := has.get("num_features"), int):
        for spatial in ((), (length,), (32, 32), (32, 32, 32)):
            yield (batch, features, *spatial), None


def _other_sizes(
    tensors: Mapping[str, torch.Tensor], dynamic: Mapping[str, Mapping[int, str]]
) -> list[dict[str, int]]:
    """Return three assignments of a size to every symbol or expression."""
    import sympy  # type: ignore[import-untyped, unused-ignore]

    sizes: dict[str, int] = {}
    roles: dict[str, str] = {}
    for name, tensor in tensors.items():
        for index, text in dynamic.get(name, {}).items():
            sizes[text] = tensor.shape[index]
            role = "image" if tensor.is_floating_point() and index >= 2 else "token"
            for symbol in re.findall(r"[a-z]+\d+", text):
                roles[symbol] = "batch" if index == 0 else roles.get(symbol, role)
    if not sizes:
        return [{}]
    symbols = {name: sympy.Symbol(name, integer=True, positive=True) for name in roles}
    expressions = {text: sympy.sympify(text, locals=symbols) for text in sizes}
    equations = [expressions[text] - size for text, size in sizes.items()]
    known: dict[Any, Any] = {}
    with contextlib.suppress(NotImplementedError):  # then nothing is known, as reported below
        known = next(iter(sympy.solve(equations, list(symbols.values()), dict=True)), {})
    if any(not getattr(known.get(symbol), "is_Integer", False) for symbol in symbols.values()):
        raise InputError(
            f"the example's sizes {sizes} do not determine the symbols {sorted(symbols)}; "
            "pass example inputs whose sizes fit together"
        )
    choices: dict[Any, list[int]] = {}
    for name, symbol in symbols.items():
        rank = sum(roles[earlier.name] == roles[name] for earlier in choices)
        three = _SIZES[roles[name]](int(known[symbol]))
        choices[symbol] = [three[(turn + rank) % 3] for turn in range(3)]
    return [
        {
            text: int(expression.subs({symbol: three[turn] for symbol, three in choices.items()}))
            for text, expression in expressions.items()
        }
        for turn in range(3)
    ]


def _token_sizes(size: int) -> list[int]:
    # Long sequences may be as long as the model allows, so they only shrink.
    preferred = (5, size // 4 + 1, size - 1, size // 2) if size >= 16 else (5, 2 * size + 1, 3, 7)
    return [n for n in dict.fromkeys(preferred) if n != size][:3]


_SIZES: dict[str, Callable[[int], list[int]]] = {
    "batch": lambda size: [n for n in (1, 3, 5, 2) if n != size][:3],
    "token": _token_sizes,
    "image": lambda size: [size + 1, size + 2, size + max(3, size // 4)],
}


def _kept_positions(size: int, new_size: int, generator: torch.Generator) -> torch.Tensor:
    """Return which positions fill a resized dimension: in order, both ends among them."""
    if new_size == 1:
        return torch.randint(size, (1,), generator=generator)
    middle = torch.randint(size, (new_size - 2,), generator=generator).sort().values
    return torch.cat([torch.tensor([0]), middle, torch.tensor([size - 1])])


def _resize(
    name: str, tensor: torch.Tensor, positions: dict[int, torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """Return a tensor with other sizes and contents, which stay of the example's kind."""
    shape = list(tensor.shape)
    for index, kept in positions.items():
        shape[index] = len(kept)
    if tensor.is_meta or tensor.numel() == 0:
        return tensor.new_empty(shape)
    if _is_mask(tensor):
        for index, kept in positions.items():
            tensor = tensor.index_select(index, kept.to(tensor.device))
        unpadded = "mask" in name and tensor.dim() == 2 and bool((tensor == tensor[0, 0]).all())
        return _with_padding(tensor, generator) if unpadded else tensor
    if tensor.is_floating_point():
        chosen = torch.randint(tensor.numel(), shape, generator=generator)
        return tensor.flatten()[chosen.to(tensor.device)]
    return _shuffle(tensor, positions, shape, generator)


def _shuffle(
    tensor: torch.Tensor,
    positions: dict[int, torch.Tensor],
    shape: list[int],
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the slices at the resized dimensions in random order, repeated as needed.

    What lies in the other dimensions stays together: the corners of a box, for one.
    """
    if tensor.dim() == 0:
        return tensor
    moved = sorted(positions) or [0]
    slices = tensor.movedim(moved, list(range(len(moved)))).flatten(0, len(moved) - 1)
    sizes = [shape[index] for index in moved]
    count = torch.Size(sizes).numel()
    rounds = -(-count // len(slices))
    order = torch.cat([torch.randperm(len(slices), generator=generator) for _ in range(rounds)])
    filled: torch.Tensor = slices[order[:count].to(tensor.device)].unflatten(0, sizes)
    return filled.movedim(list(range(len(moved))), moved)


def _is_mask(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds zeros and ones, or as floats at most two values."""
    if tensor.dtype == torch.bool:
        return True
    low, high = tensor.min(), tensor.max()
    if tensor.is_floating_point():
        return bool(((tensor == low) | (tensor == high)).all())
    return bool(low >= 0) and bool(high <= 1)


def _with_padding(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip the ends of all rows but the first; at least half of a row stays."""
    rows, length = mask.shape
    lengths = torch.randint((length + 1) // 2, length + 1, (rows, 1), generator=generator)
    lengths[0] = length
    padding = (torch.arange(length) >= lengths).to(mask.device)
    return torch.where(padding, 1 - mask.to(torch.int8), mask.to(torch.int8)).to(mask.dtype)
