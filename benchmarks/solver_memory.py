"""Peak memory of calibrating, estimating losses and solving, in sizes of the model.

Resident memory of the process is sampled while `graphopt.optimize` runs with calibration data, the
solver and in place; the base is what the process holds after the model ran once. What comes before
the first report of progress is capture, which compares gradients of the whole model with those of
its graph: it has a column of its own. Large blocks go back to the system at once, so that what was
freed is not counted. GPT-2-shaped models with random weights; the bound of the
design is twice the model plus the Gram matrices of one layer, the widest: 2 float64 matrices of
[inputs, inputs].
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

import graphopt
from graphopt.environment import environment, write_csv
from graphopt.recipes import load_recipe

PASSES = ("prune-channels", "factorize-low-rank", "quantize-weights")
_MIB = 2**20
_M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""


@dataclass(frozen=True)
class Row:
    """One model; sizes in MiB. `over_bound`, of calibrating and solving, is to stay below 1."""

    model: str
    model_mib: float
    gram_mib: float
    base_mib: float
    capture_mib: float
    peak_mib: float
    added_mib: float
    added_models: float
    over_bound: float


class Peak:
    """The largest resident memory of this process while a block runs."""

    def __init__(self) -> None:
        self.size_bytes = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def again(self) -> int:
        """Return the largest size so far and start from what is held now."""
        found, self.size_bytes = self.size_bytes, resident_bytes()
        return found

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.01):
            self.size_bytes = max(self.size_bytes, resident_bytes())


def resident_bytes() -> int:
    """Return the resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def main(
    layers: Annotated[int, typer.Option(help="Transformer layers.")] = 12,
    width: Annotated[int, typer.Option(help="Width; the feed-forward has four times that.")] = 768,
    output: Annotated[Path, typer.Option(help="CSV file to add rows to.")] = (
        Path(__file__).parent / "results" / "solver_memory.csv"
    ),
) -> None:
    """Optimize one model and add one row."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MIB // 4)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, use_cache=False)
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = [
        {"input_ids": torch.randint(0, 50257, (2, 64), generator=generator)} for _ in range(8)
    ]
    with torch.no_grad():
        model(**tokens[0])
    model_mib = sum(parameter.nbytes for parameter in model.parameters()) / _MIB
    gram_mib = 2 * (4 * width) ** 2 * 8 / _MIB
    base = resident_bytes() / _MIB
    captured: list[float] = []
    with Peak() as peak:

        def told(_: str, __: int, ___: int) -> None:
            if not captured:
                captured.append(peak.again() / _MIB)

        graphopt.optimize(
            model,
            tokens[0],
            recipe=load_recipe(PASSES).model_copy(update={"allocation": "solver"}),
            budget="60%",
            calibration=tokens,
            inplace=True,
            measure=False,
            progress=told,
        )
    added = peak.size_bytes / _MIB - base
    row = Row(
        model=f"GPT-2, {layers} layers of width {width}",
        model_mib=round(model_mib, 1),
        gram_mib=round(gram_mib, 1),
        base_mib=round(base, 1),
        capture_mib=round(captured[0], 1),
        peak_mib=round(peak.size_bytes / _MIB, 1),
        added_mib=round(added, 1),
        added_models=round(added / model_mib, 3),
        over_bound=round(added / (2 * model_mib + gram_mib), 3),
    )
    typer.echo(str(row))
    write_csv(output, [row], environment())


if __name__ == "__main__":
    typer.run(main)
