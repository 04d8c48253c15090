"""Coupled dimensions: which ones belong together, and that removing them means what it says."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from math import prod
from typing import Any

import pytest
import torch
from coupled_models import COUPLED
from torch import Tensor, nn
from zoo import EXAMPLE, find_case

from graphopt.capture import capture
from graphopt.passes.axes import Axes, ChannelGroup, axes_of
from graphopt.passes.axis_sizes import attributes_with, resize_arguments
from graphopt.passes.axis_terms import Product, Sum, Unifier, atoms, size_of
from graphopt.passes.program import Program, shape_of
from graphopt.passes.propagation import refresh
from graphopt.passes.structure import flatten

HEADS, HIDDEN, CHANNELS, HEAD_DIMENSION = "heads", "hidden units", "channels", "head dimension"


@cache
def captured(name: str) -> Program:
    """Return a program that a test only reads."""
    return capture_named(name)


def capture_named(name: str) -> Program:
    """Capture a model of the zoo or of the coupled ones, in evaluation mode."""
    torch.manual_seed(0)
    if name in COUPLED:
        build, example = COUPLED[name]
        return capture(build().eval(), example)
    case = find_case(name)
    args, kwargs = case.call(*EXAMPLE)
    return capture(case.build().eval(), kwargs or args)


def prunable(axes: Axes) -> dict[str, int]:
    """Count the prunable groups by kind and size: "4 heads"."""
    return dict(Counter(f"{g.size} {g.kind}" for g in axes.groups() if g.prunable))


def names(group: ChannelGroup) -> set[str]:
    """Say what a group consists of, without the layer's own path."""
    return {f"{'.'.join(m.parameter.split('.')[-2:])}[{m.dim}] {m.role}" for m in group.members}


