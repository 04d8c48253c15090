"""Batches to calibrate and measure on, from a loader, tensors in memory or a file.

Whatever the source, the result can be iterated several times and gives dictionaries of the
arguments that the model's forward accepts, in the source's order. No file is unpickled.
"""

from __future__ import annotations

import itertools
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphopt.passes.errors import CheckpointError, ConfigError, InputError, MissingExtraError

Batch = dict[str, Any]


class Batches:
    """A re-iterable series of batches; its length is known where the source's is."""

    def __init__(self, source: Iterable[Any], convert: Callable[[int, Any], Batch]) -> None:
        """Hold a source and the function that makes a batch of its item number and item."""
        self._source = source
        self._convert = convert

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches from the start."""
        return itertools.starmap(self._convert, enumerate(self._source))

    def __len__(self) -> int:
        """Return the number of batches; raises TypeError where the source does not know it."""
        return len(self._source)  # type: ignore[arg-type]


def open_batches(
    source: Any,
    *,
    model_arguments: Sequence[str],
    tokenizer_dir: str | Path | None = None,
    batch_size: int = 32,
    max_length: int = 128,
    limit: int | None = None,
) -> Batches:
    """Return the batches of a source, ready to be passed to a model by keyword.

    Args:
        source: One of

            - a DataLoader or another iterable of batches: tensors, tuples in the order of the
              forward's arguments, or dicts, of which entries that the forward lacks are dropped;
            - a tensor, or a dict of tensors, whose first dimension is samples;
            - the path of a `.npz` or `.safetensors` file of such arrays, named as the arguments;
            - the path of a `.jsonl` file of `{"text": ...}` rows, in batches of like length.
        model_arguments: The names of the forward's arguments, in order.
        tokenizer_dir: A checkpoint directory with the tokenizer for texts.
        batch_size: Samples per batch, for sources that are not batched yet.
        max_length: Most tokens of a text; each batch is padded to its longest.
        limit: Most samples. With a limit, and from one-shot iterators, batches are kept in memory,
            so that every pass sees the same.

    Raises:
        InputError: if the contents do not fit the forward.
        CheckpointError: if a file is missing, damaged or of another kind.
        ConfigError: if a number is below one.
        MissingExtraError: if texts are given and transformers is not installed.
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.suffix == ".jsonl":
            texts = _read_texts(path, limit)
            return _tokenized(texts, path, model_arguments, tokenizer_dir, batch_size, max_length)
        return _sliced(_read_arrays(path), str(path), model_arguments, batch_size, limit)
    if isinstance(source, torch.Tensor):
        return _sliced(
            {model_arguments[0]: source}, "the tensor", model_arguments, batch_size, limit
        )
    if isinstance(source, Mapping):
        return _sliced(dict(source), "the dict", model_arguments, batch_size, limit)
    if not isinstance(source, Iterable):
        raise InputError(
            "batches must come from a DataLoader, an iterable of batches, a tensor, a dict of "
            f"tensors or a file, got {type(source).__name__}"
        )
    batches = Batches(source, lambda index, item: _by_name(index, item, model_arguments))
    if limit is None and iter(source) is not source:
        return batches
    kept = list(_first_samples(batches, limit))
    if not kept:
        raise InputError("the iterable of batches is empty; at least one batch is needed")
    return Batches(kept, lambda _, batch: dict(batch))


def _by_name(index: int, item: Any, model_arguments: Sequence[str]) -> Batch:
    """Return a loader's batch as keyword arguments."""
    if isinstance(item, (torch.Tensor, np.ndarray)):
        item = (item,)
    if isinstance(item, (tuple, list)):
        named = dict(zip(model_arguments, item, strict=False))
    elif hasattr(item, "keys"):
        named = {key: item[key] for key in item.keys() if key in model_arguments}  # noqa: SIM118 - any mapping-like batch, also ones whose iteration is not over keys
        if not named:
            raise InputError(
                f"batch {index} has the keys {sorted(map(str, item.keys()))}, but forward takes "
                f"{list(model_arguments)}; name its entries after arguments"
            )
    else:
        raise InputError(
            f"batch {index} is a {type(item).__name__}; expected a tensor, a tuple or a dict"
        )
    for name, value in named.items():
        if isinstance(value, np.ndarray):
            named[name] = _tensor(value, f"{name} of batch {index}")
        elif isinstance(value, (list, tuple)) and not _holds_tensors(value):
            raise InputError(
                f"{name} of batch {index} is a {type(value).__name__} of "
                f"{type(value[0]).__name__ if value else 'nothing'}; expected a tensor of a whole "
                "batch: stack rows with a DataLoader"
            )
    return named


def _holds_tensors(values: Sequence[Any]) -> bool:
    return any(
        isinstance(value, torch.Tensor)
        or (isinstance(value, (list, tuple)) and _holds_tensors(value))
        for value in values
    )


