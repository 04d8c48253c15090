"""The proof's arithmetic, and a smoke run of its harness on images that are drawn at random."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import typer
from frontier.images import Images
from frontier.language import Language
from frontier.saving import compute_at, difference, frontier, saving, saving_over
from frontier.study import Arm, Study, read_study
from frontier.trial import Trial, full_flops, made, run_trial
from training_frontier import app
from tuning_choice import app as choice_app
from typer.testing import CliRunner


def trials(flops: int, losses: Sequence[float], arm: str = "dense") -> list[Trial]:
    return [
        Trial(
            arm=arm,
            share=1.0,
            rate=0.1,
            seed=seed,
            precision="float32",
            loss=loss,
            accuracy=50.0,
            flops=flops,
            outside_flops=0,
            outside_seconds=0.0,
            steps=1,
        )
        for seed, loss in enumerate(losses, 1)
    ]


def test_a_frontier_is_monotone_with_the_means_of_what_was_not() -> None:
    assert frontier({1.0: [3.0], 2.0: [1.0, 1.0], 4.0: [2.5], 8.0: [0.5]}) == [
        (1.0, 3.0),
        (2.0, 1.5),
        (4.0, 1.5),
        (8.0, 0.5),
    ]


def test_compute_at_a_loss_is_linear_in_its_logarithm_and_never_outside() -> None:
    points = [(1.0, 3.0), (4.0, 1.0)]
    assert compute_at(2.0, points) == pytest.approx(2.0)
    assert compute_at(0.5, points) == 4.0
    assert compute_at(3.5, points) == 1.0


def test_the_same_model_saves_what_it_spends_less() -> None:
    dense = {0.5: trials(50, [2.0, 2.1, 1.9]), 1.0: trials(100, [1.0, 1.1, 0.9])}
    found = saving(trials(60, [1.0, 1.1, 0.9], "method"), dense)
    assert found.value == pytest.approx(0.4)
    # Seeds are drawn for both arms at once, so what they share is no uncertainty.
    assert found.low == pytest.approx(0.4)
    assert found.high == pytest.approx(0.4)


def test_seeds_that_disagree_widen_the_interval() -> None:
    dense = {0.5: trials(50, [2.0] * 3), 1.0: trials(100, [1.0] * 3)}
    found = saving(trials(60, [0.9, 1.5, 1.0], "method"), dense)
    assert found.low < found.value < found.high


def test_a_budget_of_fewer_seeds_is_drawn_as_often_as_it_has_seeds() -> None:
    dense = {0.5: trials(50, [2.0] * 8), 1.0: trials(100, [0.8, 1.2])}
    found = saving(trials(60, [1.4] * 8, "method"), dense)
    # Both of two seeds are the same one in half of the draws, so each alone is in the interval.
    alone = [
        saving(trials(60, [1.4] * 8, "method"), {**dense, 1.0: trials(100, [loss])}).value
        for loss in (1.2, 0.8)
    ]
    assert [found.low, found.high] == pytest.approx(sorted(alone))


def test_a_method_that_loses_more_than_every_budget_saves_nothing() -> None:
    dense = {0.5: trials(50, [2.0] * 2), 1.0: trials(100, [1.0] * 2)}
    assert saving(trials(10, [3.0] * 2, "method"), dense).value == -math.inf


def test_a_control_counts_as_what_the_dense_model_spends_at_its_loss() -> None:
    dense = {0.5: trials(50, [2.0] * 3), 1.0: trials(100, [1.0] * 3)}
    method, control = trials(30, [1.0] * 3, "method"), trials(40, [2.0] * 3, "control")
    # 30 instead of 100 operations, where the control takes 40 instead of 50.
    found = saving_over(method, control, dense)
    assert found.value == pytest.approx(1 - 0.3 / 0.8)
    # Beyond the frontier: at least as bad as its smallest budget.
    assert saving_over(method, trials(40, [5.0] * 3), dense).value == pytest.approx(found.value)
    assert saving_over(method, method, dense) == saving_over(dense[0.5], dense[0.5], dense)


def test_a_difference_is_taken_seed_by_seed() -> None:
    dense, method = trials(1, [1.0, 2.0, 3.0]), trials(1, [1.1, 2.1, 3.1], "method")
    found = difference(method, dense, lambda trial: trial.loss)
    assert found.value == pytest.approx(0.1)
    assert found.upper == pytest.approx(0.1)
    assert difference(method[:1], dense, lambda trial: trial.loss).upper == math.inf


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Random images whose label is the brightest of ten bands."""
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (3400,), dtype=torch.uint8)
    images = torch.randint(0, 60, (3400, 28, 28), dtype=torch.uint8)
    for band in range(10):
        images[labels == band, 2 * band + 4 : 2 * band + 6] += 120
    for name, values in (("images", images), ("labels", labels)):
        header = bytes([0, 0, 8, values.dim()])
        sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
        with gzip.open(tmp_path / f"random-{name}.gz", "wb") as file:
            file.write(header + sizes + values.numpy().tobytes())
    return tmp_path


