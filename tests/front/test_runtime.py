"""An optimized model is still the user's model: class, names, hooks, generation, conversions."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zoo import EXAMPLE, find_case, without_dropout

from graphopt import capture
from graphopt.errors import PlanError
from graphopt.passes.plan import Plan
from graphopt.passes.structure import flatten
from graphopt.passes.verifier import preserved
from graphopt.runtime import install, installation_of, uninstall


def installed(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return an eager model and its twin that runs its graph, equal in everything else."""
    case = find_case(name)
    eager = without_dropout(case.build()).eval()
    model = copy.deepcopy(eager)
    inputs = case.inputs(*EXAMPLE)
    return eager, install(capture(model, inputs), Plan(model_class=name), **options)


def assert_equal(actual: Any, expected: Any) -> None:
    tensors, structure = flatten(actual)
    references, expected_structure = flatten(expected)
    assert structure == expected_structure
    assert all(map(torch.equal, tensors, references))


def count_graph_calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every call of the model's original forward."""
    eager_calls: list[int] = []
    original = type(model).__dict__["_graphopt_original_class"]
    forward = original.forward

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        eager_calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(original, "forward", counted)
    return eager_calls


def gradients(model: nn.Module, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    model.zero_grad()
    with preserved(model):
        loss = flatten(model(**kwargs))[0][0].float().square().mean()
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_class_names_and_parameters_stay() -> None:
    case = find_case("bert-classifier")
    model = case.build().eval()
    original, config = type(model), model.get_submodule("bert").config
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    keys = list(model.state_dict())
    result = install(capture(model, case.inputs(*EXAMPLE)), Plan(model_class="x"))
    assert result is model
    assert isinstance(model, original)
    assert type(model) is not original
    assert type(model).__name__ == original.__name__
    assert model.get_submodule("bert").config is config
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(m is modules[name] for name, m in model.named_modules())
    assert len(list(model.named_modules())) == len(modules)
    output = model(**case.call(4, 7)[1])
    assert type(output).__name__ == "SequenceClassifierOutput"


def test_the_graph_runs_what_it_captured_and_eager_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    eager, model = installed("bert-classifier")
    eager_calls = count_graph_calls(model, monkeypatch)
    case = find_case("bert-classifier")
    inputs = case.call(4, 7)[1]
    positional = tuple(inputs.values())
    result, positional_result = model(**inputs), model(*positional)
    assert not eager_calls
    hidden = model(**inputs, output_hidden_states=True)
    assert eager_calls
    assert_equal(result, eager(**inputs))
    assert_equal(positional_result, eager(*positional))
    assert_equal(hidden, eager(**inputs, output_hidden_states=True))
    assert_equal(model(**inputs, return_dict=False), eager(**inputs, return_dict=False))
    assert_equal(model(inputs["input_ids"]), eager(inputs["input_ids"]))
    labelled = case.call(4, 7, labels=True)[1]
    assert_equal(model(**labelled), eager(**labelled))
    with pytest.raises(TypeError, match="input_ids"):
        model(inputs["input_ids"], input_ids=inputs["input_ids"])


def test_none_where_the_default_is_something_else_is_another_call() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, features: torch.Tensor, shift: float | None = 1.0) -> torch.Tensor:
            hidden: torch.Tensor = self.layer(features)
            return hidden if shift is None else hidden + shift

    model = Shifted().eval()
    features = torch.randn(3, 4)
    expected = model(features, None)
    install(capture(model, torch.randn(2, 4)), Plan(model_class="x"))
    assert_equal(model(features, shift=None), expected)
    assert_equal(model(features), expected + 1.0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mpt"])
def test_generation_with_a_cache_gives_the_eager_tokens(name: str) -> None:
    eager, model = installed(name)
    tokens = find_case(name).call(2, 7)[1]["input_ids"]
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "use_cache": True,
        "attention_mask": torch.ones_like(tokens),
        "pad_token_id": 0,
    }
    expected = eager.generate(tokens, **options)  # type: ignore[operator]  # a transformers model
    found = model.generate(tokens, **options)  # type: ignore[operator]  # a transformers model
    assert found.shape[1] > tokens.shape[1]
    assert torch.equal(found, expected)


def test_a_deep_copy_is_independent() -> None:
    eager, model = installed("bert")
    twin = copy.deepcopy(model)
    inputs = find_case("bert").call(4, 7)[1]
    expected = eager(**inputs)
    assert type(twin) is type(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_equal(twin(**inputs), expected)
    installation = installation_of(twin)
    assert installation is not None
    assert installation.program is not None
    assert installation.program.model is twin
    assert_equal(installation.program(**inputs), expected)


@pytest.mark.parametrize("name", ["bert-classifier", "flags"])
def test_compiled_model_gives_the_same_at_every_size(name: str) -> None:
    torch._dynamo.reset()
    eager, model = installed(name)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for batch, length in ((2, 16), (3, 9), (5, 12)):
        args, kwargs = find_case(name).call(batch, length)
        with torch.no_grad():
            assert_equal(compiled(*args, **kwargs), eager(*args, **kwargs))


@pytest.mark.parametrize("name", ["bert", "llama", "cnn"])
def test_autocast_is_equal_to_eager_autocast(name: str) -> None:
    eager, model = installed(name)
    args, kwargs = find_case(name).call(4, 7)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*args, **kwargs)
        assert_equal(found, eager(*args, **kwargs))
    tensors, _ = flatten(found)
    assert not torch.equal(tensors[0].float(), flatten(eager(*args, **kwargs))[0][0])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
