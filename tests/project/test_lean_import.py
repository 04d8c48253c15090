"""Importing graphopt costs torch and nothing else that is heavy or optional."""

import subprocess
import sys

HEAVY = (
    "triton",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "transformers",
    "lightning",
    "mlflow",
    "scipy",
)


def test_import_loads_nothing_heavy() -> None:
    # torch imports triton by itself where it is installed (its FLOP counter, its compiler) and does
    # without where it is not: here it is not, and what imported it would fail.
    code = (
        "import sys; sys.modules['triton'] = None; import graphopt; "
        f"print([name for name in {HEAVY} if sys.modules.get(name)])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
