"""Linear layers that store and multiply only some blocks of their weights.

before: y = W x + b
after:  y = W' x + b',  W' is 0 outside of equally many blocks in every row tile
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import nn

from graphopt.kernels import BlockLayout, BlockSparseLinear
from graphopt.kernels.block_presets import block_sizes
from graphopt.passes.base import (
    Candidate,
    Change,
    Context,
    Miss,
    Pass,
    Proposal,
    State,
    replace_module,
)
from graphopt.passes.compress.block_candidates import candidate_of, measured, train_like
from graphopt.passes.compress.block_details import BlockSizes, Sparsification, checked, first_blocks
from graphopt.passes.compress.block_fit import BlockChoice, choose_blocks
from graphopt.passes.compress.block_order import reorderings
from graphopt.passes.compress.channel_slices import permuted
from graphopt.passes.compress.layer_replacement import replacement
from graphopt.passes.compress.levels import slower
from graphopt.passes.compress.scores import check_scores
from graphopt.passes.dense_form import dense_form, remember_dense
from graphopt.passes.details import read_details
from graphopt.passes.errors import PreconditionError
from graphopt.passes.facts import facts_of, total_cost
from graphopt.passes.latest import latest
from graphopt.passes.linear_layers import LinearLayer, linear_layers
from graphopt.passes.output_heads import output_heads
from graphopt.passes.program import Program
from graphopt.passes.propagation import refresh
from graphopt.passes.replaceability import left_dense
from graphopt.passes.uniform_share import largest_share

_MOST_LEVELS = 6
_CLOSE = 1.05
"""Row tiles that are slower than the fastest by less than this are as good, if they are smaller."""


@final
@dataclass(frozen=True, kw_only=True)
class SparsifyBlocks(Pass):
    """Replace linear layers by ones that keep the same number of blocks in every row tile.

    First the hidden units between layers are put in an order that gathers what matters in few
    blocks (`unit_order`): rows of the producers and columns of the consumers at once, so the model
    computes the same. Then blocks are scored, by magnitude or, with calibration data, by OBS on
    the row tile's output errors; then the kept ones are refitted by least squares, the bias
    absorbing means. Output heads and tied layers stay dense. Where times are measured, only layers
    that are faster are kept.

    Cost: with calibration two passes over its data per layer, and O(channels^3) per row tile.
    Source: structured OBS of ZipLM, Kurtic et al. 2023 (arXiv 2302.04089), per row tile.

    Attributes:
        density: Share of the blocks to keep where the context has no budget.
        scores: "auto" (OBS with calibration data, else magnitude), "magnitude" or "obs".
        repair: Whether kept blocks are refitted where there is calibration data.
        damping: Ridge of the refit, as a share of the mean variance of the kept inputs.
        permute: Whether hidden units may be put in another order.
        block_out: Rows of a block; 0 takes what pays on the device, and where times are measured
            the fastest of that, half and twice that.
        block_in: Columns of a block; 0 takes what pays on the device.
    """

    name: ClassVar[str] = "sparsify-blocks"
    exact: ClassVar[bool] = False

    density: float = 0.5
    scores: str = "auto"
    repair: bool = True
    damping: float = 0.1
    permute: bool = True
    block_out: int = 0
    block_in: int = 0

    def requires(self, program: Program, context: Context) -> None:
        """Refuse options that no model can satisfy."""
        if not 0 < self.density <= 1 or self.damping <= 0 or min(self.block_out, self.block_in) < 0:
            raise PreconditionError(
                f"{self.name} needs 0 < density <= 1, damping > 0 and block sizes >= 0, got "
                f"density={self.density}, damping={self.damping}, block_out={self.block_out}, "
                f"block_in={self.block_in}"
            )
        check_scores(self.name, self.scores, context)

    def propose(self, program: Program, context: Context) -> Proposal:
        """Propose the same density for every layer that can be sparse."""
        layers, tiles, misses = self._layers(program, context)
        candidates: dict[str, Candidate] = {}
        slow = True
        while slow:
            kept = self._kept(program, context, layers, tiles)
            slow = False
            for name in [name for name, count in kept.items() if count is not None]:
                candidates[name], ratio = self._fastest(
                    program, context, name, layers[name], tiles[name], kept[name] or 0
                )
                if ratio is not None and ratio <= 1:
                    height = candidates[name].change.details["block_out"]
                    reason = f"{height}-row blocks measured {ratio:.2f}x, kept dense"
                    misses.append(self._miss(name, reason))
                    del layers[name]
                    slow = True
        chosen = {name: candidates[name] for name in layers if kept[name] is not None}
        misses += [self._miss(n, "all of it fits the budget") for n in layers if n not in chosen]
        if self.permute:
            chosen = _with_units(program, layers, chosen)
        return Proposal(candidates=tuple(chosen.values()), misses=tuple(misses))

    def offer(self, program: Program, context: Context) -> Proposal:
        """Offer densities in even steps for every layer, units in the order they have.

        An order is best for all sparse layers of a group at once, and which will be is not known.
        """
        layers, tiles, misses = self._layers(program, context)
        candidates: list[Candidate] = []
        for name, layer in layers.items():
            if context.kept_share(0.0, name) == 1:
                misses.append(self._miss(name, "it is kept whole by a pattern"))
                continue
            groups = layer.in_features // tiles[name][0][1]
            step = -(-groups // _MOST_LEVELS)
            refused: list[tuple[str, float]] = []
            for kept in range(groups - step, 0, -step):
                candidate, ratio = self._fastest(program, context, name, layer, tiles[name], kept)
                if ratio is None or ratio > 1:
                    candidates.append(candidate)
                else:
                    refused.append((f"{kept / groups:.0%} of its blocks", ratio))
            if refused:
                misses.append(self._miss(name, slower(refused)))
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def reconstruct(self, program: Program, change: Change, state: State) -> State | None:
        """Return the weight with zeros for missing blocks, and what was put into another order."""
        details, layer = checked(program, change)
        name = change.target
        layout = BlockLayout(
            out_features=details.out_features,
            in_features=details.in_features,
            block_out=details.block_out,
            block_in=details.block_in,
            rows=state[f"{name}.rows"],
            columns=state[f"{name}.columns"],
        )
        matrix = layout.unpack(state[f"{name}.values"])
        own = {f"{name}.{key}" for key in ("values", "rows", "columns", "bias")}
        dense = {key: value for key, value in state.items() if key not in own}
        dense[f"{name}.{layer.weight_name}"] = matrix.t() if layer.transposed else matrix
        if layer.bias_name is not None:
            dense[f"{name}.{layer.bias_name}"] = state[f"{name}.bias"]
        return dense

    def settle(self, program: Program, candidate: Candidate, context: Context) -> Candidate:
        """Predict the error on the calibration data as it reaches the layer now."""
        choice = self._choice(program, candidate.change, context)
        summary = candidate.change.summary + ", units reordered" * bool(choice.orders)
        return replace(
            candidate,
            change=replace(candidate.change, summary=summary),
            predicted_error=choice.fit.relative_error,
        )

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return the kept blocks and their places, and reordered units of other parameters."""
        choice = self._choice(program, change, context)
        _, layer = checked(program, change)
        own = {f"{change.target}.{key}" for key, _ in layer.module.named_parameters()}
        reordered = permuted(program, choice.orders)
        state = {name: value for name, value in reordered.items() if name not in own}
        state[f"{change.target}.values"] = choice.fit.values
        state[f"{change.target}.rows"] = choice.fit.layout.rows
        state[f"{change.target}.columns"] = choice.fit.layout.columns
        if choice.fit.bias is not None:
            state[f"{change.target}.bias"] = choice.fit.bias
        return state

    def apply(self, program: Program, change: Change) -> None:
        """Put the sparse layer in the place of the dense one; its blocks come with the values."""
        details, layer = checked(program, change)
        weight = layer.weight
        layout = first_blocks(details.out_features, details.in_features, details.sizes)
        sparse = BlockSparseLinear(
            layout, details.bias, device="meta", dtype=weight.dtype
        ).to_empty(device=weight.device)
        sparse.rows.copy_(layout.rows)
        sparse.columns.copy_(layout.columns)
        train_like(sparse, layer)
        remember_dense(sparse, layer)
        replace_module(program.model, change.target, sparse)
        # Later layers of this pass are analysed with this one in place.
        refresh(program)

    def restore(self, model: nn.Module, change: Change) -> None:
        """Put a dense layer of the original class back: missing blocks are zeros."""
        details = read_details(Sparsification, change)
        sparse = replacement(model, change, details, BlockSparseLinear, "sparse")
        dense = dense_form(sparse).filled(
            sparse.weight.detach(), sparse.bias, trained=sparse.values.requires_grad
        )
        replace_module(model, change.target, dense.train(sparse.training))

    def _miss(self, target: str, reason: str) -> Miss:
        return Miss(pass_name=self.name, target=target, reason=reason)

    def _layers(
        self, program: Program, context: Context
    ) -> tuple[dict[str, LinearLayer], dict[str, list[tuple[int, int]]], list[Miss]]:
        """Return the layers that can be sparse, block sizes to try, and why others cannot."""
        layers: dict[str, LinearLayer] = {}
        misses: list[Miss] = []
        tiles: dict[str, list[tuple[int, int]]] = {}
        heads = output_heads(program)
        for name, layer in linear_layers(program):
            reason = left_dense(program, context, name, heads)
            if reason is None:
                try:
                    tiles[name] = self._tiles(layer, context)
                except ValueError as error:
                    reason = str(error)
            if reason is None:
                layers[name] = layer
            else:
                misses.append(self._miss(name, reason))
        return layers, tiles, misses

    def _tiles(self, layer: LinearLayer, context: Context) -> list[tuple[int, int]]:
        """Return the block sizes to try; ValueError says why there are none."""
        out, inputs = layer.matrix.shape
        rows, columns = self.block_out, self.block_in
        if not rows or not columns:
            preset = block_sizes(out, inputs, layer.weight.device, training=context.training)
            rows, columns = rows or preset[0], columns or _halved(preset[1], inputs)
        if columns == inputs:
            raise ValueError(f"blocks of {columns} columns leave nothing out of {inputs} inputs")
        first_blocks(out, inputs, BlockSizes(block_out=rows, block_in=columns, blocks=out // rows))
        others = (rows // 2, rows * 2) if context.costs is not None and not self.block_out else ()
        return [(n, columns) for n in (rows, *others) if n and out % n == 0]

    def _kept(
        self,
        program: Program,
        context: Context,
        layers: Mapping[str, LinearLayer],
        tiles: Mapping[str, list[tuple[int, int]]],
    ) -> dict[str, int | None]:
        """Return the blocks per row tile at the largest density that meets the budget."""
        facts = facts_of(program)
        total = left = total_cost(program).flops
        groups = {name: layer.in_features // tiles[name][0][1] for name, layer in layers.items()}
        flops = {name: facts.cost(program.calls(name)).flops for name in layers}
        left -= sum(flops.values())

        def kept(density: float) -> dict[str, int | None]:
            return {
                name: _kept_groups(count, context.kept_share(density, name))
                for name, count in groups.items()
            }

        if context.budget is None:
            return kept(self.density)
        wanted = context.budget * total - left

        def fits(density: float) -> bool:
            shares = {n: 1 if k is None else k / groups[n] for n, k in kept(density).items()}
            return sum(flops[name] * share for name, share in shares.items()) <= wanted

        return kept(largest_share(fits))

    def _fastest(
        self,
        program: Program,
        context: Context,
        name: str,
        layer: LinearLayer,
        tiles: list[tuple[int, int]],
        kept: int,
    ) -> tuple[Candidate, float | None]:
        """Return the candidate that measured fastest, and how much faster, None if unknown."""
        cost = facts_of(program).cost(program.calls(name))
        candidates = [
            candidate_of(self.name, name, layer, cost, _sizes(layer, rows, columns, kept))
            for rows, columns in tiles
        ]
        if context.costs is None:
            return candidates[0], None
        timed = [
            measured(program, candidate, context.costs, training=context.training)
            for candidate in candidates
        ]
        most = max(ratio for _, ratio in timed)
        candidate, ratio = min(
            ((c, r) for c, r in timed if r * _CLOSE >= most),
            key=lambda pair: int(pair[0].change.details["block_out"]),
        )
        return candidate, ratio

    def _choice(self, program: Program, change: Change, context: Context) -> BlockChoice:
        """Return what a change makes of its layer, computed once for `settle` and `transfer`."""
        key = f"{self} at {change.target}: {change.details} with {id(context.calibration)}"

        def compute() -> BlockChoice:
            return choose_blocks(
                program,
                change,
                context.calibration,
                by_obs=self.scores != "magnitude",
                damping=self.damping if self.repair else None,
            )

        return latest(program, "choice of blocks", key, compute)


def _with_units(
    program: Program, layers: Mapping[str, LinearLayer], chosen: Mapping[str, Candidate]
) -> dict[str, Candidate]:
    """Return the candidates with the units that the first of each group puts in order."""
    sizes = {
        name: Sparsification.model_validate(candidate.change.details, strict=False).sizes
        for name, candidate in chosen.items()
    }
    found = reorderings(program, layers, sizes)
    result: dict[str, Candidate] = {}
    for name, candidate in chosen.items():
        units = [item.model_dump(mode="json") for item in found.get(name, ())]
        details = {**candidate.change.details, "units": units}
        result[name] = replace(candidate, change=replace(candidate.change, details=details))
    return result


def _sizes(layer: LinearLayer, block_out: int, block_in: int, kept: int) -> BlockSizes:
    tiles = layer.out_features // block_out
    return BlockSizes(block_out=block_out, block_in=block_in, blocks=tiles * kept)


def _kept_groups(groups: int, share: float) -> int | None:
    """Return how many column groups a share keeps in every row tile, None for all of them."""
    # 0.29 * 100 is 28.999...96 in binary: a share that means a whole number must give that number.
    kept = max(1, int(groups * share + 1e-9))
    return None if kept == groups else kept


def _halved(columns: int, inputs: int) -> int:
    """Return a block width that leaves a choice: halved until the inputs are four groups."""
    while columns % 2 == 0 and columns * 4 > inputs:
        columns //= 2
    return columns