def test_gradient_checkpointing_keeps_the_gradients(name: str) -> None:
    eager, model = installed(name)
    inputs = find_case(name).call(4, 7)[1]
    expected = gradients(eager.train(), inputs)
    assert all(map(torch.equal, gradients(model.train(), inputs), expected))
    ran: list[int] = []
    counted = next(m for n, m in model.named_modules() if n.endswith(".0"))
    counted.register_forward_pre_hook(lambda *_: ran.append(1))
    leaf = next(m for m in counted.modules() if isinstance(m, nn.LayerNorm))
    leaf.register_forward_pre_hook(lambda *_: ran.append(2))
    model.gradient_checkpointing_enable()  # type: ignore[operator]  # a transformers model
    found = gradients(model, inputs)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert ran.count(2) == 2, "the block runs again in the backward pass"
    model.gradient_checkpointing_disable()  # type: ignore[operator]  # a transformers model
    assert all(map(torch.equal, gradients(model, inputs), expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_conversion_to_another_type_is_equal_to_eager(name: str, dtype: torch.dtype) -> None:
    eager, model = installed(name)
    inputs = find_case(name).call(4, 7)[1]
    found = model.to(dtype)(**inputs)
    assert_equal(found, eager.to(dtype)(**inputs))
    assert flatten(found)[0][0].dtype == dtype


def test_hooks_on_leaves_and_blocks_fire() -> None:
    eager, model = installed("bert")
    inputs = find_case("bert").call(4, 7)[1]
    seen: dict[str, list[Any]] = {"eager": [], "graph": []}
    for kind, owner in (("eager", eager), ("graph", model)):
        for name in ("encoder.layer.0", "encoder.layer.1.output.dense", "pooler.dense"):

            def hook(_module: nn.Module, _args: Any, output: Any, kind: str = kind) -> None:
                seen[kind].append(flatten(output)[0][0].detach().clone())

            owner.get_submodule(name).register_forward_hook(hook)
        owner(**inputs)
    assert len(seen["graph"]) == 3
    assert_equal(seen["graph"], seen["eager"])


def test_uninstall_gives_the_classes_back() -> None:
    eager, model = installed("bert")
    uninstall(model)
    classes = {name: type(module) for name, module in eager.named_modules()}
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert installation_of(model) is None
    inputs = find_case("bert").call(4, 7)[1]
    assert_equal(model(**inputs), eager(**inputs))


def test_a_refused_eager_forward_raises_on_another_call() -> None:
    eager, model = installed("bert", eager_refusal="the heads were removed")
    inputs = find_case("bert").call(4, 7)[1]
    assert_equal(model(**inputs), eager(**inputs))
    with pytest.raises(PlanError, match=r"the heads were removed; optimize again"):
        model(**inputs, output_hidden_states=True)
    with pytest.raises(PlanError, match="sizes, types or mode"):
        model.to(torch.bfloat16)(**inputs)


def test_a_refused_eager_forward_leaves_modes_equal_up_to_rounding() -> None:
    eager, model = installed("transformer-encoder", eager_refusal="a layer was replaced")
    (features,), _ = find_case("transformer-encoder").call(4, 7)
    expected = eager(features).detach()  # with gradients: torch's fused layer does not run
    with torch.no_grad():
        assert torch.equal(model(features), expected)


def test_hugging_face_directory_is_written_under_the_class_name(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    eager, model = installed("bert-classifier")
    model.save_pretrained(tmp_path)  # type: ignore[operator]  # a transformers model
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["BertForSequenceClassification"]
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = find_case("bert-classifier").call(4, 7)[1]
    assert_equal(again(**inputs), eager(**inputs))


def test_pickling_says_what_to_do_instead() -> None:
    _, model = installed("sequential")
    with pytest.raises(PlanError, match=r"use graphopt\.save"):
        pickle.dumps(model)


def test_shared_block_runs_one_function_for_each_call() -> None:
    eager, model = installed("shared-block")
    (features,), _ = find_case("shared-block").call(4, 7)
    assert_equal(model(features), eager(features))
    assert_equal(copy.deepcopy(model)(features), eager(features))


def test_generated_code_follows_the_blocks() -> None:
    _, model = installed("bert")
    installation = installation_of(model)
    assert installation is not None
    assert "# encoder.layer.0\n" in installation.code
    assert "# encoder.layer.1\n" in installation.code
    root = installation.code[installation.code.index("# model\n") :]
    assert root.count("_graph = 0") == 2
    assert "intermediate" not in root
