"""Recipes: presets, files, lists; what is wrong in one is said in one sentence."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from graphopt.errors import ConfigError
from graphopt.passes.registry import pass_class, pass_named
from graphopt.recipes import PassSpec, Recipe, load_recipe, preset_names


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_presets_are_the_documented_ones() -> None:
    training = {"exact", "fine-tune", "pretrain", "train"}
    assert set(preset_names()) == {"deploy", "deploy-int8", "smallest"} | training


def test_the_exact_preset_only_has_exact_passes_that_training_allows() -> None:
    recipe = load_recipe("exact")
    kinds = [pass_class(spec.name) for spec in recipe.passes]
    assert all(kind.exact and not kind.inference_only for kind in kinds)
    assert recipe.budget is None


def test_training_prunes_for_a_budget_only() -> None:
    recipe = load_recipe("train")
    assert (recipe.budget, recipe.training, recipe.allocation) == (None, True, "uniform")
    assert recipe.passes[0] == PassSpec(name="prune-channels", options={"share": 1})
    assert recipe.with_settings(budget="60%").budget == 0.6


@pytest.mark.parametrize(
    ("name", "max_drift", "runtime"),
    [
        ("deploy", 0.1, "torch"),
        ("deploy-int8", 0.1, "onnxruntime"),
        ("smallest", 0.2, "onnxruntime"),
    ],
)
def test_presets_for_inference_have_a_guard_and_the_solver(
    name: str, max_drift: float, runtime: str
) -> None:
    recipe = load_recipe(name)
    assert (recipe.max_drift, recipe.runtime) == (max_drift, runtime)
    assert (recipe.allocation, recipe.training) == ("solver", False)
    assert not recipe.include


def test_the_integer_preset_is_deploy_with_one_pass_more() -> None:
    names = [spec.name for spec in load_recipe("deploy-int8").passes]
    assert names.index("quantize-weights") < names.index("fuse-projections")
    names.remove("quantize-weights")
    assert names == [spec.name for spec in load_recipe("deploy").passes]


@pytest.mark.parametrize("name", preset_names())
def test_packing_comes_last(name: str) -> None:
    assert load_recipe(name).passes[-1].name == "pack-tokens"


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_says_what_it_does(name: str) -> None:
    text = (resources.files("graphopt") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "\nversion: 1\n" in text


def test_a_training_preset_has_no_pass_that_forbids_training() -> None:
    assert not any(pass_class(spec.name).inference_only for spec in load_recipe("train").passes)


@pytest.mark.parametrize("name", preset_names())
def test_a_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_a_file_is_read_with_all_its_keys(tmp_path: Path) -> None:
    text = """
        passes:
          - fold-batch-norm
          - {name: prune-channels, options: {round_to: 16}}
        budget: 70%
        training: true
        ignore: [pooler, "re:head$"]
        keep: {layer.0: 50%}
    """
    assert load_recipe(write(tmp_path, text)) == Recipe(
        name="mine",
        passes=(
            PassSpec(name="fold-batch-norm"),
            PassSpec(name="prune-channels", options={"round_to": 16}),
        ),
        budget=0.7,
        training=True,
        ignore=("pooler", "re:head$"),
        keep={"layer.0": 0.5},
    )


@pytest.mark.parametrize(
    ("budget", "kept", "allocation"),
    [
        ("60%", 0.6, "uniform"),
        (0.6, 0.6, "uniform"),
        ("60% latency", "60% latency", "solver"),
        ("12ms", "12 ms", "solver"),
        ("5M parameters", "5000000 parameters", "solver"),
        ("40MB", "40000000 bytes", "solver"),
    ],
)
def test_budgets_of_all_kinds(
    budget: Any, kept: float | str, allocation: str, tmp_path: Path
) -> None:
    recipe = load_recipe(Recipe.model_validate({"passes": ["prune-channels"], "budget": budget}))
    assert (recipe.budget, recipe.allocation) == (kept, allocation)
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_settings_on_top() -> None:
    recipe = load_recipe("train").with_settings(
        budget="12ms", max_drift="5%", min_cosine=None, ignore=("pooler",), keep={"a": "50%"}
    )
    assert (recipe.budget, recipe.allocation, recipe.max_drift) == ("12 ms", "solver", 0.05)
    assert recipe.training
    assert recipe.with_settings(ignore=("pooler", "b"), keep={"b": 1}).ignore == ("pooler", "b")
    assert recipe.with_settings(keep={"b": 1}).keep == {"a": 0.5, "b": 1.0}
    with pytest.raises(ConfigError, match="training steps run in torch"):
        recipe.with_settings(runtime="onnxruntime")


def test_included_passes_and_settings_come_first_and_own_ones_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "passes: [prune-channels, {name: pack-tokens, options: {mask: real}}]\n"
        "max_drift: 5%\nmin_cosine: 0.9\nbudget: 50%\nallocation: uniform\n"
        "ignore: [a]\nkeep: {x: 50%, y: 50%}"
    )
    recipe = load_recipe(
        write(
            tmp_path,
            "include: [base.yaml]\npasses: [fuse-projections, pack-tokens]\nmax_drift: 2%\n"
            "budget: 9ms\nignore: [b]\nkeep: {y: 70%}",
        )
    )
    assert recipe.name == "mine"
    assert not recipe.include
    assert [spec.name for spec in recipe.passes] == [
        "prune-channels",
        "fuse-projections",
        "pack-tokens",
    ]
    assert recipe.passes[-1].options == {}
    assert (recipe.max_drift, recipe.min_cosine) == (0.02, 0.9)
    assert (recipe.budget, recipe.allocation) == ("9 ms", "solver")
    assert recipe.ignore == ("a", "b")
    assert recipe.keep == {"x": 0.5, "y": 0.7}


def test_presets_can_be_included_from_python_and_later_ones_win() -> None:
    recipe = load_recipe(Recipe(name="both", include=("deploy", "exact"), max_drift=None))
    assert recipe.name == "both"
    assert [spec.name for spec in recipe.passes] == [
        *[spec.name for spec in load_recipe("deploy").passes[:3]],
        *[spec.name for spec in load_recipe("exact").passes],
    ]
    assert recipe.max_drift is None
    assert recipe.allocation == "solver"


def test_recipes_that_include_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("include: [mine.yaml]")
    path = write(tmp_path, "include: [other.yaml]")
    with pytest.raises(ConfigError, match=r"mine.yaml: the recipe .*mine.yaml includes itself"):
        load_recipe(path)


def test_passes_names_and_pipelines_mean_the_same() -> None:
    step = pass_named("prune-channels", round_to=16)
    assert load_recipe([step, "fuse-projections"]) == load_recipe(
        "prune-channels{round_to=16},fuse-projections"
    )
    assert load_recipe([step]).build_passes() == (step,)
    assert load_recipe(["prune-channels{round_to=16}"]) == load_recipe([step])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("passes: [fuse-projections]\nbudgt: 60%", r"unknown key 'budgt'; did you mean 'budget'"),
        ("passes: [prune-chanels]", r"did you mean 'prune-channels'"),
        ("passes: [{name: prune-channels, options: {round: 8}}]", r"no option 'round'"),
        ("passes: [{name: prune-channels, option: {}}]", r"did you mean 'options'"),
        ("budget: 60%", r"has no passes"),
        ("passes: []", r"has no passes"),
        ("passes: [{options: {}}]", r"the key 'name' is missing in passes.0"),
        ("version: 2\npasses: [prune-channels]\nnewer: 1", r"version 2.*install a newer"),
        ("version: 0\npasses: [prune-channels]", r"it has version 0"),
        ("passes: [prune-channels]\nbudget: 60% speed", r"a budget's share is of flops, latency"),
        ("passes: [prune-channels]\nbudget: true", r"a budget is a share or an amount"),
        ("passes: [prune-channels]\nbudget: 9ms\nallocation: uniform", r"uniform.*'9 ms'"),
        ("passes: [prune-channels]\nallocation: greedy", r"allocation: input should be 'uniform'"),
        ("passes: [prune-channels]\nruntime: tensorrt", r"runtime must be torch, onnxruntime"),
        ("passes: [prune-channels]\nruntime: onnxruntime\ntraining: true", r"training steps run"),
        ("passes: [prune-channels]\nmax_drift: lots", r"max_drift must be a relative error"),
        ("passes: [prune-channels]\nmax_drift: -1%", r"max_drift must be a relative error"),
        ("passes: [prune-channels]\nmin_cosine: 1.5", r"min_cosine must be a cosine"),
        ("include: [deploi]", r"did you mean 'deploy'"),
        ("include: [absent.yaml]", r"absent.yaml cannot be read"),
        ("include: [mine.yaml]", r"mine.yaml includes itself"),
        ("passes: [prune-channels]\nbudget: 150%", r"above 0 and at most 1"),
        ("passes: [prune-channels]\nkeep: {a: 0}", r"share to keep of a must be above 0"),
        ("passes: [prune-channels]\nignore: ['re:[']", r"is not a regular expression"),
        ("passes: [", r"is not valid YAML, line 1"),
        ("- prune-channels", r"must be a mapping with the key 'passes', got list"),
        ("!!python/object/apply:os.system [exit]", r"is not valid YAML"),
        ("[" * 5000, r"is not valid YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_path(
    tmp_path: Path, text: str, sentence: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("deploi", r"did you mean 'deploy'"),
        ("nothing-like-it", r"there are deploy, deploy-int8, exact, fine-tune, pretrain, smallest"),
        ("absent.yaml", r"absent.yaml cannot be read"),
        (["prune-channels", 3], r"names or passes, got int"),
        (7, r"got int"),
    ],
)
def test_an_unknown_recipe_is_refused(source: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_recipe(source)  # type: ignore[arg-type]
