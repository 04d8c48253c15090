"""What a study compares, as its YAML file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

DENSE = "dense"
METHOD = "method"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Samples(_Strict):
    """Which samples an epoch trains on.

    Attributes:
        choice: "all"; "learned" drops part of those that are learned (`SampleGate`); "uniform" is
            its naive twin: as many are dropped, whatever their loss.
        drop: Probability with which a sample that may be dropped is dropped.
        stop: Share of the training after which nothing is dropped.
    """

    choice: Literal["all", "learned", "uniform"] = "all"
    drop: float = 0.5
    stop: float = 0.875


class Arm(_Strict):
    """One way to train.

    Attributes:
        share: Its budget, as a share of the dense model's full one; None for every share of the
            study.
        recipe: Name of a recipe, or passes by comma; None to train the model as it is.
        budget: Share of the dense operations that the recipe is given; None for no budget.
        model: Arguments of the workload's model that differ from the study's.
        samples: Which samples are trained on.
        batch: Samples of a step, None for the study's.
        even_batches: Whether batches hold more images while these are small.
        rates: Peak learning rates to tune over, None for the study's.
        seeds: Seeds of each of its budgets, None for the study's.
    """

    share: float | None = Field(default=None, gt=0)
    recipe: str | None = None
    budget: float | None = Field(default=None, gt=0, lt=1)
    model: dict[str, Any] = Field(default_factory=dict)
    samples: Samples = Samples()
    batch: int | None = Field(default=None, gt=0)
    even_batches: bool = False
    rates: tuple[float, ...] | None = None
    seeds: int | None = Field(default=None, gt=0)


class Study(_Strict):
    """A workload, its dense model, and what is compared with that.

    Attributes:
        workload: Which data and models.
        model: Arguments of the workload's model.
        options: Arguments of the workload itself.
        batch: Samples of a step.
        epochs: What the full budget is: so many epochs of the dense model.
        warmup: Share of the training in which the learning rate rises.
        weight_decay: Of AdamW.
        rates: Peak learning rates to tune over, for every arm and budget.
        shares: Budgets of the dense model, as shares of the full one.
        tuned: Seeds that tune: 0, -1 and so on; more of them where the tuning split is small.
        seeds: Seeds of every arm and budget, from 1.
        full_seeds: Seeds of the full budget, and of the method if it does not say its own.
        tolerance: By how much the method's loss may exceed the full budget's (non-inferiority).
        tolerance_accuracy: By how much its accuracy may fall short, in points; None for no
            accuracy.
        arms: By name; the method is called "method".
    """

    workload: Literal["topics", "language", "images"]
    model: dict[str, Any] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    batch: int = Field(gt=0)
    epochs: float = Field(gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = 0.01
    rates: tuple[float, ...] = Field(min_length=1)
    shares: tuple[float, ...] = (0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
    tuned: int = Field(default=1, gt=0)
    seeds: int = Field(default=3, gt=0)
    full_seeds: int = Field(default=5, gt=0)
    tolerance: float = 0.005
    tolerance_accuracy: float | None = 0.2
    arms: dict[str, Arm]

    def arm(self, name: str) -> Arm:
        """Return an arm by its name; the dense one needs no entry."""
        return self.arms.get(name, Arm())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all arms, the dense one first."""
        return (DENSE, *(name for name in self.arms if name != DENSE))

    def shares_of(self, name: str) -> tuple[float, ...]:
        """Return the budgets of an arm."""
        share = self.arm(name).share
        return self.shares if share is None else (share,)

    def rates_of(self, name: str) -> tuple[float, ...]:
        """Return the learning rates that an arm is tuned over."""
        return self.arm(name).rates or self.rates

    @property
    def tuning_seeds(self) -> range:
        """The seeds that tune, on a split of their own."""
        return range(0, -self.tuned, -1)

    def seeds_of(self, name: str, share: float) -> range:
        """Return the seeds that count for an arm at a budget."""
        if name == DENSE and share == max(self.shares):
            return range(1, 1 + self.full_seeds)
        usual = self.full_seeds if name == METHOD else self.seeds
        return range(1, 1 + (self.arm(name).seeds or usual))


def read_study(path: Path, **settings: Any) -> Study:
    """Return a study from its YAML file, with settings on top.

    Raises:
        SystemExit: if the file does not say one, with the reason.
    """
    try:
        return Study.model_validate({**yaml.safe_load(path.read_text("utf-8")), **settings})
    except (OSError, ValidationError, yaml.YAMLError) as error:
        raise SystemExit(f"{path} is no study: {error}") from error
