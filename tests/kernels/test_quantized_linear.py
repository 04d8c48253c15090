"""Integer layers: the reference, the fast form, stale copies, types, gradients, ONNX forms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import ExportError
from graphopt.export import ExportReport
from graphopt.kernels import QuantizedLinear, quantized_linear_reference
from graphopt.kernels.cpu import quantized
from graphopt.kernels.quantized_inputs import round_inputs
from graphopt.kernels.quantized_weights import dequantize, pack_integers, unpack_integers

SCHEMES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "dynamic-tensor": {"activations": "dynamic-tensor"},
    "static": {"activations": "static", "input_range": (-3.0, 4.0)},
    "none": {"activations": "none"},
    "groups": {"group_size": 32, "activations": "none"},
    "rounded groups": {"group_size": 16},
    "4 bits": {"bits": 4},
    "4-bit groups": {"bits": 4, "group_size": 32, "activations": "none"},
    "rounded 4-bit groups": {"bits": 4, "group_size": 32},
}
EPS = torch.finfo(torch.float32).eps


def dense(inputs: int = 64, outputs: int = 48, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias)


def layer(scheme: str, inputs: int = 64, outputs: int = 48, bias: bool = True) -> QuantizedLinear:
    return QuantizedLinear.from_dense(dense(inputs, outputs, bias), **SCHEMES[scheme])


def reference(item: QuantizedLinear, x: Tensor) -> Tensor:
    """Return the layer's outputs by the reference in float64."""
    result = quantized_linear_reference(
        x.double().reshape(-1, item.in_features),
        item.codes,
        item.scales,
        item.bias,
        item.input_scale,
        item.input_zero_point,
        item.bits,
        item.activations,
    )
    return result.detach().view(*x.shape[:-1], item.out_features)


def runtime_saturates() -> bool:
    """Say whether ONNX Runtime sums pairs of integer products in 16 bits, as without VNNI."""
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]>'
        "g (uint8[1, 64] a, int8[64, 16] b) => (int32[1, 16] c) { c = MatMulInteger(a, b) }"
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    values = {"a": np.full((1, 64), 255, np.uint8), "b": np.full((64, 16), 127, np.int8)}
    (found,) = session.run(None, values)
    return bool((found != 64 * 255 * 127).any())


def exported(model: nn.Module, path: Path, x: Tensor, **settings: Any) -> ExportReport | None:
    """Export a model, or see that it is refused where the runtime's products are wrong."""
    if not runtime_saturates():
        return graphopt.export_onnx(model, path, x, **settings)
    with pytest.raises(ExportError, match="differs from torch"):
        # No other opset and no fixed sizes would mend it: one attempt is enough.
        graphopt.export_onnx(model, path, x, **{**settings, "opset": 20, "dynamic": {}})
    assert not path.exists()
    return None


