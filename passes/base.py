"""The contract of a pass: it proposes changes, and a change can be replayed.

A pass reads a program and proposes candidates; the budget chooses; the manager settles, transfers
and applies each chosen change, in this order, and the verifier checks the result. `apply` is
structure only and works on the meta device, so that loading a checkpoint, capturing another call
and reproducing a bug are all "apply this plan to that model".
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from .errors import ConfigError
from .latency import Comparison, Source
from .memory_order import laid_out_like
from .program import Program

if TYPE_CHECKING:
    from .calibration import Calibration
    from .costs import Costs

State = dict[str, torch.Tensor]
"""Parameters and buffers by their names in the model."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One rewrite, as data.

    Attributes:
        pass_name: The pass that applies it.
        target: What it rewrites: a module or parameter name.
        summary: Before and after in a few words: "1536 -> 768 hidden units".
        details: All that `apply` needs; JSON values only.
    """

    pass_name: str
    target: str
    summary: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a part of a program costs at the example's sizes.

    Attributes:
        flops: Floating point operations of one forward (a multiply-add is 2).
        size_bytes: Bytes of the parameters it reads.
        parameters: Number of those parameters.
        latency_ms: Time at the example's sizes, None where nothing is known of it.
        latency_source: Where the time comes from; empty where there is none.
    """

    flops: int
    size_bytes: int
    parameters: int
    latency_ms: float | None = None
    latency_source: Literal["", Source] = ""

    def timed(self, latency_ms: float, source: Source = "measured") -> Cost:
        """Return the cost with a time."""
        return replace(self, latency_ms=latency_ms, latency_source=source)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A change that could be made, with what it would bring.

    Attributes:
        change: The change.
        before: Cost of what it rewrites.
        after: Cost of what takes its place.
        predicted_error: Relative output error of the rewritten part: 0 for exact changes, None
            where it is not known without data.
        loss: Estimate of what it adds to the squared relative error of the model's outputs, None
            where nothing estimated it.
        loss_source: How the loss was found: "data", "measured" or "weights".
        shared: What other candidates may change too, if they share it as well (see `exclusive`).
        exclusive: What no other candidate may claim, shared or not. Both hold names such as
            "encoder.fc.weight structure" (sizes and values of a parameter) and
            "encoder.fc.weight format" (how it is stored and multiplied). Candidates of one pass
            for one target exclude each other in any case.
    """

    change: Change
    before: Cost
    after: Cost
    predicted_error: float | None = None
    loss: float | None = None
    loss_source: str = ""
    shared: frozenset[str] = frozenset()
    exclusive: frozenset[str] = frozenset()

    def timed(self, times: Comparison) -> Candidate:
        """Return the candidate with the times of what it rewrites and of what takes its place."""
        return replace(
            self,
            before=self.before.timed(times.dense_ms, times.source),
            after=self.after.timed(times.candidate_ms, times.source),
        )


@dataclass(frozen=True, kw_only=True)
class Miss:
    """Why a pass leaves something as it is."""

    pass_name: str
    target: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """Everything a pass found: what it could change and what it could not, with reasons."""

    candidates: tuple[Candidate, ...] = ()
    misses: tuple[Miss, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Context:
    """What passes may know besides the program.

    Attributes:
        budget: Share of the dense model's forward FLOPs to keep, in (0, 1]; None keeps a pass's
            own default.
        training: Whether rewrites must pay in a training step (else in inference).
        ignore: Target patterns to leave alone: module or parameter names, or `re:` and a regular
            expression; a name covers everything below it.
        keep: Per-target overrides of the kept share, pattern -> share in (0, 1].
        calibration: Batches with their statistics, None without data.
        costs: Measured times of rewritten parts; None measures nothing.
    """

    budget: float | None = None
    training: bool = False
    ignore: tuple[str, ...] = ()
    keep: Mapping[str, float] = field(default_factory=dict)
    calibration: Calibration | None = None
    costs: Costs | None = None

    def ignored_by(self, *names: str) -> str | None:
        """Return the pattern that excludes one of these names, None if none does."""
        return next((p for p in self.ignore if any(matches(p, name) for name in names)), None)

    def kept_share(self, default: float, *names: str) -> float:
        """Return the share of units to keep for these names: an override or the default."""
        return next(
            (s for p, s in self.keep.items() if any(matches(p, name) for name in names)), default
        )


class Pass(ABC):
    """A rewrite rule. Subclasses are final, frozen dataclasses; their fields are the options."""

    name: ClassVar[str]
    """Textual name, used in reports, errors, pipelines and plan.json."""
    exact: ClassVar[bool]
    """Whether outputs and gradients stay the same; the verifier holds it to that."""
    inference_only: ClassVar[bool] = False
    """Whether the result must not be trained."""

    def requires(self, program: Program, context: Context) -> None:  # noqa: B027 - optional hook
        """Raise PreconditionError, with a sentence, if the pass cannot run at all."""

    def note_unread(self, program: Program) -> None:  # noqa: B027 - optional hook
        """Note on the program what of its call nobody reads, if the options say so.

        This is `program.padding`, the input that marks padding, and `program.unread_outputs`. It
        is called before the program is observed; `apply` notes the same.
        """

    @abstractmethod
    def propose(self, program: Program, context: Context) -> Proposal:
        """Return what could change and what could not, with reasons; touch nothing."""

    def offer(self, program: Program, context: Context) -> Proposal:
        """Return alternatives for every target, from mild to strong: what the solver chooses from.

        The budget of the context plays no part. A pass that knows one form of a change only offers
        what it proposes.
        """
        return self.propose(program, replace(context, budget=None))

    def reconstruct(self, program: Program, change: Change, state: State) -> State | None:
        """Return dense parameters of the program with which it computes what the change makes.

        They have the shapes of the program's own: removed units are zeros in what reads them,
        factors are multiplied, rounded weights are the numbers they stand for. None where no
        parameters do that.

        Args:
            program: The program without the change.
            change: As settled.
            state: What `transfer` returned for it.
        """
        return None

    def settle(self, program: Program, candidate: Candidate, context: Context) -> Candidate:
        """Return the candidate with its last details decided on the program as it is now.

        Called right before `transfer`, when all earlier changes are in place.
        """
        return candidate

    def resized(self, program: Program, candidate: Candidate, context: Context) -> Candidate:
        """Return the candidate for its target's present sizes, for dry runs: values do not matter.

        A pass whose `settle` is costly, or needs calibration data, says here what it can without.
        """
        return self.settle(program, candidate, context)

    @abstractmethod
    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return the new values of what `apply` makes or resizes; touch nothing."""

    @abstractmethod
    def apply(self, program: Program, change: Change) -> None:
        """Make the change in modules and graph; structure only, values come from `transfer`.

        Raises:
            PlanError: if the change does not fit the program.
        """

    def trains_only(self, change: Change) -> bool:
        """Say whether the change does nothing in evaluation mode, so that exports leave it out."""
        return False

    @abstractmethod
    def restore(self, model: nn.Module, change: Change) -> None:
        """Undo the change on the modules, values included: an ordinary dense model again.

        Raises:
            PlanError: if that is not possible, with the reason.
        """


