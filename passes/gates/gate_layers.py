"""Residual blocks that are left out: in some training steps, or for good.

before: x = x + f(x)
after:  x = gate(x + f(x), entry=x)      in training x alone, with a probability
or:     x = x                            the parameters of f are gone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
from pydantic import Field
from torch import fx, nn

from graphopt.kernels.layer_gate import LayerGate
from graphopt.passes.base import (
    Candidate,
    Change,
    Context,
    Cost,
    Miss,
    Pass,
    Proposal,
    State,
    shared_names,
)
from graphopt.passes.details import Details, read_details
from graphopt.passes.errors import ConfigError, PlanError
from graphopt.passes.facts import attribute_of, facts_of, total_cost
from graphopt.passes.lazy_branches import make_lazy, only_for
from graphopt.passes.program import Program
from graphopt.passes.region_times import region_workload
from graphopt.passes.tokens import Region, residual_stream

from .block_influence import block_influences
from .residual_blocks import (
    BLOCK_ORDER,
    BlockPlace,
    ResidualBlock,
    escaping,
    find_block,
    refusal,
    residual_blocks,
)

_GATE = "layer_gate"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class _Skip(Details):
    """A region that a gate leaves out in some training steps.

    Attributes:
        kind: Tells it from a removal.
        place: Which region.
        gate: Name of the gate to add to the model.
        number: Number of the gate, which its draws depend on.
        rate: Largest probability to leave the region out.
        plateau: Progress up to which it stays.
        seed: Seed of the draws.
    """

    kind: Literal["skip"]
    place: BlockPlace
    gate: str
    number: int = Field(ge=0)
    rate: float = Field(gt=0, lt=1)
    plateau: float = Field(ge=0, le=1)
    seed: int


class _Freed(Details):
    """A parameter that goes with its region."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool


class _Removal(Details):
    """A region that is gone.

    Attributes:
        kind: Tells it from a gate.
        place: Which region.
        freed: The parameters that nothing else reads.
    """

    kind: Literal["remove"]
    place: BlockPlace
    freed: tuple[_Freed, ...] = Field(min_length=1)


