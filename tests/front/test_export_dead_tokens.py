"""Models that compute read tokens only, in ONNX Runtime at other shapes than the example's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from zoo import EXAMPLE, find_case, without_dropout

import graphopt
from graphopt.runtime import installation_of


def first_token() -> tuple[nn.Module, dict[str, Tensor]]:
    case = find_case("bert-classifier")
    return case.build(), case.call(*EXAMPLE)[1]


def last_token() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=100, num_labels=3, pad_token_id=0
    )
    ids = torch.randint(3, 100, (3, 9))
    ids[1, 6:] = 0
    return without_dropout(transformers.GPT2ForSequenceClassification(config)), {"input_ids": ids}


@pytest.mark.parametrize(
    ("build", "passes"),
    [
        (first_token, ("drop-dead-tokens", "pack-tokens")),
        (last_token, ("drop-dead-tokens",)),
    ],
)
def test_the_export_agrees(
    build: Callable[[], tuple[nn.Module, dict[str, Tensor]]],
    passes: tuple[str, ...],
    tmp_path: Path,
) -> None:
    model, inputs = build()
    model = graphopt.optimize(model.eval(), inputs, recipe=list(passes), measure=False)
    installation = installation_of(model)
    assert installation is not None
    assert {record.pass_name for record in installation.plan.changes} == set(passes)
    graphopt.export_onnx(model, tmp_path / "model.onnx", inputs)  # runs and compares
    assert (tmp_path / "model.onnx").exists()
