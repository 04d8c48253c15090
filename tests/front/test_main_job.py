"""The main job on a real checkpoint: optimize, save, load, train a step, export."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.passes.verifier import rounding_bound
from graphopt.runtime import installation_of


@pytest.fixture(scope="module")
def optimized_directory(minilm_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("main_job") / "out"
    program = Path(sys.executable).with_name("graphopt")
    subprocess.run(
        [
            *(program, "optimize", minilm_directory, "-o", directory),
            *("--recipe", "prune-channels,factorize-low-rank,fuse-projections"),
            *("--budget", "60%", "--no-measure", "--json"),
        ],
        check=True,
        capture_output=True,
        timeout=600,
    )
    return directory


def _batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"input_ids": torch.randint(1000, 20000, (rows, length)), "attention_mask": mask}


def test_the_directory_stays_a_hugging_face_directory(
    optimized_directory: Path, minilm_directory: Path
) -> None:
    files = {path.name for path in optimized_directory.iterdir()}
    assert {"config.json", "plan.json", "tokenizer.json"} <= files
    config = json.loads((optimized_directory / "config.json").read_text())
    original = json.loads((minilm_directory / "config.json").read_text())
    assert config["architectures"] == original["architectures"]


def test_the_budget_is_met(optimized_directory: Path) -> None:
    plan = json.loads((optimized_directory / "plan.json").read_text())
    totals = plan["totals"]
    assert 0.5 < totals["after"]["flops"] / totals["before"]["flops"] <= 0.6
    assert len(plan["changes"]) >= 12


def test_a_training_step_matches_float64(optimized_directory: Path) -> None:
    """Gradients of one step against the same model in float64, dropout off."""
    model = graphopt.load(optimized_directory)
    installation = installation_of(model)
    assert installation is not None
    assert installation.program is not None
    bound = rounding_bound(installation.program)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _without_attention_dropout(model)
    reference = copy.deepcopy(model).double()
    batch = _batch(3, 17)
    gradients = [_gradients(each, batch) for each in (model, reference)]
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0].keys() == {name for name, _ in model.named_parameters()}
    scale = max(gradient.norm().item() for gradient in gradients[1].values())
    for name, gradient in gradients[0].items():
        difference = (gradient.double() - gradients[1][name]).norm().item()
        assert difference <= bound * scale, name
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    moved = sum(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert moved >= len(gradients[0])


def _without_attention_dropout(model: nn.Module) -> None:
    """Turn the attention's own rate off by evaluation mode of everything but the root."""
    for module in model.modules():
        module.training = False


def _gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    output: Any = model(**batch)
    loss = output.last_hidden_state.square().mean() + output.pooler_output.square().mean()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_the_export_runs_at_other_shapes(optimized_directory: Path, tmp_path: Path) -> None:
    from graphopt.onnx_runtime import run, session

    model = graphopt.load(optimized_directory).eval()
    target = tmp_path / "model.onnx"
    graphopt.export_onnx(model, target)
    batch = _batch(5, 23)
    found = run(session(target), batch)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    value = torch.as_tensor(found["last_hidden_state"])
    installation = installation_of(model)
    assert installation is not None
    assert installation.program is not None
    error = (value - expected).norm() / expected.norm()
    assert error.item() <= rounding_bound(installation.program)
