"""`FusedLinear` and its parts against separate layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from graphopt.kernels import FusedLinear, FusedPart, fused_linear_reference

SIZES = (5, 3, 1)


class Attention(nn.Module):
    """Calls the layers one by one, as a model's own forward does."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.query = FusedLinear(7, SIZES, bias, dtype=dtype)
        self.key = FusedPart(self.query, 1)
        self.value = FusedPart(self.query, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_outputs_and_gradients_are_those_of_separate_layers(
    shape: tuple[int, ...], bias: bool, together: bool, dtype: torch.dtype
) -> None:
    model = Attention(bias, dtype)
    x = torch.randn(shape, dtype=dtype)
    wide = x.double().requires_grad_()
    x.requires_grad_()
    owner = model.query
    weights = [owner.part_weight(i).detach().double().requires_grad_() for i in range(3)]
    parts = [owner.part_bias(i) for i in range(3)]
    biases = [None if part is None else part.detach().double() for part in parts]
    expected = fused_linear_reference(wide, weights, biases)
    actual = owner(x, part=None) if together else model(x)
    assert actual.dtype == dtype
    expected.sum().backward()
    actual.sum().backward()
    # Sums of at most 9 terms of order 1.
    atol = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol)
    assert x.grad is not None
    assert owner.fused_weight.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=atol)
    stacked = torch.cat([w.grad for w in weights if w.grad is not None])
    torch.testing.assert_close(owner.fused_weight.grad.double(), stacked, rtol=0, atol=atol)


def test_gradients_are_the_numerical_ones() -> None:
    owner = FusedLinear(7, SIZES, dtype=torch.float64)
    assert owner.fused_bias is not None

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        values = {"fused_weight": weight, "fused_bias": bias}
        return (
            torch.func.functional_call(owner, values, (x,), {"part": None}),
            torch.func.functional_call(owner, values, (x,), {"part": 1}),
        )

    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, owner.fused_weight, owner.fused_bias))


def test_a_part_alone_is_its_slice_of_the_whole() -> None:
    model, x = Attention(), torch.randn(4, 7)
    # A product of another shape may sum in another order: 7 terms of order 1.
    atol = 8 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(model(x), model.query(x, part=None), rtol=0, atol=atol)
    for part, module in enumerate((model.query, model.key, model.value)):
        assert torch.equal(model.query(x, part=part), module(x))


def test_parts_look_like_the_layers_they_replace() -> None:
    model = Attention()
    start = 0
    layers: list[FusedLinear | FusedPart] = [model.query, model.key, model.value]
    for module, size in zip(layers, SIZES, strict=True):
        assert (module.in_features, module.out_features) == (7, size)
        assert torch.equal(module.weight, model.query.fused_weight[start : start + size])
        assert module.bias is not None
        assert model.query.fused_bias is not None
        assert torch.equal(module.bias, model.query.fused_bias[start : start + size])
        start += size
    assert Attention(bias=False).value.bias is None


def test_a_state_dict_holds_every_weight_once() -> None:
    model, x = Attention(), torch.randn(4, 7)
    assert list(model.state_dict()) == ["query.fused_weight", "query.fused_bias"]
    other = Attention()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_a_copy_refers_to_its_own_owner() -> None:
    model = Attention()
    twin = copy.deepcopy(model)
    assert twin.key.owner is twin.query
    assert twin.value.owner is twin.query
    with torch.no_grad():
        twin.query.fused_weight.zero_()
    assert model.key.weight.abs().sum() > 0


def test_conversion_reaches_the_parts() -> None:
    model = Attention().to(torch.float64)
    assert model.key(torch.randn(4, 7, dtype=torch.float64)).dtype == torch.float64


def test_it_exports_and_compiles() -> None:
    model, x = Attention(), torch.randn(4, 7)
    exported = torch.export.export(model, (x,), dynamic_shapes=((torch.export.Dim("rows"), None),))
    other = torch.randn(6, 7)
    assert torch.equal(exported.module()(other), model(other))
    assert set(exported.state_dict) == {"query.fused_weight", "query.fused_bias"}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("part", [0, 3])
def test_a_part_that_is_not_there_is_refused(part: int) -> None:
    with pytest.raises(ValueError, match=f"a part from 1 to 2, got {part}"):
        FusedPart(FusedLinear(7, SIZES), part)


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"positive output sizes, got \[3, 0\]"):
        FusedLinear(7, (3, 0))
