"""The command line end to end, on a tiny Hugging Face directory, and everything that goes wrong."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner, Result

from graphopt.cli import app
from graphopt.cli_models import exceeds_memory
from graphopt.cli_terminal import command, show_json
from graphopt.errors import GraphoptError, PlanError

WORDS = ["[PAD]", "[UNK]", *(f"word{index}" for index in range(62))]
SIZES = ("--batch", "2", "--length", "16")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def printed_json(*arguments: object) -> dict[str, object]:
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    data: dict[str, object] = json.loads(result.stdout)
    return data


def refusal(*arguments: object) -> str:
    """Return the one sentence that a failing command prints."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("graphopt: ")
    return line


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Hugging Face directory of a tiny BERT with a tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def optimized(source: Path) -> Path:
    """Return what `graphopt optimize` wrote for it, calibrated on texts."""
    texts = source.parent / "texts.jsonl"
    rows = ({"text": " ".join(WORDS[2 + i : 12 + i])} for i in range(16))
    texts.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    output = source.parent / "out"
    options = ("--recipe", "deploy", "--budget", "60%", "--no-measure")
    data = ("--calibration", texts, "--calibration-store", source.parent / "statistics")
    result = run("optimize", source, "-o", output, *options, *data, *SIZES)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"written to {output}" in result.stdout
    assert list((source.parent / "statistics").glob("*.safetensors"))
    return output


def test_optimize_writes_a_smaller_checkpoint_that_stays_a_hugging_face_directory(
    source: Path, optimized: Path
) -> None:
    plan = json.loads((optimized / "plan.json").read_text(encoding="utf-8"))
    assert plan["changes"]
    assert plan["totals"]["after"]["flops"] <= 0.6 * plan["totals"]["before"]["flops"]
    assert json.loads((optimized / "config.json").read_text())["model_type"] == "bert"
    transformers.AutoTokenizer.from_pretrained(optimized)
    sizes = [
        sum(tensor.numel() for file in path.glob("*.safetensors") for tensor in load(file))
        for path in (optimized, source)
    ]
    assert sizes[0] < sizes[1]


def load(file: Path) -> list[torch.Tensor]:
    return list(load_file(file).values())


def test_report_repeats_what_the_plan_file_says(optimized: Path) -> None:
    plan = json.loads((optimized / "plan.json").read_text(encoding="utf-8"))
    data = printed_json("report", optimized)
    assert data["totals"] == plan["totals"]
    assert isinstance(data["changes"], list)
    assert [change["target"] for change in data["changes"]] == [
        change["target"] for change in plan["changes"]
    ]
    assert all(change["measured_error"] is not None for change in data["changes"])
    text = run("report", optimized).stdout
    assert "FLOPs (forward)" in text
    assert plan["changes"][0]["target"] in text


def test_plan_and_dry_run_agree_and_write_nothing(source: Path, tmp_path: Path) -> None:
    options = ("--budget", "60%", "--no-measure", "--ignore", "pooler", *SIZES)
    planned = printed_json("plan", source, *options)
    dry = printed_json("optimize", source, "-o", tmp_path / "new", "--dry-run", *options)
    assert planned == dry
    assert planned["changes"]
    assert not (tmp_path / "new").exists()


def test_plan_needs_no_weights(source: Path, tmp_path: Path) -> None:
    shutil.copy(source / "config.json", tmp_path)
    # What padding an example has is among its values, so packing is left out.
    options = ("--recipe", "prune-channels", "--budget", "60%", "--no-measure", *SIZES)
    real, meta = (
        printed_json("plan", path, *extra, *options)
        for path, extra in ((source, ()), (tmp_path, ("--meta",)))
    )
    assert meta["totals"] == real["totals"]


