"""Channels that are left out at first, and join later without a jump."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.kernels.width_gate import WidthGate
from graphopt.passes.axes import axes_of
from graphopt.passes.base import Context
from graphopt.passes.errors import ConfigError
from graphopt.passes.gates.first_channels import first_channels, trial_refusal
from graphopt.passes.gates.grow_width import GrowWidth
from graphopt.testing import assert_same_outputs
from graphopt.training import ComputeClock, ExecutedFlops

IMAGES = torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(0))
TRAINING = Context(training=True)


class Net(nn.Module):
    """A residual net of three groups of channels: before the block, inside and behind it."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(2 * width)
        self.outer = nn.Conv2d(2 * width, width, 1)
        self.shortcut = nn.Conv2d(width, width, 1, stride=2)
        self.last_norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        entry = torch.relu(self.norm(self.stem(images)))
        inner = torch.relu(self.inner_norm(self.inner(entry)))
        hidden = self.last_norm(self.outer(inner) + self.shortcut(entry))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


def grown(model: nn.Module, step: GrowWidth | None = None) -> nn.Module:
    return graphopt.optimize(model, (IMAGES,), recipe=[step or GrowWidth()]).train()


def advance(model: nn.Module, progress: float) -> None:
    for module in model.modules():
        if isinstance(module, WidthGate):
            module.advance(0, progress)


def trained(model: nn.Module, progress: float, steps: int = 3) -> nn.Module:
    """Return the model after some steps at one progress."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    advance(model, progress)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
    return model


def parts(model: nn.Module, small: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the first channels of a model's tensors beside those of a net of these alone."""
    state = model.state_dict()
    for name, value in small.state_dict().items():
        cut = state[name]
        for dim, size in enumerate(value.shape):
            cut = cut.narrow(dim, 0, size)
        yield name, cut, value


def reasons(model: nn.Module, context: Context = TRAINING, images: Tensor = IMAGES) -> list[str]:
    program = capture(model, (images,))
    return [miss.reason for miss in GrowWidth().propose(program, context).misses]


def test_the_first_channels_train_as_a_net_of_these() -> None:
    model, small = grown(Net(32)), Net(16)
    for _, first, value in parts(model, small):
        value.copy_(first)
    trained(model, 0.2)
    trained(small.train(), 0.2)
    for name, first, value in parts(model, small):
        # Sums of 16 * 9 products, there and back, in three steps of float32.
        torch.testing.assert_close(first, value, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(model.eval()(IMAGES), small.eval()(IMAGES), rtol=1e-4, atol=1e-5)


def test_a_step_of_the_first_channels_costs_what_they_cost() -> None:
    def spent(model: nn.Module) -> int:
        with ExecutedFlops() as executed:
            model(IMAGES).sum().backward()
        return int(executed.flops)

    model = grown(Net(32))
    advance(model, 0.0)
    assert spent(model) == spent(Net(16).train())
    advance(model, 0.6)
    assert spent(model) == spent(Net(32).train())


def test_the_others_join_without_a_jump_and_train() -> None:
    model = trained(grown(Net()), 0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    narrow = model(IMAGES)
    model.load_state_dict(before)
    advance(model, 0.6)
    torch.testing.assert_close(model(IMAGES), narrow)
    after = trained(model, 0.6, steps=2).state_dict()
    for name in ("stem.weight", "inner.weight", "outer.weight", "norm.weight"):
        assert not torch.equal(after[name][16:], before[name][16:]), name
    assert after["outer.weight"][:, 32:].any()


def test_evaluation_in_between_is_that_of_the_plain_model() -> None:
    model = trained(grown(Net()), 0.2).eval()
    plain = Net().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(IMAGES), plain(IMAGES))


def test_nothing_happens_before_progress_is_reported() -> None:
    assert torch.equal(grown(Net())(IMAGES), Net().train()(IMAGES))


@pytest.mark.parametrize("saved_at", [0.2, 0.7])
def test_a_training_goes_on_from_a_checkpoint(saved_at: float, tmp_path: Path) -> None:
    model = trained(trained(grown(Net()), 0.2), saved_at)
    graphopt.save(model, tmp_path / "saved")
    again = graphopt.load(tmp_path / "saved", base=Net()).train()
    for progress in (0.3, 0.8) if saved_at < 0.6 else (0.8,):
        assert torch.equal(trained(again, progress)(IMAGES), trained(model, progress)(IMAGES))


def test_a_trained_model_is_not_touched_by_a_new_training() -> None:
    model = trained(trained(grown(Net()), 0.2), 0.7)
    plain = Net().train()
    plain.load_state_dict(model.state_dict())
    again = grown(Net())
    again.load_state_dict(model.state_dict())
    for grown_before in (again, model):
        advance(grown_before, 0.0)
        assert torch.equal(grown_before(IMAGES), plain(IMAGES))


def test_layers_that_were_changed_afterwards_are_an_error_with_the_reason() -> None:
    model = grown(Net())
    model.head = nn.Linear(8, 5)
    advance(model, 0.0)
    with pytest.raises(RuntimeError, match=r"head.weight was to begin .* apply grow-width after"):
        model(IMAGES)


def test_a_copy_of_the_model_grows_by_itself() -> None:
    model = grown(Net())
    before = copy.deepcopy(model.state_dict())
    copied = trained(copy.deepcopy(model), 0.2)
    assert not copied.get_parameter("outer.weight")[:, 32:].any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_layers_keep_their_hooks_and_checkpointed_forwards_their_gradients() -> None:
    model, seen = grown(Net()), []
    model.get_submodule("inner").register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
    advance(model, 0.1)
    model(IMAGES).sum().backward()
    expected = {name: value.grad for name, value in model.named_parameters()}
    model.zero_grad()
    torch.utils.checkpoint.checkpoint(model, IMAGES, use_reentrant=False).sum().backward()
    assert seen == [32, 32, 32]
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, expected[name])


