"""Statistics from batches: exact, masked, resumable, and refused where batches do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import EXAMPLE, find_case

from graphopt.capture import capture
from graphopt.passes.calibration import Calibration
from graphopt.passes.errors import InputError
from graphopt.passes.padding import real_tokens
from graphopt.passes.program import Program


class Masked(nn.Module):
    """Attention over tokens whose padding an input names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.outer = nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = (x @ x.transpose(1, 2)).masked_fill(mask[:, None] == 0, -1e9)
        result: Tensor = self.outer(self.inner(scores.softmax(-1) @ x))
        return result


def batch(seed: int, rows: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (rows, 1), generator=generator)
    return {
        "x": torch.randn(rows, 6, 8, generator=generator),
        "mask": (torch.arange(6) < lengths).long(),
    }


@pytest.fixture
def program() -> Program:
    return capture(Masked(), batch(0))


def node_of(program: Program) -> Any:
    return (program.calls("outer")[0].all_input_nodes[0], -1)


def test_statistics_are_those_of_the_real_tokens(program: Program) -> None:
    batches = [batch(seed, rows=seed + 2) for seed in range(4)]
    found = Calibration(batches).statistics(program, [node_of(program)])
    rows = []
    with torch.no_grad():
        for item in batches:
            scores = (item["x"] @ item["x"].transpose(1, 2)).masked_fill(
                item["mask"][:, None] == 0, -1e9
            )
            hidden = program.model.get_submodule("inner")(scores.softmax(-1) @ item["x"])
            rows.append(hidden[item["mask"].bool()].double())
    expected = torch.cat(rows)
    assert found.count == len(expected)
    torch.testing.assert_close(found.covariance, expected.T.cov(correction=0))


def test_a_stored_statistic_is_not_computed_again(program: Program, tmp_path: Path) -> None:
    seen: list[int] = []

    class Batches(list[dict[str, Any]]):
        def __iter__(self) -> Any:
            seen.append(1)
            return super().__iter__()

    batches = Batches([batch(0), batch(1)])
    first = Calibration(batches, store=tmp_path).statistics(program, [node_of(program)])
    runs = len(seen)
    program.changed()
    again = Calibration(batches, store=tmp_path).statistics(program, [node_of(program)])
    assert torch.equal(first.covariance, again.covariance)
    assert len(seen) - runs < runs
    program.model.get_parameter("inner.weight").data.mul_(2)
    program.changed()
    other = Calibration(batches, store=tmp_path).statistics(program, [node_of(program)])
    assert not torch.equal(first.covariance, other.covariance)


def test_progress_is_told_about_every_batch(program: Program) -> None:
    told: list[tuple[int, int]] = []
    data = Calibration(
        [batch(0), batch(1)], progress=lambda label, done, total: told.append((done, total))
    )
    data.statistics(program, [node_of(program)])
    assert told == [(1, 2), (2, 2)]


def test_modes_and_gradients_are_left_alone(program: Program) -> None:
    program.model.train()
    program.model.get_submodule("inner").eval()
    found = Calibration([batch(0)]).statistics(program, [node_of(program)])
    assert program.model.training
    assert not program.model.get_submodule("inner").training
    assert not found.covariance.requires_grad


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "holds no batch"),
        ([{"x": torch.randn(2, 6, 8)}], "lacks mask, which the example inputs have; it has x"),
        ([{"x": [torch.randn(2, 6, 8)], "mask": torch.ones(2, 6)}], "another structure"),
    ],
)
def test_batches_that_do_not_fit_are_refused(
    program: Program, batches: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Calibration(batches).statistics(program, [node_of(program)])


@pytest.mark.parametrize(
    "name", ["bert", "gpt2-padded", "llama-padded", "mpt-padded", "transformer-encoder-padded"]
)
def test_masks_of_either_meaning_are_understood(name: str) -> None:
    case = find_case(name)
    _, call = case.call(*EXAMPLE)
    program = capture(case.build(), call)
    found = real_tokens(program, call)
    assert found is not None
    assert found.sum(1).tolist() == [9, 8, 7]


def test_a_mask_does_not_hide_other_tokens() -> None:
    case = find_case("t5")
    _, call = case.call(*EXAMPLE)
    program = capture(case.build(), call)
    call = {**call, "decoder_input_ids": call["input_ids"]}
    counts = {}
    for side in ("encoder", "decoder"):
        node = program.calls(f"{side}.block.0.layer.0.SelfAttention.o")[0].all_input_nodes[0]
        counts[side] = Calibration([call]).statistics(program, [(node, -1)]).count
    assert counts == {"encoder": int(call["attention_mask"].sum()), "decoder": 27}