def test_limit_ignore_and_keep_reach_the_passes(source: Path) -> None:
    options = ("--recipe", "prune-channels", "--budget", "60%", "--no-measure", *SIZES)
    everything = printed_json("plan", source, *options)["changes"]
    assert isinstance(everything, list)
    assert len(everything) > 1
    limited = printed_json("plan", source, *options, "--limit", 1)["changes"]
    assert limited == everything[:1]
    without = printed_json("plan", source, *options, "--ignore", "encoder.layer.0")["changes"]
    assert isinstance(without, list)
    assert without
    assert not any("layer.0." in change["target"] for change in without)
    kept = printed_json("plan", source, *options, "--keep", "encoder.layer.0=100%")["changes"]
    assert isinstance(kept, list)
    assert kept
    assert not any("layer.0." in change["target"] for change in kept)


def test_inspect_shows_the_program(source: Path) -> None:
    text = run("inspect", source, *SIZES).stdout
    assert text.startswith("# BertModel")
    assert "def forward(self, input_ids" in text
    data = printed_json("inspect", source, *SIZES)
    assert isinstance(data["inputs"], list)
    assert data["inputs"][0]["name"] == "input_ids"


def test_export_is_verified_and_a_wrong_file_is_refused(
    source: Path, optimized: Path, tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    written = printed_json("export", optimized, file)
    assert written["inputs"] == ["input_ids", "attention_mask"]
    assert "equal to torch" in run("verify", optimized, file).stdout
    result = run("verify", source, file, *SIZES, "--json")
    assert result.exit_code == 1
    failure = json.loads(result.stdout)["failure"]
    assert "differs from torch" in failure
    assert result.stderr == f"graphopt: {file}: {failure}\n"


def test_bench_compares_in_both_runtimes(source: Path, optimized: Path) -> None:
    data = printed_json("bench", source, optimized, "--repeats", 2, "--threads", 1, *SIZES)
    assert isinstance(data["rows"], list)
    assert [row["runtime"] for row in data["rows"]] == ["torch", "onnxruntime"]
    assert data["inputs"] == {"input_ids": [2, 16], "attention_mask": [2, 16]}
    assert isinstance(data["flops_ratio"], float)
    assert data["flops_ratio"] > 1.6


def test_densify_writes_an_ordinary_checkpoint(source: Path, tmp_path: Path) -> None:
    fused, dense = tmp_path / "fused", tmp_path / "dense"
    options = ("--recipe", "factorize-low-rank", "--no-measure", *SIZES)
    assert run("optimize", source, "-o", fused, *options).exit_code == 0
    result = run("densify", fused, "-o", dense)
    assert (result.exit_code, result.stderr) == (0, "")
    model = transformers.AutoModel.from_pretrained(dense)
    assert (
        model.state_dict().keys()
        == transformers.AutoModel.from_pretrained(source).state_dict().keys()
    )


def test_bisect_finds_the_first_change_beyond_the_error(source: Path) -> None:
    options = ("--recipe", "prune-channels", "--budget", "60%", "--no-measure", *SIZES)
    one_layer = ("--ignore", "encoder.layer.1")
    bad = printed_json("bisect", source, "--max-error", 1e-9, *options, *one_layer)
    assert (bad["number"], bad["pass_name"]) == (1, "prune-channels")
    fine = run("bisect", source, "--max-error", 1e9, *options, *one_layer)
    assert "together are fine" in fine.stdout


def test_passes_lists_passes_options_and_recipes() -> None:
    data = printed_json("passes")
    assert isinstance(data["passes"], list)
    names = {entry["name"] for entry in data["passes"]}
    compressing = {"factorize-low-rank", "prune-channels", "quantize-weights", "sparsify-blocks"}
    folding = {"fold-batch-norm", "fuse-projections"}
    allocating = {"pack-tokens", "drop-dead-tokens", "hoist-frozen-prefix"}
    gating = {"gate-tokens", "gate-layers", "freeze-blocks"}
    growing = {"ramp-resolution", "grow-depth", "grow-width", "add-ngram-embeddings"}
    assert names == compressing | folding | allocating | gating | growing
    assert isinstance(data["recipes"], dict)
    for_training = {"exact", "fine-tune", "pretrain", "train"}
    assert set(data["recipes"]) == {"deploy", "deploy-int8", "smallest"} | for_training
    assert isinstance(data["descriptions"], dict)
    assert "as fast as the guard allows" in data["descriptions"]["deploy"]
    text = run("passes").stdout
    assert "round_to = 8" in text
    assert "as fast as the guard allows" in " ".join(text.split())


def test_a_sweep_shows_and_writes_what_accuracy_costs(source: Path, tmp_path: Path) -> None:
    before = sorted(source.rglob("*"))
    options = ("--recipe", "prune-channels", "--no-measure", "--sweep", *SIZES)
    data = printed_json("plan", source, *options, "-o", tmp_path / "frontier")
    assert isinstance(data["points"], list)
    assert [point["budget"] for point in data["points"]][::6] == ["90% flops", "30% flops"]
    written = json.loads((tmp_path / "frontier" / "frontier.json").read_text(encoding="utf-8"))
    assert written == data
    assert (tmp_path / "frontier" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(source.rglob("*")) == before


def test_the_resolved_recipe_of_an_output_makes_it_again(
    source: Path, optimized: Path, tmp_path: Path
) -> None:
    data = ("--calibration", source.parent / "texts.jsonl", "--no-measure")
    result = run(
        *("optimize", source, "-o", tmp_path / "again"),
        *("--recipe", optimized / "recipe.yaml", *data, *SIZES),
    )
    assert (result.exit_code, result.stderr) == (0, "")
    weights = [load_file(path / "model.safetensors") for path in (optimized, tmp_path / "again")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--budget", "0%"], "budget must be above 0 and at most 1 (100%), got '0%'"),
        (["--budget", "150%"], "budget must be above 0 and at most 1 (100%), got '150%'"),
        (["--budget", "abc"], "a budget is a share or an amount such as '60%', '60% latency'"),
        (["--budget", "60% speed"], "a budget's share is of flops, latency"),
        (["--max-drift", "lots"], "max_drift must be a relative error such as 0.1 or '10%'"),
        (["--min-cosine", "2"], "min_cosine must be a cosine between 0 and 1"),
        (["--allocation", "greedy"], "allocation must be 'uniform' or 'solver'"),
        (["--runtime", "tensorrt"], "the runtime must be torch, onnxruntime"),
        (["--runtime", "onnxruntime", "--recipe", "train"], "training steps run in torch"),
        (["--recipe", "deploi"], "did you mean 'deploy'?"),
        (["--recipe", "prune-chanels,fuse-projections"], "did you mean 'prune-channels'?"),
        (["--keep", "layer.0"], "--keep must be PATTERN=SHARE"),
        (["--keep", "layer.0=2"], "the share to keep of layer.0 must be above 0 and at most 1"),
        (["--ignore", "re:["], "is not a regular expression"),
        (["--calibration", "absent.jsonl"], "there is no calibration file at absent.jsonl"),
    ],
)
def test_a_bad_option_is_one_sentence_before_any_model_is_read(
    options: list[str], sentence: str
) -> None:
    for action in ("plan", "optimize"):
        output = ["-o", "never-written"] if action == "optimize" else []
        assert sentence in refusal(action, "no-such-model", *options, *output)


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize"],
        ["optimize", "somewhere"],
        ["plan", "somewhere", "-o", "out"],
        ["optimize", "somewhere", "-o", "out", "--unknown"],
        ["unknown"],
        ["plan", "somewhere", "--limit", "-1"],
    ],
)
def test_wrong_usage_exits_with_two(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize", "absent", "-o", "out"],
        ["plan", "absent"],
        ["inspect", "absent"],
        ["report", "absent"],
        ["export", "absent", "model.onnx"],
        ["bench", "absent", "absent"],
        ["densify", "absent", "-o", "out"],
    ],
)
def test_a_missing_source_is_named(arguments: list[str]) -> None:
    assert "there is nothing at absent; expected a Hugging Face directory" in refusal(*arguments)


