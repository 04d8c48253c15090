"""Linear layers are found by what leaf modules compute."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from zoo import EXAMPLE, find_case

from graphopt.capture import capture
from graphopt.passes.linear_layers import linear_layer, linear_layers


class Transposed(nn.Module):
    """A linear layer that stores its weight as [in, out] under names of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))
        self.offset = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.offset, x.view(-1, x.shape[-1]), self.kernel)
        return flat.view(*x.shape[:-1], self.kernel.shape[1])


class Product(nn.Module):
    """A product with a weight stored as [out, in], turned for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class Almost(nn.Module):
    """A linear layer with something more, named by what that is."""

    def __init__(self, more: str) -> None:
        super().__init__()
        self.more = more
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(6))
        if more == "buffer":
            self.register_buffer("scale", torch.ones(()))
        if more == "unused parameter":
            self.extra = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.more == "scaled bias":
            return torch.addmm(self.bias, x.view(-1, 6), self.weight, beta=0.5).view(x.shape)
        if self.more == "normed weight":
            return functional.linear(x, functional.normalize(self.weight), self.bias)
        if self.more == "turned input":
            return functional.linear(x.transpose(1, 2), self.weight, self.bias)
        y = functional.linear(x, self.weight, self.bias)
        if self.more == "activation":
            y = y.relu()
        return y.view(x.shape[0], -1) if self.more == "flattened output" else y


def test_every_way_to_store_the_weight_is_read_as_a_matrix() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 6), Product())
    model.append(Transposed(5, 2))
    x = torch.randn(2, 7, 4)
    program = capture(model, x)
    found = dict(linear_layers(program))
    assert list(found) == ["0", "2", "3", "4"]
    assert [found[name].transposed for name in found] == [False, False, False, True]
    assert (found["4"].weight_name, found["4"].bias_name) == ("kernel", "offset")
    for part in model:
        layer = linear_layer(program, str(list(model).index(part)))
        if layer is not None:
            torch.testing.assert_close(part(x), functional.linear(x, layer.matrix, layer.bias))
            assert layer.matrix.shape == (layer.out_features, layer.in_features)
        x = part(x)


def test_a_layer_is_made_again_in_its_own_form() -> None:
    model = nn.Sequential(Transposed(4, 3))
    layer = linear_layer(capture(model, torch.randn(2, 4)), "0")
    assert layer is not None
    empty = layer.emptied()
    assert all(value.is_meta for value in empty.module.parameters())
    assert isinstance(empty.module, Transposed)
    again = empty.filled(layer.matrix, layer.bias, trained=False)
    x = torch.randn(5, 4)
    assert torch.equal(again(x), model(x))
    assert [value.requires_grad for value in again.parameters()] == [False, True]


@pytest.mark.parametrize(
    "more",
    [
        "activation",
        "buffer",
        "flattened output",
        "normed weight",
        "scaled bias",
        "turned input",
        "unused parameter",
    ],
)
def test_what_computes_something_more_is_no_linear_layer(more: str) -> None:
    program = capture(nn.Sequential(Almost(more)), torch.randn(2, 6, 6))
    assert linear_layer(program, "0") is None
    plain = capture(nn.Sequential(copy.deepcopy(Almost("nothing"))), torch.randn(2, 6, 6))
    assert linear_layer(plain, "0") is not None


def test_layers_of_a_real_model_are_found_whatever_their_class() -> None:
    case = find_case("gpt2")
    model = case.build()
    found = dict(linear_layers(capture(model, case.inputs(*EXAMPLE))))
    assert len(found) == 9
    assert [name for name, layer in found.items() if not layer.transposed] == ["lm_head"]