def test_an_arm_with_a_budget_is_pruned_to_it(digits: Path) -> None:
    model = {"kind": "cnn", "widths": [16, 32]}
    study = Study(workload="images", model=model, batch=2, epochs=1, rates=(0.1,), arms={})
    arm = Arm(recipe="prune-channels{share=1}", budget=0.4)
    pruned, _ = made(study, Images(digits), arm, 1)
    dense, _ = made(study, Images(digits), Arm(), 1)
    channels, all_channels = (net.get_parameter("head.weight").shape[1] for net in (pruned, dense))
    assert 0 < channels < all_channels == 32


def test_an_arm_has_as_many_seeds_as_it_says() -> None:
    arms = {"dense": Arm(seeds=3), "method": Arm(share=0.5, seeds=4), "other": Arm(share=0.5)}
    study = Study(
        workload="images", batch=2, epochs=1, rates=(0.1,), seeds=2, full_seeds=9, arms=arms
    )
    budgets = (("dense", 1.0), ("dense", 0.5), ("method", 0.5), ("other", 0.5))
    assert [len(study.seeds_of(*budget)) for budget in budgets] == [9, 3, 4, 2]


def test_a_small_study_runs_resumes_and_says_what_it_saves(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frontier.times._STEPS", 2)  # how long they take is not the point here
    study = tmp_path / "smoke.yaml"
    study.write_text(
        "workload: images\n"
        "model: {kind: cnn, widths: [8, 16]}\n"
        "batch: 50\nepochs: 2\nrates: [0.01]\nshares: [0.5, 1.0]\nseeds: 1\nfull_seeds: 2\n"
        "arms:\n  dense: {seeds: 2}\n"
        "  method: {share: 0.6, recipe: ramp-resolution, samples: {choice: learned}}\n"
        "  even: {share: 0.6, recipe: ramp-resolution, batch: 100, even_batches: true}\n"
    )
    options = ["--data", str(digits), "--workers", "1", "--results", str(tmp_path)]
    app_says(["run", str(study), *options])
    trials_file = tmp_path / "smoke_trials.csv"
    lines = trials_file.read_text().splitlines()
    # Three budgets, tuned with one rate, measured with two seeds, and an arm with one.
    assert len(lines) == 1 + 3 * (1 + 2) + (1 + 1)
    steps_of = {trial["arm"]: int(trial["steps"]) for trial in csv.DictReader(lines)}
    assert 0 < steps_of["even"] <= steps_of["method"] / 3
    found = json.loads((tmp_path / "smoke.json").read_text())
    assert found["method"]["flops"] == pytest.approx(0.6 * found["dense"]["flops"], rel=0.1)
    assert (tmp_path / "smoke.png").stat().st_size
    times_file = tmp_path / "smoke_times.csv"
    row, other = csv.DictReader(times_file.read_text().splitlines())
    assert (row["precision"], other["precision"]) == ("float32", "bfloat16")
    outside = next(t for t in csv.DictReader(lines) if t["arm"] == "method" and t["seed"] == "1")
    steps = found["method"]["flops"] - int(outside["outside_flops"])
    seconds = steps * float(row["arm_seconds_per_tflop"]) / 1e12 + float(row["arm_outside_seconds"])
    dense = found["method"]["flops"] * float(row["dense_seconds_per_tflop"]) / 1e12
    kept = (1 - found["method"]["saved_flops"]["value"]) * seconds / dense
    # The row's ratio has four digits.
    assert found["method"]["saved_time"]["float32"]["value"] == pytest.approx(
        1 - kept, abs=5e-4 * kept
    )
    trials_file.write_text("\n".join(line for line in lines if line[:4] != "even") + "\n")
    app_says(["analyse", str(study), "--results", str(tmp_path)])
    assert json.loads((tmp_path / "smoke.json").read_text()) == {
        name: values for name, values in found.items() if name != "even"
    }
    trials_file.write_text("\n".join(lines[:-1]) + "\n")
    timed = times_file.read_text()
    app_says(["run", str(study), *options])
    assert trials_file.read_text().splitlines()[:-1] == lines[:-1]
    assert len(trials_file.read_text().splitlines()) == len(lines)
    assert times_file.read_text() == timed


def test_a_choice_is_made_on_the_tuning_split_with_what_differs_from_the_study(
    digits: Path, tmp_path: Path
) -> None:
    study = tmp_path / "smoke.yaml"
    study.write_text(
        "workload: images\nmodel: {kind: cnn, widths: [8, 16]}\nbatch: 50\nepochs: 2\n"
        "rates: [0.5]\narms: {method: {share: 0.6, recipe: train}}\n"
    )
    rows = tmp_path / "choices.csv"
    options = ["--data", str(digits), "--results", str(rows), "--rate", "0.01", "--rate", "0.02"]
    options += ["--threads", str(torch.get_num_threads())]
    changes = ["--epochs", "1", "--batch", "100", "--model", '{"widths": [8]}']
    app_says([str(study), *options, *changes, "--seed", "0", "--seed", "-1"], choice_app)
    app_says([str(study), *options, "--recipe", "ramp-resolution", "--seed", "0"], choice_app)
    *dense, ramp, _ = csv.DictReader(rows.read_text().splitlines())
    made_with = [(float(row["rate"]), int(row["seed"])) for row in dense]
    assert made_with == [(0.01, 0), (0.02, 0), (0.01, -1), (0.02, -1)]
    assert dense[0]["study"] == "smoke of widths [8] in batches of 100 at 1 epochs"
    changed = read_study(study, epochs=1, batch=100, model={"kind": "cnn", "widths": [8]})
    images = Images(digits)
    full = full_flops(changed, images)
    trial = run_trial(changed, images, "dense", 1.0, 0.02, -1, full_flops=full)
    assert (trial.loss, trial.steps) == (float(dense[-1]["loss"]), int(dense[-1]["steps"]))
    assert (ramp["study"], ramp["recipe"]) == ("smoke", "ramp-resolution")
    assert int(ramp["steps"]) > 2 * math.ceil(images.samples / 50)


@pytest.mark.parametrize(
    ("option", "expected"),
    [(["--seed", "1"], "equal to 0"), (["--seed", "0", "--model", "[]"], "JSON object")],
)
def test_a_choice_that_must_not_be_made_is_refused(
    tmp_path: Path, option: list[str], expected: str
) -> None:
    study = Path(__file__).parents[2] / "benchmarks" / "frontier" / "studies" / "mnist_cnn.yaml"
    rows = tmp_path / "choices.csv"
    command = [str(study), "--results", str(rows), "--rate", "0.01", *option]
    result = CliRunner().invoke(choice_app, [*command, "--threads", str(torch.get_num_threads())])
    assert result.exit_code
    assert expected in result.output + str(result.exception)
    assert not rows.exists()


def test_a_study_without_its_full_training_is_not_analysed(tmp_path: Path) -> None:
    study = Path(__file__).parents[2] / "benchmarks" / "frontier" / "studies" / "mnist_vit_8.yaml"
    result = CliRunner().invoke(app, ["analyse", str(study), "--results", str(tmp_path)])
    assert result.exit_code == 1
    assert "the full dense training is not there yet" in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_not_there_is_trained_first(tmp_path: Path) -> None:
    code = tmp_path / "code"
    for number in range(800):
        package = code / f"package{number % 40}"
        package.mkdir(parents=True, exist_ok=True)
        text = f"def part{number}() -> int:\n    return {number}\n"
        (package / f"part{number}.py").write_text(4 * text)
    study = tmp_path / "smoke.yaml"
    study.write_text(
        "workload: language\n"
        "model: {n_layer: 1, n_embd: 16, n_head: 1}\n"
        "options: {length: 32, largest_bytes: 60000}\n"
        "batch: 8\nepochs: 0.1\nrates: [0.01]\nshares: [1.0]\nseeds: 1\nfull_seeds: 1\n"
        "arms: {}\n"
    )
    checkpoint = tmp_path / "checkpoint"
    options = ["--data", str(code), "--workers", "1", "--results", str(tmp_path)]
    command = ["run", str(study), "--checkpoint", str(checkpoint), *options]
    assert "trained first" in app_says(command)
    assert (checkpoint / "model.safetensors").stat().st_size
    assert "trained first" not in app_says(command)


def test_a_corpus_without_a_test_part_is_refused(tmp_path: Path) -> None:
    # Of files in no package, half 0 has no part with an odd number.
    for number in range(400):
        (tmp_path / f"part{number}.py").write_text("x = 1\n" * 20)
    task = Language(tmp_path, None, half=0, largest_bytes=20_000)
    with pytest.raises(SystemExit, match=r"none for \['test'\].*--data"):
        assert task.samples


def app_says(command: list[str], program: typer.Typer = app) -> str:
    result = CliRunner().invoke(program, command)
    assert result.exit_code == 0, result.output
    return result.output
