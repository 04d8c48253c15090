"""The cache of the frozen prefix: the same losses, less work, and never a stale value."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import EXAMPLE, find_case

import graphopt
from graphopt.errors import TrainingError
from graphopt.training.prefix_cache import PrefixCache
from graphopt.training.sample_store import SampleStore

SAMPLES = 6
LENGTHS = (9, 4, 7, 9, 5, 6)


def frozen(model: nn.Module, *parts: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))
    return model


def batch_of(rows: list[int], *, length: int | None = None) -> dict[str, Tensor]:
    """Samples by number, each with content of its own, padded to their longest or to `length`."""
    length = length or max(LENGTHS[row] for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for place, row in enumerate(rows):
        generator = torch.Generator().manual_seed(row)
        ids[place, : LENGTHS[row]] = torch.randint(3, 100, (LENGTHS[row],), generator=generator)
        mask[place, : LENGTHS[row]] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(rows) % 3}


@pytest.fixture(scope="module")
def optimized() -> nn.Module:
    model = frozen(find_case("bert-classifier").build(), "embeddings", "layer.0.")
    return graphopt.optimize(
        model, batch_of([0, 1, 2]), recipe=["hoist-frozen-prefix"], measure=False
    )


@pytest.fixture
def model(optimized: nn.Module) -> nn.Module:
    return copy.deepcopy(optimized).train()


def calls_of(module: nn.Module) -> list[int]:
    """Return a list that grows with every call of a module, by the number of its rows."""
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def _interrupt() -> None:
    raise KeyboardInterrupt


def with_ids(cache: PrefixCache, model: nn.Module, rows: list[int]) -> Tensor:
    """Return the logits of these samples."""
    with cache.samples(rows):
        logits: Tensor = model(**batch_of(rows)).logits
    return logits


def losses(model: nn.Module, epochs: int, cache: PrefixCache | None = None) -> list[float]:
    """Train for some epochs, shuffled, with dropout; return the loss of every step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    found: list[float] = []
    for _ in range(epochs):
        order = torch.randperm(SAMPLES, generator=generator).tolist()
        for rows in (order[:3], order[3:]):
            batch = batch_of(rows, length=9)
            if cache is None:
                loss = model(**batch).loss
            else:
                with cache.samples(rows):
                    loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found


def test_training_is_the_same_and_runs_the_prefix_once(model: nn.Module, tmp_path: Path) -> None:
    plain = losses(copy.deepcopy(model), epochs=3)
    rows = calls_of(model.get_submodule("bert.embeddings.word_embeddings"))
    with PrefixCache(model, tmp_path, dtype=torch.float32) as cache:
        assert losses(model, epochs=3, cache=cache) == plain
    assert cache.misses == SAMPLES
    assert cache.hits == 2 * SAMPLES
    # The first sample once more, to learn the types; then a comparison that looks at padding.
    assert sum(rows) <= 1 + 2 * 3 + SAMPLES


def test_bf16_values_are_rounded_once(model: nn.Module, tmp_path: Path) -> None:
    class Rounding(nn.Module):
        """A norm whose result is rounded to bf16."""

        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            value: Tensor = self.norm(x)
            return value.bfloat16().float()

    reference = copy.deepcopy(model)
    layer = reference.get_submodule("bert.encoder.layer.0.output")
    layer.LayerNorm = Rounding(layer.get_submodule("LayerNorm"))
    with PrefixCache(model, tmp_path) as cache:
        assert losses(model, 2, cache) == losses(reference, 2)


def test_a_sample_comes_back_padded_to_another_length(model: nn.Module, tmp_path: Path) -> None:
    model.eval()
    with PrefixCache(model, tmp_path, dtype=torch.float32) as cache:
        with cache.samples([1, 2, 4]):
            model(**batch_of([1, 2, 4]))
        for length in (9, 12):
            batch = batch_of([4, 1], length=length)
            with cache.samples([4, 1]):
                found = model(**batch)
            torch.testing.assert_close(found.logits, model(**batch).logits)
    assert (cache.hits, cache.misses) == (4, 3)


