"""The report: every decision is a row, and nothing is lost between plan, text and JSON."""

import json

import pytest
import torch
from torch import nn

from graphopt.capture import capture
from graphopt.errors import PlanError
from graphopt.passes.facts import module_costs, total_cost
from graphopt.passes.plan import Plan
from graphopt.report import plan_report, report
from graphopt.runtime import install

BEFORE = {"flops": 4_000_000, "size_bytes": 8_000_000, "parameters": 2_000_000, "latency_ms": 2.5}
AFTER = {"flops": 1_000_000, "size_bytes": 2_000_000, "parameters": 500_000, "latency_ms": 1.25}


def plan_of_one_layer() -> Plan:
    """Return a plan with one change, two refusals for one reason, and brackets in the texts."""
    return Plan.model_validate(
        {
            "model_class": "Sequential",
            "recipe": {"name": "deploy"},
            "inputs": [{"name": "input", "shape": [4, 16], "dtype": "torch.float32"}],
            "changes": [
                {
                    "pass": "prune-channels",
                    "target": "0",
                    "summary": "32 -> 8 channels [bold]",
                    "details": {"kept": [0, 1]},
                    "before": BEFORE,
                    "after": AFTER,
                    "predicted_error": 0.125,
                    "measured_error": 0.25,
                }
            ],
            "misses": [
                {"pass": "prune-channels", "target": name, "reason": "it is an output [4, 16]"}
                for name in ("2.weight (16 channels)", "3")
            ],
            "totals": {"before": BEFORE, "after": AFTER},
            "notes": ["dimension 1 of input is static"],
        }
    )


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def test_json_has_every_decision_with_its_costs() -> None:
    data = json.loads(json.dumps(plan_report(plan_of_one_layer()).to_json()))
    (change,) = data["changes"]
    assert (change["pass"], change["target"], change["decision"]) == ("prune-channels", "0", "kept")
    assert (change["before"], change["after"]) == (BEFORE, AFTER)
    assert (change["predicted_error"], change["measured_error"]) == (0.125, 0.25)
    assert [miss["target"] for miss in data["misses"]] == ["2.weight (16 channels)", "3"]
    assert {miss["decision"] for miss in data["misses"]} == {"refused"}
    assert data["totals"] == {"before": BEFORE, "after": AFTER}
    assert data["flops_share"] == 0.25


def test_text_shows_numbers_reasons_and_notes() -> None:
    text = str(plan_report(plan_of_one_layer()))
    for part in (
        "4M → 1M",
        "2M → 500k",
        "2.5 → 1.25",
        "0.12 / 0.25",
        "25.0%",
        "32 -> 8 channels [bold]",
        "it is an output [4, 16]",
        "2.weight (16 channels), 3",
        "note: dimension 1 of input is static",
    ):
        assert part in text


def test_a_plan_without_changes_says_so() -> None:
    assert "Nothing was changed." in str(plan_report(Plan(model_class="Sequential")))


def test_the_parts_of_a_model_are_reported_under_their_full_names() -> None:
    found = plan_report(Plan(notes=("only parts",), parts={"encoder": plan_of_one_layer()}))
    assert [row.target for row in found.kept] == ["encoder.0"]
    assert [row.target for row in found.refused] == ["encoder.2.weight (16 channels)", "encoder.3"]
    assert found.notes == ("only parts", "encoder: dimension 1 of input is static")


def test_an_optimized_model_reports_the_cost_of_what_was_left_alone() -> None:
    program = capture(model(), torch.randn(4, 16))
    optimized = install(program, plan_of_one_layer())
    found = report(optimized)
    assert found.refused[0].before is not None
    assert found.refused[0].before.flops == module_costs(program)["2"].flops
    assert found.refused[0].before.flops == 2 * 4 * 32 * 16 == total_cost(program).flops // 2
    assert found.refused[1].before is None


def test_a_model_that_was_not_optimized_has_no_report() -> None:
    with pytest.raises(PlanError, match="got a Sequential with nothing to report; optimize it"):
        report(model())
