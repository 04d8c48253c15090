"""The Triton kernels under Triton's interpreter, in a process that starts with it switched on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_interpreted_kernels() -> None:
    folder = Path(__file__).parent / "interpreted"
    command = [sys.executable, "-m", "pytest", str(folder), "-n", "0", "-q", "--no-header"]
    surroundings = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    done = subprocess.run(
        command,
        env=surroundings | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=folder.parents[2],
        capture_output=True,
        text=True,
    )
    # pytest ends with 5 where it collects nothing, so an empty run fails too.
    assert done.returncode == 0, done.stdout + done.stderr
