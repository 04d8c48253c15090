"""`BlockSparseLinear` as a drop-in for `nn.Linear`."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from graphopt.kernels import BlockLayout, BlockSparseLinear, block_sparse_linear_reference
from graphopt.kernels.block_presets import block_sizes


def sparse_layer(seed: int = 0, *, bias: bool = True) -> BlockSparseLinear:
    torch.manual_seed(seed)
    linear = nn.Linear(48, 32, bias)
    return BlockSparseLinear.from_dense(linear, 0.5, block_out=16, block_in=8)


def test_it_keeps_the_blocks_with_the_largest_norms() -> None:
    linear = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([1.0, 4.0, 2.0, 3.0]).repeat_interleave(2).expand(4, 8))
    sparse = BlockSparseLinear.from_dense(linear, 0.5, block_out=2, block_in=2)
    assert sparse.columns.tolist() == [1, 3, 1, 3]
    assert sparse.to_dense().weight.tolist() == [[0, 0, 4, 4, 0, 0, 3, 3]] * 4


def test_at_full_density_it_is_the_dense_layer_and_goes_back_to_it() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 32).eval()
    sparse = BlockSparseLinear.from_dense(linear, 1.0, block_out=16, block_in=8)
    assert not sparse.training
    dense = sparse.to_dense()
    assert torch.equal(dense.weight, linear.weight)
    assert torch.equal(dense.bias, linear.bias)
    assert not dense.training
    x = torch.randn(5, 48)
    torch.testing.assert_close(sparse(x), linear(x))


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (0, 48), (2, 1, 3, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_maps_the_last_dimension(shape: tuple[int, ...], bias: bool) -> None:
    sparse = sparse_layer(bias=bias)
    x = torch.randn(shape)
    expected = block_sparse_linear_reference(x, sparse.values, sparse.bias, sparse.layout)
    torch.testing.assert_close(sparse(x), expected)
    torch.testing.assert_close(sparse.eval()(x.clone()), expected)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), expected)


def test_a_transposed_input_is_taken_as_it_is() -> None:
    sparse = sparse_layer()
    x = torch.randn(48, 5).t()
    torch.testing.assert_close(sparse(x), sparse(x.contiguous()))
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), sparse(x.contiguous()))


def test_another_input_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected an input \[..., 48\], got \[5, 96\]"):
        sparse_layer()(torch.randn(5, 96))


def test_it_looks_like_a_linear_layer() -> None:
    sparse = sparse_layer()
    assert (sparse.in_features, sparse.out_features) == (48, 32)
    assert repr(sparse) == (
        "BlockSparseLinear(in_features=48, out_features=32, blocks=6 of 16x8, density=0.5, "
        "bias=True)"
    )
    assert torch.equal(sparse.weight, sparse.to_dense().weight)


def test_its_state_is_what_is_kept_and_survives_safetensors(tmp_path: Path) -> None:
    sparse, other = sparse_layer(0), sparse_layer(1)
    state = sparse.state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == {
        "values": [6, 16, 8],
        "bias": [32],
        "rows": [6],
        "columns": [6],
    }
    x = torch.randn(5, 48)
    with torch.no_grad():
        before = other(x)  # packs the other weights
        save_file(state, tmp_path / "layer.safetensors")
        other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
        assert not torch.equal(other(x), before)
        assert torch.equal(other(x), sparse(x))
    assert torch.equal(other(x), sparse(x))


def test_indices_that_are_no_layout_are_not_loaded() -> None:
    sparse = sparse_layer()
    state = sparse.state_dict()
    state["columns"] = torch.full_like(state["columns"], 6)
    columns = sparse.columns.clone()
    with pytest.raises(ValueError, match="columns from 0 to 5, got 6 to 6"):
        sparse.load_state_dict(state)
    assert torch.equal(sparse.columns, columns)


def test_inference_follows_averaged_weights() -> None:
    """Averaging of weights writes through `.data`, which keeps the version of a tensor."""
    sparse = sparse_layer()
    x = torch.randn(5, 48)
    with torch.no_grad():
        sparse(x)
        sparse.values.data.copy_(torch.rand_like(sparse.values))
        expected = block_sparse_linear_reference(x, sparse.values, sparse.bias, sparse.layout)
        torch.testing.assert_close(sparse(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("block_in", "density"), [(8, 0.5), (24, 0.5), (8, 1.0)])
@pytest.mark.parametrize("tokens", [3, 400])
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_weights_end_with_the_layer(
    autocast: bool, tokens: int, block_in: int, density: float, dtype: torch.dtype
) -> None:
    linear = nn.Linear(48, 32, dtype=dtype)
    sparse = BlockSparseLinear.from_dense(linear, density, block_out=16, block_in=block_in)
    values = weakref.ref(sparse.values)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sparse(torch.randn(tokens, 48, dtype=dtype))
    del sparse
    gc.collect()
    assert values() is None


def test_it_learns_what_its_blocks_can_express() -> None:
    torch.manual_seed(0)
    teacher, student = sparse_layer(0), sparse_layer(0)
    nn.init.normal_(student.values, std=0.1)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    x = torch.randn(256, 48)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (student(x) - teacher(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3
    assert optimizer.state[student.values]["exp_avg"].shape == student.values.shape


def test_copies_and_moves_compute_the_same() -> None:
    sparse = sparse_layer()
    x = torch.randn(5, 48)
    with torch.no_grad():
        expected = sparse(x)
        assert torch.equal(copy.deepcopy(sparse)(x), expected)
        moved = copy.deepcopy(sparse).to("meta").to_empty(device="cpu")
        moved.load_state_dict(sparse.state_dict())
        assert torch.equal(moved(x), expected)
        assert copy.deepcopy(sparse).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_it_compiles_and_exports_for_any_number_of_tokens() -> None:
    sparse = sparse_layer()
    compiled = torch.compile(sparse, fullgraph=True, dynamic=True)
    for tokens in (5, 7):
        x = torch.randn(tokens, 48)
        torch.testing.assert_close(compiled(x), sparse(x))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), sparse(x))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            torch.testing.assert_close(compiled(x), sparse(x))
    compiled(torch.randn(5, 48)).sum().backward()
    found = sparse.values.grad
    sparse.zero_grad()
    assert found is not None
    size = torch.export.Dim.DYNAMIC
    program = torch.export.export(sparse, (torch.randn(5, 48),), dynamic_shapes=({0: size},))
    names = [str(node.target) for node in program.graph.nodes]
    assert "graphopt.block_sparse_linear.default" in names
    x = torch.randn(9, 48)
    torch.testing.assert_close(program.module()(x), sparse(x))


def test_frozen_weights_leave_the_gradient_to_an_adapter() -> None:
    sparse = sparse_layer().requires_grad_(False)
    down, up = nn.Linear(48, 2, bias=False), nn.Linear(2, 32, bias=False)
    x = torch.randn(5, 48)
    (sparse(x) + up(down(x))).square().sum().backward()
    assert sparse.values.grad is None
    assert down.weight.grad is not None
    assert down.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("sizes", "device", "training", "expected"),
    [
        ((3072, 768), "cpu", False, (256, 32)),
        ((384, 384), "cpu", True, (384, 32)),
        ((100, 60), "cpu", False, (100, 15)),
        ((1000, 48), "cpu", False, (500, 12)),
        ((64, 20), "cpu", False, (64, 20)),
        ((3072, 768), "cuda", True, (128, 128)),
        ((3072, 64), "cuda", True, (128, 64)),
        ((3072, 768), "cuda", False, (256, 32)),
    ],
)
def test_default_blocks_divide_the_weight(
    sizes: tuple[int, int], device: str, training: bool, expected: tuple[int, int]
) -> None:
    assert block_sizes(*sizes, torch.device(device), training=training) == expected


def test_a_weight_without_such_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="got 7 outputs and 131 inputs; name block sizes yourself"):
        BlockSparseLinear.from_dense(nn.Linear(131, 7))


def test_a_density_that_removes_nothing_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"0\.5 keeps all of 1 column groups of 20; name a smaller"
    ):
        BlockSparseLinear.from_dense(nn.Linear(20, 64), 0.5)
    assert BlockSparseLinear.from_dense(nn.Linear(20, 64), 1.0).density == 1


def test_a_given_layout_is_used() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    layout = BlockLayout.from_mask(mask, 16, 24)
    linear = nn.Linear(48, 32)
    sparse = BlockSparseLinear.from_dense(linear, layout=layout)
    assert torch.equal(sparse.layout.mask(), mask)
    assert torch.equal(sparse.values, layout.pack(linear.weight))
