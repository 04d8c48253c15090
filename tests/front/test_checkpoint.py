"""Optimized models written and read: exact, small, whole, and nothing run that a file says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file
from saved_models import layers, pruned
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, BertModel

from graphopt import checkpoint, files
from graphopt.api import optimize
from graphopt.capture import capture
from graphopt.checkpoint import densify, load, save, save_dense
from graphopt.errors import CheckpointError, PlanError
from graphopt.passes.plan import Plan
from graphopt.passes.structure import flatten
from graphopt.recipes import load_recipe
from graphopt.runtime import install, installation_of
from graphopt.sources import open_source


class Custom(nn.Module):
    """A model that no description but its own code can build."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 64)
        self.outer = nn.Linear(64, 4)
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.outer(self.inner(x).relu()) * self.scale
        return result


def custom() -> nn.Module:
    return Custom()


FACTORY = f"{__name__}:custom"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


def unchanged(model: nn.Module, example: Any) -> nn.Module:
    """Return a model that runs its graph, with an empty plan."""
    program = capture(model, example)
    plan = Plan(model_class=type(model).__name__, modes=tuple(sorted(program.modes)))
    return install(program, plan).eval()


def assert_equal_outputs(model: nn.Module, other: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        expected, found = flatten(model(*args, **kwargs))[0], flatten(other(*args, **kwargs))[0]
    for value, reference in zip(found, expected, strict=True):
        assert torch.equal(value, reference)


def test_the_resolved_recipe_lies_beside_the_model_and_makes_it_again(tmp_path: Path) -> None:
    dense = layers().eval()
    example = torch.randn(4, 16)
    recipe = load_recipe("train").with_settings(budget="70%", ignore=("0.0",))
    model = optimize(dense, example, recipe=recipe, measure=False).eval()
    save(model, tmp_path / "out")
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == recipe
    again = optimize(dense, example, recipe=tmp_path / "out" / "recipe.yaml", measure=False).eval()
    assert_equal_outputs(model, again, example)
    save(load(tmp_path / "out"), tmp_path / "again")
    assert load_recipe(tmp_path / "again" / "recipe.yaml") == recipe


@pytest.mark.parametrize("name", ["gpt2", "llama-padded", "transformer-encoder"])
def test_loaded_models_equal_saved_ones_to_the_last_bit(name: str, tmp_path: Path) -> None:
    case = zoo.find_case(name)
    args, kwargs = case.call(*zoo.EXAMPLE)
    model = unchanged(case.build(), kwargs or args)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert type(loaded).__name__ == type(model).__name__
    assert isinstance(loaded, type(case.build()))
    assert set(loaded.state_dict()) == {
        key for key in model.state_dict() if not key.startswith("_graphopt")
    }
    for length in (8, 11):
        args, kwargs = case.call(4, length)
        assert_equal_outputs(model, loaded, *args, **kwargs)
        original: Any = type(model).__mro__[1]
        with torch.no_grad():
            eager = flatten(original.forward(loaded, *args, **kwargs))[0]
            assert all(map(torch.equal, eager, flatten(loaded(*args, **kwargs))[0]))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    case = zoo.find_case("gpt2")
    model: Any = unchanged(case.build(), case.call(*zoo.EXAMPLE)[1])
    save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) + ("transformer.wte.weight" in stored) == 1
    loaded: Any = load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_changed_layers_and_flags_survive(tmp_path: Path) -> None:
    dense = layers()
    dense[1].bias.requires_grad_(False)
    model: Any = pruned(dense)
    save(model, tmp_path / "out")
    loaded: Any = load(tmp_path / "out")
    x = torch.randn(7, 16)
    assert_equal_outputs(model, loaded, x)
    assert loaded[0][0].weight.shape == model[0][0].weight.shape
    assert loaded[0][0].out_features < 64
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert loaded[3].p == 0.25
    loaded.train()(x).sum().backward()
    first, second = installation_of(loaded), installation_of(model)
    assert first is not None
    assert second is not None
    assert first.plan == second.plan
    assert first.program is not None
    assert second.program is not None
    examples = [flatten(i.example)[0][0] for i in (first.program, second.program)]
    assert torch.equal(*examples)


def test_recurrent_layers_are_rebuilt(tmp_path: Path) -> None:
    class Wrapped(nn.Sequential):
        pass

    model = unchanged(nn.Sequential(nn.LSTM(8, 8, 2, batch_first=True)), torch.randn(2, 5, 8))
    save(model, tmp_path / "out")
    assert_equal_outputs(model, load(tmp_path / "out"), torch.randn(2, 5, 8))
    other = unchanged(Wrapped(nn.Linear(2, 2)), torch.randn(3, 2))
    save(other, tmp_path / "other")
    with pytest.raises(CheckpointError, match="was made in Python"):
        load(tmp_path / "other")
    assert_equal_outputs(
        other, load(tmp_path / "other", base=Wrapped(nn.Linear(2, 2))), torch.ones(2, 2)
    )


