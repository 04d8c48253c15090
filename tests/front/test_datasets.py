"""Batches come out the same from loaders, arrays and texts, in every pass, or with one sentence."""

from __future__ import annotations

import json
import operator
import pickle
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from graphopt.datasets import open_batches
from graphopt.passes.errors import (
    CheckpointError,
    ConfigError,
    GraphoptError,
    InputError,
    MissingExtraError,
)

TEXTS = [
    "A short one.",
    "Stocks rose on Friday after a long week of losses. " * 30,
    "naïve 日本",
    "",
]


def write_texts(path: Path, texts: Iterable[str] = TEXTS) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n", "utf-8")
    return path


def equal(left: Any, right: Any) -> None:
    torch.testing.assert_close(list(left), list(right), rtol=0, atol=0)


def test_loaders_of_tuples_fill_the_arguments_in_order() -> None:
    features, labels = torch.randn(10, 3), torch.arange(10)
    loader = DataLoader(TensorDataset(features, labels), batch_size=4)
    one = open_batches(loader, model_arguments=["x"])
    equal(one, [{"x": part} for part in features.split(4)])
    equal(one, [{"x": part} for part in features.split(4)])
    assert len(one) == 3
    both = open_batches(loader, model_arguments=["x", "labels"])
    equal(both, [{"x": x, "labels": y} for x, y in loader])


def test_entries_that_the_forward_lacks_are_dropped() -> None:
    encoding = transformers.BatchEncoding({"x": torch.ones(2, 3), "labels": torch.ones(2)})
    batches = [{"x": np.ones((2, 3), np.float32), "labels": [1, 2], "name": ["a", "b"]}, encoding]
    opened = open_batches(batches, model_arguments=["x", "mask"])
    equal(opened, [{"x": torch.ones(2, 3)}] * 2)


def test_one_shot_iterators_serve_many_passes() -> None:
    opened = open_batches((torch.full((2, 3), i) for i in range(3)), model_arguments=["x"])
    assert [len(list(opened)) for _ in range(3)] == [3, 3, 3]
    assert len(opened) == 3


def test_an_endless_source_ends_at_the_limit() -> None:
    def endless() -> Iterable[torch.Tensor]:
        while True:
            yield torch.randn(4, 3)

    opened = open_batches(endless(), model_arguments=["x"], limit=10)
    assert [len(batch["x"]) for batch in opened] == [4, 4, 2]
    equal(opened, opened)


def test_a_limit_makes_a_shuffling_loader_repeat_itself() -> None:
    loader = DataLoader(TensorDataset(torch.arange(100.0)[:, None]), batch_size=8, shuffle=True)
    opened = open_batches(loader, model_arguments=["x"], limit=20)
    equal(opened, opened)


def test_an_iterable_without_length_is_not_read_ahead() -> None:
    class Stream:
        started = 0

        def __iter__(self) -> Any:
            self.started += 1
            return iter([torch.ones(2, 3)])

    stream = Stream()
    opened = open_batches(stream, model_arguments=["x"])
    assert operator.length_hint(opened, -1) == -1
    assert [len(list(opened)) for _ in range(2)] == [1, 1]


def save_npz(path: Path, arrays: dict[str, torch.Tensor]) -> Path:
    named: dict[str, Any] = {name: value.numpy() for name, value in arrays.items()}
    np.savez(path, **named)
    return path


def save_safetensors(path: Path, arrays: dict[str, torch.Tensor]) -> Path:
    save_file(arrays, path)
    return path


@pytest.mark.parametrize(
    ("name", "save"), [("data.npz", save_npz), ("data.safetensors", save_safetensors)]
)
def test_array_files_are_cut_into_batches(
    tmp_path: Path, name: str, save: Callable[[Path, dict[str, torch.Tensor]], Path]
) -> None:
    arrays = {
        "input_ids": torch.arange(14).view(7, 2),
        "mask": torch.ones(7, 2, dtype=torch.bool),
        "labels": torch.zeros(3),
    }
    path = save(tmp_path / name, arrays)
    for source in (path, str(path), {**arrays, "labels": None}):
        opened = open_batches(source, model_arguments=["input_ids", "mask"], batch_size=3, limit=5)
        assert len(opened) == 2
        expected = [{k: arrays[k][a:b] for k in ("input_ids", "mask")} for a, b in ((0, 3), (3, 5))]
        equal(opened, expected)
        equal(opened, expected)


