"""Two processes that train together end where one process with all the data ends."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks_kit
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from two_ranks import RANKS, build, run_rank, train

LONGEST_S = 240


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with the kit in one process, then in two; return their files.

    Once, because starting ranks takes most of the time.
    """
    path = tmp_path_factory.mktemp("ranks")
    two_ranks_kit.train_and_save("one", path, "one")
    ranks = spawn(run_rank, (str(path),), nprocs=RANKS, join=False)
    started = time.monotonic()
    while not ranks.join(timeout=5):
        if time.monotonic() - started > LONGEST_S:
            for process in ranks.processes:
                process.kill()
            pytest.fail(f"two ranks were not done after {LONGEST_S} s: one waits for the other")
    return path


def loaded(directory: Path, name: str) -> list[dict[str, Tensor]]:
    files = [directory / f"{name}-{rank}.pt" for rank in range(RANKS)]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("moving", [False, True])
def test_layers_train_alike_in_one_process_and_in_two(
    directory: Path, kind: str, moving: bool
) -> None:
    expected = train(build(), slice(None), moving=moving)
    assert moving != torch.equal(expected["0.columns"], build().state_dict()["0.columns"])
    ranks = loaded(directory, f"{kind}-{moving}")
    outputs = torch.cat([found.pop("output") for found in ranks])
    # The mean of two means is rounded differently from one mean; six steps of Adam and sums over
    # at most 24 terms and 16 tokens amplify 1e-16 by less than 1e5.
    torch.testing.assert_close(outputs, expected["output"], rtol=0, atol=1e-11)
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-11)


def test_the_density_falls_alike_on_every_rank(directory: Path) -> None:
    first, second = loaded(directory, "density")
    assert [len(first[name]) for name in ("0.values", "2.values")] == [3, 5]
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def read(directory: Path, name: str) -> Any:
    return json.loads((directory / f"{name}.json").read_text())


def assert_same_steps(found: list[list[float]], expected: list[list[float]]) -> None:
    """Losses up to rounding, and all that is counted or drawn exactly.

    In the last step an odd number of samples is left: two ranks train one of them twice, each time
    with half of its weight, so that is counted and nothing else changes.
    """
    assert [step[1:] for step in found[:-1]] == [step[1:] for step in expected[:-1]]
    assert found[-1][4:] == expected[-1][4:]
    losses = [torch.tensor([step[0] for step in steps]).double() for steps in (found, expected)]
    # Sums over at most 8 * 48 terms in another order; Adam amplifies 1e-16 by less than 1e6 in
    # nine steps.
    torch.testing.assert_close(*losses, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_kit_trains_alike_in_one_process_and_in_two(directory: Path, kind: str) -> None:
    expected = read(directory, "one")
    samples = [step[3] for step in expected]
    assert min(samples) < two_ranks_kit.BATCH  # an epoch with dropped samples was among them
    assert [ranks_steps[-1][3] for ranks_steps in (expected, read(directory, f"{kind}-0"))] == [
        1,
        2,
    ]
    assert len({tuple(step[4:]) for step in expected}) == len(expected)
    ranks = [read(directory, f"{kind}-{rank}") for rank in range(RANKS)]
    assert ranks[0] == ranks[1]
    assert_same_steps(ranks[0], expected)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_one_process_goes_on_from_a_checkpoint_of_two(directory: Path, kind: str) -> None:
    found = two_ranks_kit.resume("one", directory / f"{kind}-saved")
    assert_same_steps(found, read(directory, "one")[two_ranks_kit.SAVED_AT :])


@pytest.mark.parametrize("way", ["one to ddp", "one to fsdp2", "ddp to fsdp2"])
def test_two_processes_go_on_from_any_checkpoint(directory: Path, way: str) -> None:
    ranks = [read(directory, f"resumed-{rank}")[way] for rank in range(RANKS)]
    assert ranks[0] == ranks[1]
    assert_same_steps(ranks[0], read(directory, "one")[two_ranks_kit.SAVED_AT :])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_one_rank_writes_the_ledger_of_all(directory: Path, kind: str) -> None:
    def entries(name: str) -> list[dict[str, Any]]:
        lines = (directory / f"{name}.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [{key: entry[key] for key in ("step", "flops", "tokens")} for entry in found]

    assert entries(kind)[:-1] == entries("one")[:-1]
    assert entries(kind)[-1]["tokens"] == 2 * entries("one")[-1]["tokens"]


def test_no_rank_waits_for_one_with_fewer_or_shorter_batches(directory: Path) -> None:
    ranks = [read(directory, f"uneven-{rank}") for rank in range(RANKS)]
    assert ranks[0] == ranks[1]
    assert [step[1] for step in ranks[0]] == [2 * 48 + 3 * 32, 2 * (192), 3 * (192)]
    assert all(progress == router for progress, _, router in ranks[0])
