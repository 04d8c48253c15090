"""Learning from the dense model: its distribution over the classes, and what its layers compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphopt.errors import ConfigError, TrainingError


class Teacher:
    """A dense model that is asked and not trained: evaluation mode, no gradients.

    Asked within `ledger.step()`, its operations are counted.

    Args:
        model: The dense model; it is put into evaluation mode for the time of a call only.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    # Not inference mode, whose tensors the student's backward pass could not use.
    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's outputs."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            return self.model(*args, **kwargs)
        finally:
            for module in training:
                module.training = True


def distill(
    student: Any,
    teacher: Any,
    *,
    task_loss: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 2.0,
    logit_weight: float = 0.5,
    hidden_weight: float = 0.0,
    project: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return a loss that pulls a cheap model towards the dense one it was made from.

    It is `(1 - a) task + a T^2 KL(teacher || student) + h MSE`, with the distributions of
    `softmax(logits / T)`, a the `logit_weight` and h the `hidden_weight`; the mean over samples
    or, for logits [batch, token, vocabulary], over the tokens that count. MSE is the mean over all
    hidden states of the student, each compared with the one at the same share of the depth, both
    ends included. Numerics: float32 at least.

    Args:
        student: Outputs with `logits`, and `hidden_states` where they are compared: a Hugging Face
            output or a mapping; or the logits alone [..., classes].
        teacher: The same of the teacher.
        task_loss: The student's loss on the labels; None leaves only the teacher, a = 1.
        mask: Which tokens count [batch, token], 1 or True; padding does not.
        temperature: T; higher ones show more of what the teacher holds for less likely.
        logit_weight: a, in [0, 1].
        hidden_weight: h; 0 compares no hidden states.
        project: Maps the student's hidden states to the teacher's width, where they differ.

    Raises:
        ConfigError: A weight or the temperature is outside its range.
        TrainingError: The outputs lack something, or their shapes do not fit.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Jiao et al.,
    TinyBERT, 2020 (hidden states).
    """
    if temperature <= 0 or not 0 <= logit_weight <= 1 or hidden_weight < 0:
        raise ConfigError(
            "expected a temperature above 0, logit_weight in [0, 1] and hidden_weight of at least "
            f"0, got {temperature}, {logit_weight} and {hidden_weight}"
        )
    loss = _divergence(_logits(student), _logits(teacher).detach(), mask, temperature)
    if task_loss is not None:
        loss = (1 - logit_weight) * task_loss + logit_weight * loss
    if hidden_weight:
        mine, wanted = _hidden_states(student, "student"), _hidden_states(teacher, "teacher")
        last = max(len(mine) - 1, 1)
        pairs = [
            (state, wanted[round(place * (len(wanted) - 1) / last)])
            for place, state in enumerate(mine)
        ]
        distances = [_distance(state, other, mask, project) for state, other in pairs]
        loss = loss + hidden_weight * torch.stack(distances).mean()
    return loss


def _divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float
) -> Tensor:
    if student.shape != teacher.shape:
        raise TrainingError(
            f"expected logits of one shape, got {list(student.shape)} of the student and "
            f"{list(teacher.shape)} of the teacher; they must choose among the same classes"
        )
    mine = functional.log_softmax(_precise(student) / temperature, dim=-1)
    wanted = functional.log_softmax(_precise(teacher) / temperature, dim=-1)
    divergence = functional.kl_div(mine, wanted, reduction="none", log_target=True).sum(-1)
    # One distribution per sample has no tokens to leave out.
    return temperature**2 * _mean(divergence, mask if divergence.dim() > 1 else None)


def _distance(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    project: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    mapped = student if project is None else project(student)
    if mapped.shape != teacher.shape:
        raise TrainingError(
            f"expected hidden states of one shape, got {list(mapped.shape)} of the student and "
            f"{list(teacher.shape)} of the teacher; pass project=, a trained linear map from the "
            "student's width to the teacher's"
        )
    squares = (_precise(mapped) - _precise(teacher.detach())).square().mean(-1)
    return _mean(squares, mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the places that count; 0 if none does."""
    if mask is None:
        return values.mean()
    if mask.shape != values.shape:
        raise TrainingError(
            f"expected a mask {list(values.shape)}, got {list(mask.shape)}; it says which tokens "
            "of the batch count"
        )
    counts = mask.to(values.dtype)
    return torch.where(mask.bool(), values, 0.0).sum() / counts.sum().clamp(min=1)


def _precise(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _logits(outputs: Any) -> Tensor:
    found = outputs if isinstance(outputs, Tensor) else _output(outputs, "logits")
    if not isinstance(found, Tensor):
        raise TrainingError(
            f"expected logits, or outputs that have them, got {type(outputs).__name__}; pass "
            "what the model returned, or its logits"
        )
    return found


def _hidden_states(outputs: Any, whose: str) -> Sequence[Tensor]:
    found = None if isinstance(outputs, Tensor) else _output(outputs, "hidden_states")
    if found is None or not len(found):
        raise TrainingError(
            f"expected hidden states of the {whose}, got none; call it with "
            "output_hidden_states=True"
        )
    return tuple(found)


def _output(outputs: Any, name: str) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    return getattr(outputs, name, None)
