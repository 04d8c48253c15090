"""The exact passes on seven architectures: equality, and time saved over operations saved.

Models have random weights, width 256 and 4 layers. Text batches have the token lengths of 16 AG
News texts, padded to the longest; language models get the texts as labels, -100 at padding, and a
prompt of half of each text that is not labelled; images are random. A training step is forward and
backward, float32; times are medians of paired, interleaved runs. Dropout is off.

`pack-tokens`, `drop-dead-tokens` and both are timed against the eager model;
`hoist-frozen-prefix`, with half of the layers frozen and its cache full, against the eager model
with the same layers frozen. Where a pass does nothing, the row has its reason.

Model (its tokenizer) and data: see `minilm_protocol`.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from minilm_protocol import read_texts
from torch import Tensor, nn

import graphopt
from graphopt.environment import environment, write_csv
from graphopt.passes.stopwatch import interleaved_ms
from graphopt.passes.verifier import relative_error
from graphopt.training import ExecutedFlops, PrefixCache

_VOCABULARY = 30522
_TEXTS = 16
_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BOTH = "drop-dead-tokens,pack-tokens"
_PASSES = ("pack-tokens", "drop-dead-tokens", _BOTH, "hoist-frozen-prefix")
Batch = dict[str, Tensor]
Step = Callable[[nn.Module, Batch], None]


@dataclass(frozen=True)
class Row:
    """One pass on one architecture; errors are relative to the eager model's, Frobenius norms."""

    pass_name: str
    model: str
    changes: int
    reason: str
    evaluation_error: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    eager_flops: int | None = None
    pass_flops: int | None = None
    eager_ms: float | None = None
    pass_ms: float | None = None
    ratio: float | None = None
    saved_flops: float | None = None
    saved_time: float | None = None
    time_per_flop_saved: float | None = None


def main(
    data: Annotated[Path, typer.Option(help="AG News test split as CSV.")],
    model: Annotated[Path, typer.Option(help="Hugging Face directory of all-MiniLM-L6-v2.")],
    only: Annotated[str, typer.Option(help="Architectures, separated by commas.")] = "",
    passes: Annotated[str, typer.Option(help="Pipelines, separated by spaces.")] = " ".join(
        _PASSES
    ),
    budget: Annotated[float, typer.Option(help="Seconds to time each model.")] = 6.0,
    output: Annotated[Path, typer.Option(help="CSV file to add rows to.")] = (
        Path(__file__).parent / "results" / "exact_passes.csv"
    ),
) -> None:
    """Measure every pass on every architecture and add the rows."""
    torch.manual_seed(0)
    masks = _masks(data, model)
    for name, build in _MODELS.items():
        if only and name not in only.split(","):
            continue
        for pass_name in passes.split():
            row = _row(pass_name, name, *build(masks), budget)
            typer.echo(str(row))
            write_csv(output, [row], environment())


def _row(pass_name: str, name: str, eager: nn.Module, batch: Batch, budget: float) -> Row:
    recipe = pass_name
    if batch["labels"].dim() == 2:
        recipe = recipe.replace("drop-dead-tokens", "drop-dead-tokens{outputs=loss}")
    if pass_name == "hoist-frozen-prefix":
        _freeze_half(eager)
    optimized = graphopt.optimize(copy.deepcopy(eager), batch, recipe=recipe, measure=False)
    rows = graphopt.report(optimized).rows
    changes = [row for row in rows if row.decision == "kept"]
    if not changes:
        return Row(pass_name, name, 0, "; ".join(row.reason for row in rows))
    errors = _errors(eager, optimized, batch)
    with TemporaryDirectory() as directory, ExitStack() as stack:
        run: Step = _step
        if pass_name == "hoist-frozen-prefix":
            cache = stack.enter_context(PrefixCache(optimized, directory))
            run = partial(_cached_step, cache)
            run(optimized, batch)
        flops = [_flops(_step, eager, batch), _flops(run, optimized, batch)]
        functions = [partial(_step, eager, batch), partial(run, optimized, batch)]
        times = interleaved_ms(functions, torch.device("cpu"), budget)
    ratio = statistics.median(before / after for before, after in zip(*times, strict=True))
    saved_flops, saved_time = 1 - flops[1] / flops[0], 1 - 1 / ratio
    return Row(
        pass_name,
        name,
        len(changes),
        "; ".join(row.reason for row in changes),
        *errors,
        eager_flops=flops[0],
        pass_flops=flops[1],
        eager_ms=round(statistics.median(times[0]), 2),
        pass_ms=round(statistics.median(times[1]), 2),
        ratio=round(ratio, 3),
        saved_flops=round(saved_flops, 3),
        saved_time=round(saved_time, 3),
        time_per_flop_saved=round(saved_time / saved_flops, 3),
    )


def _step(model: nn.Module, batch: Batch) -> None:
    model.train()
    model(**batch).loss.backward()
    model.zero_grad()