@final
@dataclass(frozen=True, kw_only=True)
class GateLayers(Pass):
    """Leave out whole residual blocks: at random while training, the least useful ones for good.

    Blocks are the regions of the residual stream: what lies between a value and the add that
    joins its result back in (attention and feed-forward each). What stands behind the add, such as
    the norm of a post-norm model, always runs.

    While training, block r of R is left out with probability `rate * (r / R) * time`, where time
    is 1 up to `plateau` and falls to 0 at the end of training; the first block always runs. All
    ranks draw alike, and evaluation is that of the plain model. What something outside of a block
    reads, such as keys and values for a cache, is computed in any case.

    With `remove`, that many blocks are removed instead: those whose result differs least from
    what they start from, 1 - cosine, on the calibration data or else the example. The model's own
    forward then has no parameters to run with, so calls unlike the captured one are refused.

    Sources: stochastic depth (arXiv 1603.09382), progressive layer dropping (2010.13369), block
    influence (ShortGPT, 2403.03853).

    Attributes:
        rate: Largest probability to leave a block out, in [0, 1).
        plateau: Progress up to which the probabilities stay, in [0, 1].
        seed: Seed of the draws, the same on all ranks.
        remove: Number of blocks to remove; 0 gates them.
    """

    name: ClassVar[str] = "gate-layers"
    exact: ClassVar[bool] = False

    rate: float = 0.2
    plateau: float = 0.5
    seed: int = 0
    remove: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        if not 0 <= self.rate < 1 or not 0 <= self.plateau <= 1 or self.remove < 0:
            raise ConfigError(
                "gate-layers takes a rate from 0 to below 1, a plateau from 0 to 1 and a number of "
                f"blocks to remove from 0 on, got rate={self.rate}, plateau={self.plateau}, "
                f"remove={self.remove}"
            )

    def propose(self, program: Program, context: Context) -> Proposal:
        """Find the blocks of every chain; gate them by depth, or score them for removal."""
        blocks = list(residual_blocks(program))
        if not blocks:
            reason = residual_stream(program).reason or "its blocks have no parameters"
            return Proposal(misses=(self._miss("(model)", reason),))
        if self.remove:
            return self._removals(program, context, blocks)
        return self._skips(program, context, blocks)

    def offer(self, program: Program, context: Context) -> Proposal:
        """Offer the removal of each block that can go; to train without `remove`, the gates."""
        if context.training and not self.remove:
            return self.propose(program, context)
        free, misses = self._removable(program, context, list(residual_blocks(program)))
        candidates = [
            _timed(program, context, block, self._removal(program, block, freed, "removed"))
            for block, freed in free
        ]
        if not candidates and not misses:
            reason = residual_stream(program).reason or "its blocks have no parameters"
            misses = [self._miss("(model)", reason)]
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def reconstruct(self, program: Program, change: Change, state: State) -> State | None:
        """Return zeros for the parameters of a removed block, with which it adds 0."""
        details = _read(change)
        if isinstance(details, _Skip):
            return {}
        return {
            item.name: torch.zeros_like(attribute_of(program, item.name)) for item in details.freed
        }

    def trains_only(self, change: Change) -> bool:
        """Say whether the change is a gate, which always runs its block in evaluation mode."""
        return isinstance(_read(change), _Skip)

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return nothing: a gate has no values, and a removal leaves none."""
        return {}

    def apply(self, program: Program, change: Change) -> None:
        """Put a gate behind the block's add, or the block's entry in its place."""
        details = _read(change)
        region = find_block(program, details.place, change)
        if isinstance(details, _Skip):
            _insert_gate(program, region, details)
        else:
            _remove(program, region, details, change)
        program.changed()

    def restore(self, model: nn.Module, change: Change) -> None:
        """Take the gate away; or give a removed block parameters of zero, with which it adds 0."""
        details = _read(change)
        if isinstance(details, _Skip):
            owner, _, attribute = details.gate.rpartition(".")
            if not isinstance(getattr(model.get_submodule(owner), attribute, None), LayerGate):
                raise PlanError(f"the model has no gate {details.gate!r}, which the plan describes")
            delattr(model.get_submodule(owner), attribute)
            return
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for freed in details.freed:
            owner, _, attribute = freed.name.rpartition(".")
            dtype = getattr(torch, freed.dtype)
            value = nn.Parameter(
                torch.zeros(freed.shape, dtype=dtype, device=device), requires_grad=freed.trained
            )
            setattr(model.get_submodule(owner), attribute, value)

    def _miss(self, target: str, reason: str) -> Miss:
        return Miss(pass_name=self.name, target=target, reason=reason)

    def _skips(
        self, program: Program, context: Context, blocks: Sequence[ResidualBlock]
    ) -> Proposal:
        candidates: list[Candidate] = []
        misses: list[Miss] = []
        taken: set[str] = set()
        for number, block in enumerate(blocks):
            rate = self.rate * block.depth
            reason = _skip_refusal(program, context, block, rate)
            if reason is not None:
                misses.append(self._miss(block.name, reason))
                continue
            gate = _gate_name(program, block.region, taken)
            taken.add(gate)
            details = _Skip(
                kind="skip",
                place=block.place,
                gate=gate,
                number=number,
                rate=rate,
                plateau=self.plateau,
                seed=self.seed,
            )
            cost = facts_of(program).cost(block.region.nodes)
            candidates.append(
                Candidate(
                    change=Change(
                        pass_name=self.name,
                        target=block.name,
                        summary=f"left out in up to {rate:.1%} of the training steps",
                        details=details.model_dump(mode="json"),
                    ),
                    before=cost,
                    after=cost,
                    predicted_error=0.0,
                )
            )
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def _removals(
        self, program: Program, context: Context, blocks: Sequence[ResidualBlock]
    ) -> Proposal:
        free, misses = self._removable(program, context, blocks)
        if not free:
            return Proposal(misses=tuple(misses))
        influences = block_influences(program, context, [block for block, _ in free])
        order = sorted(range(len(free)), key=influences.__getitem__)
        spare = _spare_flops(program, context)
        candidates: list[Candidate] = []
        for index in order:
            block, freed = free[index]
            text = f"influence {influences[index]:.3g}"
            if len(candidates) == self.remove or spare <= 0:
                limit = "the budget is met" if spare <= 0 else f"{self.remove} matter less"
                misses.append(self._miss(block.name, f"{text}, kept: {limit}"))
                continue
            candidate = self._removal(program, block, freed, f"removed, {text}")
            spare -= candidate.before.flops
            candidates.append(candidate)
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def _removable(
        self, program: Program, context: Context, blocks: Sequence[ResidualBlock]
    ) -> tuple[list[tuple[ResidualBlock, tuple[_Freed, ...]]], list[Miss]]:
        """Return the blocks that can be removed with their parameters, and why others cannot."""
        misses: list[Miss] = []
        free: list[tuple[ResidualBlock, tuple[_Freed, ...]]] = []
        for block in blocks:
            freed = _freed(program, block.region)
            reason = _removal_refusal(program, context, block, freed)
            if reason is None:
                free.append((block, freed))
            else:
                misses.append(self._miss(block.name, reason))
        return free, misses

    def _removal(
        self, program: Program, block: ResidualBlock, freed: tuple[_Freed, ...], summary: str
    ) -> Candidate:
        details = _Removal(kind="remove", place=block.place, freed=freed)
        return Candidate(
            change=Change(
                pass_name=self.name,
                target=block.name,
                summary=summary,
                details=details.model_dump(mode="json"),
            ),
            before=facts_of(program).cost(only_for(block.region.add, block.region.entry)),
            after=Cost(flops=0, size_bytes=0, parameters=0),
            shared=frozenset({BLOCK_ORDER}),
            exclusive=frozenset(
                f"{item.name} {claim}" for item in freed for claim in ("structure", "format")
            ),
        )


def _timed(
    program: Program, context: Context, block: ResidualBlock, candidate: Candidate
) -> Candidate:
    """Return the removal of a block with the time that the block takes alone."""
    if context.costs is None:
        return candidate
    region = block.region
    work = region_workload(program, [*only_for(region.add, region.entry), region.add])
    latency_ms = context.costs.latency(work, training=context.training).latency_ms
    return replace(
        candidate,
        before=replace(candidate.before, latency_ms=latency_ms),
        after=replace(candidate.after, latency_ms=0.0),
    )


def _skip_refusal(
    program: Program, context: Context, block: ResidualBlock, rate: float
) -> str | None:
    """Say why a region cannot be left out in training, None if it can."""
    reason = refusal(program, context, block)
    if reason is not None:
        return reason
    if block.first:
        return "the first block always runs"
    if not rate:
        return "the rate is 0"
    region = block.region
    facts = facts_of(program)
    all_flops = facts.cost(region.nodes).flops
    saved = facts.cost(only_for(region.add, region.entry)).flops
    if 2 * saved < all_flops:
        return f"{escaping(region)}; that leaves {saved / all_flops:.0%} of it to save"
    return None


def _removal_refusal(
    program: Program, context: Context, block: ResidualBlock, freed: Sequence[_Freed]
) -> str | None:
    """Say why a region cannot be removed, None if it can."""
    reason = refusal(program, context, block)
    if reason is not None:
        return reason
    if block.region.escapes:
        return escaping(block.region)
    if {item.name for item in freed} < {*block.place.weights}:
        return "its parameters are also read outside"
    for item in freed:
        others = [name for name in shared_names(program.model, item.name) if name != item.name]
        if others:
            return f"{item.name} is tied to {others[0]}"
    if any(parameter.is_meta for parameter in program.model.parameters()):
        return "its influence is not known: parameters on the meta device have no values"
    return None


def _gate_name(program: Program, region: Region, taken: set[str]) -> str:
    """Return a free name in the module whose forward adds."""
    owner = _owner(program, region)[-1]
    names = (f"{owner}.{_GATE}{end}".lstrip(".") for end in ["", *map(str, range(1, 10**6))])
    return next(
        name
        for name in names
        if name not in taken and not hasattr(program.module(owner), name.rpartition(".")[2])
    )


def _owner(program: Program, region: Region) -> tuple[str, ...]:
    """Return the names of the module that gets the gate and of all around it, outermost first.

    It is no container, if there is a choice: those are counted, indexed and called by position.
    """
    modules = tuple(region.add.meta["modules"])
    while len(modules) > 1 and isinstance(program.module(modules[-1]), _CONTAINERS):
        modules = modules[:-1]
    return modules


def _insert_gate(program: Program, region: Region, details: _Skip) -> None:
    modules = _owner(program, region)
    owner, _, attribute = details.gate.rpartition(".")
    holder = program.module(owner)
    if owner != modules[-1] or hasattr(holder, attribute):
        raise PlanError(
            f"the gate {details.gate!r} does not fit the model; is this plan for another one?"
        )
    gate = LayerGate(
        rate=details.rate, plateau=details.plateau, seed=details.seed, number=details.number
    )
    holder.add_module(attribute, gate.train(holder.training))
    add, graph = region.add, program.graph
    with graph.inserting_after(add):
        node = graph.call_module(details.gate, (add,), {"entry": region.entry})
    calls = tuple(add.meta["calls"])[: len(modules)]
    # Analyses see the gate as what it is in evaluation mode: its first argument.
    body = fx.Graph()
    x = body.placeholder("x")
    x.meta["val"] = add.meta["val"]
    body.output(x)
    node.meta = {"val": add.meta["val"], "modules": modules, "calls": calls, "body": body}
    make_lazy(node)
    add.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def _remove(program: Program, region: Region, details: _Removal, change: Change) -> None:
    if _freed(program, region) != details.freed:
        raise PlanError(
            f"the parameters of the block at {change.target!r} are not those that the plan frees; "
            "is this plan for another model?"
        )
    dead = only_for(region.add, region.entry)
    region.add.replace_all_uses_with(region.entry)
    program.graph.erase_node(region.add)
    for node in reversed(dead):
        program.graph.erase_node(node)
    for freed in details.freed:
        owner, _, attribute = freed.name.rpartition(".")
        program.module(owner)._parameters[attribute] = None


def _freed(program: Program, region: Region) -> tuple[_Freed, ...]:
    """Return the parameters that only the region reads."""
    dead = {*only_for(region.add, region.entry)}
    facts = facts_of(program)

    def read(nodes: set[fx.Node]) -> set[str]:
        return {name for node in nodes for name in facts.nodes[node].weights}

    kept = read({node for node in facts.nodes if node not in dead})
    found = []
    for name in sorted(read(dead) - kept):
        parameter = attribute_of(program, name)
        found.append(
            _Freed(
                name=name,
                shape=tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                trained=parameter.requires_grad,
            )
        )
    return tuple(found)


def _spare_flops(program: Program, context: Context) -> float:
    """Return how many operations the budget wants to be gone."""
    if context.budget is None:
        return float("inf")
    return total_cost(program).flops * (1 - context.budget)


def _read(change: Change) -> _Skip | _Removal:
    """Return the checked details of a change.

    Raises:
        PlanError: if they are not valid.
    """
    if change.details.get("kind") == "remove":
        return read_details(_Removal, change)
    return read_details(_Skip, change)
