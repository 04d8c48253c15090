"""The example runs as it stands, alone and under torchrun, and goes on where it stopped."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_with_clock.py"
LONGEST_S = 120
BUDGET_FLOPS = 1e8


def run_alone(output: Path) -> None:
    runpy.run_path(str(EXAMPLE))["main"](output)


def run_on_two_ranks(output: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLE), str(output)],
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    # Not the exit code: threads of gloo have aborted a rank that had ended (see two_ranks.py).
    assert (output / "saved" / "training.json").exists(), done.stderr


def entries(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_trains_until_its_budget_is_spent(tmp_path: Path, ranks: int) -> None:
    {1: run_alone, 2: run_on_two_ranks}[ranks](tmp_path)
    found = entries(tmp_path)
    saved = json.loads((tmp_path / "saved" / "training.json").read_text())
    spent = sum(entry["flops"] for entry in found)
    assert saved["ranks"] == ranks
    assert saved["parts"]["clock"]["$dict"] == {"steps": len(found), "consumed_flops": spent}
    assert BUDGET_FLOPS <= spent < 1.2 * BUDGET_FLOPS
    assert [entry["step"] for entry in found] == list(range(1, len(found) + 1))
    assert found[0]["samples"] == 32 * ranks
    assert found[-1]["loss"] < found[0]["loss"] / 2
    run_alone(tmp_path)
    assert entries(tmp_path) == found  # nothing is left to do, also for another number of ranks
