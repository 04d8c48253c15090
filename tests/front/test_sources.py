"""Models from directories, exported programs and weights, and files that are refused."""

from __future__ import annotations

import io
import json
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertModel, GPT2Config, GPT2LMHeadModel

from graphopt.capture import capture
from graphopt.errors import CheckpointError, ConfigError, GraphoptError
from graphopt.passes.structure import flatten
from graphopt.sources import open_source, origin_of

TRIPPED: list[str] = []


def trip() -> None:
    TRIPPED.append("code of a file was run")


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return trip, ()


class TwoLayers(nn.Module):
    """Two linear layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x).relu())
        return result


def two_layers() -> nn.Module:
    return TwoLayers()


FACTORY = f"{__name__}:two_layers"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    TRIPPED.clear()


def equal_outputs(model: nn.Module, other: nn.Module, *args: Any, **kwargs: Any) -> bool:
    with torch.no_grad():
        found, expected = flatten(other(*args, **kwargs))[0], flatten(model(*args, **kwargs))[0]
    return all(map(torch.equal, found, expected))


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    return GPT2LMHeadModel(config).eval()


def export(path: Path, model: nn.Module, *args: Any, **kwargs: Any) -> Path:
    sizes = {name: {0: torch.export.Dim.AUTO} for name in kwargs} or tuple(
        {0: torch.export.Dim.AUTO} for _ in args
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about recurrent layers
        program = torch.export.export(model, args, kwargs, dynamic_shapes=sizes)
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("form", ["one file", "shards", "bin"])
def test_a_directory_gives_the_class_that_its_configuration_names(
    form: str, tmp_path: Path
) -> None:
    model = tiny_gpt2()
    model.save_pretrained(tmp_path, max_shard_size="5KB" if form == "shards" else "1GB")
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    source = open_source(tmp_path)
    opened: Any = source.model
    assert type(opened) is GPT2LMHeadModel
    assert not source.model.training
    assert source.kind == "hugging-face"
    assert source.directory == tmp_path
    assert origin_of(source.model) is source.origin
    assert opened.lm_head.weight is opened.transformer.wte.weight
    assert equal_outputs(model, source.model, input_ids=torch.arange(12).view(2, 6))


def test_a_directory_without_weights_opens_on_meta(tmp_path: Path) -> None:
    tiny_gpt2().config.to_json_file(tmp_path / "config.json")
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "architectures": None}))
    source = open_source(tmp_path, device="meta")
    assert type(source.model).__name__ == "GPT2Model"
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_minilm_opens_as_it_is(minilm_directory: Path) -> None:
    source = open_source(minilm_directory)
    assert type(source.model) is BertModel
    assert sum(p.numel() for p in source.model.parameters()) > 20_000_000


def damage_config(**fields: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        data = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**data, **fields}))

    return damage


def damage_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    save_file({"wte.weight": torch.zeros(50, 16)}, path, metadata={"format": "pt"})


def lead_out(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "stolen.safetensors")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "../stolen.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config(architectures=["os"]), "names the architecture 'os'"),
        (damage_config(model_type="evil", auto_map={"AutoConfig": "a.B"}), "not a configuration"),
        (damage_config(_attn_implementation="someone/kernel"), "asks for code from elsewhere"),
        (damage_weights, "cannot be read as a GPT2LMHeadModel"),
        (drop_weights, "lacks weights"),
        (lead_out, "names '../stolen.safetensors'"),
        (lambda d: (d / "config.json").write_text("{"), "not readable JSON"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
    ],
)
def test_a_damaged_directory_is_refused(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    tiny_gpt2().save_pretrained(directory)
    damage(directory)
    with pytest.raises(CheckpointError, match=message):
        open_source(directory)


@pytest.mark.parametrize("name", ["sequential", "cnn", "bert-classifier", "vit", "lstm"])
def test_an_exported_program_is_a_model_with_the_same_layers(name: str, tmp_path: Path) -> None:
    case = zoo.find_case(name)
    model = case.build().eval()
    args, kwargs = case.call(2, 8)
    source = open_source(export(tmp_path / "model.pt2", model, *args, **kwargs))
    assert source.kind == "exported-program"
    assert set(source.model.state_dict()) == set(model.state_dict())
    kinds = [nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.BatchNorm2d]
    for kind in kinds:
        wanted = {n for n, module in model.named_modules() if type(module) is kind}
        assert {n for n, m in source.model.named_modules() if type(m) is kind} == wanted
    args, kwargs = case.call(3, 8)
    assert equal_outputs(model, source.model, *args, **kwargs)
    program = capture(source.model, source.example_inputs)
    assert (False, False) in program.modes
    assert equal_outputs(model, program, *args, **kwargs)  # type: ignore[arg-type]


def test_arguments_of_an_exported_program_keep_names_and_constants(tmp_path: Path) -> None:
    class Flagged(nn.Module):
        def forward(
            self, x: Tensor, *, scale: Tensor, negate: bool = False, mask: Tensor | None = None
        ) -> dict[str, Tensor]:
            return {"result": -x * scale if negate else x * scale}

    model = Flagged()
    x, scale = torch.randn(3, 4), torch.randn(4)
    program = torch.export.export(model, (x,), {"scale": scale, "negate": True})
    torch.export.save(program, tmp_path / "model.pt2")
    source = open_source(tmp_path / "model.pt2")
    assert source.example_inputs is not None
    assert list(source.example_inputs) == ["x", "scale", "negate"]
    assert torch.equal(source.model(x, scale=scale)["result"], -x * scale)


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Write a `.pt2` again with other records; None leaves one out."""
    result = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            data = change(name.partition("/")[2], old.read(name))
            if data is not None:
                new.writestr(f"changed/{name.partition('/')[2]}", data)
    return result


