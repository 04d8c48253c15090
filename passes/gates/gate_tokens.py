"""Blocks that run on a share of the tokens; the others are carried over.

before: x = block(x, mask)
after:  i = gate(x);  x = put_tokens(x, i, block(take_tokens(x, i), take_tokens(mask, i)))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar, cast, final, get_args

from torch import fx, nn

from graphopt.kernels.token_routers import choose_tokens
from graphopt.kernels.token_selection import kept_count
from graphopt.passes.axis_flow import operator_name, tensor_nodes
from graphopt.passes.base import Candidate, Change, Context, Cost, Miss, Pass, Proposal, State
from graphopt.passes.details import read_details
from graphopt.passes.errors import ConfigError, PlanError
from graphopt.passes.facts import facts_of
from graphopt.passes.padding import marks_real, padding_input
from graphopt.passes.program import Program, shape_of
from graphopt.passes.routed_graph import apply_route
from graphopt.passes.special_tokens import read_positions, special_ids
from graphopt.passes.token_blocks import BlockChain, TokenBlock, block_chains, token_dims
from graphopt.passes.token_route import Route, Unroutable, find_route
from graphopt.passes.token_scores import Unscored, check_score, insert_score, score_flops

from .residual_blocks import BLOCK_ORDER
from .token_gating import HOLDER, GateDetails, Gating, Router, make_gates

_LEVELS = (0.875, 0.75, 0.625, 0.5, 0.375, 0.25)
"""Shares of the tokens to offer."""


@final
@dataclass(frozen=True, kw_only=True)
class GateTokens(Pass):
    """Run blocks of the residual stream on a share of the tokens; the others skip them.

    Numbers of tokens are multiples of 16, kept tokens stay in order, and what enters a block with
    the tokens in its shape (masks, rotary tables, biases) is taken with them. Positions that
    outputs read, and in encoders the special tokens that the configuration names, always run.
    `random` acts in training only: in evaluation mode, decoding and exports the model is the plain
    one. `attention` and `learned` also act in evaluation mode and look at the whole sequence, so
    calls with a cache are refused. A cache that a gated call returns holds the kept tokens.
    Sources: random-LTD (arXiv 2211.11586), TREAD (2501.04765), A-MoD (2412.20875), p-MoD
    (2412.04449). Cost of `attention`: one product of queries and keys of the block before.

    Attributes:
        router: "random" (anew each step, for the whole batch), "attention" (the tokens that
            receive most in the last block that runs all) or "learned" (a trained vector, whose
            weight enters the result).
        span: Whether one route leads over all gated blocks in a row, instead of one per block.
        first: The first gated block of each chain; negative numbers count from the end.
        last: The last one.
        keep: The share of tokens: where random routing starts, where the others end.
        full_at: The progress of training at which random routing is back at all tokens.
        anneal: The progress until which the others go from all tokens to `keep`; before anybody
            reports progress, `attention` is at `keep`, `learned` at all tokens.
        seed: Seed of the random choices, the same on all ranks.
    """

    name: ClassVar[str] = "gate-tokens"
    exact: ClassVar[bool] = False

    router: str = "random"
    span: bool = False
    first: int = 1
    last: int = -2
    keep: float = 0.5
    full_at: float = 0.7
    anneal: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.router not in get_args(Router):
            raise ConfigError(
                f"the router of gate-tokens must be random, attention or learned, "
                f"got {self.router!r}"
            )
        if not (0 < self.keep <= 1 and 0 < self.full_at <= 1 and 0 <= self.anneal <= 1):
            raise ConfigError(
                "keep and full_at of gate-tokens must be above 0 and at most 1, anneal in 0 to 1, "
                f"got keep={self.keep}, full_at={self.full_at}, anneal={self.anneal}"
            )

    def propose(self, program: Program, context: Context) -> Proposal:
        """Find the blocks that can run on some tokens: one change for all of them."""
        if any(node.target is choose_tokens for node in program.graph.nodes):
            return Proposal(misses=(self._miss("(model)", "its tokens are gated already"),))
        if hasattr(program.model, HOLDER):
            reason = f"the model has something else called {HOLDER!r}"
            return Proposal(misses=(self._miss("(model)", reason),))
        chains = block_chains(program)
        misses: list[Miss] = []
        gates: list[GateDetails] = []
        routes: list[Route] = []
        if not chains:
            misses.append(self._miss("(model)", "no residual stream with tokens was found"))
        for number, blocks in enumerate(chains):
            for first, last, share in self._runs(blocks, context, misses):
                target = _name(blocks.blocks[first : last + 1])
                try:
                    routes.append(self._route(program, blocks, first, last))
                except (Unroutable, Unscored) as reason:
                    misses.append(self._miss(target, str(reason)))
                    continue
                gates.append(self._gate(program, blocks, number, first, last, share))
        if not gates:
            return Proposal(misses=tuple(misses))
        return Proposal(
            candidates=(self._candidate(program, chains, gates, routes),), misses=tuple(misses)
        )

    def offer(self, program: Program, context: Context) -> Proposal:
        """Offer shares of the tokens for inference, by attention where the router is random."""
        if context.training:
            return self.propose(program, context)
        router = "attention" if self.router == "random" else self.router
        candidates: list[Candidate] = []
        misses: dict[Miss, None] = {}
        for keep in _LEVELS:
            found = replace(self, router=router, keep=keep).propose(program, context)
            misses.update(dict.fromkeys(found.misses))
            candidates += [c for c in found.candidates if c.after.flops < c.before.flops]
        return Proposal(candidates=tuple(candidates), misses=tuple(misses))

    def trains_only(self, change: Change) -> bool:
        """Say whether evaluation runs all tokens."""
        return read_details(Gating, change).router == "random"

    def transfer(self, program: Program, change: Change, context: Context) -> State:
        """Return the state of routers that have one: full shares, or vectors of zeros."""
        details, _, routes = _routes(program, change)
        return {
            f"{HOLDER}.{name}": value
            for name, value in make_gates(details, _widths(routes)).state_dict().items()
        }

    def apply(self, program: Program, change: Change) -> None:
        """Add the gates to the model and rewrite the blocks to run on what they choose."""
        details, chains, routes = _routes(program, change)
        ranked = details.router != "random"
        entry = routes[0].entry.meta["val"]
        holder = make_gates(details, _widths(routes)).train(program.model.training)
        holder.to(next(program.model.parameters()).device, entry.dtype)
        program.model.add_module(HOLDER, holder)
        scores: dict[int, fx.Node] = {}
        for gate in details.gates if ranked else ():
            if gate.chain not in scores:
                blocks = chains[gate.chain]
                before = blocks.blocks[gate.first - 1]
                scores[gate.chain] = insert_score(program, blocks, before, details.router)
        # The last part first: each one's entry is then still the value that was analysed.
        for number, gate in reversed(list(enumerate(details.gates))):
            apply_route(
                program,
                routes[number],
                f"{HOLDER}.{number}",
                scores.get(gate.chain),
                gate.ids,
                gate.padding,
                per_sample=ranked,
                blend=details.router == "learned",
            )
        program.changed()

    def restore(self, model: nn.Module, change: Change) -> None:
        """Take the gates away: the plain model, which runs all tokens."""
        read_details(Gating, change)
        if not hasattr(model, HOLDER):
            raise PlanError(f"the model has no {HOLDER!r} as the plan describes")
        delattr(model, HOLDER)

    def _miss(self, target: str, reason: str) -> Miss:
        return Miss(pass_name=self.name, target=target, reason=reason)

    def _runs(
        self, blocks: BlockChain, context: Context, misses: list[Miss]
    ) -> Iterator[tuple[int, int, float]]:
        """Yield the first and the last block and the share of every gate of a chain."""
        if blocks.refusal is not None:
            target = _scope_name([region.add for region in blocks.chain.regions])
            misses.append(self._miss(target, blocks.refusal))
            return
        count = len(blocks.blocks)
        first, last = (i + count if i < 0 else i for i in (self.first, self.last))
        wanted = range(max(first, 0), min(last, count - 1) + 1)
        if not wanted:
            reason = (
                f"the stream has {count} blocks, and none lies from {self.first} to {self.last}; "
                "choose first and last"
            )
            misses.append(self._miss(_name(blocks.blocks), reason))
        free: list[tuple[int, float]] = []
        for index in wanted:
            name = _name([blocks.blocks[index]])
            pattern = context.ignored_by(name)
            share = context.kept_share(self.keep, name)
            if pattern is not None:
                misses.append(self._miss(name, f"ignored by the pattern {pattern!r}"))
            elif (
                kept_count(blocks.tokens.size, share) >= blocks.tokens.size
                and not blocks.tokens.symbols
            ):
                reason = f"{share:.0%} of {blocks.tokens.size} tokens are all, in steps of 16"
                misses.append(self._miss(name, reason))
            else:
                free.append((index, share))
        if not self.span:
            yield from ((index, index, share) for index, share in free)
            return
        numbered = enumerate(free)
        for _, group in groupby(numbered, lambda item: (item[1][0] - item[0], item[1][1])):
            run = [index for _, (index, _) in group]
            share = dict(free)[run[0]]
            yield run[0], run[-1], share

    def _route(self, program: Program, blocks: BlockChain, first: int, last: int) -> Route:
        ranked = self.router != "random"
        if ranked:
            check_score(blocks, blocks.blocks[first - 1] if first else None, self.router)
        entry, exit_ = blocks.blocks[first].entry, blocks.blocks[last].exit
        return find_route(program, blocks, entry, exit_, per_sample=ranked)

    def _gate(
        self,
        program: Program,
        blocks: BlockChain,
        chain: int,
        first: int,
        last: int,
        share: float,
    ) -> GateDetails:
        ids, special = special_ids(program, blocks)
        padding = padding_input(program) if self.router != "random" else None
        if padding is not None and blocks.tokens.inputs.get(padding) != (1,):
            padding = None
        return GateDetails(
            chain=chain,
            first=first,
            last=last,
            keep=share,
            fixed=read_positions(blocks),
            ids=ids,
            special_ids=special,
            padding=padding,
            marks_real=padding is None or marks_real(program),
        )

    def _candidate(
        self,
        program: Program,
        chains: Sequence[BlockChain],
        gates: Sequence[GateDetails],
        routes: Sequence[Route],
    ) -> Candidate:
        details = Gating(
            router=cast(Router, self.router),
            seed=self.seed,
            full_at=self.full_at,
            anneal=self.anneal,
            gates=tuple(gates),
        )
        blocks = [block for g in gates for block in chains[g.chain].blocks[g.first : g.last + 1]]
        before = facts_of(program).cost([n for route in routes for n in route.inside])
        flops = sum(_flops(program, r, g.keep) for r, g in zip(routes, gates, strict=True))
        for number in {gate.chain for gate in gates} if self.router != "random" else ():
            first = next(gate.first for gate in gates if gate.chain == number)
            flops += score_flops(chains[number], chains[number].blocks[first - 1], self.router)
        shares = ", ".join(dict.fromkeys(f"{gate.keep:.0%}" for gate in gates))
        way = "one route" if self.span else "each its own route"
        return Candidate(
            change=Change(
                pass_name=self.name,
                target=_name(blocks),
                summary=f"{len(blocks)} blocks on {shares} of the tokens ({self.router}, {way})",
                details=details.model_dump(mode="json"),
            ),
            before=before,
            after=Cost(flops=flops, size_bytes=before.size_bytes, parameters=before.parameters),
            exclusive=frozenset({BLOCK_ORDER}),
        )


def _routes(program: Program, change: Change) -> tuple[Gating, tuple[BlockChain, ...], list[Route]]:
    """Return the checked details, the chains they refer to and the routes they ask for.

    Raises:
        PlanError: if they do not fit the program.
    """
    details = read_details(Gating, change)
    ranked = details.router != "random"
    chains = block_chains(program)
    inputs = {node.name for node in program.placeholders}
    if hasattr(program.model, HOLDER):
        raise PlanError(f"the model has {HOLDER!r} already; apply the plan to a fresh model")
    routes: list[Route] = []
    for gate in details.gates:
        blocks = chains[gate.chain].blocks if gate.chain < len(chains) else ()
        if not gate.first <= gate.last < len(blocks):
            raise PlanError(
                f"the plan gates the blocks {gate.first} to {gate.last} of stream {gate.chain}, "
                "which this model does not have; make the plan again"
            )
        missing = [name for name in (gate.ids, gate.padding) if name and name not in inputs]
        if missing:
            raise PlanError(f"this call has no input {missing[0]!r}, which the gates look at")
        try:
            if ranked:
                before = blocks[gate.first - 1] if gate.first else None
                check_score(chains[gate.chain], before, details.router)
            route = find_route(
                program,
                chains[gate.chain],
                blocks[gate.first].entry,
                blocks[gate.last].exit,
                per_sample=ranked,
            )
        except (Unroutable, Unscored) as reason:
            raise PlanError(f"the plan does not fit this call: {reason}") from reason
        routes.append(route)
    return details, chains, routes


def _widths(routes: Sequence[Route]) -> list[int]:
    return [shape_of(route.entry)[-1] for route in routes]


def _flops(program: Program, route: Route, share: float) -> int:
    """Return about what a route costs: products of tokens with tokens shrink twice."""
    facts = facts_of(program)
    kept = kept_count(route.tokens.size, share) / route.tokens.size
    flops = 0.0
    for node in route.inside:
        squared = operator_name(node) == "scaled_dot_product_attention" or (
            any(len(token_dims(route.tokens, item)) > 1 for item in (node, *tensor_nodes(node)))
        )
        flops += facts.nodes[node].forward_flops * (kept * kept if squared else kept)
    return round(flops)


def _name(blocks: Sequence[TokenBlock]) -> str:
    """Return the name of the innermost module that blocks come from."""
    return _scope_name([node for b in blocks for r in b.regions for node in r.nodes])


def _scope_name(nodes: Sequence[fx.Node]) -> str:
    paths = [node.meta["modules"] for node in nodes if node.op != "get_attr"]
    common = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
    return common[-1] if common and common[-1] else "(model)"