def assert_close(item: QuantizedLinear, x: Tensor) -> None:
    """Compare with the reference: float32 scales and sums err, integers do not.

    A value on the border of two integers, in float32, may go to either: their distance is a step.
    """
    expected = reference(item, x)
    scale = float(expected.abs().max())
    with torch.no_grad():
        difference = (item(x).double() - expected).abs()
    assert float(difference.max()) <= 8 * EPS * item.in_features**0.5 * scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_are_the_reference(scheme: str, bias: bool) -> None:
    item = layer(scheme, bias=bias)
    for shape in ((7, 64), (2, 3, 64), (64,), (300, 64)):
        assert_close(item, torch.randn(shape))
    strided = torch.randn(64, 9).t()
    assert_close(item, strided)
    assert_close(item, torch.zeros(3, 64))
    assert item(torch.empty(0, 64)).shape == (0, 48)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_err_by_half_a_step_of_weights_and_inputs(scheme: str) -> None:
    linear, item = dense().double(), layer(scheme)
    x = torch.randn(20, 64).clamp(-3, 4)
    groups = 64 // item.group_size if item.group_size else 1
    rounded = round_inputs(
        x.double(), item.activations, groups, item.input_scale, item.input_zero_point
    )
    steps = item.scales.double().reshape(48, -1).repeat_interleave(64 // groups, 1)
    largest = x.double().unflatten(1, (groups, -1)).abs().amax(2).repeat_interleave(64 // groups, 1)
    # Ranges of whole calls and calibrated ones span 7 here, scales per token the largest value.
    input_step = {"none": 0.0, "dynamic": largest / 127}.get(
        item.activations, torch.tensor(7 / 255, dtype=torch.float64)
    )
    half = input_step / 2 * (1 + 4 * EPS)
    assert bool(((rounded - x).abs() <= half + 1e-6).all())
    bound = (
        rounded.abs() @ (steps / 2).t()
        + (torch.zeros_like(rounded) + half) @ linear.weight.abs().t()
    )
    with torch.no_grad():
        error = (item(x).double() - linear(x.double())).abs()
    assert bool((error <= bound * (1 + 1e-4) + 1e-5).all())
    assert float(error.max()) > 0


def test_a_token_does_not_depend_on_the_others() -> None:
    item, x = layer("dynamic"), torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    with torch.no_grad():
        together = item(x)
        alone = torch.cat([item(row) for row in x.split(1)])
    if quantized.runs(x, item.scales, None, None, item.bits, item.activations):
        assert torch.equal(together, alone)
    # Products of floats are summed in another order for another number of rows.
    rounded = round_inputs(x.double(), item.activations, 1, None, None)
    weight = dequantize(unpack_integers(item.codes, item.bits), item.scales.double())
    sizes = (
        torch.cat([rounded, torch.ones(40, 1)], 1).abs()
        @ torch.cat([weight, dense().bias.detach().double()[:, None]], 1).abs().t()
    )
    assert bool(((together - alone).abs() <= 2 * 65 * EPS * sizes).all())


@pytest.mark.parametrize("scheme", ["dynamic", "static", "4 bits"])
def test_new_values_are_seen_at_once(scheme: str) -> None:
    item, x = layer(scheme), torch.randn(5, 64)
    item(x)
    other = layer(scheme)
    torch.manual_seed(3)
    other.requantize(torch.randn(48, 64), torch.randn(48))
    item.load_state_dict(other.state_dict())
    assert_close(item, x)
    assert torch.equal(item(x), other(x))
    item.requantize(-other.weight)
    assert_close(item, x)
    twin = copy.deepcopy(item)
    twin.requantize(torch.randn(48, 64))
    assert_close(twin, x)
    assert_close(item, x)
    assert sorted(item.state_dict()) == sorted(
        [
            "bias",
            "codes",
            "scales",
            *["input_multipliers", "input_scale", "input_zero_point"] * (scheme == "static"),
        ]
    )


def test_another_type_leaves_scales_in_float32() -> None:
    item, x = layer("dynamic"), torch.randn(6, 64)
    before = reference(item, x.bfloat16())
    item.to(torch.bfloat16)
    assert item.scales.dtype is torch.float32
    assert item.bias is not None
    assert item.bias.dtype is torch.bfloat16
    result = item(x.bfloat16())
    assert result.dtype is torch.bfloat16
    # The result, and the bias, are rounded to bfloat16.
    bound = torch.finfo(torch.bfloat16).eps * float(before.abs().max())
    assert float((result.detach().double() - before).abs().max()) <= bound
    assert item.to("meta")(x.to("meta")).shape == (6, 48)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_keeps_every_pair_of_integers(bits: int) -> None:
    values = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.cartesian_prod(values, values)
    packed = pack_integers(pairs, bits)
    assert packed.nbytes == pairs.numel() * bits // 8
    assert torch.equal(unpack_integers(packed, bits), pairs)


@pytest.mark.parametrize("scheme", ["dynamic", "static", "4-bit groups"])
def test_gradients_reach_inputs_and_bias_as_if_nothing_were_rounded(scheme: str) -> None:
    item, x = layer(scheme), torch.randn(2, 3, 64, requires_grad=True)
    gradient = torch.randn(2, 3, 48)
    item(x).backward(gradient)
    assert item.bias is not None
    torch.testing.assert_close(x.grad, gradient @ item.weight)
    torch.testing.assert_close(item.bias.grad, gradient.sum((0, 1)))
    torch.testing.assert_close(item.weight, dequantize(item.integers, item.scales))


@pytest.mark.parametrize("scheme", ["dynamic", "4-bit groups"])
def test_the_operator_keeps_the_rules_of_operators(scheme: str) -> None:
    item = layer(scheme)
    x = torch.randn(5, 64, requires_grad=True)
    rest = (item.input_scale, item.input_zero_point, item.bits, item.activations)
    torch.library.opcheck(
        torch.ops.graphopt.quantized_linear.default,
        (x, item.codes, item.scales, item.bias, *rest),
    )


def test_an_exported_program_computes_the_same_at_other_sizes() -> None:
    item = layer("dynamic").eval()
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(item, (torch.randn(4, 64),), dynamic_shapes=sizes)
    x = torch.randn(9, 64)
    assert torch.equal(program.module()(x), item(x))


class Schemes(nn.Module):
    """One layer of every scheme, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(scheme, 128, 128) for scheme in SCHEMES)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [item(x) for item in self.layers]


def test_onnx_files_compute_the_same_from_small_integers(tmp_path: Path) -> None:
    model, path, x = Schemes().eval(), tmp_path / "model.onnx", torch.randn(3, 5, 128)
    report = exported(model, path, x)
    if report is None:
        return
    assert report.dynamic == {"x": {0: "batch", 1: "sequence"}}
    # The allowance is for values that round to neighbouring integers; here none does.
    largest = max(float(value.detach().abs().max()) for value in model(x))
    assert report.verification.difference <= 8 * EPS * 128**0.5 * largest
    assert all(entry.bound > 2**-8 for entry in report.verification.comparisons)
    graph = onnx.load(path).graph
    assert {node.op_type for node in graph.node} >= {
        *("QuantizeLinear", "MatMulInteger", "DynamicQuantizeLinear", "DequantizeLinear"),
        "MatMulNBits",
    }
    weights = [tensor for tensor in graph.initializer if len(tensor.dims) > 1]
    floats = [tensor for tensor in weights if tensor.data_type == onnx.TensorProto.FLOAT]
    assert len(weights) - len(floats) == len(SCHEMES)
    assert sum(len(tensor.raw_data) for tensor in floats) <= 4 * 128 * (4 + 8 + 4 + 4)  # scales


def test_static_layers_multiply_integers_where_all_sizes_are_fixed(tmp_path: Path) -> None:
    model, path = nn.Sequential(layer("static")).eval(), tmp_path / "model.onnx"
    if exported(model, path, torch.randn(3, 64), dynamic={}) is None:
        return
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert operators >= {"MatMulIntegerToFloat"}
    assert not operators & {"Gemm", "MatMul"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_say_how_coarsely_they_round_inputs(scheme: str) -> None:
    assert layer(scheme).unit_roundoff == (0 if layer(scheme).activations == "none" else 2**-8)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected bits 4 or 8"):
        QuantizedLinear(8, 8, bits=3)
    with pytest.raises(ValueError, match="divides 40 inputs"):
        QuantizedLinear(40, 8, group_size=32)
    with pytest.raises(ValueError, match="cannot have static inputs"):
        QuantizedLinear(64, 8, group_size=32, activations="static")
    with pytest.raises(ValueError, match="even number of inputs"):
        QuantizedLinear(7, 8, bits=4)
    with pytest.raises(ValueError, match="expected an input range"):
        QuantizedLinear.from_dense(dense(), activations="static")
    with pytest.raises(ValueError, match=r"expected an input \[\.\.\., 64\]"):
        layer("dynamic")(torch.randn(2, 63))
    with pytest.raises(ValueError, match="expected a weight"):
        layer("dynamic").requantize(torch.randn(4, 4))
    with pytest.raises(ValueError, match="expected a layer with static inputs"):
        layer("dynamic").set_input_range(-1.0, 1.0)
    with pytest.raises(ValueError, match="for 8 bits"):
        layer("dynamic").load_state_dict(layer("4 bits").state_dict())


def test_multiplied_inputs_are_rounded_alike_in_onnx(tmp_path: Path) -> None:
    torch.manual_seed(2)
    x = torch.randn(6, 64)
    x[:, :4] *= 50
    plain = QuantizedLinear.from_dense(dense(), activations="static", input_range=(-200.0, 200.0))
    item = copy.deepcopy(plain)
    assert item.input_multipliers is not None
    item.input_multipliers[:4] = 1 / 10
    item.requantize(dense().weight)
    item.set_input_range(-20.0, 20.0)
    with torch.no_grad():
        wanted, rounded, multiplied = (module(x) for module in (dense(), plain, item))
    errors = [float((found - wanted).norm() / wanted.norm()) for found in (rounded, multiplied)]
    assert errors[1] < errors[0] / 3
    assert item(x.bfloat16()).dtype is torch.bfloat16
    path = tmp_path / "layer.onnx"
    report = exported(item, path, x, measure=False)
    if report is None:
        return
    assert report.verification.failure is None
    session = onnxruntime.InferenceSession(path)
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # Products that round to another integer at a tie differ by a step.
    step = 40 / 255 * float((item.rounded_weight(item.weight)).abs().max())
    assert float((torch.from_numpy(result) - multiplied).abs().max()) < step
