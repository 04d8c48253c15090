"""What the CUDA key of the operators runs where triton is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys, warnings
sys.modules["triton"] = None
import torch
from graphopt.kernels import BlockLayout, block_sparse_linear_reference
from graphopt.kernels.gpu import dispatch, row_dispatch, tiles

# A CUDA device would be asked for its architecture: this one has tiles.
dispatch.architecture = lambda device: "sm_90"
layout = BlockLayout.from_mask(torch.eye(4, dtype=torch.bool), 128, 128)
x, values = torch.randn(5, 512), torch.randn(4, 128, 128)
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    for _ in range(2):
        y = dispatch.block_sparse_linear(x, values, None, layout.rows, layout.columns, 512)
        rows = row_dispatch.gather_rows(x, torch.tensor([3, 1]))
print([str(one.message) for one in found])
print(torch.equal(y, block_sparse_linear_reference(x, values, None, layout)))
print(torch.equal(rows, x[[3, 1]]))
"""


def test_the_dense_form_runs_with_one_warning() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    warnings, *same = done.stdout.splitlines()
    assert warnings.count("install graphopt[triton] for the kernels") == 1, done.stderr
    assert same == ["True", "True"]


@pytest.mark.parametrize("name", ["kernels_gpu.py", "token_rows_gpu.py"])
def test_gpu_benchmarks_need_little_and_end_with_one_sentence_without_a_gpu(name: str) -> None:
    """They run where only torch, triton and numpy are installed."""
    script = Path(__file__).parents[2] / "benchmarks" / name
    code = (
        "import runpy, sys; "
        "missing = ('pydantic', 'yaml', 'typer', 'rich', 'onnx', 'safetensors', 'onnxruntime'); "
        "sys.modules.update(dict.fromkeys(missing)); "
        f"sys.path.insert(0, {str(script.parent)!r}); "
        f"sys.argv = [{name!r}]; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "Nothing was measured: expected a CUDA device, and torch sees none here.\n"
    )
