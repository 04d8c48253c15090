"""Blocks that move in training: what goes, what comes, and that nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.errors import ConfigError, TrainingError
from graphopt.kernels import BlockLayout, BlockSparseLinear
from graphopt.training import BlockTopology
from graphopt.training.block_topology import regrown

INPUTS, OUTPUTS, ROWS, COLUMNS = 48, 32, 8, 6


def random_layer(density: float, *, seed: int = 0, balanced: bool = True) -> BlockSparseLinear:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(OUTPUTS // ROWS, INPUTS // COLUMNS, generator=generator)
    layout = BlockLayout.from_scores(scores, density, ROWS, COLUMNS, balanced=balanced)
    return BlockSparseLinear(layout)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    topology: BlockTopology | None,
    steps: range,
    teacher: nn.Module,
) -> list[int]:
    moved = []
    for step in steps:
        x = torch.randn(64, INPUTS, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), teacher(x).detach()).backward()
        optimizer.step()
        moved.append(topology.step() if topology is not None else 0)
    return moved


@pytest.mark.parametrize("seed", range(3))
def test_moving_blocks_find_the_support_of_a_planted_teacher(seed: int) -> None:
    torch.manual_seed(seed)
    teacher = random_layer(0.25, seed=100 + seed)
    planted = teacher.layout.mask()
    found, loss = {}, {}
    for moving in (False, True):
        student = random_layer(0.25, seed=200 + seed)
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
        topology = (
            BlockTopology(student, optimizer, total_steps=240, drop_fraction=0.5, interval=20)
            if moving
            else None
        )
        train(student, optimizer, topology, range(240), teacher)
        found[moving] = (student.layout.mask() & planted).sum().item()
        assert student.layout.blocks_per_row_tile.tolist() == [2] * 4
        loss[moving] = (student.weight - teacher.weight).square().sum().item()
    # Chance finds 2 of the 8.
    assert found[False] <= 2
    assert found[True] >= 6
    assert loss[True] < loss[False] / 2


def test_an_update_drops_the_weakest_and_grows_the_most_wanted() -> None:
    layer = random_layer(0.5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    topology = BlockTopology(layer, optimizer, total_steps=10, drop_fraction=0.9, interval=1)
    x, target = torch.randn(16, INPUTS), torch.randn(16, OUTPUTS)
    dense = layer.to_dense()
    nn.functional.mse_loss(dense(x), target).backward()
    assert dense.weight.grad is not None
    nn.functional.mse_loss(layer(x), target).backward()
    optimizer.step()
    before = BlockLayout.from_mask(layer.layout.mask(), ROWS, COLUMNS)
    values = layer.values.detach().clone()
    moments = {k: v.clone() for k, v in optimizer.state[layer.values].items()}
    held, versions = layer.values, (layer.rows._version, layer.columns._version)
    share = topology.drop_fraction_at(1)
    count = round(share * 4)
    assert 0 < count < 4
    assert topology.step() == 4 * count

    # The same by a plain search, one row tile at a time.
    wanted = dense.weight.grad.view(4, ROWS, 8, COLUMNS).double().square().sum((1, 3))
    strength = values.double().square().sum((1, 2))
    expected = set()
    for tile in range(4):
        stored = [i for i in range(before.blocks) if before.rows[i] == tile]
        strong = sorted(stored, key=lambda i: float(strength[i]))[count:]
        groups = {int(before.columns[i]) for i in stored}
        missing = sorted(set(range(8)) - groups, key=lambda j: float(-wanted[tile, j]))
        expected |= {(tile, int(before.columns[i])) for i in strong}
        expected |= {(tile, j) for j in missing[:count]}
    after = layer.layout
    places = list(zip(after.rows.tolist(), after.columns.tolist(), strict=True))
    assert set(places) == expected
    assert places == sorted(places)

    earlier_places = zip(before.rows.tolist(), before.columns.tolist(), strict=True)
    old = {place: i for i, place in enumerate(earlier_places)}
    now = {"values": layer.values.detach(), **optimizer.state[layer.values]}
    for name, earlier in {"values": values, **moments}.items():
        if earlier.dim() == 0:
            assert torch.equal(now[name], earlier)
            continue
        for i, place in enumerate(places):
            kept = earlier[old[place]] if place in old else torch.zeros(ROWS, COLUMNS)
            assert torch.equal(now[name][i], kept), name
    assert layer.values is held
    assert (layer.rows._version, layer.columns._version) > versions


def test_the_gradient_of_missing_blocks_is_that_of_all_calls_of_the_step() -> None:
    layer = random_layer(0.5, balanced=False)
    full = random_layer(1.0, seed=1)
    model = nn.ModuleList([layer, full])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    topology = BlockTopology(model, optimizer, total_steps=4, interval=2, stop=1)
    topology.step()
    dense = layer.to_dense()
    for shape in ((3, 5, INPUTS), (7, INPUTS)):  # micro-batches, and a layer called twice
        x = torch.randn(shape)
        (layer(x).square().sum() + layer(2 * x).sum()).backward()
        (dense(x).square().sum() + dense(2 * x).sum()).backward()
    with torch.no_grad():
        layer(torch.randn(2, INPUTS))
    assert dense.weight.grad is not None
    (gradients,) = topology._watched.values()
    blocks = BlockLayout.from_mask(~layer.layout.mask(), ROWS, COLUMNS).pack(dense.weight.grad)
    # Sums over at most 44 tokens of magnitudes up to the largest gradient, and one rounding of
    # their factors, which are sums over 48 inputs.
    atol = 100 * torch.finfo(torch.float32).eps * blocks.abs().max().item()
    torch.testing.assert_close(gradients.sum(), blocks, rtol=0, atol=atol)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=15, max_size=15).filter(any),
    st.floats(0, 1),
)
def test_every_row_tile_keeps_its_number_of_blocks(
    wanted: list[list[int]], stored: list[bool], fraction: float
) -> None:
    mask = torch.tensor(stored).view(3, 5)
    layout = BlockLayout.from_mask(mask, 2, 2)
    grid = torch.tensor(wanted).double().masked_fill(mask, 0)
    norms = torch.arange(layout.blocks) % 2
    after = regrown(layout, norms, grid, fraction)
    assert torch.equal(after.sum(1), mask.sum(1))
    assert bool((grid > 0)[after & ~mask].all())
    limit = (fraction * mask.sum(1)).round()
    assert bool(((after & ~mask).sum(1) <= limit).all())
    for tile, new, old in zip(grid, after, mask, strict=True):
        grown, left = tile[new & ~old], tile[~new & ~old]
        assert not grown.numel() or not left.numel() or grown.min() >= left.max()


def test_ties_are_broken_by_place_and_an_overflow_moves_nothing() -> None:
    layout = BlockLayout.from_mask(torch.tensor([[True, True, False, False]]), 1, 1)
    wanted = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert regrown(layout, torch.ones(2), wanted, 0.5).tolist() == [[False, True, True, False]]
    wanted[0, 3] = float("nan")
    assert torch.equal(regrown(layout, torch.ones(2), wanted, 0.5), layout.mask())


def test_the_share_falls_as_a_cosine_and_updates_stop() -> None:
    layer = random_layer(0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    topology = BlockTopology(layer, optimizer, total_steps=1000)
    shares = [topology.drop_fraction_at(step) for step in (0, 250, 375, 750, 751)]
    assert shares == pytest.approx([0.3, 0.225, 0.15, 0, 0])
    short = BlockTopology(layer, optimizer, total_steps=40, drop_fraction=0.6, interval=5)
    moved = train(layer, optimizer, short, range(40), random_layer(1.0))
    updates = [step for step, count in enumerate(moved, 1) if count]
    # 4 blocks in a row tile: from step 25 on the share rounds to none of them.
    assert updates == [5, 10, 15, 20]
    assert not layer._forward_hooks


@pytest.mark.parametrize("stopped", [9, 14])
def test_a_resumed_training_gives_equal_bits(stopped: int) -> None:
    teacher = random_layer(0.25, seed=7)

    def start() -> Any:
        model = nn.Sequential(random_layer(0.25, seed=8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return (
            model,
            optimizer,
            BlockTopology(model, optimizer, total_steps=40, drop_fraction=0.6, interval=5),
        )

    torch.manual_seed(1)
    model, optimizer, topology = start()
    train(model, optimizer, topology, range(stopped), teacher)
    saved = [copy.deepcopy(item.state_dict()) for item in (model, optimizer, topology)]
    again, optimizer_again, topology_again = resumed = start()
    for item, state in zip(resumed, saved, strict=True):
        item.load_state_dict(state)
    moved = train(model, optimizer, topology, range(stopped, 30), teacher)
    assert sum(moved) > 0
    steps = range(stopped, 30)
    assert train(again, optimizer_again, topology_again, steps, teacher) == moved
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_compiled_model_says_what_to_do_and_then_works() -> None:
    model = nn.Sequential(random_layer(0.5), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    topology = BlockTopology(compiled, optimizer, total_steps=10, interval=2)

    def step() -> int:
        compiled(torch.randn(4, INPUTS)).square().sum().backward()
        optimizer.step()
        return topology.step()

    step()
    with pytest.raises(TrainingError, match=r"updates_next under torch\.compiler"):
        step()
    step()
    assert topology.updates_next
    with torch.compiler.set_stance("force_eager"):
        assert step() > 0


def test_autocast_and_kept_gradients() -> None:
    layer = random_layer(0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    topology = BlockTopology(layer, optimizer, total_steps=10, interval=1)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x=torch.randn(4, INPUTS)).sum().backward()
    optimizer.step()
    before = layer.layout.mask()
    assert topology.step() > 0
    grown = (layer.layout.mask() & ~before)[layer.rows.long(), layer.columns.long()]
    assert layer.values.grad is not None
    assert not layer.values.grad[grown].any()
    assert layer.values.grad[~grown].any()


def test_frozen_layers_stay() -> None:
    frozen, trained = random_layer(0.5), random_layer(0.5)
    frozen.values.requires_grad_(False)
    before = frozen.layout.mask()
    model = nn.ModuleList([frozen, trained])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    topology = BlockTopology(model, optimizer, total_steps=10, interval=1)
    x = torch.randn(4, INPUTS)
    (frozen(x) + trained(x)).square().sum().backward()
    assert topology.step() > 0
    assert torch.equal(frozen.layout.mask(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_fraction": 0.0}, "above 0 and at most 1, got 0.0 and 0.75"),
        ({"stop": 1.5}, "got 0.3 and 1.5"),
        ({"interval": 0}, "at least 1 step"),
        ({"interval": 75}, "ends before 0.75 of 100 steps, got 75"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    layer = random_layer(0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    arguments: dict[str, Any] = {"total_steps": 100, "interval": 5, **options}
    with pytest.raises(ConfigError, match=message):
        BlockTopology(layer, optimizer, **arguments)


class FlatState(torch.optim.SGD):
    """Keeps state that no block owns."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        values = self.param_groups[0]["params"][0]
        self.state[values]["flat"] = torch.zeros(values.numel())


