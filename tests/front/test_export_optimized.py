"""Optimized models of several architectures become verified ONNX files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import EXAMPLE, find_case, with_layers

import graphopt
from graphopt.passes.compress.prune_channels import PruneChannels
from graphopt.passes.exact.fold_batch_norm import FoldBatchNorm
from graphopt.passes.exact.fuse_projections import FuseProjections
from graphopt.runtime import installation_of


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "resnet", "t5"])
def test_an_optimized_model_is_exported_and_compared(name: str, tmp_path: Path) -> None:
    case = find_case(name)
    args, kwargs = case.call(*EXAMPLE)
    model = with_layers(name, 1).eval()
    small = graphopt.optimize(
        model,
        args or kwargs,
        recipe=[FoldBatchNorm(), PruneChannels(round_to=1), FuseProjections()],
        budget=0.7,
        measure=False,
    )
    installation = installation_of(small)
    assert installation is not None
    assert installation.plan.changes
    report = graphopt.export_onnx(small, tmp_path / "model.onnx", args or kwargs)
    assert (tmp_path / "model.onnx").exists()
    assert len(report.verification.shapes) >= 4, "the example's and three others"
    assert report.verification.failure is None


def test_low_rank_layers_export_as_two_products(tmp_path: Path) -> None:
    import onnx

    model = torch.nn.Sequential(
        torch.nn.Linear(32, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 8),
    )
    example = torch.randn(4, 32)
    counts = []
    for index, recipe in enumerate((["fuse-projections"], ["factorize-low-rank"])):
        small = graphopt.optimize(model, example, recipe=recipe, budget=0.6, measure=False)
        path = tmp_path / f"{index}.onnx"
        graphopt.export_onnx(small, path, example)
        nodes = onnx.load(path).graph.node
        counts.append(sum(node.op_type in ("MatMul", "Gemm") for node in nodes))
    installation = installation_of(small)
    assert installation is not None
    assert counts[1] == counts[0] + len(installation.plan.changes) > counts[0]
