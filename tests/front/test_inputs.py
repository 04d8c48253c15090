"""Inputs are found for models that came without any, and resized consistently."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn

from graphopt.inputs import infer_inputs, variants
from graphopt.passes.calls import expand_arguments, signature_of
from graphopt.passes.errors import InputError


def call(model: nn.Module, arguments: dict[str, Any]) -> Any:
    args, kwargs = expand_arguments(signature_of(model), arguments)
    with torch.no_grad():
        return model.eval()(*args, **kwargs)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "gpt2", "opt", "mpt", "mixtral", "t5", "vit", "swin", "resnet"]
)
def test_configured_models_run_on_what_is_inferred(name: str) -> None:
    model = zoo.find_case(name).build()
    arguments = infer_inputs(model)
    call(model, arguments)
    assert {tensor.shape[0] for tensor in arguments.values()} == {8}
    assert ("attention_mask" in arguments) == ("input_ids" in arguments)
    if "attention_mask" in arguments:
        mask = arguments["attention_mask"]
        assert mask[0].all()
        assert not mask[1].all()
        assert mask[:, 0].all()


def test_minilm_gets_a_full_text_batch(minilm_directory: Path) -> None:
    model = transformers.AutoModel.from_pretrained(minilm_directory)
    arguments = infer_inputs(model)
    assert list(arguments) == ["input_ids", "attention_mask"]
    assert arguments["input_ids"].shape == (8, 128)
    assert ((arguments["input_ids"] == 0) == (arguments["attention_mask"] == 0)).all()
    assert call(model, arguments).last_hidden_state.shape == (8, 128, 384)


def test_a_model_on_meta_gets_inputs_on_meta_and_no_weights() -> None:
    config = transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    arguments = infer_inputs(model)
    assert arguments["input_ids"].device.type == "meta"
    with torch.device("meta"):
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 5))
    assert infer_inputs(plain)["input"].shape == (8, 3, 28, 28)


def test_a_classifier_without_padding_token_gets_one_row() -> None:
    model = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    )
    assert infer_inputs(model)["input_ids"].shape == (1, 16)


def test_two_modalities_are_both_found() -> None:
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    tiny |= {"num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**tiny, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**tiny, "image_size": 16, "patch_size": 8},
    )
    model = transformers.CLIPModel(config)
    arguments = infer_inputs(model)
    assert arguments["pixel_values"].shape == (8, 3, 16, 16)
    call(model, arguments)


def test_speech_models_run() -> None:
    config = transformers.WhisperConfig(
        vocab_size=60,
        num_mel_bins=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    arguments = infer_inputs(model)
    assert arguments["input_features"].shape == (8, 8, 40)
    call(model, arguments)


PLAIN: list[tuple[nn.Module, tuple[int, ...], torch.dtype]] = [
    (nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)), (8, 12), torch.float32),
    (nn.Sequential(nn.Flatten(), nn.Linear(784, 4)), (8, 784), torch.float32),
    (nn.Sequential(nn.Linear(6, 4)).double(), (8, 6), torch.float64),
    (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 13 * 13, 3)),
        (8, 1, 28, 28),
        torch.float32,
    ),
    (
        nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3136, 3)),
        (8, 3, 224, 224),
        torch.float32,
    ),
    (nn.Sequential(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1)), (8, 2, 32), torch.float32),
    (nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)), (8, 2, 32, 32, 32), torch.float32),
    (nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 3)), (8, 128), torch.int64),
    (nn.LSTM(6, 5, batch_first=True), (8, 128, 6), torch.float32),
    (nn.GRU(6, 5), (128, 8, 6), torch.float32),
    (nn.Sequential(nn.BatchNorm1d(9), nn.Linear(9, 2)), (8, 9), torch.float32),
    (nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 2)), (8, 128, 9), torch.float32),
    (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (8, 128, 8), torch.float32),
    (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False),
        (128, 8, 8),
        torch.float32,
    ),
]


@pytest.mark.parametrize(("model", "shape", "dtype"), PLAIN)
def test_plain_models_are_read_from_their_first_layers(
    model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    (value,) = infer_inputs(model).values()
    assert value.shape == shape
    assert value.dtype == dtype
    call(model, infer_inputs(model))


class LearnedPositions(nn.Module):
    """A token table and a position table of 50 rows, which nothing but running reveals."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 8)
        self.positions = nn.Embedding(50, 8)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        positions = self.positions(torch.arange(idx.shape[1], device=idx.device))
        hidden: Tensor = self.tokens(idx) + positions
        return hidden


def test_position_tables_bound_the_length() -> None:
    assert infer_inputs(LearnedPositions())["idx"].shape == (8, 32)


def test_inference_leaves_no_trace_and_repeats_itself() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, second = infer_inputs(model), infer_inputs(model)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model] == [True, False, True]


