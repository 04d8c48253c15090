"""The ledger writes down what happened: complete, once, and in the right file."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from graphopt.errors import TrainingError
from graphopt.training import Ledger

STEP_FLOPS = 2 * 5 * 8 * 4


def spend(ledger: Ledger, steps: int = 1, loss: object = 0.5) -> None:
    layer = nn.Linear(8, 4)
    for _ in range(steps):
        with ledger.step(tokens=10, samples=5) as entry, torch.no_grad():
            layer(torch.randn(5, 8))
            entry.loss = loss  # type: ignore[assignment]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_is_a_line_at_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "run.jsonl")
    for step in range(1, 4):
        spend(ledger, loss=torch.tensor(0.25, requires_grad=True))
        found = lines(tmp_path / "new" / "run.jsonl")
        assert len(found) == step
        assert 0 < found[-1].pop("seconds") < 60
        expected = {"step": step, "kind": "train", "flops": STEP_FLOPS, "tokens": 10}
        assert found[-1] == {**expected, "samples": 5, "loss": 0.25}
    assert ledger.total_flops == 3 * STEP_FLOPS
    assert ledger.total_seconds == ledger.totals["train"]["seconds"] > 0


def test_what_is_no_step_is_charged_under_its_name(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run.jsonl")
    ledger.charge(1000, seconds=2.5, kind="calibration")
    spend(ledger)
    with ledger.step(kind="probe"):
        pass
    assert [(line["kind"], line["step"]) for line in lines(tmp_path / "run.jsonl")] == [
        ("calibration", 0),
        ("train", 1),
        ("probe", 1),
    ]
    assert ledger.total_flops == 1000 + STEP_FLOPS
    text = io.StringIO()
    Console(file=text, width=120).print(ledger.table())
    assert "calibration" in text.getvalue()
    assert f"{STEP_FLOPS:.3e}" in text.getvalue()


def test_a_loss_that_is_no_number_stays_readable_json(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run.jsonl")
    spend(ledger, loss=math.nan)
    spend(ledger, loss=None)
    assert [line["loss"] for line in lines(tmp_path / "run.jsonl")] == [None, None]
    assert "NaN" not in (tmp_path / "run.jsonl").read_text()


def test_a_resumed_run_writes_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    ledger = Ledger(path)
    spend(ledger, 3)
    state = json.loads(json.dumps(ledger.state_dict()))
    spend(ledger, 2)
    resumed = Ledger(path)
    resumed.load_state_dict(state)
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    spend(resumed, 2)
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5]
    assert resumed.total_flops == 5 * STEP_FLOPS


def test_another_runs_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    ledger = Ledger(path)
    spend(ledger)
    before = path.read_bytes()
    with pytest.raises(TrainingError, match="another run; load the checkpoint"):
        spend(Ledger(path))
    assert path.read_bytes() == before
    state = ledger.state_dict()
    with pytest.raises(TrainingError, match=r"expected the first \d+ bytes .* got 0"):
        Ledger(tmp_path / "other.jsonl").load_state_dict(state)


def test_a_step_that_fails_is_not_written_and_not_counted_further(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run.jsonl")
    with pytest.raises(KeyboardInterrupt), ledger.step():
        raise KeyboardInterrupt
    assert not (tmp_path / "run.jsonl").exists()
    with ledger.step(), pytest.raises(TrainingError, match="one step at a time"):
        ledger.begin()
    spend(ledger)
    assert [line["flops"] for line in lines(tmp_path / "run.jsonl")] == [0, STEP_FLOPS]
    with pytest.raises(TrainingError, match="call begin"):
        ledger.finish(ledger.charge(0, kind="nothing"))