def _first_samples(batches: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    """Yield batches until `limit` samples have come, cutting the last one."""
    left = limit
    for batch in batches:
        tensors = [v for v in batch.values() if isinstance(v, torch.Tensor) and v.dim()]
        rows = len(tensors[0]) if tensors else 1
        if left is not None and rows > left:
            batch = {
                name: value[:left]
                if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows
                else value
                for name, value in batch.items()
            }
        yield batch
        if left is not None:
            left -= rows
            if left <= 0:
                return


def _tensor(array: np.ndarray[Any, Any], what: str) -> torch.Tensor:
    """Return an array as a tensor; float64, numpy's default, becomes torch's default."""
    try:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    except TypeError as error:
        raise InputError(f"{what} holds {array.dtype}; expected numbers or booleans") from error
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def _read_arrays(path: Path) -> dict[str, Any]:
    """Return the named arrays of a file.

    Safetensors files are mapped into memory, not read.
    """
    if path.suffix not in (".npz", ".safetensors"):
        raise CheckpointError(
            f"{path} is not a kind of file that batches are read from; expected .npz, "
            ".safetensors or .jsonl"
        )
    _require_file(path)
    if path.suffix == ".npz":
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except (
            OSError,
            ValueError,
            EOFError,
            AttributeError,
            TypeError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise CheckpointError(
                f"{path} cannot be read as a .npz file of plain arrays: {_first_line(error)}"
            ) from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a .safetensors file: {_first_line(error)}"
        ) from error


def _sliced(
    arrays: dict[str, Any],
    where: str,
    model_arguments: Sequence[str],
    batch_size: int,
    limit: int | None,
) -> Batches:
    """Return batches cut from arrays whose first dimension is samples."""
    tensors = {
        name: _tensor(value, f"{name} in {where}") if isinstance(value, np.ndarray) else value
        for name, value in arrays.items()
        if name in model_arguments
    }
    if not tensors:
        raise InputError(
            f"{where} has the arrays {sorted(map(str, arrays))}, but forward takes "
            f"{list(model_arguments)}; name the arrays after arguments"
        )
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            raise InputError(
                f"{name} in {where} must be an array whose first dimension is samples, "
                f"got {'one number' if isinstance(value, torch.Tensor) else type(value).__name__}"
            )
    counts = {name: len(value) for name, value in tensors.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"the arrays in {where} must have equally many samples, got {counts}")
    samples = min(next(iter(counts.values())), limit or torch.iinfo(torch.int64).max)
    if samples == 0:
        raise InputError(f"the arrays in {where} hold no samples; at least one is needed")

    def cut(_: int, start: int) -> Batch:
        end = min(start + batch_size, samples)
        return {name: value[start:end] for name, value in tensors.items()}

    return Batches(range(0, samples, batch_size), cut)


def _read_texts(path: Path, limit: int | None) -> list[str]:
    """Return the texts of a file of `{"text": ...}` rows; blank lines are skipped."""
    _require_file(path)
    texts: list[str] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    texts.append(_text_of(line, path, number))
                if len(texts) == limit:
                    break
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if not texts:
        raise InputError(f'{path} has no rows; expected one {{"text": ...}} object a line')
    return texts


def _text_of(line: str, path: Path, number: int) -> str:
    expected = f'{path}, line {number}: expected a JSON object such as {{"text": "..."}}'
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{expected}, got {line.strip()[:60]!r}") from error
    if not isinstance(row, dict):
        raise InputError(f"{expected}, got {line.strip()[:60]!r}")
    if not isinstance(row.get("text"), str):
        found = (
            f"text of type {type(row['text']).__name__}"
            if "text" in row
            else f"the keys {sorted(row)}"
        )
        raise InputError(f"{expected}, got {found}")
    return str(row["text"])


def _tokenized(
    texts: list[str],
    path: Path,
    model_arguments: Sequence[str],
    tokenizer_dir: str | Path | None,
    batch_size: int,
    max_length: int,
) -> Batches:
    """Return batches of token ids, texts of like length together, padded to the longest of each.

    Statistics do not depend on the order, and sorted texts need half the padding. Every fourth
    batch comes last, so that the last quarter, which a guard looks at, has texts of all lengths.
    """
    if "input_ids" not in model_arguments:
        raise InputError(
            f"{path} holds texts, but forward takes {list(model_arguments)} and no input_ids; "
            "pass .npz or .safetensors arrays named after its arguments"
        )
    tokenizer = _load_tokenizer(path, tokenizer_dir)
    length = min(max_length, int(tokenizer.model_max_length))
    ordered = sorted(texts, key=len)

    def encode(_: int, start: int) -> Batch:
        rows = ordered[start : start + batch_size]
        encoded = tokenizer(
            rows, padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        batch = {name: encoded[name] for name in model_arguments if name in encoded}
        if "decoder_input_ids" in model_arguments:
            # A text is all there is: the decoder reads what the encoder reads.
            batch["decoder_input_ids"] = encoded["input_ids"]
        return batch

    starts = list(range(0, len(ordered), batch_size))
    early = [start for number, start in enumerate(starts) if number % 4 != 3]
    return Batches([*early, *starts[3::4]], encode)


def _load_tokenizer(path: Path, directory: str | Path | None) -> Any:
    if directory is None:
        raise InputError(
            f"{path} holds texts, which need a tokenizer, and the model did not come from a "
            "checkpoint directory that has one; pass batches of token ids"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError(
            f"reading the texts of {path} needs transformers: pip install 'graphopt[hf]'"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(  # type: ignore[no-untyped-call, unused-ignore]
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise CheckpointError(
            f"no tokenizer could be read from {directory}: {_first_line(error)}; put its "
            "tokenizer.json and tokenizer_config.json there"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # the usual choice; padding is masked
    if tokenizer.pad_token is None:
        raise InputError(
            f"the tokenizer in {directory} has no padding token; set pad_token in its "
            "tokenizer_config.json"
        )
    return tokenizer


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"{path} {'is not a file' if path.exists() else 'does not exist'}; expected a .npz, "
            ".safetensors or .jsonl file"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