class TwoInputs(nn.Module):
    """Nothing tells what its second argument is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
        result: Tensor = scale * self.linear(left) + right
        return result


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (TwoInputs(), ["TwoInputs", "forward(left, right, scale=...)"]),
        (nn.Sequential(nn.ReLU()), ["forward(input)"]),
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 6)), ["tried:", "8x4 and 5x6"]),
    ],
)
def test_what_cannot_be_inferred_names_the_line_to_write(
    model: nn.Module, words: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        infer_inputs(model)
    for word in [*words, "graphopt.optimize(model, example_inputs)"]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


TEXT = {"input_ids": {0: "s1", 1: "s2"}, "attention_mask": {0: "s1", 1: "s2"}}


@pytest.mark.parametrize("name", ["bert-classifier", "roberta", "gpt2-padded", "llama-padded"])
def test_variants_of_texts_run_at_other_sizes(name: str) -> None:
    case = zoo.find_case(name)
    model = case.build()
    example = infer_inputs(model)
    found = variants(example, TEXT, generator=generator())
    shapes = [tuple(arguments["input_ids"].shape) for arguments in found]
    assert shapes == [(1, 5), (3, 9), (5, 31)]
    for arguments in found:
        mask = arguments["attention_mask"]
        assert mask.shape == arguments["input_ids"].shape
        assert mask[:, 0].all()
        assert (mask.diff(dim=1) <= 0).all(), "padding must stay at the end"
        assert torch.isin(arguments["input_ids"], example["input_ids"]).all()
        call(model, arguments)


def test_left_padding_stays_left() -> None:
    mask = (torch.arange(20) >= torch.tensor([0, 3, 19])[:, None]).long()
    dynamic = {"attention_mask": {0: "s1", 1: "s2"}}
    for arguments in variants({"attention_mask": mask}, dynamic, generator=generator()):
        assert (arguments["attention_mask"].diff(dim=1) >= 0).all()
        assert arguments["attention_mask"][:, -1].all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_an_unpadded_mask_gets_padding(dtype: torch.dtype) -> None:
    example = {"attention_mask": torch.ones(4, 20, dtype=dtype)}
    _, many, _ = variants(example, {"attention_mask": {0: "s1", 1: "s2"}}, generator=generator())
    mask = many["attention_mask"].bool()
    assert many["attention_mask"].dtype == dtype
    assert mask[0].all()
    assert not mask.all()
    assert mask.any(dim=1).all()


def test_symbols_and_expressions_change_together() -> None:
    example: dict[str, Any] = {
        "features": torch.randn(4, 12, 3),
        "pair": (torch.randn(4, 24), torch.randint(9, (13, 4))),
        "decoder": torch.randint(9, (4, 8)),
    }
    dynamic = {
        "features": {0: "s1", 1: "s7"},
        "pair_0": {0: "s1", 1: "2*s7"},
        "pair_1": {0: "s7 + 1", 1: "s1"},
        "decoder": {0: "s1", 1: "s9"},
    }
    found = variants(example, dynamic, generator=generator())
    assert len(found) == 3
    for arguments in found:
        batch, length, width = arguments["features"].shape
        assert (batch, length) != (4, 12)
        assert width == 3
        assert arguments["pair"][0].shape == (batch, 2 * length)
        assert arguments["pair"][1].shape == (length + 1, batch)
        assert arguments["decoder"].shape[0] == batch
        assert arguments["decoder"].shape[1] != length
        assert torch.isin(arguments["features"], example["features"]).all()
    assert len({arguments["features"].shape for arguments in found}) == 3


def test_a_symbol_known_only_from_an_expression_is_solved() -> None:
    example = {"images": torch.randn(2, 3, 32, 32)}
    dynamic = {"images": {0: "s1", 2: "16*s2", 3: "16*s3"}}
    for arguments in variants(example, dynamic, generator=generator()):
        height, width = arguments["images"].shape[2:]
        assert height % 16 == 0
        assert width % 16 == 0
        assert height > 32
        assert width > 32
        assert height != width


def test_undetermined_symbols_are_an_error() -> None:
    with pytest.raises(InputError, match="do not determine"):
        variants({"x": torch.zeros(6, 2)}, {"x": {0: "s1*s2"}}, generator=generator())


def test_one_row_grows_into_different_rows() -> None:
    example = {"ids": torch.arange(10)[None], "boxes": torch.arange(40).view(1, 10, 4)}
    dynamic = {"ids": {0: "s1", 1: "s2"}, "boxes": {0: "s1", 1: "s2"}}
    three = variants(example, dynamic, generator=generator())[0]
    assert not torch.equal(three["ids"][0], three["ids"][1])
    corners = three["boxes"] - three["boxes"][..., :1]
    assert (corners == torch.arange(4)).all(), "a box must stay whole"


def test_static_calls_vary_in_contents_only() -> None:
    example: dict[str, Any] = {"x": torch.randn(3, 4), "scale": 2.0}
    (other,) = variants(example, {"x": {}}, generator=generator())
    assert other["x"].shape == (3, 4)
    assert other["scale"] == 2.0
    assert not torch.equal(other["x"], example["x"])


def test_variants_repeat_with_the_seed_and_keep_the_device() -> None:
    example = {"x": torch.randn(8, 3)}
    first = variants(example, {"x": {0: "s1"}}, generator=generator())
    second = variants(example, {"x": {0: "s1"}}, generator=generator())
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    meta = {"x": torch.empty(8, 3, device="meta")}
    assert [v["x"].shape[0] for v in variants(meta, {"x": {0: "s1"}}, generator=generator())] == [
        1,
        3,
        5,
    ]