def test_minilm_goes_through_a_directory_that_stays_one(
    minilm_directory: Path, tmp_path: Path
) -> None:
    source = open_source(minilm_directory)
    example = {
        "input_ids": torch.arange(5, 17).view(2, 6),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
    }
    model = unchanged(source.model, example)
    save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    for name in ("tokenizer.json", "vocab.txt", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (minilm_directory / name).read_bytes()
    assert_equal_outputs(model, load(tmp_path / "out"), **example)
    assert_equal_outputs(model, AutoModel.from_pretrained(tmp_path / "out").eval(), **example)


def test_a_bfloat16_model_keeps_its_types(tmp_path: Path) -> None:
    case = zoo.find_case("llama-padded")
    model = unchanged(case.build().to(torch.bfloat16), case.call(*zoo.EXAMPLE)[1])
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert_equal_outputs(model, loaded, **case.call(3, 9)[1])


def test_an_exported_program_needs_no_code(tmp_path: Path) -> None:
    model = layers().eval()
    sizes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (torch.randn(3, 16),), dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "model.pt2")
    source = open_source(tmp_path / "model.pt2")
    cheap = pruned(source.model, source.example_inputs)
    save(cheap, tmp_path / "out")
    (tmp_path / "model.pt2").unlink()
    assert (tmp_path / "out" / "base.pt2").stat().st_size < 100_000
    loaded = load(tmp_path / "out")
    assert_equal_outputs(cheap, loaded, torch.randn(5, 16))
    save(loaded, tmp_path / "again")
    assert_equal_outputs(cheap, load(tmp_path / "again"), torch.randn(5, 16))


class HalfCapturable(nn.Module):
    """Looks at values between two parts that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        self.second = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if hidden.sum().item() > 1e9:
            hidden = hidden * 2
        result: Tensor = self.second(hidden)
        return result


def test_a_model_optimized_in_parts_is_loaded_in_parts(tmp_path: Path) -> None:
    model = optimize(
        HalfCapturable(), torch.randn(3, 16), recipe=["prune-channels"], budget=0.6, measure=False
    ).eval()
    whole = installation_of(model)
    assert whole is not None
    assert set(whole.plan.parts) == {"first", "second"}
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out", base=HalfCapturable)
    assert_equal_outputs(model, loaded, torch.randn(5, 16))
    with torch.no_grad():
        difference = densify(loaded)(x := torch.randn(5, 16)) - model(x)
    assert difference.abs().max() < 1e-6


def test_a_factory_in_a_file_is_not_called(tmp_path: Path) -> None:
    model = pruned(Custom(), torch.randn(3, 16))
    save(model, tmp_path / "out", factory=FACTORY)
    with pytest.raises(CheckpointError, match=f"--factory {FACTORY}"):
        load(tmp_path / "out")
    for base in (FACTORY, custom, Custom()):
        assert_equal_outputs(model, load(tmp_path / "out", base=base), torch.randn(5, 16))


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor with values that any operation makes."""

    size_bytes: int = 0

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in flatten(result)[0]:
            if not value.is_meta and not isinstance(value, FakeTensor):
                self.size_bytes = max(self.size_bytes, value.nbytes)
        return result


def test_loading_makes_no_dense_weights(tmp_path: Path) -> None:
    model: Any = pruned(nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), nn.Linear(1024, 16)))
    save(model, tmp_path / "out")
    with LargestTensor() as largest:
        load(tmp_path / "out")
    assert 0 < largest.size_bytes <= model[0].weight.nbytes < 16 * 1024 * 4
    with LargestTensor() as largest:
        layers()
    assert largest.size_bytes == 64 * 64 * 4


def test_densify_gives_the_original_class_and_shapes(tmp_path: Path) -> None:
    case = zoo.find_case("bert")
    kwargs = case.call(*zoo.EXAMPLE)[1]
    model = pruned(case.build(), kwargs)
    save(model, tmp_path / "out")
    dense = densify(load(tmp_path / "out"))
    reference = case.build()
    assert type(dense) is type(reference)
    assert {k: v.shape for k, v in dense.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
    with torch.no_grad():
        found, expected = dense(**kwargs)[0].double(), model(**kwargs)[0].double()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    save_dense(model, tmp_path / "dense")
    plain = BertModel.from_pretrained(tmp_path / "dense").eval()
    assert_equal_outputs(dense, plain, **kwargs)
    with pytest.raises(PlanError, match="nothing to densify"):
        densify(plain)


def test_a_plain_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not optimized"):
        save(layers(), tmp_path / "out")


def test_only_an_earlier_output_is_replaced(tmp_path: Path) -> None:
    model = unchanged(layers(), torch.randn(3, 16))
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds thesis.txt"):
        save(model, target)
    (target / "thesis.txt").unlink()
    save(model, target)
    save(model, target)
    (target / "model.onnx").write_text("made later")
    with pytest.raises(CheckpointError, match=r"holds model.onnx"):
        save(model, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unchanged(layers(), torch.randn(3, 16))
    save(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    write = files.write_tensors

    def interrupted(path: Path, tensors: Any) -> None:
        write(path, tensors)
        if path.name == "buffers.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_tensors", interrupted)
    for target in ("out", "new"):
        with pytest.raises(KeyboardInterrupt):
            save(model, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