def test_other_content_and_other_weights_are_computed_again(
    model: nn.Module, tmp_path: Path
) -> None:
    model.eval()
    cache = PrefixCache(model, tmp_path, dtype=torch.float32)

    def check(batch: dict[str, Tensor], misses: int) -> None:
        with cache.samples([0, 3]):
            found = model(**batch).logits
        torch.testing.assert_close(found, model(**batch).logits)
        assert cache.misses == misses

    batch = batch_of([0, 3])
    check(batch, 2)
    check(batch, 2)
    batch["input_ids"][1, 5] += 1
    check(batch, 3)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.output.dense.weight").mul_(2)
    check(batch, 5)
    model.get_parameter("bert.encoder.layer.0.output.dense.weight").requires_grad_(True)
    with pytest.raises(TrainingError, match="stay frozen"):
        check(batch, 5)


def test_padding_that_is_read_is_stored(tmp_path: Path) -> None:
    """A language model's loss over padded positions reads them, so whole rows are kept."""
    case = find_case("gpt2-padded")
    _, batch = case.call(*EXAMPLE, labels=True)
    model = frozen(case.build(), "wte", "wpe", "h.0.")
    model = graphopt.optimize(model, batch, recipe=["hoist-frozen-prefix"], measure=False)
    model.eval()
    real = dict(batch, labels=batch["labels"].masked_fill(batch["attention_mask"] == 0, -100))
    for folder, inputs in (("whole", batch), ("real", real)):
        cache = PrefixCache(model, tmp_path / folder, dtype=torch.float32)
        for _ in range(2):
            with cache.samples([0, 1, 2]):
                found = model(**inputs).loss.item()
            assert found == pytest.approx(model(**inputs).loss.item(), rel=1e-6)
        cache.close()
        assert (cache.hits, cache.misses) == (3, 3)
    files = {
        f: sum(p.stat().st_size for p in (tmp_path / f).rglob("*.bin")) for f in ("whole", "real")
    }
    tokens = int(batch["attention_mask"].sum())
    assert files["real"] * batch["attention_mask"].numel() == files["whole"] * tokens


