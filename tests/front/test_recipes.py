"""Recipes: presets, files, lists; what is wrong in one is said in one sentence."""

from pathlib import Path

import pytest

from graphopt.errors import ConfigError
from graphopt.passes.registry import pass_class, pass_named
from graphopt.recipes import PassSpec, Recipe, load_recipe, preset_names


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_presets_are_the_documented_ones() -> None:
    assert preset_names() == ("deploy", "exact", "train")


def test_the_exact_preset_only_has_exact_passes_that_training_allows() -> None:
    recipe = load_recipe("exact")
    kinds = [pass_class(spec.name) for spec in recipe.passes]
    assert all(kind.exact and not kind.inference_only for kind in kinds)
    assert recipe.budget is None


@pytest.mark.parametrize(("name", "training"), [("train", True), ("deploy", False)])
def test_presets_that_compress_keep_sixty_percent(name: str, training: bool) -> None:
    recipe = load_recipe(name)
    assert (recipe.budget, recipe.training) == (0.6, training)


def test_a_training_preset_has_no_pass_that_forbids_training() -> None:
    assert not any(pass_class(spec.name).inference_only for spec in load_recipe("train").passes)


@pytest.mark.parametrize("name", ["deploy", "exact", "train"])
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


def test_passes_names_and_pipelines_mean_the_same() -> None:
    step = pass_named("prune-channels", round_to=16)
    assert load_recipe([step, "fuse-projections"]) == load_recipe(
        "prune-channels{round_to=16},fuse-projections"
    )
    assert load_recipe([step]).build_passes() == (step,)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("passes: [fuse-projections]\nbudgt: 60%", r"unknown key 'budgt'; did you mean 'budget'"),
        ("passes: [prune-chanels]", r"did you mean 'prune-channels'"),
        ("passes: [{name: prune-channels, options: {round: 8}}]", r"no option 'round'"),
        ("passes: [{name: prune-channels, option: {}}]", r"did you mean 'options'"),
        ("budget: 60%", r"the key 'passes' is missing"),
        ("passes: []", r"passes: tuple should have at least 1 item"),
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
        ("nothing-like-it", r"there are deploy, exact, train"),
        ("absent.yaml", r"absent.yaml cannot be read"),
        (["prune-channels", 3], r"names or passes, got int"),
        (7, r"got int"),
    ],
)
def test_an_unknown_recipe_is_refused(source: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_recipe(source)  # type: ignore[arg-type]
