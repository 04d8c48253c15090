"""Blocks that move while they are trained: the weakest go, the most wanted come."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt.errors import ConfigError, TrainingError
from graphopt.kernels import BlockLayout, BlockSparseLinear

from .missing_gradients import MissingGradients
from .ranks import Group, add_up, require_same, whole, write
from .sparse_layers import block_norms, require_held, sparse_layers, state_tensors


class BlockTopology:
    """Moves the blocks of block-sparse layers to where the loss wants them (RigL, on blocks).

    Call `step()` once after every optimizer step. Every `interval` steps, each row tile of each
    trained layer drops the share `drop_fraction / 2 * (1 + cos(pi * step / (stop * total_steps)))`
    of its blocks, those with the smallest norms, and grows as many of the blocks it did not store,
    those with the largest gradient norms; both rounded to whole blocks. From
    `stop * total_steps` on, the blocks stay where they are. Every row tile keeps its number of
    blocks. New blocks are zeros, and so is the optimizer's state for them; that of the others
    moves along. Parameters stay the same objects, so wrappers and optimizers keep them. Blocks
    with equal norms go and come in the order of their places; equal bits give equal blocks.

    Several ranks: the gradients of missing blocks are added over the ranks (their order is that of
    the mean, which DDP and FSDP2 take of the stored ones), and SHA-256 sums of the blocks are
    compared before and after every choice. Works in plain loops, under DistributedDataParallel,
    and on layers sharded with `fully_shard`, whose values and state are gathered one layer at a
    time for an update.

    `torch.compile` overlooks hooks that come after it: run the steps with `updates_next` under
    `torch.compiler.set_stance("force_eager")`.

    Cost: nothing between updates; for that of an update step see `MissingGradients`.

    Args:
        model: Any model with `BlockSparseLinear` layers, optimized or hand-built, wrapped or not.
            Layers with frozen values are left alone.
        optimizer: The optimizer of those layers.
        total_steps: Optimizer steps of the whole training.
        drop_fraction: Share of the blocks to move at first, in (0, 1].
        interval: Steps between updates.
        stop: Share of the training after which nothing moves, in (0, 1].
        process_group: The ranks that train the same layers on other data; all by default.

    Raises:
        ConfigError: An option is outside its range, or no update would take place.
        TrainingError: The model has no such layer, or the optimizer does not hold one.

    Source: Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020 (algorithm 1);
    unlike there, blocks dropped in an update cannot grow back in the same one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int,
        drop_fraction: float = 0.3,
        interval: int = 100,
        stop: float = 0.75,
        process_group: Group | None = None,
    ) -> None:
        if not 0 < drop_fraction <= 1 or not 0 < stop <= 1:
            raise ConfigError(
                "expected drop_fraction and stop above 0 and at most 1, got "
                f"{drop_fraction} and {stop}"
            )
        if interval < 1 or not interval < stop * total_steps:
            raise ConfigError(
                f"expected an interval of at least 1 step that ends before {stop} of {total_steps} "
                f"steps, got {interval}"
            )
        self.total_steps = total_steps
        self.drop_fraction = drop_fraction
        self.interval = interval
        self.stop = stop
        self._model = model
        self._optimizer = optimizer
        self._group = process_group
        self._step = 0
        self._watched: dict[str, MissingGradients] = {}
        layers = sparse_layers(model, trained=True)
        if not layers:
            raise TrainingError(
                f"expected a model with trained BlockSparseLinear layers, got "
                f"{type(model).__name__} without; make them with BlockSparseLinear.from_dense or "
                "the pass sparsify-blocks"
            )
        require_held(layers, optimizer)
        self._watch()

    @property
    def updates_next(self) -> bool:
        """Whether the training step that comes now ends in an update."""
        return self.drop_fraction_at(self._step + 1) > 0 and (self._step + 1) % self.interval == 0

    def drop_fraction_at(self, step: int) -> float:
        """Return the share of blocks that an update after this step would move."""
        progress = step / (self.stop * self.total_steps)
        if progress >= 1:
            return 0.0
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * progress))

    def step(self) -> int:
        """Count an optimizer step and update the blocks if it is time; return how many moved.

        Raises:
            TrainingError: Ranks hold different blocks, an optimizer keeps state that cannot be
                moved, or no gradient was seen in the whole step; nothing is changed then.
        """
        present = {id(layer) for layer in sparse_layers(self._model, trained=True).values()}
        watched = {k: v for k, v in self._stop_watching().items() if id(v.layer) in present}
        self._step += 1
        moved = self._update(watched) if watched else 0
        self._watch()
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs besides the states of model and optimizer."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the step of a `state_dict`."""
        self._stop_watching()
        self._step = int(state["step"])
        self._watch()

    def _watch(self) -> None:
        """See the gradients of missing blocks in the coming step, if it ends in an update."""
        if self.updates_next:
            self._watched = {
                name: MissingGradients(layer)
                for name, layer in sparse_layers(self._model, trained=True).items()
                if layer.density < 1
            }

    def _stop_watching(self) -> dict[str, MissingGradients]:
        watched, self._watched = self._watched, {}
        for gradients in watched.values():
            gradients.stop()
        return watched

    @torch.no_grad()
    def _update(self, watched: dict[str, MissingGradients]) -> int:
        layers = {name: gradients.layer for name, gradients in watched.items()}
        require_held(layers, self._optimizer)
        for name, layer in layers.items():
            state_tensors(self._optimizer, layer.values, name)
        places = [places for item in layers.values() for places in (item.rows, item.columns)]
        where = f"{self._step} {list(layers)}"
        require_same("step, layers and blocks", where, places, self._group)
        self._require_gradients(watched)
        masks = {}
        for name, gradients in watched.items():
            total = gradients.sum()
            add_up(total, self._group)
            masks[name] = regrown(
                layers[name].layout,
                block_norms(whole(layers[name].values)),
                gradients.grid(block_norms(total)),
                self.drop_fraction_at(self._step),
            )
            gradients.total = None
        require_same("choice of blocks", where, masks.values(), self._group)
        return sum(_move(layers[name], self._optimizer, name, mask) for name, mask in masks.items())

    def _require_gradients(self, watched: dict[str, MissingGradients]) -> None:
        rows = next(iter(watched.values())).layer.rows
        calls = rows.new_tensor([sum(item.total is not None for item in watched.values())]).float()
        add_up(calls, self._group)
        if not calls.item():
            raise TrainingError(
                f"expected gradients through the sparse layers in step {self._step}, got none; "
                "call step() once after each optimizer.step(), and under torch.compile run the "
                'steps with updates_next under torch.compiler.set_stance("force_eager")'
            )