EXPECTED: dict[str, dict[str, int]] = {
    "bert": {"4 heads": 2, "8 head dimension": 2, "64 hidden units": 2},
    "modernbert": {"4 heads": 2, "64 hidden units": 2},
    "gpt2": {"4 heads": 2, "8 head dimension": 2, "128 hidden units": 2},
    "llama": {"2 heads": 4, "8 head dimension": 2, "64 hidden units": 2},
    "qwen3": {"2 heads": 4, "8 head dimension": 2, "64 hidden units": 2},
    "mpt": {"8 head dimension": 2, "128 hidden units": 2},
    "t5": {"4 heads": 3, "8 head dimension": 4, "64 hidden units": 3},
    "swin": {
        "2 heads": 2,
        "4 heads": 2,
        "8 head dimension": 4,
        "64 hidden units": 2,
        "128 hidden units": 2,
    },
    "convnext": {f"{4 * width} hidden units": 1 for width in (8, 16, 24, 32)},
    "resnet": {"8 channels": 5, "4 channels": 4, "16 channels": 1, "32 channels": 1},
    "cnn": {"16 channels": 1, "32 channels": 1},
    "transformer-encoder": {"4 heads": 2, "64 hidden units": 2},
    "lstm": {},
    "shared-block": {"64 hidden units": 1},
    "concatenation": {"8 channels": 1, "6 channels": 1, "4 channels": 1},
    "grouped": {"4 channels": 2, "8 channels": 2, "6 channels": 1, "2 channels": 1},
    "shuffled-channels": {"3 channels": 1, "4 channels": 2, "5 hidden units": 1},
    "packed-heads": {"4 heads": 1},
    "gates": {"20 hidden units": 1, "24 hidden units": 1},
    "shared-keys": {"2 heads": 2, "6 head dimension": 1},
    "folded-heads": {"4 heads": 1, "6 head dimension": 1},
    "mixed-heads": {"4 heads": 1},
    "token-mixer": {"7 hidden units": 1, "32 hidden units": 1},
    "computed-weight": {"6 channels": 1, "9 hidden units": 1, "5 hidden units": 1},
    "cut-twice": {"6 hidden units": 1, "4 hidden units": 1, "3 hidden units": 1},
    "tied-weight": {"20 hidden units": 1},
    "outer-product": {},
    "across-units": {},
    "empty-rest": {"24 hidden units": 1},
    "cross-attention": {"4 heads": 2, "24 hidden units": 1},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_are_found_and_removing_them_equals_not_reading_them(name: str) -> None:
    program = capture_named(name)
    assert prunable(axes_of(program)) == EXPECTED[name]
    bound = torch.finfo(torch.float32).eps * reductions(program.model)
    done: set[Any] = set()
    draw = random.Random(0)
    while group := next((g for g in axes_of(program).groups() if fresh(g, done)), None):
        done.add(identity(group))
        kept = sorted(draw.sample(range(group.size), draw.randint(1, group.size - 1)))
        before = outputs(program)
        expected = outputs_without(program, group, kept)
        remove(program, group, kept)
        found = outputs(program)
        changed = 0.0
        for was, want, have in zip(before, expected, found, strict=True):
            if want.shape == have.shape:
                assert (want - have).abs().max() <= bound * want.abs().max().clamp_min(1e-6)
                changed = max(changed, float((want - was).abs().max() / want.abs().max()))
        assert changed > 3 * bound, "the removed units did not matter, so nothing was tested"
    if done:
        recorded = shapes(program)
        refresh(program)
        assert recorded == shapes(program)


def identity(group: ChannelGroup) -> Any:
    return group.kind, frozenset((member.parameter, member.dim) for member in group.members)


def fresh(group: ChannelGroup, done: set[Any]) -> bool:
    return group.prunable and identity(group) not in done


def outputs(program: Program) -> list[Tensor]:
    tensors, _ = flatten(program.example)
    with torch.no_grad():
        return [value for value in program.run(*tensors) if value.is_floating_point()]


def reductions(model: nn.Module) -> int:
    """Return how many terms are summed on the way, each of which may round."""
    return sum(prod(parameter.shape[1:]) for parameter in model.parameters() if parameter.dim() > 1)


def shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Return the recorded shapes by node, at the example's sizes."""
    return {
        node.name: shape_of(node)
        for node in program.graph.nodes
        if isinstance(node.meta.get("val"), Tensor)
    }


def outputs_without(program: Program, group: ChannelGroup, kept: list[int]) -> list[Tensor]:
    """Run the model with zeros where a consumer would read a removed unit."""
    saved: dict[str, Tensor] = {}
    for member in group.of("consumer"):
        weight = program.model.get_parameter(member.parameter).data
        saved.setdefault(member.parameter, weight.clone())
        gone = set(range(weight.shape[member.dim])) - set(member.indices(kept))
        weight.index_fill_(member.dim, torch.tensor(sorted(gone)), 0)
    result = outputs(program)
    for name, value in saved.items():
        program.model.get_parameter(name).data.copy_(value)
    return result


def remove(program: Program, group: ChannelGroup, kept: list[int]) -> None:
    """Slice every member once, and make the program and its modules follow."""
    sizes = {group.axis: len(kept)}
    attributes = attributes_with(program, sizes)
    for name, dim in {(member.parameter, member.dim) for member in group.members}:
        member = next(m for m in group.members if (m.parameter, m.dim) == (name, dim))
        path, _, attribute = name.rpartition(".")
        old = getattr(program.module(path), attribute)
        new = old.detach().index_select(dim, torch.tensor(member.indices(kept)))
        for module in program.model.modules():
            for key, value in [*module._parameters.items(), *module._buffers.items()]:
                if value is old:
                    is_parameter = isinstance(old, nn.Parameter)
                    setattr(module, key, nn.Parameter(new) if is_parameter else new)
    for path, values in attributes.items():
        for attribute, size in values.items():
            setattr(program.module(path), attribute, size)
    resize_arguments(program, sizes)
    program.changed()


def group_of(axes: Axes, kind: str, parameter: str, size: int | None = None) -> ChannelGroup:
    """Return the group of a kind that has a member whose name ends like this."""
    return next(
        g
        for g in axes.groups()
        if g.kind == kind
        and size in (None, g.size)
        and any(m.parameter.endswith(parameter) for m in g.members)
    )


def test_heads_of_separate_projections_are_rows_columns_and_biases() -> None:
    group = group_of(axes_of(captured("bert")), HEADS, "layer.0.attention.self.query.weight")
    assert names(group) == {
        "query.weight[0] producer",
        "query.bias[0] pointwise",
        "key.weight[0] producer",
        "key.bias[0] pointwise",
        "value.weight[0] producer",
        "value.bias[0] pointwise",
        "dense.weight[1] consumer",
    }
    assert group.of("consumer")[0].indices([0, 2]) == [*range(8), *range(16, 24)]


def test_the_residual_width_is_pinned_with_reasons() -> None:
    group = group_of(axes_of(captured("bert")), HIDDEN, "word_embeddings.weight")
    assert "is normalised over by layer_norm in embeddings.LayerNorm" in group.reasons
    assert "reaches an output of the model" in group.reasons


def test_heads_in_a_fused_projection_are_taken_from_each_part() -> None:
    group = group_of(axes_of(captured("gpt2")), HEADS, "h.1.attn.c_attn.weight")
    weight = next(m for m in group.members if m.parameter.endswith("c_attn.weight"))
    assert weight.dim == 1
    assert weight.indices([1]) == [*range(8, 16), *range(40, 48), *range(72, 80)]


def test_key_heads_come_with_their_query_heads() -> None:
    group = group_of(axes_of(captured("llama")), HEADS, "layers.0.self_attn.k_proj.weight")
    found = {m.parameter.split(".")[-2]: m.indices([1]) for m in group.members}
    assert found["q_proj"] == found["o_proj"] == list(range(16, 32))
    assert found["k_proj"] == found["v_proj"] == list(range(8, 16))


def test_relative_positions_couple_the_heads_of_all_layers() -> None:
    group = group_of(
        axes_of(captured("t5")), HEADS, "encoder.block.1.layer.0.SelfAttention.q.weight"
    )
    layers = {m.parameter.split(".")[2] for m in group.members}
    assert layers == {"0", "1"}
    assert [m.parameter.split(".")[-2] for m in group.of("lookup")] == ["relative_attention_bias"]


def test_heads_with_fixed_slopes_stay() -> None:
    reasons = group_of(axes_of(captured("mpt")), HEADS, "blocks.0.attn.Wqkv.weight").reasons
    assert any("not a parameter, made by arange" in reason for reason in reasons)


def test_channels_of_a_residual_stream_are_one_group_with_norms_and_statistics() -> None:
    group = group_of(axes_of(captured("cnn")), CHANNELS, "stem.weight", size=16)
    assert {m.parameter for m in group.of("producer")} == {"stem.weight", "project.weight"}
    assert {m.parameter for m in group.of("consumer")} == {"expand.weight", "head.weight"}
    assert len(group.of("buffer")) == 4


def test_an_operator_without_a_rule_pins_what_it_touches() -> None:
    reasons = group_of(axes_of(captured("lstm")), HIDDEN, "head.weight", size=32).reasons
    assert any("lstm, which has no axis rule" in reason for reason in reasons)


def test_a_block_applied_three_times_is_one_group_with_each_member_once() -> None:
    group = group_of(axes_of(captured("shared-block")), HIDDEN, "block.up.weight", size=64)
    assert names(group) == {
        "up.weight[0] producer",
        "up.bias[0] pointwise",
        "down.weight[1] consumer",
    }
    assert len(group.members) == 3
    assert len(group.of("consumer")[0].inputs) == 3


def test_a_consumer_names_the_value_it_contracts() -> None:
    program = captured("gpt2")
    group = group_of(axes_of(program), HIDDEN, "h.0.mlp.c_proj.weight")
    ((node, dim),) = group.of("consumer")[0].inputs
    assert dim == 2
    assert node.graph is program.graph
    assert node.meta["val"].shape[dim] == group.size


def test_dimensions_cut_alike_are_refined_and_others_kept_apart() -> None:
    unifier = Unifier()
    width, heads, half = unifier.fresh(24), unifier.fresh(4), unifier.fresh(12)
    unifier.unify(width, Product((heads, unifier.fresh(6))))
    unifier.unify(width, Sum((half, unifier.fresh(12))))
    assert not unifier.conflicts
    assert [size_of(part) for part in atoms(heads)] == [2, 2]
    assert [size_of(factor) for factor in atoms(half)] == [2, 6]
    unifier.unify(width, Product((unifier.fresh(3), unifier.fresh(8))))
    assert "is grouped in two ways" in unifier.conflicts[0][1]


def test_group_keys_are_stable_and_distinct() -> None:
    first, second = axes_of(captured("gpt2")), axes_of(captured("gpt2"))
    keys = [group.key for group in first.groups()]
    assert keys == [group.key for group in second.groups()]
    assert len(set(keys)) == len(keys)


def test_an_index_that_belongs_to_two_units_is_refused() -> None:
    (group,) = [g for g in axes_of(captured("outer-product")).groups() if g.size == 5]
    assert "occurs twice in one dimension of a parameter" in group.reasons


def test_positions_are_not_mistaken_for_sizes() -> None:
    program = capture_named("llama")
    group = group_of(axes_of(program), HEADS, "layers.1.self_attn.k_proj.weight")
    attention: Any = program.module("model.layers.1.self_attn")
    attention.layer_idx = group.size
    found = attributes_with(program, {group.axis: 1})
    assert "layer_idx" not in found.get("model.layers.1.self_attn", {})