def test_a_tensor_is_samples_and_float64_arrays_become_float32(tmp_path: Path) -> None:
    rows = torch.randn(5, 3)
    opened = open_batches(rows, model_arguments=["x"], batch_size=2)
    equal(opened, [{"x": part} for part in rows.split(2)])
    np.savez(tmp_path / "d.npz", x=rows.double().numpy())
    equal(open_batches(tmp_path / "d.npz", model_arguments=["x"], batch_size=5), [{"x": rows}])


def test_texts_go_through_the_checkpoint_tokenizer(tmp_path: Path, minilm_directory: Path) -> None:
    path = write_texts(tmp_path / "texts.jsonl")
    model = transformers.AutoModel.from_pretrained(minilm_directory).eval()
    opened = open_batches(
        path,
        model_arguments=["input_ids", "attention_mask", "token_type_ids"],
        tokenizer_dir=minilm_directory,
        batch_size=3,
        max_length=64,
    )
    first, second = opened
    assert first["attention_mask"].sum(1)[0] == 2, "shortest first"
    assert first["input_ids"][0, :2].tolist() == [101, 102]
    assert first["input_ids"][2, :6].tolist() == [101, 1037, 2460, 2028, 1012, 102]
    assert second["input_ids"].shape == (1, 64)
    assert second["attention_mask"].sum() == 64
    equal(opened, [first, second])
    with torch.no_grad():
        assert model(**first).last_hidden_state.isfinite().all()
    (one,) = open_batches(
        str(path), model_arguments=["input_ids"], tokenizer_dir=minilm_directory, limit=1
    )
    assert one.keys() == {"input_ids"}
    assert one["input_ids"].shape == (1, 6)


def test_a_decoder_reads_the_text_too(tmp_path: Path, minilm_directory: Path) -> None:
    (batch,) = open_batches(
        write_texts(tmp_path / "texts.jsonl"),
        model_arguments=["input_ids", "attention_mask", "decoder_input_ids"],
        tokenizer_dir=minilm_directory,
    )
    assert torch.equal(batch["decoder_input_ids"], batch["input_ids"])


@pytest.mark.parametrize("end", ["<end>", None])
def test_a_tokenizer_without_padding_pads_with_its_end_token(
    tmp_path: Path, end: str | None
) -> None:
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<end>": 0, "one": 1, "two": 2}, unk_token="<end>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end)
    tokenizer.save_pretrained(tmp_path)
    path = write_texts(tmp_path / "texts.jsonl", ["two", "one two one"])
    arguments = ["input_ids", "attention_mask"]
    if end is None:
        with pytest.raises(InputError, match="no padding token"):
            open_batches(path, model_arguments=arguments, tokenizer_dir=tmp_path)
        return
    (batch,) = open_batches(path, model_arguments=arguments, tokenizer_dir=tmp_path)
    assert batch["input_ids"].tolist() == [[2, 0, 0], [1, 2, 1]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", ["line 2", "'not json'"]),
        ('["text"]', ["line 2", "JSON object"]),
        ('{"sentence": "a"}', ["line 2", "['sentence']"]),
        ('{"text": 3}', ["line 2", "int"]),
        ("[" * 100_000, ["line 2"]),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, words: list[str]) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError) as error:
        open_batches(path, model_arguments=["input_ids"], tokenizer_dir=tmp_path)
    for word in [*words, str(path)]:
        assert word in str(error.value)


