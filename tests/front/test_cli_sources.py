"""The three kinds of source through the command line, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import graphopt
from graphopt.cli import app

_FACTORY = '''
from torch import nn

def build() -> nn.Module:
    """Return the model without weights worth keeping."""
    return nn.Sequential(nn.Linear(16, 8192), nn.ReLU(), nn.Linear(8192, 8))
'''


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8192), nn.ReLU(), nn.Linear(8192, 8)).eval()


def run(*arguments: object) -> int:
    return CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code


def optimize(*arguments: object) -> int:
    """Rewrite to 60 % of the FLOPs, whether or not this machine runs it faster just now."""
    return run("optimize", *arguments, "--budget", "60%", "--no-measure")


def check(directory: Path, base: str | None = None) -> None:
    plan = json.loads((directory / "plan.json").read_text())
    assert plan["totals"]["after"]["flops"] <= 0.6 * plan["totals"]["before"]["flops"]
    model = graphopt.load(directory, base=base)
    assert model(torch.randn(3, 16)).shape == (3, 8)


def test_an_exported_program_needs_no_code(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch")
    exported = torch.export.export(build(), (torch.randn(4, 16),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "model.pt2")
    out = tmp_path / "out"
    assert optimize(tmp_path / "model.pt2", "-o", out, "--json") == 0
    check(out)
    assert run("export", out, tmp_path / "model.onnx") == 0
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_and_a_factory(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "factory_of_this_test.py").write_text(_FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    state = build().state_dict()
    source = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(state, source)
    else:
        save_file(state, source)
    out = tmp_path / "out"
    factory = "factory_of_this_test:build"
    assert optimize(source, "--factory", factory, "-o", out) == 0
    check(out, base=factory)
    assert run("densify", out, "--factory", factory, "-o", tmp_path / "dense") == 0
    assert run("optimize", source, "--factory", "no.such:build", "-o", tmp_path / "b") == 1
