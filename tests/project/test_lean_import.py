"""Importing graphopt costs torch and nothing else that is heavy or optional."""

import subprocess
import sys

HEAVY = ("triton", "onnx", "onnxscript", "onnxruntime", "transformers", "mlflow", "scipy")


def test_import_loads_nothing_heavy() -> None:
    code = f"import graphopt, sys; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
