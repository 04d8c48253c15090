"""Predicted times: operations or bytes, whichever takes longer; the words that go with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.passes.costs import Costs
from graphopt.passes.errors import ConfigError
from graphopt.passes.roofline import COPIED_BYTES, PRODUCT_SIZE, Rates, predicted_ms, rates_from
from graphopt.passes.runners import TorchRunner
from graphopt.passes.workload import Workload

RATES = Rates(flops_per_ms=1e6, bytes_per_ms=1e5)


def linear(rows: int, size: int) -> Workload:
    layer = nn.Linear(size, size, bias=False, device="meta")
    return Workload.of_shape(layer, (rows, size), torch.float32)


def test_a_product_takes_as_long_as_its_operations() -> None:
    # 2 * 512^3 operations at 1e6 a millisecond; 3 * 4 * 512^2 bytes would take 31.5 ms.
    expected = 2 * 512**3 / 1e6
    assert predicted_ms(linear(512, 512), RATES, training=False) == pytest.approx(expected)
    bytes_too = Rates(flops_per_ms=1e6, bytes_per_ms=1e3)
    assert predicted_ms(linear(512, 512), bytes_too, training=False) == pytest.approx(
        3 * 4 * 512**2 / 1e3
    )


def test_a_product_of_one_row_takes_as_long_as_its_bytes() -> None:
    size_bytes = 4 * (64 * 64 + 2 * 64)
    assert predicted_ms(linear(1, 64), RATES, training=False) == pytest.approx(size_bytes / 1e5)


def test_a_training_step_is_three_products() -> None:
    work = linear(2048, 512)
    forward, step = (predicted_ms(work, RATES, training=mode) for mode in (False, True))
    assert step == pytest.approx(3 * forward)


def test_rates_are_those_of_the_product_and_the_copy() -> None:
    rates = rates_from(2.0, 4.0)
    assert rates.flops_per_ms == PRODUCT_SIZE**3
    assert rates.bytes_per_ms == COPIED_BYTES / 2


class TooLarge(nn.Module):
    """Runs on shapes, but on no device: the memory is too small."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_meta:
            raise MemoryError("out of memory")
        result: torch.Tensor = self.layer(x)
        return result


@pytest.mark.parametrize("training", [False, True])
def test_what_cannot_be_measured_is_predicted_and_says_so(training: bool, tmp_path: Path) -> None:
    costs = Costs(tmp_path / "costs.json", budget_s=0.001)
    found = costs.compare(
        Workload.of_shape(TooLarge(512), (4096, 512), torch.float32),
        Workload.of_shape(TooLarge(256), (4096, 256), torch.float32),
        training=training,
    )
    assert found.source == "predicted"
    assert found.ratio == pytest.approx(4, rel=0.2)
    alone = costs.latency(
        Workload.of_shape(TooLarge(512), (4096, 512), torch.float32), training=training
    )
    assert (alone.latency_ms, alone.source) == (found.dense_ms, "predicted")
    # Only the rates are kept: a later run may be able to measure.
    assert (tmp_path / "costs.json").read_text().count("rates of") == 1
    assert "vs" not in (tmp_path / "costs.json").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that is not here")
def test_times_on_a_device_that_is_not_here_are_predicted() -> None:
    costs = Costs(device="cuda", budget_s=0.001)
    found = costs.compare_modules(
        nn.Linear(512, 512), nn.Linear(512, 64), (4096, 512), torch.float32, training=False
    )
    assert found.source == "predicted"
    assert found.ratio > 2


def test_a_candidate_that_does_not_run_is_not_faster() -> None:
    costs = Costs(budget_s=0.001)
    found = costs.compare_modules(
        nn.Linear(16, 16), TooLarge(16), (4, 16), torch.float32, training=False
    )
    assert (found.ratio, found.source) == (0.0, "measured")


class Refusing(TorchRunner):
    """A runtime that a user asked for something it does not do."""

    def prepare(self, work: Workload, *, training: bool) -> Any:
        raise ConfigError("not here")


def test_what_a_user_has_to_change_is_not_predicted_away() -> None:
    costs = Costs(runner=Refusing())
    with pytest.raises(ConfigError, match="not here"):
        costs.module_latency_ms(nn.Linear(2, 2), (1, 2), torch.float32, training=False)
