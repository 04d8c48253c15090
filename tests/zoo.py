"""Tiny random models of many architectures, with inputs at any batch and sequence size.

Every model is built from a small random configuration, seeded, in the library's default (train)
mode, with dropout rates other than zero wherever the architecture has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from zoo_modules import (
    ConvolutionalNetwork,
    FlaggedModel,
    RecurrentBlock,
    RecurrentNetwork,
    TransformerWithPadding,
)

VOCABULARY = 100
CLASSES = 3
IMAGE_SIZE = 32
EXAMPLE = (3, 9)
"""Rows and tokens that models are captured with, wherever that does not matter: equal calls share
a trace (`shared_traces`)."""

Inputs = dict[str, Any] | tuple[Any, ...]

_DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers")


@dataclass(frozen=True)
class Case:
    """One architecture: how to build it, what it is called with, what its labels look like.

    `inputs(batch, length)` gives the call without labels: a dict of keyword arguments or a tuple
    of positional ones. `labels(batch, length)` gives the `labels` keyword, None if the forward has
    none. Image models ignore `length`.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    labels: Callable[[int, int], Tensor] | None = None

    @property
    def sequence(self) -> bool:
        """Whether the inputs change with the length."""
        return _shapes(self.inputs(2, 8)) != _shapes(self.inputs(2, 9))

    def call(self, batch: int, length: int, *, labels: bool = False) -> tuple[tuple[Any, ...], Any]:
        """Positional and keyword arguments of one call.

        Args:
            batch: Rows.
            length: Tokens per row.
            labels: Whether to add the `labels` keyword.
        """
        inputs = self.inputs(batch, length)
        args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), dict(inputs))
        if labels and self.labels is not None:
            kwargs["labels"] = self.labels(batch, length)
        return args, kwargs


def without_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout rate of the model and of its configurations to zero, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _clear_rates(module)
        config = getattr(module, "config", None)
        if config is not None:
            _clear_rates(config)
            for nested in vars(config).values():
                if isinstance(nested, transformers.PreTrainedConfig):
                    _clear_rates(nested)
    return model


def with_attention(model: nn.Module, implementation: str) -> nn.Module:
    """Choose the attention implementation ("sdpa", "eager") of a transformers model, in place."""
    if isinstance(model, transformers.PreTrainedModel):
        model.set_attn_implementation(implementation)
    return model


def with_layers(name: str, layers: int) -> nn.Module:
    """Build the case of that name, with another number of layers where its configuration has one.

    Types of layers are left to the architecture.
    """
    model = find_case(name).build()
    config: Any = getattr(model, "config", None)
    if config is None:
        return model
    values = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
    values |= {depth: layers for depth in _DEPTHS if depth in values}
    torch.manual_seed(0)
    kind: Any = type(model)
    result: nn.Module = kind(type(config)(**values))
    return result.train()


def find_case(name: str) -> Case:
    """Return the case of that name."""
    return next(case for case in CASES if case.name == name)


def _clear_rates(holder: object) -> None:
    for name, value in vars(holder).items():
        if "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            setattr(holder, name, type(value)(0))


def _shapes(inputs: Inputs) -> list[torch.Size]:
    values = inputs if isinstance(inputs, tuple) else tuple(inputs.values())
    return [value.shape for value in values if isinstance(value, Tensor)]


def _generator(batch: int, length: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * batch + length)


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=_generator(batch, length))


def _attention_mask(batch: int, length: int) -> Tensor:
    """1 for tokens, 0 for padding at the end: row i is i % 3 tokens short, row 0 is full."""
    lengths = torch.tensor([max(1, length - row % 3) for row in range(batch)])
    return (torch.arange(length) < lengths[:, None]).long()


def _token_inputs(batch: int, length: int) -> Inputs:
    return {"input_ids": _tokens(batch, length)}


def _padded_inputs(batch: int, length: int) -> Inputs:
    return {
        "input_ids": _tokens(batch, length),
        "attention_mask": _attention_mask(batch, length),
    }


