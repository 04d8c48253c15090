"""Damaged and hostile directories: an error names what is wrong, and nothing is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import layers, pruned
from torch import Tensor

from graphopt.checkpoint import load, save
from graphopt.errors import GraphoptError


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        data = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(change(data)))

    return damage


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


def edit_change(**fields: Any) -> Callable[[Path], None]:
    def change(plan: Any) -> Any:
        plan["changes"][0].update(fields)
        return plan

    return edit("plan.json", change)


def edit_manifest(**fields: Any) -> Callable[[Path], None]:
    return edit("graphopt.json", lambda data: {**data, **fields})


def edit_call(call: Any) -> Callable[[Path], None]:
    def change(data: Any) -> Any:
        data["captures"][""]["call"] = call
        return data

    return edit("graphopt.json", change)


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        data = (directory / name).read_bytes()
        (directory / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def flip_a_bit(directory: Path) -> None:
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (directory / "model.safetensors").write_bytes(data)


def claim_a_huge_header(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def link_out(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.rename(directory.parent / "elsewhere.safetensors")
    os.symlink(directory.parent / "elsewhere.safetensors", path)


def in_description(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edited(data: Any) -> Any:
        change(data["description"])
        return data

    return edit("graphopt.json", edited)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no plan": (lambda d: (d / "plan.json").unlink(), "lacks plan.json"),
    "plan is cut": (cut("plan.json", 0.5), "not valid JSON"),
    "plan is newer": (edit("plan.json", lambda p: {**p, "schema_version": 9}), "newer graphopt"),
    "plan has other keys": (edit("plan.json", lambda p: {**p, "code": "x"}), "code"),
    "unknown pass": (edit_change(**{"pass": "mine-bitcoin"}), "mine-bitcoin"),
    "unknown target": (
        edit_change(target="no.such", details={}),
        "is the plan for another|details|no.such",
    ),
    "manifest is cut": (cut("graphopt.json", 0.5), "JSON"),
    "manifest is newer": (edit_manifest(schema_version=9), "newer graphopt"),
    "manifest is a list": (edit("graphopt.json", lambda data: [data]), "damaged"),
    "unknown base": (edit_manifest(base="pickle"), "damaged: base"),
    "path in a checksum": (edit_manifest(sha256={"../secret": "0"}), "not a file name"),
    "absolute path": (edit_manifest(sha256={"/etc/passwd": "0"}), "not a file name"),
    "strange alias": (edit_manifest(aliases={"0.0.weight": "../x"}), "lacks"),
    "strange call": (edit_call({"$object": "os.system"}), "not a value"),
    "another call": (edit_call({"$dict": {"other": 1}}), "forward"),
    "unknown part": (edit_manifest(captures={}), "do not belong together"),
    "another class": (
        in_description(lambda tree: tree["children"]["1"].update({"class": "os.system"})),
        "not a class of torch.nn",
    ),
    "another module's class": (
        in_description(lambda tree: tree["children"]["1"].update({"class": "linear.Tensor"})),
        "not a class of torch.nn",
    ),
    "method as attribute": (
        in_description(lambda tree: tree["children"]["1"]["attributes"].update(forward="x")),
        "not an attribute",
    ),
    "unknown function": (
        in_description(
            lambda tree: tree["children"]["2"]["attributes"].update(f={"$function": "exec"})
        ),
        "not a value",
    ),
    "weights are cut": (cut("model.safetensors", 0.7), "not a complete safetensors file"),
    "weights are empty": (cut("model.safetensors", 0.0), "not a complete safetensors file"),
    "huge header": (claim_a_huge_header, "not a complete safetensors file"),
    "flipped bit": (flip_a_bit, "damaged or changed"),
    "missing tensor": (edit_tensors(lambda t: t.pop("1.bias")), "lacks: 1.bias"),
    "extra tensor": (edit_tensors(lambda t: t.update(x=torch.ones(1))), "unexpected tensors: x"),
    "wrong shape": (
        edit_tensors(lambda t: t.update({"1.bias": torch.ones(3)})),
        "does not fit the plan: 1.bias",
    ),
    "wrong type": (
        edit_tensors(lambda t: t.update({"5.bias": t["5.bias"].to(torch.int8)})),
        "5.bias is torch.int8",
    ),
    "link out of the directory": (link_out, "leads out of its directory"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("written") / "out"
    save(pruned(layers()), directory)
    return directory


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_before_anything_is_used(name: str, written: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    directory = tmp_path / "out"
    directory.mkdir()
    for path in written.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    damage(directory)
    with pytest.raises(GraphoptError, match=message):
        load(directory)
