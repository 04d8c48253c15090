"""Distillation agrees with its equation, leaves padding out, and trains a cheap model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import graphopt
from graphopt.errors import ConfigError, TrainingError
from graphopt.training import ExecutedFlops, Teacher, distill

BATCH, TOKENS, CLASSES = 3, 5, 7


def test_the_loss_is_that_of_the_equation() -> None:
    student, teacher = torch.randn(2, BATCH, CLASSES).double()
    student.requires_grad_()
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    expected = 9 * (p * (p.log() - q.log())).sum(-1).mean()
    task = student.logsumexp(-1).mean()
    found = distill(student, teacher, task_loss=task, temperature=3, logit_weight=0.25)
    torch.testing.assert_close(found, 0.75 * task + 0.25 * expected)
    torch.testing.assert_close(distill(student, teacher, temperature=3), expected)
    (gradient,) = torch.autograd.grad(distill(student, teacher, temperature=3), student)
    torch.testing.assert_close(gradient, 3 * (q - p) / BATCH)


def test_a_model_that_equals_its_teacher_has_no_loss() -> None:
    outputs = {"logits": torch.randn(BATCH, CLASSES), "hidden_states": [torch.randn(BATCH, 2, 4)]}
    assert distill(outputs, outputs, hidden_weight=1).item() == 0


def test_padding_counts_nothing() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    outputs: list[dict[str, Tensor]] = [
        {
            "logits": torch.randn(BATCH, TOKENS, CLASSES),
            "hidden_states": torch.randn(2, BATCH, TOKENS, 4),
        }
        for _ in range(2)
    ]
    first = distill(*outputs, mask=mask, hidden_weight=0.5)
    assert first != distill(*outputs, hidden_weight=0.5)
    for item in outputs:
        item["logits"][mask == 0] = torch.inf
        item["hidden_states"][:, mask == 0] = torch.nan
    assert distill(*outputs, mask=mask, hidden_weight=0.5) == first
    real = [
        {key: value[..., mask == 1, :].unsqueeze(-3) for key, value in item.items()}
        for item in outputs
    ]
    torch.testing.assert_close(first, distill(*real, hidden_weight=0.5))


def test_layers_are_compared_at_equal_shares_of_the_depth() -> None:
    states = torch.arange(5.0)[:, None, None, None].expand(5, BATCH, TOKENS, 2)
    logits = torch.zeros(BATCH, CLASSES)
    teacher = {"logits": logits, "hidden_states": list(states)}
    student: dict[str, Any] = {"logits": logits, "hidden_states": list(states[[0, 2, 4]])}
    assert distill(student, teacher, hidden_weight=1).item() == 0
    student["hidden_states"][1] = states[3]
    assert distill(student, teacher, hidden_weight=3).item() == 1


def test_a_map_takes_a_narrow_student_to_the_teachers_width() -> None:
    logits = torch.zeros(BATCH, CLASSES)
    student = {"logits": logits, "hidden_states": [torch.randn(BATCH, TOKENS, 4)]}
    teacher = {"logits": logits, "hidden_states": [torch.randn(BATCH, TOKENS, 8)]}
    with pytest.raises(TrainingError, match=r"\[3, 5, 4\] of the student .* pass project="):
        distill(student, teacher, hidden_weight=1)
    project = nn.Linear(4, 8)
    distill(student, teacher, hidden_weight=1, project=project).backward()
    assert project.weight.grad is not None


def test_what_does_not_fit_is_refused() -> None:
    logits = torch.zeros(BATCH, CLASSES)
    with pytest.raises(ConfigError, match="temperature above 0"):
        distill(logits, logits, temperature=0)
    with pytest.raises(TrainingError, match=r"the student and \[3, 6\] of the teacher"):
        distill(logits, logits[:, 1:])
    with pytest.raises(TrainingError, match="got tuple; pass what the model returned"):
        distill((logits,), logits)
    with pytest.raises(TrainingError, match="output_hidden_states=True"):
        distill({"logits": logits}, {"logits": logits}, hidden_weight=1)
    tokens = torch.zeros(BATCH, TOKENS, CLASSES)
    with pytest.raises(TrainingError, match=r"mask \[3, 5\], got \[3, 4\]"):
        distill(tokens, tokens, mask=torch.ones(BATCH, 4))


def test_an_optimized_model_learns_from_the_dense_one() -> None:
    config = BertConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        initializer_range=0.3,
        attention_probs_dropout_prob=0.0,
    )
    dense = BertForSequenceClassification(config)
    batch: dict[str, Any] = {
        "input_ids": torch.randint(0, 30, (8, 12)),
        "attention_mask": torch.ones(8, 12, dtype=torch.long),
        "output_hidden_states": True,
    }
    cheap = graphopt.optimize(
        dense, batch, recipe=["prune-channels"], budget="60%", measure=False
    ).train()
    teacher, optimizer = Teacher(dense.train()), torch.optim.AdamW(cheap.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        with ExecutedFlops() as asked:
            wanted = teacher(**batch)
        optimizer.zero_grad()
        loss = distill(
            cheap(**batch), wanted, mask=batch["attention_mask"], hidden_weight=1, logit_weight=1
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert asked.flops > 0
    assert dense.training
    assert all(parameter.grad is None for parameter in dense.parameters())
