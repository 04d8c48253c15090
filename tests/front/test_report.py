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

BEFORE = {
    "flops": 4_000_000,
    "size_bytes": 8_000_000,
    "parameters": 2_000_000,
    "latency_ms": 2.5,
    "latency_source": "measured",
}
AFTER = {
    "flops": 1_000_000,
    "size_bytes": 2_000_000,
    "parameters": 500_000,
    "latency_ms": 1.25,
    "latency_source": "measured",
}


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


def guarded_plan() -> Plan:
    """Return that plan with a budget, a guard, a loss, and a change that was given up."""
    plan = json.loads(plan_of_one_layer().to_json())
    plan["recipe"] = {"name": "deploy", "budget": "3MB", "runtime": "onnxruntime"}
    plan["changes"][0] |= {"loss": 0.0004, "loss_source": "data"}
    plan["misses"] += [
        {"pass": "prune-channels", "target": "4", "reason": "given up: accuracy fell to 0"}
    ]
    plan["guard"] = {
        "max_drift": 0.05,
        "max_drop": 0.01,
        "score": "accuracy",
        "batches": 2,
        "drift": 0.02,
        "cosine": 0.9998,
        "score_before": 0.9,
        "score_after": 0.895,
    }
    return Plan.model_validate(plan)


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


@pytest.mark.parametrize("source", ["interpolated", "predicted"])
def test_text_says_which_times_were_not_measured(source: str) -> None:
    plan = json.loads(plan_of_one_layer().to_json())
    for cost in (plan["changes"][0]["after"], plan["totals"]["after"]):
        cost["latency_source"] = source
    text = str(plan_report(Plan.model_validate(plan)))
    assert f"2.5 → 1.25 ({source})" in " ".join(text.split())
    assert f"{source}, ms" in text
    assert "measured, ms" not in text


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


def test_what_was_given_up_stands_apart_from_what_was_left_alone() -> None:
    found = plan_report(guarded_plan())
    assert [(row.target, row.reason) for row in found.given_up] == [("4", "accuracy fell to 0")]
    assert [row.target for row in found.refused] == ["2.weight (16 channels)", "3"]
    text = str(found)
    assert "Given up for the guard: 1" in text
    assert "Left as it was: 2" in text
    (given_up,) = found.to_json()["given_up"]
    assert (given_up["target"], given_up["decision"]) == ("4", "given up")


def test_budget_guard_and_losses_are_shown_with_what_was_reached() -> None:
    found = plan_report(guarded_plan())
    text = str(found)
    for part in (
        "Budget: 3000000 bytes; at most 3MB, reached 2MB: met",
        "Guard, on 2 batches: drift 0.02 (at most 0.05), cosine 0.99980, "
        "accuracy 0.9 → 0.895 (may drop by 0.01)",
        "0.0004, data",
        "ms in onnxruntime",
    ):
        assert part in text
    data = json.loads(json.dumps(found.to_json()))
    assert data["budget"] == {
        "asked": "3000000 bytes",
        "resource": "bytes",
        "allowed": 3e6,
        "reached": 2e6,
    }
    assert data["guard"]["drift"] == 0.02
    assert data["guard"]["min_cosine"] is None
    assert data["changes"][0]["loss"] == 0.0004
    assert data["changes"][0]["loss_source"] == "data"


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        (0.2, "at most 800k FLOPs, reached 1M FLOPs: not met"),
        ("60% latency", "at most 1.5 ms, reached 1.25 ms: met"),
        ("1M parameters", "at most 1M parameters, reached 500k parameters: met"),
    ],
)
def test_a_budget_is_compared_in_its_own_resource(budget: float | str, line: str) -> None:
    plan = guarded_plan().model_copy(update={"recipe": {"budget": budget}})
    assert line in str(plan_report(plan))


def test_a_latency_that_was_not_measured_is_not_called_met() -> None:
    plan = guarded_plan()
    assert plan.totals is not None
    after = plan.totals.after.model_copy(update={"latency_ms": None})
    totals = plan.totals.model_copy(update={"after": after})
    changed = plan.model_copy(update={"recipe": {"budget": "12ms"}, "totals": totals})
    assert "Budget: 12 ms; what was reached was not measured" in str(plan_report(changed))


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