def regrown(layout: BlockLayout, norms: Tensor, wanted: Tensor, fraction: float) -> Tensor:
    """Return which blocks to store next [row tiles, column groups], bool.

    Args:
        layout: The blocks stored now.
        norms: Norm of every stored block [blocks].
        wanted: Gradient norm of every missing block [row tiles, column groups]. Blocks with none
            do not grow, and nothing moves if one is not finite: the step overflowed.
        fraction: Share of each row tile's blocks to move.
    """
    mask = layout.mask()
    if not bool(wanted.isfinite().all()):
        return mask
    candidates = ~mask & (wanted > 0)
    count = torch.minimum((fraction * mask.sum(1)).round().long(), candidates.sum(1))[:, None]
    strength = torch.full_like(wanted, math.inf)
    strength[layout.rows.long(), layout.columns.long()] = norms.to(wanted.dtype)
    dropped = mask & (_ranks(strength, descending=False) < count)
    grown = candidates & (_ranks(wanted.where(candidates, -1), descending=True) < count)
    return mask & ~dropped | grown


def _ranks(scores: Tensor, *, descending: bool) -> Tensor:
    """Return the place of every score in its sorted row; ties by index."""
    return scores.sort(dim=1, descending=descending, stable=True).indices.argsort(dim=1)


def _move(layer: BlockSparseLinear, optimizer: Optimizer, name: str, mask: Tensor) -> int:
    """Store the blocks of a mask in place, with optimizer state; return how many are new."""
    old = layer.layout
    new = BlockLayout.from_mask(mask, layer.block_out, layer.block_in)
    index = old.rows.new_full((old.row_tiles, old.column_groups), -1).long()
    index[old.rows.long(), old.columns.long()] = torch.arange(old.blocks, device=index.device)
    source = index[new.rows.long(), new.columns.long()]
    kept = source >= 0
    tensors = [layer.values, *state_tensors(optimizer, layer.values, name).values()]
    for tensor in tensors if layer.values.grad is None else [*tensors, layer.values.grad]:
        before = whole(tensor)
        after = torch.zeros_like(before)
        after[kept] = before[source[kept]]
        write(tensor, after)
    # In place, so that everything derived from the places notices.
    layer.rows.copy_(new.rows)
    layer.columns.copy_(new.columns)
    return int((~kept).sum())
