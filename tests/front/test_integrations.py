"""The callbacks in real training loops: counted, advanced, and resumed from their checkpoints."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import graphopt
from graphopt.errors import ConfigError, MissingExtraError
from graphopt.integrations import lightning as lightning_integration
from graphopt.integrations import transformers as transformers_integration
from graphopt.kernels.gates import Gate
from graphopt.training import ComputeClock, ExecutedFlops

BATCH, TOKENS, STEPS = 4, 12, 6

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(0, 50, (TOKENS,), generator=generator),
            "attention_mask": torch.ones(TOKENS, dtype=torch.long),
            "labels": torch.tensor(index % 2),
        }
        for index in range(20)
    ]


class Gated(nn.Module):
    """A gate that a test can look at, inside of a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.gate = Gate(seed=1)
        self.seen: list[tuple[int, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.gate.step, self.gate.progress))
        result: Tensor = self.layer(x)
        return result


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    batch = {name: torch.stack([s[name] for s in samples()[:BATCH]]) for name in samples()[0]}
    model = BertForSequenceClassification(config)
    return graphopt.optimize(model, batch, recipe=["fuse-projections"], measure=False)


def trained(
    bert: nn.Module, directory: Path, *, resume: Path | None = None, **options: Any
) -> tuple[Any, transformers_integration.GraphoptCallback, Gated]:
    model: Any = copy.deepcopy(bert)
    model.classifier = Gated(model.classifier)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clock = ComputeClock(model, planned_flops=5e7)
    callback = transformers_integration.GraphoptCallback(directory / "run.jsonl", clock=clock)
    arguments = TrainingArguments(
        str(directory / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=samples(),
        callbacks=[callback],
        optimizers=(optimizer, clock.learning_rate(optimizer)),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, callback, model.classifier


def test_a_trainer_advances_gates_and_writes_down_what_it_spends(
    bert: nn.Module, tmp_path: Path
) -> None:
    model, callback, gated = trained(bert, tmp_path)
    clock = callback.clock
    assert clock is not None
    found = lines(tmp_path / "run.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert all(line["samples"] * TOKENS == line["tokens"] == BATCH * TOKENS for line in found)
    batch = {name: torch.stack([s[name] for s in samples()[:BATCH]]) for name in samples()[0]}
    with ExecutedFlops() as executed:
        model.train()(**batch).loss.backward()
    assert {line["flops"] for line in found} == {executed.flops}
    assert all(0 < line["loss"] < 3 for line in found)
    assert gated.seen[:STEPS] == [(k, k * executed.flops / 5e7) for k in range(STEPS)]
    assert clock.progress == pytest.approx(STEPS * executed.flops / 5e7)
    assert not model._forward_hooks


def test_a_trainer_resumes_to_the_last_bit(bert: nn.Module, tmp_path: Path) -> None:
    whole, _, seen = trained(bert, tmp_path)
    before = lines(tmp_path / "run.jsonl")
    resumed, callback, again = trained(bert, tmp_path, resume=tmp_path / "out" / "checkpoint-4")
    assert lines(tmp_path / "run.jsonl") == before
    assert again.seen == seen.seen[4:]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert callback.ledger.totals["train"]["entries"] == STEPS


def test_a_trainer_step_of_several_batches_is_one_entry(bert: nn.Module, tmp_path: Path) -> None:
    trained(bert, tmp_path, gradient_accumulation_steps=2, save_strategy="no")
    found = lines(tmp_path / "run.jsonl")
    assert len(found) == STEPS
    assert {line["samples"] for line in found} == {2 * BATCH, BATCH}


class Regression(pl.LightningModule):  # type: ignore[misc]
    """A module with dropout and a gate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), Gated(nn.Linear(16, 2)))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fitted(
    directory: Path, *, resume: Path | None = None, **options: Any
) -> tuple[Regression, lightning_integration.GraphoptCallback]:
    module = Regression()
    callback = lightning_integration.GraphoptCallback(directory / "run.jsonl")
    torch.manual_seed(3)
    x = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    trainer = pl.Trainer(
        max_epochs=options.pop("max_epochs", 2),
        callbacks=[callback, ModelCheckpoint(directory, save_top_k=-1, filename="{step}")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    )
    data = DataLoader(TensorDataset(x, x[:, :2]), batch_size=4)
    trainer.fit(module, data, ckpt_path=resume)
    return module, callback


def test_lightning_advances_gates_writes_down_and_resumes(tmp_path: Path) -> None:
    module, callback = fitted(tmp_path)
    before = lines(tmp_path / "run.jsonl")
    assert [line["step"] for line in before] == list(range(1, 13))
    assert {line["samples"] for line in before} == {4}
    assert {line["flops"] for line in before} == {2 * 4 * (2 * 8 * 16 + 3 * 16 * 2)}
    assert callback.clock is not None
    assert callback.clock.progress == 1
    assert module.net[2].seen == [(step, step / 12) for step in range(12)]
    resumed, again = fitted(tmp_path, resume=tmp_path / "step=6.ckpt")
    assert len(lines(tmp_path / "run.jsonl")) == 12
    assert lines(tmp_path / "run.jsonl")[:6] == before[:6]
    assert resumed.net[2].seen == module.net[2].seen[6:]
    assert again.ledger.total_flops == callback.ledger.total_flops


def test_a_lightning_step_of_several_batches_is_one_entry(tmp_path: Path) -> None:
    _, callback = fitted(tmp_path, accumulate_grad_batches=3)
    assert [line["samples"] for line in lines(tmp_path / "run.jsonl")] == [12] * 4
    assert callback.clock is not None
    assert callback.clock.steps == callback.clock.planned == 4


def test_a_training_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pass max_steps or max_epochs"):
        fitted(tmp_path, max_epochs=-1)


@pytest.mark.parametrize(
    ("library", "advice"),
    [("transformers", r"graphopt\[hf\]"), ("lightning", r"graphopt\[lightning\]")],
)
def test_a_missing_library_is_named_with_its_extra(
    library: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"graphopt.integrations.{library}"
    for absent in ("transformers", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, absent, None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=advice):
        importlib.import_module(name)