def test_it_grows_with_a_clock_and_ends_in_full() -> None:
    model = grown(Net(), GrowWidth(joins=0.5))
    clock = ComputeClock(model, planned_steps=4)
    spent = []
    for _ in range(4):
        with ExecutedFlops() as executed:
            model(IMAGES).sum().backward()
        spent.append(executed.flops)
        clock.step()
    assert spent[0] == spent[1] < spent[2] == spent[3]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_it_compiles_and_runs_in_bfloat16() -> None:
    model = grown(Net())
    compiled = torch.compile(model, backend="eager")
    for progress in (0.0, 0.7):
        advance(model, progress)
        assert_same_outputs(compiled(IMAGES), model(IMAGES))
        with torch.autocast("cpu", torch.bfloat16):
            assert model(IMAGES).isfinite().all()


def without_norms() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1))


def frozen() -> nn.Module:
    model = Net()
    model.norm.requires_grad_(False)
    return model


class Normalized(Net):
    def forward(self, images: Tensor) -> Tensor:
        entry = self.norm(self.stem(images))
        entry = entry / entry.square().mean(1, keepdim=True).sqrt()
        hidden = self.outer(self.inner_norm(self.inner(entry)))
        logits: Tensor = self.head(self.last_norm(hidden).mean((2, 3)))
        return logits


class Sized(Net):
    def forward(self, images: Tensor) -> Tensor:
        entry = self.norm(self.stem(images))
        entry = entry * torch.ones(32, 1, 1)
        hidden = self.outer(self.inner_norm(self.inner(entry)))
        logits: Tensor = self.head(self.last_norm(hidden).mean((2, 3)))
        return logits


class Joined(Net):
    def forward(self, images: Tensor) -> Tensor:
        entry = self.norm(self.stem(images))
        both = torch.cat([self.shortcut(entry), self.shortcut(entry.flip(1))], 1)
        logits: Tensor = self.outer(both).mean((2, 3))
        return logits


class Depthwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(32, 32, 3, groups=32, bias=False)
        self.inner_norm = nn.BatchNorm2d(32)
        self.outer = nn.Conv2d(32, 32, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.inner(self.norm(self.stem(images))).mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (without_norms, "its weights were trained"),
        (frozen, "norm.weight is not trained"),
        (Normalized, "is reduced over by mean"),
        (Sized, "the model fails on fewer channels"),
        (Joined, "shortcut is called more than once"),
        (Depthwise, "the model fails on fewer channels"),
        (lambda: Net(16), "all 16 channels are needed"),
    ],
)
def test_what_cannot_grow_is_refused(build: Callable[[], nn.Module], reason: str) -> None:
    assert any(reason in found for found in reasons(build())), reasons(build())


def test_channels_that_are_read_all_the_same_are_refused() -> None:
    program = capture(Net(), (IMAGES,))
    group = axes_of(program).groups()[0]
    first = first_channels([(group, 16)])
    assert trial_refusal(program, first) is None
    reason = trial_refusal(program, replace(first, reads={}))
    assert reason == "with fewer channels the model computes something else"


def test_trained_channels_are_refused_and_the_others_grow() -> None:
    model = Net()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    proposal = GrowWidth().propose(capture(model, (IMAGES,)), TRAINING)
    assert [m.target for m in proposal.misses if "trained" in m.reason] == ["stem.weight/0/0/1"]
    (candidate,) = proposal.candidates
    assert set(candidate.change.details["first"]) == {"inner.weight/0/0/1", "outer.weight/0/0/1"}
    narrow = grown(model)
    assert_same_outputs(narrow.eval()(IMAGES), model.eval()(IMAGES))


def test_a_model_without_convolutions_has_nothing_to_grow() -> None:
    assert reasons(nn.Linear(10, 16)) == ["no convolution makes channels"]


@pytest.mark.parametrize("options", [{"start": 0.0}, {"start": 1.0}, {"joins": 1.0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="grow-width takes"):
        GrowWidth(**options)
