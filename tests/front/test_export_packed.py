"""Packed models in ONNX Runtime: dynamic row counts, any padding, batch and length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from zoo import find_case, without_dropout

import graphopt
from graphopt.onnx_runtime import run, session
from graphopt.passes.verifier import relative_error


def inputs(lengths: list[int], length: int) -> dict[str, Tensor]:
    """Return token ids and a mask of rows with these many real tokens."""
    _, call = find_case("bert").call(len(lengths), length)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return {"input_ids": call["input_ids"], "attention_mask": mask.long()}


def packed(name: str) -> nn.Module:
    model = without_dropout(find_case(name).build()).eval()
    return graphopt.optimize(model, inputs([9, 4, 6], 9), recipe=["pack-tokens"], measure=False)


def test_a_packed_model_equals_torch_at_other_shapes_and_paddings(tmp_path: Path) -> None:
    model = packed("bert")
    path = tmp_path / "packed.onnx"
    report = graphopt.export_onnx(model, path, inputs([9, 4, 6], 9), opset=23)
    assert report.dynamic["input_ids"] == {0: "batch", 1: "sequence"}
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert {"NonZero", "Gather", "ScatterND"} <= kinds
    runtime = session(path)
    for call in (inputs([12, 1, 5, 12, 7], 12), inputs([3], 8), inputs([6, 6], 6)):
        real = call["attention_mask"].bool()
        with torch.no_grad():
            expected = model(**call).last_hidden_state
        actual = run(runtime, call)["last_hidden_state"]
        # float32 over a few layers of width 32 and 64: eps sqrt(64) times 16 contractions
        assert relative_error(actual, expected) <= 16 * 8 * float(np.finfo(np.float32).eps)
        assert not actual[~real].any()
        assert actual[real].any()