def _cached_step(cache: PrefixCache, model: nn.Module, batch: Batch) -> None:
    model.train()
    with cache.samples(range(len(batch["labels"]))):
        loss = model(**batch).loss
    loss.backward()
    model.zero_grad()


def _flops(run: Step, model: nn.Module, batch: Batch) -> int:
    with ExecutedFlops() as executed:
        run(model, batch)
    return int(executed.flops)


def _errors(eager: nn.Module, optimized: nn.Module, batch: Batch) -> tuple[float, float, float]:
    """Return the errors of evaluation logits, training loss and all gradients together."""
    logits, losses, gradients = [], [], []
    for model in (eager, optimized):
        with torch.no_grad():
            logits.append(_readable(model.eval()(**batch).logits, batch))
        loss = model.train()(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        found = [p.grad for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat([value.flatten() for value in found]))
        model.zero_grad()
    return (
        relative_error(logits[1], logits[0]),
        relative_error(losses[1], losses[0]),
        relative_error(gradients[1], gradients[0]),
    )


def _readable(logits: Tensor, batch: Batch) -> Tensor:
    """Return the logits that somebody may read: those that predict a labelled token."""
    if "labels" not in batch or batch["labels"].dim() == 1:
        return logits
    return logits[:, :-1][batch["labels"][:, 1:] != -100]


def _freeze_half(model: nn.Module) -> None:
    blocks = max(
        (module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in blocks[len(blocks) // 2 :]:
        block.requires_grad_(True)


def _masks(data: Path, directory: Path) -> Tensor:
    """Return the attention mask of a padded batch of texts [text, token]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = read_texts(data)[:_TEXTS]
    mask: Tensor = tokenizer(texts, padding=True, return_tensors="pt")["attention_mask"]
    return mask


def _classified(config: Any, mask: Tensor) -> tuple[nn.Module, Batch]:
    from transformers import AutoModelForSequenceClassification

    batch = {"input_ids": _ids(mask), "attention_mask": mask, "labels": torch.arange(len(mask)) % 4}
    return AutoModelForSequenceClassification.from_config(config), batch


def _continued(config: Any, mask: Tensor) -> tuple[nn.Module, Batch]:
    from transformers import AutoModelForCausalLM

    ids = _ids(mask)
    is_prompt = mask.cumsum(1) <= mask.sum(1, keepdim=True) // 2
    labels = ids.masked_fill(is_prompt | (mask == 0), -100)
    return (
        AutoModelForCausalLM.from_config(config),
        {"input_ids": ids, "attention_mask": mask, "labels": labels},
    )


def _ids(mask: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, _VOCABULARY, mask.shape, generator=generator) * mask


def _bert(mask: Tensor) -> tuple[nn.Module, Batch]:
    from transformers import BertConfig

    return _classified(BertConfig(**_SIZES, **_NO_DROPOUT, num_labels=4), mask)


def _roberta(mask: Tensor) -> tuple[nn.Module, Batch]:
    from transformers import RobertaConfig

    config = RobertaConfig(
        **_SIZES, **_NO_DROPOUT, vocab_size=_VOCABULARY, num_labels=4, pad_token_id=0
    )
    return _classified(config, mask)


def _modernbert(mask: Tensor) -> tuple[nn.Module, Batch]:
    from transformers import ModernBertConfig

    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    config = ModernBertConfig(
        **_SIZES, **tokens, vocab_size=_VOCABULARY, num_labels=4, pad_token_id=0
    )
    return _classified(config, mask)


def _distilbert(mask: Tensor) -> tuple[nn.Module, Batch]:
    from transformers import DistilBertConfig

    config = DistilBertConfig(
        dim=256,
        hidden_dim=1024,
        n_layers=4,
        n_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        num_labels=4,
    )
    return _classified(config, mask)


def _gpt2(mask: Tensor) -> tuple[nn.Module, Batch]:
    from transformers import GPT2Config

    config = GPT2Config(
        vocab_size=_VOCABULARY,
        n_embd=256,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return _continued(config, mask)


def _llama(mask: Tensor) -> tuple[nn.Module, Batch]:
    from transformers import LlamaConfig

    return _continued(LlamaConfig(**_SIZES, vocab_size=_VOCABULARY, use_cache=False), mask)


def _vit(mask: Tensor) -> tuple[nn.Module, Batch]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**_SIZES, **_NO_DROPOUT, image_size=128, patch_size=8, num_labels=4)
    images = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": images, "labels": torch.arange(4)}
    return ViTForImageClassification(config), batch


_MODELS: dict[str, Callable[[Tensor], tuple[nn.Module, Batch]]] = {
    "BERT": _bert,
    "ModernBERT": _modernbert,
    "RoBERTa": _roberta,
    "DistilBERT": _distilbert,
    "GPT-2": _gpt2,
    "Llama": _llama,
    "ViT": _vit,
}


if __name__ == "__main__":
    typer.run(main)
