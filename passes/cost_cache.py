"""The file that keeps measured times between runs."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

_logger = logging.getLogger(__name__)
_SCHEMA = 1


class CostCache:
    """Times by key, in memory and in a JSON file that several processes may share.

    A damaged file is ignored with a logged warning and replaced at the next measurement; where no
    file can be written, times stay in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Read what was measured before; None keeps the times in memory."""
        self._path = path
        self._times: dict[str, list[float]] = _read(path) if path is not None else {}

    def get(self, key: str, count: int, measure: Callable[[], list[float]]) -> list[float]:
        """Return the times under a key, measuring them if there are not `count` of them yet."""
        found = self._times.get(key)
        if found is None or len(found) != count:
            found = self._times[key] = measure()
            self._keep()
        return found

    def _keep(self) -> None:
        if self._path is None:
            return
        self._times = {**_read(self._path), **self._times}
        try:
            _write(self._path, self._times)
        except OSError as error:
            _logger.warning("measured times cannot be written to %s: %s", self._path, error)
            self._path = None


def default_cache_path() -> Path | None:
    """Return the file for measured times in the user's cache directory, None without a home."""
    folder = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(folder) if folder else Path.home() / ".cache"
    except RuntimeError:
        return None
    return cache / "graphopt" / "costs.json"


def _read(path: Path) -> dict[str, list[float]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            raise ValueError(f"expected schema {_SCHEMA}, got {content['schema']!r}")
        times = {
            str(key): [float(item) for item in value] for key, value in content["times"].items()
        }
        if not all(math.isfinite(item) and item > 0 for value in times.values() for item in value):
            raise ValueError("a time is not a positive number")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _logger.warning("the file of measured times %s is ignored: %r", path, error)
        return {}
    return times


def _write(path: Path, times: dict[str, list[float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"schema": _SCHEMA, "times": times}, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
