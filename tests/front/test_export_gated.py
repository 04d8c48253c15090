"""Gated models as ONNX files: random gates are gone, the others choose at every length."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from gated_models import call, deeper, gates

import graphopt
from graphopt.passes.gates.gate_tokens import GateTokens
from graphopt.passes.registry import pass_named


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_random_gates_leave_nothing_in_the_file(tmp_path: Path) -> None:
    dense, example = deeper("bert-classifier"), call("bert-classifier")
    model = graphopt.optimize(dense, example, recipe=[GateTokens()], measure=False)
    report = graphopt.export_onnx(model, tmp_path / "gated.onnx", example)
    graphopt.export_onnx(dense, tmp_path / "dense.onnx", example)
    assert operators(tmp_path / "gated.onnx") == operators(tmp_path / "dense.onnx")
    assert any("gate-tokens" in note and "training" in note for note in report.notes)


@pytest.mark.parametrize("router", ["attention", "learned"])
def test_gates_that_rank_export_and_match_at_every_length(router: str, tmp_path: Path) -> None:
    dense, example = deeper("bert-classifier"), call("bert-classifier")
    step = GateTokens(router=router)
    model = graphopt.optimize(dense, example, recipe=[step], measure=False).eval()
    for gate in gates(model):
        gate.advance(1, 1.0)
        for value in gate.parameters():
            value.data.normal_()
    path = tmp_path / "gated.onnx"
    graphopt.export_onnx(model, path, example)
    found = operators(path)
    assert found["TopK"]
    assert found["Gather"] + found["GatherElements"] > operators_of_gathers(dense)
    assert any(name.startswith("Scatter") for name in found)
    session = onnxruntime.InferenceSession(path)
    for length in (5, 16, 17, 33, 60):
        inputs = call("bert-classifier", length)
        (logits,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            wanted = model(**inputs).logits
        # Logits of three layers of width 32: sums of at most 64 terms in float32.
        torch.testing.assert_close(torch.from_numpy(logits), wanted, atol=1e-5, rtol=1e-5)


def operators_of_gathers(model: torch.nn.Module) -> int:
    """Return how many lookups a plain encoder needs: words, positions, types."""
    return sum(isinstance(module, torch.nn.Embedding) for module in model.modules())


def test_only_random_gates_train_only() -> None:
    example = call("bert-classifier")
    for router, expected in (("random", True), ("attention", False), ("learned", False)):
        plan = graphopt.plan(deeper("bert-classifier"), example, recipe=[GateTokens(router=router)])
        (record,) = plan.changes
        assert pass_named(record.pass_name).trains_only(record.change) is expected