def test_an_output_that_graphopt_did_not_write_is_never_touched(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert "holds mine.txt, which graphopt did not write" in refusal(
        "optimize", source, "-o", tmp_path
    )
    assert "is a file" in refusal("optimize", source, "-o", tmp_path / "mine.txt")
    assert "is the source itself" in refusal("optimize", source, "-o", source)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_earlier_output_is_replaced(source: Path, optimized: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(optimized, output)
    options = ("--recipe", "exact", "--no-measure", *SIZES)
    assert run("optimize", source, "-o", output, *options).exit_code == 0
    plan = json.loads((output / "plan.json").read_text(encoding="utf-8"))
    assert plan["recipe"]["name"] == "exact"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON"),
        (
            lambda text: text.replace('"schema_version": 1', '"schema_version": 99'),
            "newer graphopt",
        ),
        (lambda text: text.replace("prune-channels", "prune-everything"), "prune-everything"),
    ],
)
def test_a_damaged_plan_is_one_sentence(
    optimized: Path, tmp_path: Path, damage: Callable[[str], str], sentence: str
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(optimized, copy)
    plan = copy / "plan.json"
    plan.write_text(damage(plan.read_text(encoding="utf-8")), encoding="utf-8")
    assert sentence in refusal("report", copy)


def test_a_dense_model_has_no_report_and_an_optimized_one_is_not_optimized_twice(
    source: Path, optimized: Path, tmp_path: Path
) -> None:
    assert "nothing to report" in refusal("report", source)
    assert "already optimized" in refusal("optimize", optimized, "-o", tmp_path / "twice")


def test_debug_shows_the_error_itself() -> None:
    assert isinstance(run("plan", "absent", "--debug").exception, GraphoptError)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PlanError("one\n  sentence"), 1, "graphopt: one sentence"),
        (FileNotFoundError(2, "No such file", "x"), 1, "graphopt: [Errno 2] No such file: 'x'"),
        (
            ValueError("odd"),
            1,
            "graphopt: unexpected ValueError: odd; please report it with the output of --debug",
        ),
        (KeyboardInterrupt(), 130, "graphopt: interrupted"),
    ],
)
def test_every_exception_becomes_one_line(error: BaseException, code: int, line: str) -> None:
    failing = typer.Typer()

    @command(failing)
    def fail() -> None:
        raise error

    result = CliRunner().invoke(failing, [])
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", line + "\n")


def test_json_has_no_number_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"rows": [(float("inf"), 1.5)], "nan": float("nan")})
    assert json.loads(capsys.readouterr().out) == {"rows": [[None, 1.5]], "nan": None}


def test_weights_beyond_memory_are_noticed(source: Path, tmp_path: Path) -> None:
    assert not exceeds_memory(source)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2**42)
    assert exceeds_memory(tmp_path)


def test_a_process_prints_pure_json_and_nothing_else(source: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "graphopt.cli", "optimize", source, "-o", "out"),
            *("--recipe", "exact", "--json", *SIZES),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (result.returncode, result.stderr) == (0, "")
    data = json.loads(result.stdout)
    assert (data["recipe"], data["path"]) == ("exact", "out")
    assert (tmp_path / "out" / "plan.json").exists()


def test_help_loads_no_library_and_shows_examples() -> None:
    code = (
        "import sys; from graphopt.cli import app; "
        "app(['optimize', '--help'], standalone_mode=False); "
        "print([name for name in ('transformers', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "graphopt optimize minilm/ -o out/ --recipe deploy --budget 60%" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_version_is_shown() -> None:
    assert run("--version").stdout.startswith("graphopt 0.")
