"""The probe for how deep a model may be frozen: it decides by loss and leaves no trace."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import EXAMPLE, find_case

from graphopt.capture import capture
from graphopt.errors import ConfigError, TrainingError
from graphopt.passes.frozen_depths import frozen_depths
from graphopt.training import DepthProbe, choose_frozen_depth

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
BATCHES: list[dict[str, Tensor]] = [
    find_case("bert-classifier").call(4, 5 + number % 3, labels=True)[1] for number in range(10)
]


def bert() -> nn.Module:
    return find_case("bert-classifier").build()


def probe(model: nn.Module, **options: Any) -> DepthProbe:
    return choose_frozen_depth(model, BATCHES, SGD, share=1.0, **options)


@pytest.mark.parametrize(
    ("name", "below", "above"),
    [
        ("bert-classifier", "bert.encoder.layer.0.output.dense.bias", "bert.encoder.layer.1"),
        ("gpt2", "transformer.wte.weight", "transformer.h.1"),
        ("vit", "vit.embeddings.cls_token", "vit.layers.1"),
    ],
)
def test_a_depth_is_all_that_its_value_depends_on(name: str, below: str, above: str) -> None:
    case = find_case(name)
    args, kwargs = case.call(*EXAMPLE)
    model = case.build()
    none, first, second = frozen_depths(capture(model, kwargs or args))
    assert (none.parameters, none.flops) == ((), 0)
    assert below in first.parameters
    assert not [parameter for parameter in first.parameters if parameter.startswith(above)]
    assert [parameter for parameter in second.parameters if parameter.startswith(above)]
    assert 0 < first.flops < second.flops


def test_the_deepest_of_the_good_depths_is_chosen() -> None:
    model = bert()
    lenient = probe(model, depths=(1, 2), tolerance=10.0)
    assert lenient.depth == 2
    assert set(lenient.losses) == {0, 2}, "a shallower one need not be tried"
    rise = lenient.losses[2] / lenient.losses[0] - 1
    assert rise > 0, "these batches need the blocks"
    assert probe(model, depths=(2,), tolerance=rise * 1.01).depth == 2
    strict = probe(model, depths=(2,), tolerance=rise * 0.99)
    assert (strict.depth, strict.frozen) == (0, ())
    lenient.freeze(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"{layer}.{kind}"
        for layer in ("bert.pooler.dense", "classifier")
        for kind in ("weight", "bias")
    }


def test_the_model_is_left_as_it_was() -> None:
    model = bert().train()
    model.get_parameter("classifier.bias").requires_grad_(False)
    model(**BATCHES[0]).loss.backward()
    model.get_submodule("bert.pooler").eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    wanted = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = probe(model)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is gradients[name] for name, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert [module.training for module in model.modules()] == modes
    assert probe(model).losses == first.losses


def test_all_that_ran_is_charged() -> None:
    model = bert()
    both = probe(model, depths=(1,))
    # Two passes over 8 training and 2 held-out batches; embeddings and heads cost little.
    program = capture(model, BATCHES[0])
    depths = frozen_depths(program)
    tokens = sum(batch["input_ids"].numel() for batch in BATCHES)
    forward = 2 * depths[2].flops * tokens / BATCHES[0]["input_ids"].numel()
    assert 2 * forward < both.flops < 3.5 * forward
    assert both.flops > probe(model, depths=(2,)).flops, "frozen blocks have no backward pass"


def test_what_makes_no_sense_is_refused() -> None:
    model = bert()
    with pytest.raises(ConfigError, match="depths from 0 to 2, got 7"):
        probe(model, depths=(7,))
    with pytest.raises(ConfigError, match="share in"):
        choose_frozen_depth(model, BATCHES, SGD, share=0.0)
    with pytest.raises(ConfigError, match="at least 5 batches"):
        choose_frozen_depth(model, BATCHES[:3], SGD)
    unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in BATCHES]
    with pytest.raises(ConfigError, match="to return a loss"):
        choose_frozen_depth(model, unlabelled, SGD, depths=(1,))
    images = [(torch.randn(2, 8),)] * 5
    with pytest.raises(TrainingError, match="residual stream"):
        choose_frozen_depth(nn.Linear(8, 2), images, SGD)
