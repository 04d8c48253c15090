"""Executed operations agree with counts made by hand, and with what the passes plan with."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from zoo import EXAMPLE, find_case, without_dropout

import graphopt
from graphopt.capture import capture
from graphopt.kernels import BlockLayout, BlockSparseLinear
from graphopt.passes.facts import facts_of
from graphopt.training import ExecutedFlops

BATCH, TOKENS, WIDTH, HIDDEN, HEADS, CLASSES = 3, 10, 32, 64, 4, 7


class Transformer(nn.Module):
    """Two blocks of attention and feed-forward, and a head on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(WIDTH, 3 * WIDTH),
                    "out": nn.Linear(WIDTH, WIDTH),
                    "up": nn.Linear(WIDTH, HIDDEN),
                    "down": nn.Linear(HIDDEN, WIDTH),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.block(block, x)
        result: Tensor = self.head(x)
        return result

    def block(self, block: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(block, nn.ModuleDict)
        parts = block["qkv"](x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts)
        x = x + block["out"](mixed.transpose(1, 2).reshape(x.shape))
        wide: Tensor = block["down"](functional.gelu(block["up"](x)))
        return x + wide


def executed(model: Callable[[Tensor], Tensor], x: Tensor, *, backward: bool = True) -> int:
    with ExecutedFlops() as counted:
        output = model(x)
        if backward:
            output.square().sum().backward()
    flops: int = counted.flops
    return flops


def test_layers_count_2_per_multiplication_and_twice_that_backward() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4, bias=False))
    forward = 2 * 5 * (8 * 16 + 16 * 4)
    with torch.no_grad():
        assert executed(model, torch.randn(5, 8), backward=False) == forward
    # The first layer's input needs no gradient.
    assert executed(model, torch.randn(5, 8)) == 3 * forward - 2 * 5 * 8 * 16
    model.requires_grad_(False)[2].requires_grad_(True)
    assert executed(model, torch.randn(5, 8)) == forward + 2 * 5 * 16 * 4


def test_a_transformer_counts_as_by_hand_and_as_planned() -> None:
    model, x = Transformer(), torch.randn(BATCH, TOKENS, WIDTH)
    weights = 2 * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN) + WIDTH * CLASSES
    attention = 2 * (4 * BATCH * TOKENS * TOKENS * WIDTH)
    by_hand = 2 * BATCH * TOKENS * (3 * weights - 3 * WIDTH * WIDTH) + int(3.5 * attention)
    assert executed(model, x) == by_hand
    facts = facts_of(capture(model, x))
    assert facts.forward_flops + facts.backward_flops == by_hand


@pytest.mark.parametrize("name", ["bert-classifier", "llama", "vit", "cnn"])
def test_whole_models_count_as_planned(name: str) -> None:
    case = find_case(name)
    model = without_dropout(case.build()).train()
    args, kwargs = case.call(*EXAMPLE)
    with ExecutedFlops() as counted:
        outputs = model(*args, **kwargs)
        real = [item for item in tree_leaves(outputs) if isinstance(item, Tensor)]
        torch.stack([item.square().sum() for item in real if item.requires_grad]).sum().backward()
    facts = facts_of(capture(model, case.inputs(*EXAMPLE)))
    assert counted.flops == facts.forward_flops + facts.backward_flops


def test_operations_that_need_no_gradient_are_counted_whole() -> None:
    """In inference mode `linear` and the like are not taken apart before they are counted."""
    model, x = Transformer(), torch.randn(BATCH, TOKENS, WIDTH)
    with torch.no_grad():
        expected = executed(model, x, backward=False)
    with torch.inference_mode():
        assert executed(model, x, backward=False) == expected > 0


def test_fused_layers_of_torch_count_as_their_parts() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0, batch_first=True)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    parts = executed(layer, x, backward=False)
    with torch.no_grad():
        assert executed(layer.eval(), x, backward=False) == parts


def test_products_count_every_matrix_of_a_batch() -> None:
    left, right = torch.randn(6, 3, 5), torch.randn(6, 5, 4)
    with ExecutedFlops() as counted:
        left[0] @ right[0]
        torch.addmm(torch.randn(4), left[0], right[0], beta=2)
    assert counted.flops == 2 * (2 * 3 * 5 * 4)
    with ExecutedFlops() as counted:
        left @ right
        torch.baddbmm(torch.randn(3, 4), left, right, alpha=2)
    assert counted.flops == 2 * (2 * 6 * 3 * 5 * 4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_count_their_groups_forward_and_backward(
    groups: int, transposed: bool
) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(8, 12, 3, groups=groups)
    x = torch.randn(2, 8, 7, 9)
    places = 7 * 9 if transposed else 5 * 7
    forward = 2 * 2 * places * 8 * 12 // groups * 9
    assert executed(layer, x) == 2 * forward
    assert executed(layer, x.requires_grad_()) == 3 * forward


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_counted(kind: type[nn.LSTM | nn.GRU]) -> None:
    layer = kind(8, 6, 2, bidirectional=True)
    matrices = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    with ExecutedFlops() as forward:
        outputs, _ = layer(torch.randn(5, 3, 8))
    assert forward.flops == 2 * 5 * 3 * matrices
    with ExecutedFlops() as backward:
        outputs.sum().backward()
    # The LSTM is one operator, with all gradients. The GRU is taken apart: neither the input nor
    # the first hidden state of its 2 layers and 2 directions needs a gradient.
    unneeded = 0 if kind is nn.LSTM else 2 * (2 * 5 * 3 * 8 * 18) + 4 * (2 * 3 * 6 * 18)
    assert backward.flops == 2 * forward.flops - unneeded


def test_only_what_runs_is_counted() -> None:
    layer = BlockSparseLinear(BlockLayout.from_scores(torch.rand(4, 6), 0.5, 8, 4))
    assert executed(layer, torch.randn(7, 24)) == 2 * 2 * 7 * 12 * 8 * 4
    model = Transformer()
    half = executed(model, torch.randn(BATCH, TOKENS // 2, WIDTH))
    assert 0.4 < half / executed(model, torch.randn(BATCH, TOKENS, WIDTH)) < 0.5


def test_what_checkpointing_computes_again_is_counted() -> None:
    model, x = Transformer(), torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    block = model.blocks[0]
    with ExecutedFlops() as forward:
        model.block(block, x)
    with ExecutedFlops() as once:
        model.block(block, x).sum().backward()
    with ExecutedFlops() as twice:
        recomputed: Tensor = checkpoint(model.block, block, x, use_reentrant=False)
        recomputed.sum().backward()
    # The recomputation stops at the last tensor that the backward pass needs.
    last = 2 * BATCH * TOKENS * WIDTH * HIDDEN
    assert twice.flops - once.flops == forward.flops - last


def test_compiled_code_stays_compiled_and_is_counted() -> None:
    model, x = Transformer(), torch.randn(BATCH, TOKENS, WIDTH)
    runs = itertools.count()

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        next(runs)
        return graph

    compiled = torch.compile(model, backend=backend)
    expected = executed(model, x)
    assert executed(compiled, x) == expected
    assert next(runs) >= 1


def test_a_model_can_be_optimized_while_operations_are_counted() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(32, 64)
    with ExecutedFlops() as once:
        model(x)
    with ExecutedFlops() as executed:
        found = graphopt.optimize(model, x, recipe="prune-channels", budget="60%", measure=False)
    # Comparisons with the eager model run it a few times; tracing and analyses run nothing.
    assert 0 < executed.flops < 20 * once.flops
    torch.manual_seed(0)
    with ExecutedFlops() as after:
        found(x)
    assert after.flops < 0.61 * once.flops
