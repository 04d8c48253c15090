"""Plans of models that do not fit in memory."""

import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import resource
import torch
import transformers
import graphopt

config = transformers.LlamaConfig(
    hidden_size=8192, num_hidden_layers=8, num_attention_heads=64, intermediate_size=22016,
    vocab_size=32000, use_cache=False,
)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.zeros(2, 128, dtype=torch.long)
plan = graphopt.plan(model, {"input_ids": tokens}, budget="60%")
assert plan.totals.before.parameters > 6.7e9, plan.totals
assert plan.totals.after.flops <= 0.6 * plan.totals.before.flops, plan.totals
assert len(plan.changes) == 16, len(plan.changes)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_seven_billion_parameters_are_planned_in_four_gigabytes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 4e9
