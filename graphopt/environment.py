"""Where a number was measured, and the file that keeps it together with the number."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from graphopt.passes.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and when something was measured.

    Attributes:
        device: The device torch ran on.
        cpu: Name of the processor.
        threads: Threads inside one operation, of torch and of ONNX Runtime.
        commit: Commit of graphopt's source, empty if it is not in a git checkout.
        date: Time of the measurement, UTC.
    """

    device: str
    cpu: str
    threads: int
    python: str
    torch: str
    onnxruntime: str
    graphopt: str
    commit: str
    date: str


def environment(device: torch.device | str = "cpu") -> Environment:
    """Return where and with what this process measures."""
    place = torch.device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    return Environment(
        device=name,
        cpu=_cpu_name(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        onnxruntime=_version("onnxruntime"),
        graphopt=_version("graphopt"),
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def write_csv(path: str | Path, rows: Sequence[Any], where: Environment) -> None:
    """Add rows to a CSV file, each with the environment it was measured in.

    Args:
        path: The file; made if there is none.
        rows: Dataclasses of one kind.
        where: The environment.

    Raises:
        ConfigError: if the file has other columns.
    """
    target = Path(path)
    records = [{**dataclasses.asdict(row), **dataclasses.asdict(where)} for row in rows]
    if not records:
        return
    columns = list(records[0])
    old = target.read_text(encoding="utf-8") if target.exists() else ""
    found = next(csv.reader(io.StringIO(old)), columns)
    if found != columns:
        raise ConfigError(f"{target} has the columns {found}, and these rows have {columns}")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not old:
        writer.writeheader()
    writer.writerows(records)
    draft = target.with_name(f".{target.name}.draft")
    draft.write_text(old + text.getvalue(), encoding="utf-8")
    draft.replace(target)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str:
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