@pytest.mark.parametrize(
    ("name", "parts"),
    [("cnn", ("stem", "expand")), ("vit", ("embeddings", "layers.0.", "layer.0."))],
)
def test_images(name: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    case = find_case(name)
    args, kwargs = case.call(*EXAMPLE)
    model = frozen(case.build(), *parts)
    model = graphopt.optimize(
        model, kwargs or args, recipe=["hoist-frozen-prefix"], measure=False
    ).train()
    cache = PrefixCache(model, tmp_path, dtype=torch.float32)

    def output(seed: int) -> Tensor:
        torch.manual_seed(seed)
        result: Any = model(*args, **kwargs)
        value: Tensor = getattr(result, "logits", result)
        return value

    for epoch in range(2):
        with cache.samples("abc"):
            found = output(epoch)
        assert torch.equal(found, output(epoch))
    assert (cache.hits, cache.misses) == (3, 3)


def test_packed_tokens_are_split_by_sample(tmp_path: Path) -> None:
    model = frozen(find_case("bert-classifier").build(), "embeddings", "layer.0.")
    passes = ["hoist-frozen-prefix", "drop-dead-tokens", "pack-tokens"]
    model = graphopt.optimize(model, batch_of([0, 1, 2]), recipe=passes, measure=False).train()
    plain = losses(copy.deepcopy(model), epochs=2)
    with PrefixCache(model, tmp_path, dtype=torch.float32) as cache:
        assert losses(model, epochs=2, cache=cache) == plain
    assert (cache.hits, cache.misses) == (SAMPLES, SAMPLES)
    stored = sum(p.stat().st_size for p in tmp_path.rglob("*.bin"))
    assert stored == sum(LENGTHS) * 32 * 4, "one value of real tokens, before the packed layers"


def test_a_saved_model_finds_what_was_stored(model: nn.Module, tmp_path: Path) -> None:
    batch = batch_of([0, 3])
    with PrefixCache(model, tmp_path / "cache") as cache, cache.samples([0, 3]):
        expected = model.eval()(**batch).logits
    graphopt.save(model, tmp_path / "model")
    loaded = graphopt.load(tmp_path / "model")
    with PrefixCache(loaded, tmp_path / "cache") as cache, cache.samples([0, 3]):
        assert torch.equal(loaded(**batch).logits, expected)
    assert (cache.hits, cache.misses) == (2, 0)


def test_a_stopped_run_leaves_a_usable_cache(model: nn.Module, tmp_path: Path) -> None:
    stop = model.register_forward_hook(lambda *_: _interrupt())
    with pytest.raises(KeyboardInterrupt), PrefixCache(model, tmp_path) as cache:
        with_ids(cache, model, [0, 3])
    stop.remove()
    assert "forward" not in vars(model)
    killed = PrefixCache(model, tmp_path)
    with killed.samples([1, 2]):
        model(**batch_of([1, 2]))
    # Never closed: the index does not name what it added, and its file goes.
    with PrefixCache(model, tmp_path) as cache:
        for rows in ([0, 3], [1, 2]):
            with cache.samples(rows):
                model(**batch_of(rows))
    assert (cache.hits, cache.misses) == (2, 2)
    assert len(list(tmp_path.rglob("*.bin"))) == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_cache_stays_usable(model: nn.Module, tmp_path: Path) -> None:
    with PrefixCache(model, tmp_path, largest_bytes=1_000) as cache:
        with cache.samples([0]):
            model(**batch_of([0]))
        with pytest.raises(TrainingError, match="only 1,000 bytes"):
            with_ids(cache, model, [3])
        with cache.samples([0]):
            model(**batch_of([0]))
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.bin")) <= 1000


def test_calls_that_do_not_fit_are_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="expected a model optimized with hoist-frozen-prefix"):
        PrefixCache(find_case("bert-classifier").build(), tmp_path)
    cache = PrefixCache(model, tmp_path)
    with (
        pytest.raises(TrainingError, match="one id for each of 2 samples, got 1"),
        cache.samples([0]),
    ):
        model(**batch_of([0, 3]))
    batch = batch_of([0, 3])
    del batch["labels"]
    with pytest.raises(TrainingError, match="the call that the model"), cache.samples([0, 3]):
        model(**batch)


def test_ranks_read_what_others_wrote(tmp_path: Path) -> None:
    types = (torch.bfloat16, torch.int64)
    first, second = (SampleStore(tmp_path, types, rank=rank) for rank in (0, 1))
    value = [torch.randn(3, 5).bfloat16(), torch.arange(4)]
    first.put("a", value)
    first.put("empty", [torch.zeros(0, 5).bfloat16(), torch.zeros(0, dtype=torch.int64)])
    second.put("b", value)
    first.flush()
    second.refresh()
    for key in ("a", "b"):
        found = second.get(key)
        assert found is not None
        assert all(torch.equal(a, b) for a, b in zip(found, value, strict=True))
    assert first.get("b") is None
    found = second.get("empty")
    assert found is not None
    assert [list(tensor.shape) for tensor in found] == [[0, 5], [0]]


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, (torch.float32,))
    store.put("a", [torch.ones(3)])
    store.close()
    index = tmp_path / "rank-0" / "index.json"
    text = index.read_text()
    index.write_text(text[:-3])
    with pytest.raises(TrainingError, match="damaged"):
        SampleStore(tmp_path, (torch.float32,))
    index.write_text(text)
    (tmp_path / "rank-0" / "values-0000.bin").write_bytes(b"1234")
    with pytest.raises(TrainingError, match="does not fit its files"):
        SampleStore(tmp_path, (torch.float32,))
