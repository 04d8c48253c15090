"""Which tokens a part of a model computes: routers behind one interface.

`RandomTokens` draws them anew in every training step and is off in evaluation mode.
`AttendedTokens` takes those that receive most attention, `LearnedTokens` those that a trained
vector points at; both choose in evaluation mode too, and look at the whole sequence.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .gates import Gate
from .token_selection import kept_count

__all__ = [
    "AttendedTokens",
    "LearnedTokens",
    "RandomTokens",
    "TokenGate",
    "blend_tokens",
    "choose_tokens",
    "stream_change",
]

_PARTS = 65536
_BEYOND = 1e30
"""Above any rank."""
_WEIGHT_RANGE = 0.2
"""How far a router's weight goes from 1 (p-MoD, arXiv 2412.04449, "tanh_0.2_1")."""


class TokenGate(Gate):
    """Chooses tokens; `share` of the progress says how many.

    Attributes:
        keep: The share of tokens at the start (random) or once annealed (attended, learned).
        fixed: Positions that are always chosen, negative ones from the end.
        special_ids: Token ids that are always chosen, where ids are known.
        marks_real: Whether a padding mask marks the real tokens; else it marks the padding.
    """

    def __init__(
        self,
        *,
        keep: float,
        seed: int = 0,
        number: int = 0,
        fixed: tuple[int, ...] = (),
        special_ids: tuple[int, ...] = (),
        marks_real: bool = True,
    ) -> None:
        super().__init__(seed=seed, number=number)
        self.keep = keep
        self.fixed = fixed
        self.special_ids = special_ids
        self.marks_real = marks_real

    @abstractmethod
    def share(self) -> float:
        """Return the share of tokens at the present progress, in (0, 1]."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        score: Tensor | None,
        ids: Tensor | None,
        padding: Tensor | None,
        token_dim: int,
        batch_dim: int,
    ) -> Tensor | None:
        """Return the numbers of the chosen tokens, ascending, None for all.

        Args:
            x: The stream before the gated part.
            score: What speaks for a token [batch, token]; higher is chosen first.
            ids: Token ids [batch, token], where special ones are kept.
            padding: The padding mask [batch, token].
            token_dim: The stream's dimension of tokens.
            batch_dim: Its dimension of samples.

        Returns:
            [1, kept] for all samples or [batch, kept], int64.
        """

    def always(self, tokens: int, device: torch.device) -> Tensor:
        """Return which positions are always chosen [token]."""
        position = torch.arange(tokens, device=device)
        chosen = torch.zeros(tokens, dtype=torch.bool, device=device)
        for place in self.fixed:
            chosen = chosen | (position == (place if place >= 0 else tokens + place))
        return chosen

    def special(self, ids: Tensor) -> Tensor:
        """Return which tokens have a special id [batch, token]."""
        return torch.isin(ids, torch.tensor(self.special_ids, device=ids.device))

    def extra_repr(self) -> str:
        """Return the share too."""
        return f"{super().extra_repr()}, keep={self.keep:g}"


class RandomTokens(TokenGate):
    """Chooses the same random tokens for all samples of a training step, all in evaluation.

    The share grows linearly from `keep` to 1 at the progress `full_at`: random-LTD
    (arXiv 2211.11586) with a schedule over compute. A position counts as special if it is for any
    sample; special positions come first.
    """

    def __init__(
        self,
        *,
        keep: float,
        full_at: float = 0.7,
        seed: int = 0,
        number: int = 0,
        fixed: tuple[int, ...] = (),
        special_ids: tuple[int, ...] = (),
    ) -> None:
        super().__init__(keep=keep, seed=seed, number=number, fixed=fixed, special_ids=special_ids)
        self.full_at = full_at

    def share(self) -> float:
        """Return the share of tokens at the present progress."""
        return self.keep + (1 - self.keep) * min(1.0, self.progress / self.full_at)

    def forward(
        self,
        x: Tensor,
        score: Tensor | None,
        ids: Tensor | None,
        padding: Tensor | None,
        token_dim: int,
        batch_dim: int,
    ) -> Tensor | None:
        """Return the chosen tokens [1, kept]; None in evaluation mode and at a share of 1."""
        return self._drawn(x.shape[token_dim], x.device, ids) if self.training else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _drawn(self, tokens: int, device: torch.device, ids: Tensor | None) -> Tensor | None:
        self.begin()
        kept = kept_count(tokens, self.share())
        if kept >= tokens:
            return None
        score = torch.rand(tokens, generator=self.generator())
        score = score + self.always(tokens, score.device)
        if ids is not None:
            score = score.to(device) + self.special(ids).any(0)
        chosen: Tensor = score.topk(kept).indices.sort().values
        return chosen.to(device, non_blocking=True)[None]


class _RankedTokens(TokenGate):
    """Chooses the tokens of highest rank, for each sample, in both modes.

    Its share anneals from 1 to `keep` until the progress `anneal`. The share reached last is kept
    in the state, so a model that is loaded computes what it computed.

    Attributes:
        capacity: That share in parts of 65536.
    """

    capacity: Tensor

    def __init__(
        self,
        *,
        keep: float,
        anneal: float = 0.25,
        start: float = 1.0,
        seed: int = 0,
        number: int = 0,
        fixed: tuple[int, ...] = (),
        special_ids: tuple[int, ...] = (),
        marks_real: bool = True,
    ) -> None:
        super().__init__(
            keep=keep,
            seed=seed,
            number=number,
            fixed=fixed,
            special_ids=special_ids,
            marks_real=marks_real,
        )
        self.anneal = anneal
        self.register_buffer("capacity", torch.tensor(int(start * _PARTS)))
        self._parts: int | None = None

    def advance(self, step: int, progress: float) -> None:
        """Set step and progress, and with them the share."""
        super().advance(step, progress)
        done = min(1.0, progress / self.anneal) if self.anneal else 1.0
        parts = int((1 - (1 - self.keep) * done) * _PARTS)
        if parts != self._parts:
            self.capacity.fill_(parts)
            self._parts = parts

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def share(self) -> float:
        """Return the share that the gate was advanced to, by whoever did it."""
        if self._parts is None:
            if isinstance(self.capacity, FakeTensor) or self.capacity.is_meta:
                return self.keep
            self._parts = int(self.capacity)
        return self._parts / _PARTS

    def forward(
        self,
        x: Tensor,
        score: Tensor | None,
        ids: Tensor | None,
        padding: Tensor | None,
        token_dim: int,
        batch_dim: int,
    ) -> Tensor | None:
        """Return the chosen tokens [batch, kept]; None at a share of 1."""
        self.begin()
        tokens = x.shape[token_dim]
        kept = kept_count(tokens, self.share())
        if isinstance(kept, int) and kept >= tokens:
            return None
        assert score is not None
        rank = self.rank(x, score)
        # Padding last, special tokens first, each in its own order: ties may fall anyhow.
        position = torch.arange(1, tokens + 1, device=x.device) * _BEYOND
        if padding is not None:
            real = padding != 0 if self.marks_real else padding == 0
            rank = torch.where(real, rank, -position)
        always = self.always(tokens, x.device)[None]
        if ids is not None:
            always = always | self.special(ids)
        rank = torch.where(always, position, rank)
        return rank.topk(kept, dim=1).indices.sort(dim=1).values

    def rank(self, x: Tensor, score: Tensor) -> Tensor:
        """Return what the tokens are sorted by [batch, token]."""
        return score

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._parts = None
        super()._load_from_state_dict(*args, **kwargs)


class AttendedTokens(_RankedTokens):
    """Chooses the tokens that receive most attention (A-MoD, arXiv 2412.20875)."""

    eager_refusal = (
        "an attention gate chooses among all tokens of a sequence, so it cannot decode with a "
        "cache; pass the whole sequence with use_cache=False, or gate with router=random, which "
        "decodes as the plain model"
    )


class LearnedTokens(_RankedTokens):
    """Chooses the tokens that a trained vector u points at, with u x weighing their result.

    A chosen token is `x + w (f(x) - x)`, `w = 1 + 0.2 tanh(u x)`; u starts at 0, the share at 1, so
    the function starts unchanged. Tokens rank by u x plus how much an earlier block turned them,
    which decides while u is 0.

    Attributes:
        weight: u [width].
    """

    eager_refusal = (
        "a learned gate ranks all tokens of a sequence, so it cannot decode with a cache; pass "
        "the whole sequence with use_cache=False, or gate with router=random, which decodes as "
        "the plain model"
    )

    def __init__(
        self,
        width: int,
        *,
        keep: float,
        anneal: float = 0.25,
        seed: int = 0,
        number: int = 0,
        fixed: tuple[int, ...] = (),
        special_ids: tuple[int, ...] = (),
        marks_real: bool = True,
    ) -> None:
        super().__init__(
            keep=keep,
            anneal=anneal,
            seed=seed,
            number=number,
            fixed=fixed,
            special_ids=special_ids,
            marks_real=marks_real,
        )
        self.weight = nn.Parameter(torch.zeros(width))

    def rank(self, x: Tensor, score: Tensor) -> Tensor:
        """Return u x plus the score, without gradient: it flows through the weights."""
        with torch.no_grad():
            found = (x @ self.weight).float()
            # The stream may have its tokens first; scores never do.
            return (found if found.shape == score.shape else found.T) + score


def choose_tokens(
    gate: TokenGate,
    x: Tensor,
    score: Tensor | None,
    ids: Tensor | None,
    padding: Tensor | None,
    token_dim: int,
    batch_dim: int,
) -> Tensor | None:
    """Return the tokens that a gate chooses: `gate(...)` in a graph.

    Where shapes are propagated without data, as many tokens are chosen as the gate keeps.
    """
    if isinstance(x, FakeTensor) and not torch.compiler.is_compiling():
        tokens = x.shape[token_dim]
        size = tokens if isinstance(tokens, int) else int(tokens.node.hint)
        rows = x.shape[batch_dim] if isinstance(gate, _RankedTokens) else 1
        return x.new_empty((rows, kept_count(size, gate.keep)), dtype=torch.int64)
    chosen: Tensor | None = gate(x, score, ids, padding, token_dim, batch_dim)
    return chosen


def blend_tokens(gate: LearnedTokens, x: Tensor, y: Tensor) -> Tensor:
    """Return `x + w (y - x)` with the router's weights; exactly y where they are 1.

    Args:
        gate: The router.
        x: The chosen tokens before the gated part [.., width].
        y: The same after it.
    """
    if isinstance(x, FakeTensor) and not torch.compiler.is_compiling():
        return torch.empty_like(y)
    w = 1 + _WEIGHT_RANGE * torch.tanh(x @ gate.weight)[..., None].to(y.dtype)
    return w * y + (1 - w) * x


def stream_change(before: Tensor, after: Tensor, batch_first: bool) -> Tensor:
    """Return 1 - cos of every token before and after a block [batch, token], without gradient."""
    with torch.no_grad():
        change = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)
    return change if batch_first else change.T
