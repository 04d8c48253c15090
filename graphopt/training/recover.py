"""Getting accuracy back after a model was made cheaper: it learns from the dense one, unlabelled.

First layer by layer, each block alone; then all of it, end to end; the best weights are kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphopt.datasets import open_batches
from graphopt.errors import ConfigError, TrainingError
from graphopt.held_out import split
from graphopt.kernels.quantized_linear import QuantizedLinear
from graphopt.passes.calls import signature_of
from graphopt.runtime import installation_of, replace_plan

from .random_states import random_states, restore_random_states
from .recovery_batches import TrainingBatches
from .recovery_loop import RecoveryLoop, RecoverySettings
from .recovery_outputs import HeldOut, ReadOutputs
from .recovery_report import attach
from .recovery_rounding import trainable_rounding

Progress = Callable[[str, int, int], None]


def recover(
    model: nn.Module,
    teacher: nn.Module,
    loader: Any,
    *,
    minutes: float = 15.0,
    steps: int | None = None,
    held_out: Any = None,
    score: Callable[[nn.Module], float] | None = None,
    learning_rate: float = 5e-4,
    layerwise: float = 0.15,
    autocast: torch.dtype | None = None,
    seed: int = 0,
    store: str | Path | None = None,
    tokenizer: str | Path | None = None,
    inplace: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Train an optimized model to do what the dense one does, on batches without labels.

        model = graphopt.optimize(dense, batch, recipe="deploy")
        model = graphopt.recover(model, dense, loader, minutes=15)

    The loss is the squared relative error of the outputs that are read (padding does not count) and
    of the hidden values of all blocks that both models have, by name. In the first part of the time
    every block reads what the dense blocks before it give, so all of them learn side by side what
    they lost; in the rest each reads what the cheap ones give. Muon moves the matrices of layers,
    AdamW everything else, gradients clipped to norm 1; the learning rate rises for the first 5 % of
    the time and falls to 0 at its end. Both models run in evaluation mode: no dropout, running
    statistics stay. The guard's measure of the outputs (drift, or the user's score) is taken on
    held-out batches about 20 times, and the best weights are kept: the result is never worse than
    the model that came, by that measure. After a fifth of the time without improvement the best
    weights are gone back to and the learning rate is a third; the third time it ends early.
    `training.recovery_of(result)` tells all, a note in the plan the outcome.

    Quantized layers are trained as float ones that compute with their weight rounded (gradients
    pass straight through), and are rounded again at the end.

    Ctrl-C returns the best so far. With a store the next call goes on where this one stopped.

    Args:
        model: What `optimize` returned, or any cheaper model with the teacher's outputs.
        teacher: The dense model.
        loader: Unlabelled batches: what `optimize` takes as calibration. Of these, the last
            quarter (at most 16 batches) is held out; a loader that shuffles is kept in memory.
        minutes: Time to spend, with judging; the last step is finished.
        steps: Train this many steps, if the time allows, with a schedule over steps instead of
            time: the result is then the same on every run.
        held_out: Other batches to judge by; all of the loader is then trained on.
        score: Judges a model instead of the drift, higher is better.
        learning_rate: The highest of the schedule.
        layerwise: Share of the time for blocks alone, in [0, 1).
        autocast: Compute matrix products in this type; bfloat16 where the CPU multiplies it.
        seed: Of the order in which a loader shuffles.
        store: Directory to go on from after a stop; it is written at every judging.
        tokenizer: Directory with the tokenizer for texts.
        inplace: Train this very model instead of a copy.
        progress: Told about every step: label, seconds (or steps) done, all.

    Returns:
        The trained model, with the modes and `requires_grad` flags of the one that came.

    Raises:
        ConfigError: An option is outside its range.
        InputError: The batches do not fit the models.
        TrainingError: Nothing can be trained, or the outputs of the two do not fit.
        CheckpointError: The store belongs to another model, or is damaged.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Romero et al.,
    FitNets, 2015 (hidden values); Muralidharan et al., Compact Language Models via Pruning and
    Knowledge Distillation, 2024 (after pruning).
    """
    _check(model, teacher, minutes, steps, learning_rate, layerwise)
    settings = RecoverySettings(
        seconds=60 * minutes,
        steps=steps,
        learning_rate=learning_rate,
        layerwise=layerwise,
        autocast=autocast,
        store=None if store is None else Path(store),
        progress=progress,
    )
    loop = RecoveryLoop(settings)
    arguments = tuple(signature_of(model).parameters)
    directory = None if tokenizer is None else Path(tokenizer)
    student = model if inplace else copy.deepcopy(model)
    with _own_randomness(seed), _evaluating(student, teacher):
        batches = open_batches(loader, model_arguments=arguments, tokenizer_dir=directory)
        if held_out is None:
            parts = split(batches)
            assert parts.fitted is not None
            trained, judged = parts.fitted, list(parts.held_out)
        else:
            trained = batches
            judged = list(
                open_batches(held_out, model_arguments=arguments, tokenizer_dir=directory)
            )
        outputs = ReadOutputs(student, teacher, judged[0])
        examined = HeldOut.of(outputs, teacher, judged, score)
        with trainable_rounding(student):
            report = loop.run(student, teacher, TrainingBatches(trained, seed), examined)
    attach(student, report)
    installation = installation_of(student)
    if installation is not None:
        notes = (*installation.plan.notes, f"recovered: {report}")
        replace_plan(student, installation.plan.model_copy(update={"notes": notes}))
    return student


def _check(
    model: nn.Module,
    teacher: nn.Module,
    minutes: float,
    steps: int | None,
    learning_rate: float,
    layerwise: float,
) -> None:
    if not (math.isfinite(minutes) and minutes > 0):
        raise ConfigError(f"expected minutes above 0, got {minutes}")
    if steps is not None and steps < 1:
        raise ConfigError(f"expected at least 1 step, got {steps}; None trains by the clock")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ConfigError(f"expected a learning rate above 0, got {learning_rate}")
    if not 0 <= layerwise < 1:
        raise ConfigError(f"expected a layer-wise share in [0, 1), got {layerwise}")
    if model is teacher:
        raise TrainingError(
            "expected the dense model as the teacher, got the model itself; keep the model that "
            "graphopt.optimize was given"
        )
    trained = any(parameter.requires_grad for parameter in model.parameters())
    if not trained and not any(isinstance(item, QuantizedLinear) for item in model.modules()):
        raise TrainingError(
            "expected parameters with requires_grad=True, got none; set it on what may be trained"
        )


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Draw from generators of its own; the caller's go on as if nothing had happened."""
    states = random_states()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        restore_random_states(states)


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode; give every module its mode back at the end."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