def matches(pattern: str, name: str) -> bool:
    """Say whether a target pattern covers a name.

    Raises:
        ConfigError: if the regular expression after `re:` is not valid.
    """
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise ConfigError(
                f"the pattern {pattern!r} is not a regular expression: {error}"
            ) from error
    return (
        name == pattern
        or name.startswith(pattern + ".")
        or name.endswith("." + pattern)
        or (f".{pattern}." in f".{name}.")
    )


def parse_share(value: float | str | None, what: str) -> float | None:
    """Return a share given as a fraction (0.6) or a percentage ("60%").

    Raises:
        ConfigError: if it is not in (0, 1].
    """
    if value is None:
        return None
    text = str(value).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise ConfigError(f"{what} must be a share such as 0.6 or '60%', got {value!r}") from error
    if not 0 < share <= 1:
        raise ConfigError(f"{what} must be above 0 and at most 1 (100%), got {value!r}")
    return share


def set_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a parameter or buffer of the model another value, of any shape, by its name.

    It lies in memory as the old one does: convolutions of weights whose channels do not come last
    are slower beside others.
    """
    parent, _, attribute = name.rpartition(".")
    module = model.get_submodule(parent)
    old = getattr(module, attribute)
    value = laid_out_like(value, old)
    if isinstance(old, nn.Parameter):
        setattr(module, attribute, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        module._buffers[attribute] = value


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of the one with this name."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def shared_names(model: nn.Module, name: str) -> Sequence[str]:
    """Return every name under which the tensor of this name is registered (tied weights)."""
    parent, _, attribute = name.rpartition(".")
    tensor = getattr(model.get_submodule(parent), attribute)
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return [other for other, value in tensors if value is tensor]
