"""Tensors by key in memory-mapped files that only grow.

    values-0000.bin ...   the bytes of the tensors, one entry after the other
    index.json            where each entry lies; written last, to a temporary file, then renamed

A process that stops at any moment leaves a store that holds what its index names. Every rank writes
to a folder of its own and reads those of all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import TrainingError

_INDEX = "index.json"
_FILE = re.compile(r"values-(\d{4,})\.bin")
_SMALLEST_FILE_BYTES = 1 << 22
_LARGEST_FILE_BYTES = 1 << 28
_SPARE_BYTES = 1 << 28
_FLUSH_S = 30.0

_Place = tuple[str, int, list[list[int]]]
"""A file, an offset in bytes, and the shapes of the tensors that lie there."""


class SampleStore:
    """Entries of several tensors each, of the same types in every entry.

    Attributes:
        size_bytes: Bytes of the entries written by this rank.
    """

    def __init__(
        self,
        folder: Path,
        types: Sequence[torch.dtype],
        *,
        rank: int = 0,
        largest_bytes: int | None = None,
    ) -> None:
        """Open or make a store.

        Args:
            folder: Where it lies; other ranks' parts lie beside.
            types: Types of an entry's tensors, in order.
            rank: The part to write to; no other process may write to it.
            largest_bytes: Bytes that this rank may write in all; None: what the disk has.

        Raises:
            TrainingError: if the folder cannot be written, or holds entries of other types.
        """
        self._root = folder
        self._own = folder / f"rank-{rank}"
        self._types = tuple(types)
        self._largest_bytes = largest_bytes
        self._maps: dict[Path, np.memmap[Any, np.dtype[np.uint8]]] = {}
        self._others: dict[Path, tuple[int, dict[str, _Place]]] = {}
        self._written: list[Path] = []
        self._end = self._capacity = 0
        self._flushed = time.monotonic()
        self._dirty = False
        try:
            self._own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"cannot write to {self._own}: {error.strerror}") from error
        self._places = self._read(self._own)
        for path in self._own.iterdir():
            if path.name != _INDEX and path.name not in {p[0] for p in self._places.values()}:
                path.unlink()  # what a stopped process had not written down
        self.size_bytes = sum(self._bytes(place[2]) for place in self._places.values())

    def get(self, key: str) -> list[Tensor] | None:
        """Return an entry's tensors, views of the files; None if there is none."""
        if key in self._places:
            return self._load(self._own, self._places[key])
        for folder, (_, places) in self._others.items():
            if key in places:
                return self._load(folder, places[key])
        return None

    def refresh(self) -> None:
        """Read what other ranks have written down since."""
        for folder in self._root.glob("rank-*"):
            path = folder / _INDEX
            if folder == self._own or not path.exists():
                continue
            changed = path.stat().st_mtime_ns
            if self._others.get(folder, (0, {}))[0] != changed:
                self._others[folder] = (changed, self._read(folder))

    def put(self, key: str, tensors: Sequence[Tensor]) -> None:
        """Add an entry.

        Raises:
            TrainingError: if it would fill the disk or pass the limit; what is there stays usable.
        """
        shapes = [list(tensor.shape) for tensor in tensors]
        needed = self._bytes(shapes)
        if self._end + needed > self._capacity:
            self._grow(needed)
        file = self._maps[self._written[-1]]
        offset = self._end
        for tensor, dtype in zip(tensors, self._types, strict=True):
            flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8)
            file[self._end : self._end + flat.numel()] = flat.numpy()
            self._end += flat.numel()
        self._places[key] = (self._written[-1].name, offset, shapes)
        self.size_bytes += needed
        self._dirty = True
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write down what was added: the values first, then the index."""
        if not self._dirty:
            return
        for path in self._written:
            self._maps[path].flush()
        content = {"types": [str(dtype) for dtype in self._types], "entries": self._places}
        descriptor, temporary = tempfile.mkstemp(dir=self._own, prefix=_INDEX, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file)
            os.replace(temporary, self._own / _INDEX)
        except BaseException:
            os.unlink(temporary)
            raise
        self._written = self._written[-1:]
        self._flushed = time.monotonic()
        self._dirty = False

    def close(self) -> None:
        """Flush, and give back what the last file does not need."""
        self.flush()
        self._maps.clear()
        if self._written:
            os.truncate(self._written[-1], self._end)
        self._written, self._end, self._capacity = [], 0, 0

    def __len__(self) -> int:
        """Return the number of entries, those of other ranks included as far as they were read."""
        return len({*self._places, *(key for _, places in self._others.values() for key in places)})

    def _grow(self, needed: int) -> None:
        """Start another file that has room for an entry."""
        size = max(_SMALLEST_FILE_BYTES, min(self.size_bytes, _LARGEST_FILE_BYTES), needed)
        if self._largest_bytes is not None:
            size = max(needed, min(size, self._largest_bytes - self.size_bytes))
            if self.size_bytes + needed > self._largest_bytes:
                raise self._full(needed, f"only {self._largest_bytes:,} bytes may be used")
        free = shutil.disk_usage(self._own).free
        if size + _SPARE_BYTES > free:
            size = needed
        if size + _SPARE_BYTES > free:
            raise self._full(needed, f"the disk has {free:,} bytes left")
        numbers = [int(found[1]) for p in self._own.iterdir() if (found := _FILE.match(p.name))]
        path = self._own / f"values-{max(numbers, default=-1) + 1:04d}.bin"
        try:
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise self._full(needed, error.strerror or str(error)) from error
        self._maps[path] = np.memmap(path, dtype=np.uint8, mode="r+")
        self._written.append(path)
        self._end, self._capacity = 0, size

    def _full(self, needed: int, why: str) -> TrainingError:
        self.flush()
        return TrainingError(
            f"the cache in {self._root} holds {self.size_bytes:,} bytes and needs {needed:,} more "
            f"for the next sample, but {why}; give it more room or another directory, and feed the "
            "same samples in every epoch (no augmentation)"
        )

    def _load(self, folder: Path, place: _Place) -> list[Tensor]:
        name, offset, shapes = place
        path = folder / name
        if path not in self._maps:
            self._maps[path] = np.memmap(path, dtype=np.uint8, mode="c")
        tensors: list[Tensor] = []
        for shape, dtype in zip(shapes, self._types, strict=True):
            size = prod(shape) * dtype.itemsize
            if not size:
                tensors.append(torch.empty(shape, dtype=dtype))
                continue
            flat = torch.frombuffer(self._maps[path], dtype=torch.uint8, count=size, offset=offset)
            tensors.append(_typed(flat, dtype).view(shape))
            offset += size
        return tensors

    def _read(self, folder: Path) -> dict[str, _Place]:
        """Return the entries that an index names, none if it is not of this store."""
        path = folder / _INDEX
        if not path.exists():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            types = content["types"]
            entries = {str(k): (str(f), int(o), s) for k, (f, o, s) in content["entries"].items()}
            sizes = {f: (folder / f).stat().st_size for f in {f for f, _, _ in entries.values()}}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(
                f"{path} or its files are damaged ({error}); remove {folder} to compute them again"
            ) from error
        whole = all(
            o + self._bytes(s) <= sizes[f] and _FILE.fullmatch(f) for f, o, s in entries.values()
        )
        if types != [str(dtype) for dtype in self._types] or not whole:
            raise TrainingError(
                f"{path} does not fit its files or holds {types} instead of "
                f"{[str(dtype) for dtype in self._types]}; remove {folder} to compute them again"
            )
        return entries

    def _bytes(self, shapes: Sequence[Sequence[int]]) -> int:
        return sum(
            prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, self._types, strict=True)
        )


def _typed(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Read bytes as another type; they may lie at any address."""
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype)
