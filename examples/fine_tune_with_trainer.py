"""Fine-tune a text classifier with the Hugging Face Trainer, for less compute.

python examples/fine_tune_with_trainer.py PATH/TO/checkpoint texts.csv out/

The CSV file has a label (1, 2, ...) first and then one or more columns of text, as AG News has.
What graphopt needs is marked: one line and one callback.
"""

import csv
import sys
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import graphopt
from graphopt.integrations.transformers import GraphoptCallback


def main(checkpoint: Path, data: Path, output: Path) -> dict[str, float]:
    """Train on nine tenths of the rows, print what it cost, return the loss on the last tenth."""
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    with data.open(newline="", encoding="utf-8") as file:
        rows = [(int(label) - 1, " ".join(texts)) for label, *texts in csv.reader(file)]
    samples = [{**tokenizer(text, truncation=True), "labels": label} for label, text in rows]
    cut = len(samples) * 9 // 10
    collate = DataCollatorWithPadding(tokenizer)
    labels = 1 + max(label for label, _ in rows)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=labels)
    model = graphopt.optimize(model, dict(collate(samples[:8])), recipe="fine-tune")  # the line
    callback = GraphoptCallback(output / "ledger.jsonl")  # the callback
    trainer = Trainer(
        model,
        TrainingArguments(
            str(output), learning_rate=2e-4, per_device_train_batch_size=32, num_train_epochs=1
        ),
        train_dataset=samples[:cut],
        eval_dataset=samples[cut:],
        data_collator=collate,
        callbacks=[callback],
    )
    trainer.train()
    sys.stdout.write(f"{callback.ledger.total_flops:.3e} operations\n")
    found: dict[str, float] = trainer.evaluate()
    return found


if __name__ == "__main__":
    result = main(*map(Path, sys.argv[1:4]))
    sys.stdout.write(f"held-out loss {result['eval_loss']:.4f}\n")
