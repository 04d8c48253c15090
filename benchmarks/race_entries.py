"""graphopt's entries of the deployment race."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

from race_inputs import InputSet, Runner
from race_rivals import onnx_runner
from torch import nn

import graphopt
from graphopt.passes.errors import GraphoptError
from graphopt.recipes import load_recipe
from graphopt.runtimes import runtime_names


def contestants(
    dense: nn.Module, inputs: InputSet, folder: Path, recipes: list[str], recovered: list[Path]
) -> Iterator[tuple[str, Runner]]:
    """Yield every recipe and every saved model, in every runtime that is installed."""
    for recipe in recipes:
        path = folder / f"{inputs.name}_{recipe.replace('/', '_')}.onnx"
        try:
            model = _optimized(dense, inputs, recipe)
        except GraphoptError as error:
            print(f"graphopt {recipe} is left out: {error}")
            continue
        yield from _in_runtimes(f"graphopt {recipe}", model, inputs, path)
    for index, saved in enumerate(recovered):
        path = folder / f"{inputs.name}_recovered_{index}.onnx"
        yield from _in_runtimes(f"graphopt {saved.name}", graphopt.load(saved), inputs, path)


def _optimized(dense: nn.Module, inputs: InputSet, name: str) -> nn.Module:
    # Files are what races: a layer is kept if it is faster in their runtime, not in torch.
    recipe = load_recipe(name).model_copy(update={"runtime": "onnxruntime"})
    if inputs.name == "full":
        passes = tuple(spec for spec in recipe.passes if spec.name != "pack-tokens")
        recipe = recipe.model_copy(update={"passes": passes})
    return graphopt.optimize(
        copy.deepcopy(dense), inputs.test[0], recipe=recipe, calibration=inputs.calibration
    )


def _in_runtimes(
    name: str, model: nn.Module, inputs: InputSet, path: Path
) -> Iterator[tuple[str, Runner]]:
    few = {key: tensor[:4] for key, tensor in inputs.test[0].items()}
    print(graphopt.export_onnx(model, path, few))
    for runtime in runtime_names():
        yield f"{name}, {runtime}", onnx_runner(path, runtime)