def _sequence_to_sequence_inputs(batch: int, length: int) -> Inputs:
    return {
        "input_ids": _tokens(batch, length),
        "attention_mask": _attention_mask(batch, length),
        "decoder_input_ids": _tokens(batch, max(2, length // 2 + 1)),
    }


def _images(batch: int, length: int) -> Tensor:
    size = (batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    return torch.randn(size, generator=_generator(batch, 0))


def _image_inputs(batch: int, length: int) -> Inputs:
    return {"pixel_values": _images(batch, length)}


def _features(batch: int, length: int) -> Tensor:
    return torch.randn((batch, length, 32), generator=_generator(batch, length))


def _class_labels(batch: int, length: int) -> Tensor:
    return torch.randint(CLASSES, (batch,), generator=_generator(batch, length))


def _decoder_labels(batch: int, length: int) -> Tensor:
    return _tokens(batch, max(2, length // 2 + 1))


def _transformers_case(
    name: str,
    architecture: str,
    configuration: str,
    inputs: Callable[[int, int], Inputs],
    labels: Callable[[int, int], Tensor] | None,
    **options: Any,
) -> Case:
    def build() -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, configuration)(**options)
        model = getattr(transformers, architecture)(config)
        assert isinstance(model, nn.Module)
        return model.train()

    return Case(name, build, inputs, labels)


def _module_case(
    name: str,
    module: Callable[[], nn.Module],
    inputs: Callable[[int, int], Inputs],
) -> Case:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return module().train()

    return Case(name, build, inputs)


_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_labels": CLASSES,
    "pad_token_id": 0,
}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_seq_len": 64,
    "resid_pdrop": 0.1,
    "emb_pdrop": 0.1,
}


def _encoder_layer(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


CASES: tuple[Case, ...] = (
    _transformers_case("bert", "BertModel", "BertConfig", _padded_inputs, None, **_ENCODER),
    _transformers_case(
        "bert-classifier",
        "BertForSequenceClassification",
        "BertConfig",
        _padded_inputs,
        _class_labels,
        **_ENCODER,
    ),
    _transformers_case(
        "distilbert",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _padded_inputs,
        _class_labels,
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=64,
        num_labels=CLASSES,
    ),
    _transformers_case(
        "roberta",
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _padded_inputs,
        _class_labels,
        **_ENCODER,
    ),
    _transformers_case(
        "modernbert",
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        _padded_inputs,
        _class_labels,
        **_ENCODER,
        local_attention=8,
        layer_types=["full_attention", "sliding_attention"],
        attention_dropout=0.1,
        mlp_dropout=0.1,
        embedding_dropout=0.1,
        classifier_dropout=0.1,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    _transformers_case("gpt2", "GPT2LMHeadModel", "GPT2Config", _token_inputs, _tokens, **_GPT2),
    _transformers_case(
        "gpt2-padded", "GPT2LMHeadModel", "GPT2Config", _padded_inputs, _tokens, **_GPT2
    ),
    _transformers_case(
        "llama", "LlamaForCausalLM", "LlamaConfig", _token_inputs, _tokens, **_DECODER
    ),
    _transformers_case(
        "llama-padded", "LlamaForCausalLM", "LlamaConfig", _padded_inputs, _tokens, **_DECODER
    ),
    _transformers_case(
        "qwen3", "Qwen3ForCausalLM", "Qwen3Config", _token_inputs, _tokens, **_DECODER, head_dim=8
    ),
    _transformers_case(
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _token_inputs,
        _tokens,
        **_DECODER,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    _transformers_case(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        _token_inputs,
        _tokens,
        **_DECODER,
        num_local_experts=4,
    ),
    _transformers_case("mpt", "MptForCausalLM", "MptConfig", _token_inputs, _tokens, **_MPT),
    _transformers_case(
        "mpt-padded", "MptForCausalLM", "MptConfig", _padded_inputs, _tokens, **_MPT
    ),
    _transformers_case(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        _padded_inputs,
        _tokens,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        attention_dropout=0.1,
        word_embed_proj_dim=32,
    ),
    _transformers_case(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        _sequence_to_sequence_inputs,
        _decoder_labels,
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    _transformers_case(
        "vit",
        "ViTForImageClassification",
        "ViTConfig",
        _image_inputs,
        _class_labels,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=IMAGE_SIZE,
        patch_size=8,
        num_labels=CLASSES,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    ),
    _transformers_case(
        "swin",
        "SwinForImageClassification",
        "SwinConfig",
        _image_inputs,
        _class_labels,
        image_size=IMAGE_SIZE,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=CLASSES,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    ),
    _transformers_case(
        "convnext",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        _image_inputs,
        _class_labels,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        image_size=IMAGE_SIZE,
        num_labels=CLASSES,
        drop_path_rate=0.1,
        layer_scale_init_value=1.0,
    ),
    _transformers_case(
        "resnet",
        "ResNetForImageClassification",
        "ResNetConfig",
        _image_inputs,
        _class_labels,
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[2, 2],
        num_labels=CLASSES,
    ),
    _module_case("transformer-encoder", _encoder_layer, lambda b, n: (_features(b, n),)),
    _module_case(
        "transformer-encoder-pre-norm",
        lambda: _encoder_layer(norm_first=True, activation="gelu"),
        lambda b, n: (_features(b, n),),
    ),
    _module_case(
        "transformer-encoder-padded",
        lambda: TransformerWithPadding(_encoder_layer()),
        lambda b, n: {
            "features": _features(b, n),
            "padding": _attention_mask(b, n) == 0,
        },
    ),
    _module_case("cnn", lambda: ConvolutionalNetwork(CLASSES), lambda b, n: (_images(b, n),)),
    _module_case(
        "lstm", lambda: RecurrentNetwork(VOCABULARY, CLASSES), lambda b, n: (_tokens(b, n),)
    ),
    _module_case("shared-block", RecurrentBlock, lambda b, n: (_features(b, n),)),
    _module_case(
        "flags",
        FlaggedModel,
        lambda b, n: {"features": _features(b, n), "bias": None, "scale": 2.0, "normalize": True},
    ),
    _module_case(
        "sequential",
        lambda: nn.Sequential(
            nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(64, 8)
        ),
        lambda b, n: (_features(b, n),),
    ),
)
