"""A density that falls while a model is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt.errors import ConfigError, TrainingError
from graphopt.kernels import BlockLayout, BlockSparseLinear
from graphopt.runtime import installation_of

from .installed_plan import InstalledPlan
from .ranks import Group, refuse_wrapped, require_same
from .sparse_layers import block_norms, exchange, require_held, sparse_layers


class DensitySchedule:
    """Removes the weakest blocks of block-sparse layers little by little.

    Call `step()` once after every optimizer step. After step t, a layer that began with density
    d0 keeps `final + (d0 - final) * (1 - p)^3`, where p goes from 0 at step `start * total_steps`
    to 1 at `stop * total_steps`; every row tile loses the same share, the blocks with the smallest
    norms, in whole blocks and down to one at least. To start dense, make the layers with
    `BlockSparseLinear.from_dense(linear, density=1.0)`. Layers that are below `final_density`
    stay as they are, and so do frozen ones.

    Only stored blocks exist, so fewer blocks are a new, smaller parameter, which takes the old
    one's place in the optimizer with its state and gradient. Wrappers do not notice that: under
    DistributedDataParallel or FSDP, pass the module inside and wrap it again whenever `step()`
    returns True. All ranks must call `step()`; their blocks are compared before every removal.
    The plan of an optimized model is kept true.

    To resume: build the model as at the start, make the optimizer and the schedule, load the state
    of the schedule (the layers get their sizes then), then those of model and optimizer.

    Args:
        model: A model with `BlockSparseLinear` layers.
        optimizer: The optimizer of those layers.
        final_density: Share of the blocks to keep in the end, in (0, 1].
        total_steps: Optimizer steps of the whole training.
        start: Share of the training after which it begins.
        stop: Share of the training after which the final density is reached.
        interval: Steps between removals.
        process_group: The ranks that train the same layers; all by default.

    Raises:
        ConfigError: An option is outside its range.
        TrainingError: The model has no such layer, is wrapped, or had block-sparse layers before it
            was optimized; or the optimizer does not hold a layer.

    Source: Zhu and Gupta, To prune, or not to prune, 2017 (equation 1).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        final_density: float,
        total_steps: int,
        start: float = 0.0,
        stop: float = 0.4,
        interval: int = 100,
        process_group: Group | None = None,
    ) -> None:
        if not 0 < final_density <= 1 or not 0 <= start < stop <= 1:
            raise ConfigError(
                "expected a final density above 0 and at most 1, and 0 <= start < stop <= 1, got "
                f"{final_density}, {start} and {stop}"
            )
        self.final_density = final_density
        self.start_step = round(start * total_steps)
        self.stop_step = round(stop * total_steps)
        self.interval = interval
        if interval < 1 or self.stop_step <= self.start_step:
            raise ConfigError(
                f"expected an interval and a schedule of at least 1 step, got {interval} and "
                f"{self.stop_step - self.start_step} of {total_steps} steps"
            )
        self._model = model
        self._optimizer = optimizer
        self._group = process_group
        self._step = 0
        refuse_wrapped(model, "lowering the density")
        installation = installation_of(model)
        self._plan = None if installation is None else InstalledPlan(model, installation)
        layers = sparse_layers(model, trained=True)
        if not layers:
            raise TrainingError(
                f"expected a model with trained BlockSparseLinear layers, got "
                f"{type(model).__name__} without; make them with BlockSparseLinear.from_dense"
            )
        require_held(layers, optimizer)
        self._initial = {
            name: layer.layout.blocks_per_row_tile.tolist() for name, layer in layers.items()
        }

    def density_at(self, step: int, initial_density: float = 1.0) -> float:
        """Return the density after a step, before it is rounded to whole blocks."""
        if initial_density <= self.final_density:
            return initial_density
        progress = (step - self.start_step) / (self.stop_step - self.start_step)
        left = (1 - min(max(progress, 0.0), 1.0)) ** 3
        return self.final_density + (initial_density - self.final_density) * left

    def step(self) -> bool:
        """Count an optimizer step and remove blocks if it is time.

        Returns:
            Whether parameters were replaced by smaller ones.

        Raises:
            TrainingError: The model was wrapped meanwhile, ranks hold different values, or an
                optimizer keeps state that cannot be moved.
        """
        self._step += 1
        since = self._step - self.start_step
        due = since > 0 and since % self.interval == 0 and self._step < self.stop_step
        return self._shrink() if due or self._step == self.stop_step else False

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the number of blocks every row tile began with, JSON values."""
        return {"step": self._step, "initial_blocks": dict(self._initial)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the step of a `state_dict`, with layers of the sizes of that step."""
        self._initial = {name: list(counts) for name, counts in state["initial_blocks"].items()}
        self._step = int(state["step"])
        due = (min(self._step, self.stop_step) - self.start_step) // self.interval * self.interval
        last = self.stop_step if self._step >= self.stop_step else self.start_step + due
        self._shrink(last)

    @torch.no_grad()
    def _shrink(self, step: int | None = None) -> bool:
        """Give every layer the number of blocks after a step, the present one by default."""
        refuse_wrapped(self._model, "lowering the density")
        step = self._step if step is None else step
        found = sparse_layers(self._model, trained=True)
        layers = {name: layer for name, layer in found.items() if name in self._initial}
        if not layers:
            return False
        require_held(layers, self._optimizer)
        norms = {name: block_norms(layer.values) for name, layer in layers.items()}
        require_same("blocks", f"{step} {list(layers)}", norms.values(), self._group)
        replaced = []
        for name, layer in layers.items():
            counts = self._counts(name, layer, step)
            if bool((counts < layer.layout.blocks_per_row_tile).any()):
                _keep(layer, self._optimizer, name, _strongest(layer.layout, norms[name], counts))
                replaced.append(name)
        if self._plan is not None and replaced:
            for name in replaced:
                self._plan.resize(name, layers[name])
            self._plan.install(self._model)
        return bool(replaced)

    def _counts(self, name: str, layer: BlockSparseLinear, step: int) -> Tensor:
        """Return how many blocks every row tile keeps after a step [row tiles]."""
        initial = layer.rows.new_tensor(self._initial[name]).double()
        layout = layer.layout
        density = initial.sum().item() / (layout.row_tiles * layout.column_groups)
        kept = (initial * (self.density_at(step, density) / density)).round().long()
        return torch.maximum(kept, (initial > 0).long())


def _strongest(layout: BlockLayout, norms: Tensor, counts: Tensor) -> Tensor:
    """Return which blocks stay [blocks]: the strongest of each row tile; ties keep the first."""
    grid = norms.new_full((layout.row_tiles, layout.column_groups), -1)
    grid[layout.rows.long(), layout.columns.long()] = norms
    ranks = grid.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    return (ranks < counts[:, None])[layout.rows.long(), layout.columns.long()]


def _keep(layer: BlockSparseLinear, optimizer: Optimizer, name: str, kept: Tensor) -> None:
    values = nn.Parameter(layer.values[kept], requires_grad=layer.values.requires_grad)
    exchange(optimizer, layer.values, values, name, lambda tensor: tensor[kept])
    layer.values = values
    layer.rows, layer.columns = layer.rows[kept], layer.columns[kept]