def replace_text(old: str, new: str, record: str = "models/model.json") -> Any:
    def change(name: str, data: bytes) -> bytes:
        if name != record:
            return data
        assert old.encode() in data
        return data.replace(old.encode(), new.encode())

    return change


def trapped_inputs(name: str, data: bytes) -> bytes:
    if name != "data/sample_inputs/model.pt":
        return data
    buffer = io.BytesIO()
    torch.save((Trap(),), buffer)
    return buffer.getvalue()


def trapped_weight(name: str, data: bytes) -> bytes:
    if name == "data/weights/weight_0":
        return pickle.dumps(Trap())
    if name == "data/weights/model_weights_config.json":
        return data.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
    return data


@pytest.mark.parametrize(
    "change",
    [
        trapped_inputs,
        trapped_weight,
        replace_text("torch.ops.aten.relu.default", "torch.os.system"),
        replace_text("torch.ops.aten.relu.default", "torch.ops.aten.__class__.__init__"),
        replace_text("Symbol('", "__import__('os').system('"),
        replace_text("Symbol('", "exec('"),
        replace_text('"name": "relu"', '"name": "relu = print()"'),
        replace_text("builtins.dict", "collections.defaultdict"),
        replace_text('"fqn": "0"', '"fqn": "0; print()"'),
        lambda name, data: None if name == "models/model.json" else data,
        lambda name, data: data[: len(data) // 2],
    ],
)
def test_an_exported_program_that_could_run_code_is_refused(change: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    path = export(tmp_path / "model.pt2", model, torch.randn(3, 4))
    same = rewrite(path, lambda name, data: data)
    assert equal_outputs(model, open_source(same).model, torch.ones(2, 4))
    with pytest.raises(CheckpointError):
        open_source(rewrite(path, change))
    assert TRIPPED == []


def test_input_conditions_of_an_exported_program_are_not_executed(tmp_path: Path) -> None:
    path = export(tmp_path / "model.pt2", nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(3, 4))
    target = tmp_path / "executed"
    code = f"[\\\"open('{target}', 'w')\\\"]".replace("\\", "")
    open_source(rewrite(path, replace_text('"guards_code": []', f'"guards_code": {code}')))
    assert not target.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_load_into_what_the_factory_makes(suffix: str, tmp_path: Path) -> None:
    model = TwoLayers().eval()
    path = tmp_path / f"weights{suffix}"
    state = dict(model.state_dict())
    if suffix == ".pt":
        torch.save(state, path)
    else:
        state.pop("second.weight")  # tied: stored once
        save_file(state, path)
    source = open_source(path, FACTORY)
    assert source.origin.factory == FACTORY
    assert not source.model.training
    assert equal_outputs(model, source.model, torch.randn(2, 8))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"first.weight": torch.zeros(8, 8)}, "missing: first.bias, second.bias"),
        ({**TwoLayers().state_dict(), "third.weight": torch.zeros(1)}, "unexpected: third.weight"),
        ({**TwoLayers().state_dict(), "first.bias": torch.zeros(3)}, r"first.bias is \[3\]"),
        ([1, 2], "must hold a dictionary of tensors"),
        (Trap(), "does not hold plain weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused(state: Any, message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "weights.pt", FACTORY)
    assert TRIPPED == []


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (None, "pass --factory"),
        ("two_layers", "must be package.module:function"),
        ("no.such.module:f", "cannot be imported"),
        ("torch:no_such_function", "cannot be imported"),
        ("torch.nn:Linear", "must work without arguments"),
        (f"{__name__}:trip", "must return a torch.nn.Module"),
    ],
)
def test_a_wrong_factory_is_refused(factory: str | None, message: str, tmp_path: Path) -> None:
    save_file(
        dict(TwoLayers().state_dict()) | {"second.weight": torch.zeros(8, 8)},
        tmp_path / "w.safetensors",
    )
    with pytest.raises(ConfigError, match=message):
        open_source(tmp_path / "w.safetensors", factory)


def test_a_path_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="no file or directory"):
        open_source(tmp_path / "nothing")
    (tmp_path / "broken.pt2").write_bytes(b"not a zip")
    with pytest.raises(CheckpointError, match="not an exported program"):
        open_source(tmp_path / "broken.pt2")
