"""Every registered pass keeps the contract, on models that it can change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gated_models import call, deeper
from torch import nn
from zoo import EXAMPLE, find_case, without_dropout

from graphopt.passes.base import Context
from graphopt.passes.registry import pass_named, pass_names
from graphopt.testing import assert_pass_contract

Build = Callable[[], nn.Module]


def from_zoo(name: str) -> tuple[Build, Any, Any]:
    """Return a builder, an example and, where the model takes them, an example with labels."""
    case = find_case(name)

    def call(labels: bool) -> Any:
        args, kwargs = case.call(*EXAMPLE, labels=labels)
        return kwargs or args

    other = call(True) if case.labels is not None else None
    return lambda: without_dropout(case.build()), call(False), other


def normalized() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.get_buffer("running_mean").normal_()
    norm.get_buffer("running_var").uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def pooled() -> nn.Module:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Residual(nn.Module):
    """Two convolutions with norms around a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(32)
        self.inner = nn.Conv2d(32, 24, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(24)
        self.outer = nn.Conv2d(24, 32, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(images)
        inner = self.inner(torch.relu(self.norm1(hidden)))
        hidden = hidden + self.outer(torch.relu(self.norm2(inner)))
        logits: torch.Tensor = self.head(self.norm3(hidden).mean((2, 3)))
        return logits


def residual_convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def frozen_below() -> nn.Module:
    model = without_dropout(find_case("bert-classifier").build())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name and "layer.0." not in name)
    return model


def from_deeper(name: str) -> tuple[Build, Any, Any]:
    """Return a model with a block in the middle, and calls with more than 16 tokens."""
    return lambda: deeper(name), call(name), call(name, labels=True)


MODELS: dict[str, tuple[Build, Any, Any]] = {
    "convolutions": (normalized, torch.randn(3, 3, 8, 8), None),
    **{f"deeper-{name}": from_deeper(name) for name in ("bert-classifier", "gpt2")},
    "residual-convolutions": (residual_convolutions, torch.randn(3, 3, 9, 11), None),
    "pooled": (pooled, torch.randn(3, 3, 16, 16), None),
    "frozen-bert": (frozen_below, *from_zoo("bert-classifier")[1:]),
    **{
        name: from_zoo(name)
        for name in ("bert-classifier", "gpt2", "llama", "modernbert", "cnn", "vit")
    },
    **{
        name: (*from_zoo(name)[:2], None) for name in ("llama-padded", "transformer-encoder-padded")
    },
}
CASES: dict[str, tuple[str, ...]] = {
    "add-ngram-embeddings": ("bert-classifier", "gpt2", "llama"),
    "freeze-blocks": ("bert-classifier", "llama"),
    "gate-tokens": ("deeper-bert-classifier", "deeper-gpt2"),
    "gate-layers": ("bert-classifier", "gpt2"),
    "grow-depth": ("bert-classifier", "gpt2", "llama"),
    "grow-width": ("residual-convolutions",),
    "drop-dead-tokens": ("bert-classifier",),
    "fold-batch-norm": ("convolutions",),
    "fuse-projections": ("llama",),
    "hoist-frozen-prefix": ("frozen-bert",),
    "prune-channels": ("bert-classifier", "gpt2", "llama", "cnn"),
    "factorize-low-rank": ("bert-classifier", "gpt2"),
    "pack-tokens": ("modernbert", "llama-padded", "transformer-encoder-padded"),
    "quantize-weights": ("bert-classifier", "gpt2"),
    "ramp-resolution": ("pooled", "vit"),
    "sparsify-blocks": ("gpt2", "llama", "modernbert"),
}


@pytest.mark.parametrize(
    ("name", "model"), [(name, model) for name, models in CASES.items() for model in models]
)
def test_the_contract_holds(name: str, model: str) -> None:
    step = pass_named(name)
    build, example, other = MODELS[model]
    budget = None if step.exact else 0.8
    context = Context(budget=budget, training=not step.inference_only)
    assert_pass_contract(step, build, example, context=context, other_example=other)


def test_every_pass_is_covered() -> None:
    assert set(CASES) == set(pass_names())