def test_what_cannot_be_moved_is_refused_before_anything_changes() -> None:
    layer = random_layer(0.5)
    linear, other = nn.Linear(3, 3), nn.Sequential(random_layer(0.5))
    pair: Any = nn.Sequential(random_layer(0.5), random_layer(0.5))
    pair[1].values = pair[0].values
    for model, trained, message in (
        (linear, linear, "got Linear without"),
        (other, layer, "does not hold the values of '0'"),
        (pair, pair, "'0' and '1' share their values"),
    ):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        with pytest.raises(TrainingError, match=message):
            BlockTopology(model, optimizer, total_steps=1000)
    flat = FlatState(layer.parameters(), lr=0.1)
    topology = BlockTopology(layer, flat, total_steps=10, interval=1)
    layer(torch.randn(4, INPUTS)).square().sum().backward()
    flat.step()
    before = layer.layout.mask()
    with pytest.raises(TrainingError, match=r"got flat of \[768\], which FlatState keeps"):
        topology.step()
    assert torch.equal(layer.layout.mask(), before)


class LowRankAdapter(nn.Module):
    """What adapters do: a frozen layer plus a trained product of two small matrices."""

    def __init__(self, base: BlockSparseLinear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def test_an_adapter_on_a_frozen_layer_is_trained_alone() -> None:
    adapted = LowRankAdapter(random_layer(0.5), 2)
    x = torch.randn(16, INPUTS, requires_grad=True)
    with torch.profiler.profile() as profile:
        adapted(x).square().sum().backward()
    called = {event.name for event in profile.events()}
    assert "graphopt::block_sparse_linear_input_gradient" in called
    assert "graphopt::block_sparse_linear_weight_gradient" not in called
    assert adapted.base.values.grad is None
    assert x.grad is not None
    assert adapted.up.weight.grad is not None

    wide = adapted.base.to_dense().double()
    weight = wide.weight + adapted.up.weight.double() @ adapted.down.weight.double()
    y = x.detach().double() @ weight.t() + wide.bias
    expected = 2 * y @ weight
    # Sums of 32 terms, each a sum of 48, doubled, over magnitudes up to the largest.
    atol = 2 * (32 + 48) * torch.finfo(torch.float32).eps * expected.abs().max().item()
    torch.testing.assert_close(x.grad.double(), expected, rtol=0, atol=atol)

    before = adapted.base.values.clone()
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    assert torch.equal(adapted.base.values, before)
