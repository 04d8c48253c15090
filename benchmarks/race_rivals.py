"""What graphopt races against: the runtimes by themselves, and other tools."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from minilm_compression import torch_pruning
from race_inputs import Batch, InputSet, Runner
from torch import Tensor, nn

import graphopt
from graphopt.passes.errors import MissingExtraError
from graphopt.runtimes import load_onnx

_PRUNED_BUDGET = 0.84
"""Share of the FLOPs that Torch-Pruning keeps."""


def rivals(dense: nn.Module, inputs: InputSet, folder: Path) -> Iterator[tuple[str, Runner]]:
    """Yield every rival by name, loaded; those whose library is missing are named and left out."""
    plain = folder / "dense.onnx"
    if not plain.exists():
        # What a user of the runtimes has: opset 20, because quantize_dynamic does not know the
        # attention operator of 23.
        few = {name: tensor[:2] for name, tensor in inputs.test[0].items()}
        graphopt.export_onnx(dense, plain, few, opset=20, measure=False)
    makers: dict[str, Callable[[], Runner]] = {
        "onnxruntime fp32": lambda: onnx_runner(plain, "onnxruntime"),
        "torch fp32": lambda: _torch_runner(dense),
        "torch bf16 autocast": lambda: _autocast_runner(dense),
        "onnxruntime dynamic int8": lambda: _dynamic_int8(plain, folder),
        "openvino fp32": lambda: onnx_runner(plain, "openvino"),
        "openvino bf16": lambda: onnx_runner(plain, "openvino bf16"),
        "openvino int8 (NNCF)": lambda: _nncf(dense, inputs, folder, "f32"),
        "openvino int8 (NNCF), rest bf16": lambda: _nncf(dense, inputs, folder, "bf16"),
        "Torch-Pruning, onnxruntime": lambda: _pruned(dense, inputs, folder),
        "torchao int8": lambda: _torchao(dense),
    }
    for name, make in makers.items():
        try:
            runner = make()
        except (ImportError, MissingExtraError) as error:
            print(f"{name} is left out: {error}")
            continue
        yield name, runner


def onnx_runner(path: Path, runtime: str) -> Runner:
    """Return a file's first output."""
    run = load_onnx(path, runtime)
    return lambda batch: run(batch)["last_hidden_state"]


def _torch_runner(model: nn.Module) -> Runner:
    def run(batch: Batch) -> Tensor:
        with torch.inference_mode():
            result: Tensor = model(**batch).last_hidden_state
        return result

    return run


def _autocast_runner(model: nn.Module) -> Runner:
    run = _torch_runner(model)

    def autocast(batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(batch)

    return autocast


def _dynamic_int8(plain: Path, folder: Path) -> Runner:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "dynamic.onnx"
    if not path.exists():
        quantize_dynamic(plain, path, weight_type=QuantType.QInt8)
    return onnx_runner(path, "onnxruntime")


def _nncf(dense: nn.Module, inputs: InputSet, folder: Path, precision: str) -> Runner:
    """Quantize as NNCF's documentation does: from torch, for transformers, one text at a time."""
    import nncf
    import openvino

    path = folder / "nncf.xml"
    if not path.exists():
        texts = [
            {name: tensor[row : row + 1].numpy() for name, tensor in batch.items()}
            for batch in inputs.calibration
            for row in range(len(batch["input_ids"]))
        ]
        example = {name: tensor[:2] for name, tensor in inputs.test[0].items()}
        quantized = nncf.quantize(
            openvino.convert_model(dense, example_input=example),
            nncf.Dataset(texts),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(texts),
        )
        openvino.save_model(quantized, path, compress_to_fp16=False)
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()

    def run(batch: Batch) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in batch.items()}
        return torch.from_numpy(request.infer(feed, share_inputs=True)[0])

    return run


def _pruned(dense: nn.Module, inputs: InputSet, folder: Path) -> Runner:
    path = folder / "pruned.onnx"
    if not path.exists():
        few = {name: tensor[:2] for name, tensor in inputs.test[0].items()}
        # 8 texts of each batch: it takes gradients anew for every ratio that it tries.
        calibration: Any = [
            {name: tensor[:8] for name, tensor in batch.items()} for batch in inputs.calibration
        ]
        pruned = torch_pruning(dense, few, _PRUNED_BUDGET, calibration)
        graphopt.export_onnx(pruned, path, few, opset=20, measure=False)
    return onnx_runner(path, "onnxruntime")


def _torchao(dense: nn.Module) -> Runner:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(dense)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    return _torch_runner(quantized)
