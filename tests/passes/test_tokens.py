"""Residual streams and token axes of many architectures, found without names."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from zoo import EXAMPLE, find_case

from graphopt.capture import capture
from graphopt.passes.program import Program, shape_of
from graphopt.passes.tokens import Chain, residual_stream, token_axis

# Name, regions per chain, token dimensions of the streams, inputs with tokens.
STREAMS: tuple[tuple[str, tuple[int, ...], tuple[int, ...], set[str]], ...] = (
    ("bert", (4,), (1,), {"input_ids", "attention_mask"}),
    ("distilbert", (4,), (1,), {"input_ids", "attention_mask"}),
    ("roberta", (4,), (1,), {"input_ids", "attention_mask"}),
    ("modernbert", (4,), (1,), {"input_ids", "attention_mask"}),
    ("gpt2", (4,), (1,), {"input_ids"}),
    ("llama", (4,), (1,), {"input_ids"}),
    ("qwen3", (4,), (1,), {"input_ids"}),
    ("gemma3", (4,), (1,), {"input_ids"}),
    ("mixtral", (4,), (1,), {"input_ids"}),
    ("mpt", (4,), (1,), {"input_ids"}),
    ("opt", (4,), (1,), {"input_ids", "attention_mask"}),
    ("t5", (4, 3), (1,), {"input_ids", "attention_mask", "decoder_input_ids"}),
    ("vit", (4,), (1,), set()),
    ("swin", (4, 4), (1,), set()),
    ("convnext", (1, 1, 1, 1), (2, 3), set()),
    ("resnet", (1, 1), (2, 3), set()),
    ("transformer-encoder", (4,), (1,), {"src"}),
    ("transformer-encoder-pre-norm", (4,), (1,), {"src"}),
    ("cnn", (1,), (2, 3), set()),
    ("shared-block", (3,), (1,), {"hidden"}),
)


@cache
def _program(name: str) -> Program:
    case = find_case(name)
    return capture(case.build(), case.inputs(*EXAMPLE))


@pytest.mark.parametrize(
    ("name", "regions", "dims", "inputs"),
    STREAMS,
    ids=lambda v: str(sorted(v) if isinstance(v, set) else v),
)
def test_stream_of_the_zoo(
    name: str, regions: tuple[int, ...], dims: tuple[int, ...], inputs: set[str]
) -> None:
    program = _program(name)
    chains = residual_stream(program).chains
    assert tuple(len(chain.regions) for chain in chains) == regions
    found: set[str] = set()
    for chain in chains:
        assert chain.tokens is not None
        assert chain.tokens.dims == dims
        assert chain.batch_dims == (0,)
        assert chain.width_dim == (2 if dims == (1,) else 1)
        found |= set(chain.tokens.inputs)
        _check_regions(chain)
    assert found == inputs


def _check_regions(chain: Chain) -> None:
    assert chain.tokens is not None
    for region in chain.regions:
        assert shape_of(region.entry) == shape_of(region.add)
        known = {region.entry, *region.nodes, *region.token_inputs}
        for node in (*region.nodes, region.add):
            assert all(item in known for item in node.all_input_nodes if item in chain.tokens.nodes)
        assert set(region.token_inputs) <= set(region.outside)
    for before, after in zip(chain.regions, chain.regions[1:], strict=False):
        assert after.entry in (before.add, *before.after)
        assert not set(before.nodes) & set(after.nodes)


@pytest.mark.parametrize("name", ["lstm", "sequential", "flags"])
def test_no_stream_with_a_reason(name: str) -> None:
    program = _program(name)
    stream = residual_stream(program)
    assert stream.chains == ()
    assert "added" in stream.reason
    assert token_axis(program) is None


def test_masks_and_rotary_tables_come_with_their_token_dimensions() -> None:
    attention, feed_forward = residual_stream(_program("bert")).chains[0].regions[:2]
    assert list(attention.token_inputs.values()) == [(2, 3)]
    assert feed_forward.outside == ()
    rotary = residual_stream(_program("llama")).chains[0].regions[0]
    assert list(rotary.token_inputs.values()) == [(2,), (2,)]
    assert len(rotary.escapes) == 2  # keys and values go to the cache


def test_decoder_reads_the_encoder_from_outside() -> None:
    program = _program("t5")
    encoder, decoder = residual_stream(program).chains
    assert encoder.tokens is not None
    assert decoder.tokens is not None
    cross = decoder.regions[1]
    from_encoder = [node for node in cross.outside if node in encoder.tokens.nodes]
    assert len(from_encoder) == 3  # keys, values and the mask
    assert not set(cross.token_inputs) & set(from_encoder[:2])
    main = token_axis(program)
    assert main is not None
    assert main.symbols in (encoder.tokens.symbols, decoder.tokens.symbols)


def test_post_norm_lies_between_regions() -> None:
    for region in residual_stream(_program("bert")).chains[0].regions[:-1]:
        assert [node.op for node in region.after] == ["call_module"]
    for region in residual_stream(_program("gpt2")).chains[0].regions:
        assert region.after == ()


class _Block(nn.Module):
    def __init__(self, parallel: bool) -> None:
        super().__init__()
        self.parallel = parallel
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.hidden, self.out, self.extra = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, stream: Tensor) -> Tensor:
        normed = self.norm(stream)
        mixed = self.attention(normed, normed, normed, need_weights=False)[0]
        if self.parallel:
            result: Tensor = stream + mixed + self._feed_forward(normed) + self.extra(normed)
            return result
        stream = stream + mixed
        return stream + self._feed_forward(self.norm(stream))

    def _feed_forward(self, value: Tensor) -> Tensor:
        result: Tensor = self.out(self.hidden(value).relu())
        return result


def test_parallel_branches_are_one_region() -> None:
    model = nn.Sequential(_Block(True), _Block(True))
    (chain,) = residual_stream(capture(model, torch.randn(6, 3, 8))).chains
    assert len(chain.regions) == 2
    assert chain.regions[1].entry is chain.regions[0].add


def test_sequence_first_is_told_from_batch_by_attention() -> None:
    model = nn.Sequential(_Block(False), _Block(False))
    (chain,) = residual_stream(capture(model, torch.randn(6, 3, 8))).chains
    assert len(chain.regions) == 4
    assert chain.tokens is not None
    assert (chain.tokens.dims, chain.tokens.size, chain.batch_dims) == ((0,), 6, (1,))


class _Cubic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, value: Tensor) -> Tensor:
        hidden = self.hidden(value)
        result: Tensor = self.out(hidden + 0.1 * hidden**3)
        return result


def test_activation_with_an_add_is_no_region() -> None:
    assert residual_stream(capture(_Cubic(), torch.randn(2, 4, 8))).chains == ()


class _Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.adapter = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, stream: Tensor) -> Tensor:
        hidden = self.layer(stream).relu()
        result: Tensor = stream + (hidden + self.adapter(hidden))
        return result


def test_region_swallows_an_adapter() -> None:
    program = capture(nn.Sequential(_Adapted(), _Adapted()), torch.randn(2, 4, 8))
    (chain,) = residual_stream(program).chains
    assert len(chain.regions) == 2
    assert all(len(region.nodes) == 4 for region in chain.regions)


class _LongSkip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_Block(False), _Block(False), nn.Linear(8, 8))

    def forward(self, stream: Tensor) -> Tensor:
        result: Tensor = stream + self.body(stream)
        return result


def test_skip_over_a_whole_chain_is_left_out() -> None:
    (chain,) = residual_stream(capture(_LongSkip(), torch.randn(6, 3, 8))).chains
    assert len(chain.regions) == 4


class _Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.width = nn.Linear(6, 6), nn.Linear(8, 8)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.tokens(stream.transpose(1, 2)).transpose(1, 2)
        result: Tensor = stream + self.width(stream)
        return result


def test_weights_over_tokens_are_named() -> None:
    (chain,) = residual_stream(capture(_Mixer(), torch.randn(2, 6, 8))).chains
    mixing, feed_forward = chain.regions
    assert set(mixing.token_parameters) == {"tokens.weight", "tokens.bias"}
    assert feed_forward.token_parameters == ()