class Exploit:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    raw, inside = tmp_path / "raw.npz", tmp_path / "inside.npz"
    raw.write_bytes(pickle.dumps(Exploit()))
    np.savez(inside, x=np.array([Exploit()], dtype=object))
    for path in (raw, inside):
        with pytest.raises(CheckpointError, match="plain arrays"):
            open_batches(path, model_arguments=["x"])


def test_damaged_and_foreign_files_are_refused(tmp_path: Path, minilm_directory: Path) -> None:
    whole = save_npz(tmp_path / "whole.npz", {"x": torch.randn(50, 50)}).read_bytes()
    tensors = save_safetensors(tmp_path / "w.safetensors", {"x": torch.randn(5, 5)}).read_bytes()
    np.save(tmp_path / "one.npy", np.ones(3))
    files = {
        "cut.npz": whole[: len(whole) // 2],
        "changed.npz": whole[:2000] + b"changed" + whole[2007:],
        "one.npz": (tmp_path / "one.npy").read_bytes(),
        "empty.npz": b"",
        "cut.safetensors": tensors[:-10],
        "empty.safetensors": b"",
        "latin.jsonl": '{"text": "\xe9"}'.encode("latin-1"),
        "data.pt": b"x",
        "noextension": b"x",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name) as error:
            open_batches(tmp_path / name, model_arguments=["x", "input_ids"])
        assert "\n" not in str(error.value)
    (tmp_path / "folder.npz").mkdir()
    for name in ("folder.npz", "missing.npz", "missing.jsonl"):
        with pytest.raises(CheckpointError, match=name):
            open_batches(tmp_path / name, model_arguments=["x"], tokenizer_dir=minilm_directory)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"x": torch.ones(3, 2), "mask": torch.ones(4, 2)}, "equally many samples"),
        ({"y": torch.ones(3, 2)}, r"forward takes \['x', 'mask'\]"),
        ({"x": torch.tensor(1.0)}, "first dimension is samples"),
        ({"x": np.array(["a"])}, "expected numbers"),
        (torch.ones(0, 3), "no samples"),
        (3, "got int"),
        (iter([]), "empty"),
    ],
)
def test_sources_that_do_not_fit_are_refused(source: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_batches(source, model_arguments=["x", "mask"])


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"y": torch.ones(3)}, r"batch 1 has the keys \['y'\]"),
        ({"x": [1, 2]}, "x of batch 1 is a list of int"),
        ("text", "batch 1 is a str"),
    ],
)
def test_batches_that_do_not_fit_are_numbered(item: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        list(open_batches([{"x": torch.ones(3)}, item], model_arguments=["x"]))


def test_the_last_quarter_of_texts_has_short_and_long_ones(
    tmp_path: Path, minilm_directory: Path
) -> None:
    path = write_texts(tmp_path / "texts.jsonl", ["one " * count for count in range(1, 10)])
    opened = open_batches(
        path, model_arguments=["input_ids"], tokenizer_dir=minilm_directory, batch_size=1
    )
    words = [batch["input_ids"].shape[1] - 2 for batch in opened]
    assert words == [1, 2, 3, 5, 6, 7, 9, 4, 8]


def test_texts_need_a_tokenizer_and_a_model_of_tokens(
    tmp_path: Path, minilm_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_texts(tmp_path / "texts.jsonl")
    cases: list[tuple[list[str], Path | None, type[GraphoptError], str]] = [
        (["pixel_values"], minilm_directory, InputError, "no input_ids"),
        (["input_ids"], None, InputError, "need a tokenizer"),
        (["input_ids"], tmp_path, CheckpointError, "no tokenizer could be read"),
    ]
    for arguments, directory, kind, words in cases:
        with pytest.raises(kind, match=words):
            open_batches(path, model_arguments=arguments, tokenizer_dir=directory)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"graphopt\[hf\]"):
        open_batches(path, model_arguments=["input_ids"], tokenizer_dir=minilm_directory)


@pytest.mark.parametrize("name", ["batch_size", "max_length", "limit"])
def test_numbers_below_one_are_refused(name: str) -> None:
    options: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        open_batches(torch.ones(3, 2), model_arguments=["x"], **options)
