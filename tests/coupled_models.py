"""Small models whose parameters are coupled in every way that a removal has to respect."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def _input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Concatenation(nn.Module):
    """Channels that are concatenated, as in DenseNet, and flattened into a linear layer."""

    def __init__(self) -> None:
        """Create 8 + 6 channels on 16 x 16 images."""
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.joint_norm = nn.BatchNorm2d(14)
        self.third = nn.Conv2d(14, 4, 1)
        self.head = nn.Linear(4 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 3, 16, 16] to [batch, 5]."""
        first = self.norm(self.first(x)).relu()
        joint = self.joint_norm(torch.cat([first, self.second(first)], 1)).relu()
        pooled = functional.max_pool2d(self.third(joint), 2)
        logits: Tensor = self.head(pooled.flatten(1))
        return logits


class Grouped(nn.Module):
    """Grouped, transposed and depthwise convolutions with norms and slopes per channel."""

    def __init__(self) -> None:
        """Create 16 channels in 4 groups."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, groups=4, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 8, 1),
            nn.ConvTranspose2d(8, 6, 2, stride=2),
            nn.Conv2d(6, 12, 3, groups=6),
            nn.InstanceNorm2d(12, affine=True),
            nn.PReLU(12),
            nn.Conv2d(12, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 3, 8, 8] to [batch, 2, 14, 14]."""
        result: Tensor = self.layers(x)
        return result


class ShuffledChannels(nn.Module):
    """A channel shuffle between grouped convolutions, and a gate per channel."""

    def __init__(self) -> None:
        """Create 12 channels in 3 groups."""
        super().__init__()
        self.first = nn.Conv2d(3, 12, 1)
        self.grouped = nn.Conv2d(12, 12, 1, groups=3)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.squeeze = nn.Linear(12, 5)
        self.excite = nn.Linear(5, 12)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 3, 8, 8] to [batch, 4, 8, 8]."""
        x = self.grouped(self.first(x).relu())
        batch, channels, height, width = x.shape
        x = x.view(batch, 3, 4, height, width).transpose(1, 2)
        x = self.depthwise(x.reshape(batch, channels, height, width))
        gate = torch.sigmoid(self.excite(self.squeeze(x.mean((2, 3))).relu()))
        result: Tensor = self.last(x * gate[:, :, None, None])
        return result


class PackedHeads(nn.Module):
    """Query, key and value packed inside every head; attention written as Einstein sums."""

    def __init__(self) -> None:
        """Create 4 heads of 6."""
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.packed = nn.Linear(24, 72)
        self.output = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, token, 24] to itself."""
        batch, tokens, width = x.shape
        packed = self.packed(self.norm(x)).view(batch, tokens, 4, 3, 6)
        query, key, value = packed[..., 0, :], packed[..., 1, :], packed[..., 2, :]
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores, value).reshape(batch, tokens, width)
        result: Tensor = x + self.output(mixed)
        return result


class Gates(nn.Module):
    """Gated units: by chunk, by slices, and by `glu` over a concatenation with itself."""

    def __init__(self) -> None:
        """Create 20 and 24 gated units."""
        super().__init__()
        self.up = nn.Linear(16, 40)
        self.scale = nn.Parameter(torch.rand(20))
        self.down = nn.Linear(20, 16)
        self.up_again = nn.Linear(16, 48, bias=False)
        self.down_again = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, token, 16] to itself."""
        gate, value = self.up(x).chunk(2, -1)
        y = self.down(gate * torch.sigmoid(value) * self.scale)
        z = self.up_again(y)
        z = self.down_again(z[..., :24] * functional.silu(z[..., 24:]))
        result: Tensor = z + functional.glu(torch.cat([y, y], -1), -1)
        return result


class SharedKeys(nn.Module):
    """Two query heads per key head: repeated by hand and inside the attention operator."""

    def __init__(self) -> None:
        """Create 4 query heads and 2 key heads of 6."""
        super().__init__()
        self.query = nn.Linear(24, 24)
        self.key = nn.Linear(24, 12)
        self.value = nn.Linear(24, 12)
        self.first_output = nn.Linear(24, 24)
        self.second_output = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, token, 24] to itself."""
        batch, tokens, width = x.shape
        query = self.query(x).view(batch, tokens, 4, 6).transpose(1, 2)
        key = self.key(x).view(batch, tokens, 2, 6).transpose(1, 2)
        value = self.value(x).view(batch, tokens, 2, 6).transpose(1, 2)
        query = query + 0.3 * torch.cat([-query[..., 3:], query[..., :3]], -1)
        attend = functional.scaled_dot_product_attention
        first = attend(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))
        second = attend(query, key, value, enable_gqa=True)
        first = first.transpose(1, 2).reshape(batch, tokens, width)
        second = second.transpose(1, 2).reshape(batch, tokens, width)
        result: Tensor = self.first_output(first) + self.second_output(second)
        return result


class FoldedHeads(nn.Module):
    """Heads folded into the batch, so that symbolic sizes hold the number of heads."""

    def __init__(self) -> None:
        """Create 4 heads of 6."""
        super().__init__()
        self.heads = 4
        self.query = nn.Linear(24, 24)
        self.key = nn.Linear(24, 24)
        self.value = nn.Linear(24, 24)
        self.output = nn.Linear(24, 24)

    def _fold(self, x: Tensor, batch: int) -> Tensor:
        x = x.view(batch, -1, self.heads, 6).transpose(1, 2).contiguous()
        return x.view(batch * self.heads, -1, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, token, 24] to itself."""
        batch, tokens, _ = x.shape
        query, key = self._fold(self.query(x), batch), self._fold(self.key(x), batch)
        scores = torch.bmm(query, key.transpose(1, 2)).view(batch, self.heads, tokens, tokens)
        scores = scores + torch.zeros(batch, self.heads, tokens, tokens)
        scores = scores.view(batch * self.heads, tokens, tokens).softmax(-1)
        mixed = torch.bmm(scores, self._fold(self.value(x), batch))
        mixed = mixed.view(batch, self.heads, tokens, 6).transpose(1, 2)
        result: Tensor = self.output(mixed.reshape(batch, tokens, self.heads * 6))
        return result


class MixedHeads(nn.Module):
    """Attention scores that a linear layer mixes across heads."""

    def __init__(self) -> None:
        """Create 4 heads of 6."""
        super().__init__()
        self.packed = nn.Linear(24, 72)
        self.temperature = nn.Parameter(torch.rand(4, 1, 1))
        self.mix = nn.Linear(4, 4)
        self.output = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, token, 24] to itself."""
        batch, tokens, width = x.shape
        packed = self.packed(x).view(batch, tokens, 3, 4, 6).permute(2, 0, 3, 1, 4)
        query, key, value = packed.unbind(0)
        scores = (query @ key.transpose(-1, -2) * self.temperature).permute(0, 2, 3, 1)
        scores = self.mix(scores).permute(0, 3, 1, 2).softmax(-1)
        result: Tensor = self.output((scores @ value).transpose(1, 2).reshape(batch, tokens, width))
        return result


class TokenMixer(nn.Module):
    """Linear layers over tokens and over features, alternating."""

    def __init__(self) -> None:
        """Create 10 tokens of width 16."""
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.token_up = nn.Linear(10, 7)
        self.token_down = nn.Linear(7, 10)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 10, 16] to itself."""
        tokens = functional.gelu(self.token_up(self.norm(x).transpose(1, 2)))
        x = x + self.token_down(tokens).transpose(1, 2)
        result: Tensor = x + self.down(functional.gelu(self.up(x)))
        return result


class ComputedWeight(nn.Module):
    """A weight that is computed from two parameters, after a group norm and a mean."""

    def __init__(self) -> None:
        """Create 12 channels in 3 norm groups."""
        super().__init__()
        self.first = nn.Conv1d(4, 12, 1)
        self.norm = nn.GroupNorm(3, 12)
        self.second = nn.Conv1d(12, 6, 1)
        self.up = nn.Linear(6, 9, bias=False)
        self.weight = nn.Parameter(torch.rand(9, 5))
        self.gain = nn.Parameter(torch.rand(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 4, length] to [batch, 3]."""
        hidden = self.up(self.second(self.norm(self.first(x))).mean(-1))
        result: Tensor = self.head(torch.tanh(hidden @ (self.weight * self.gain)))
        return result


class CutTwice(nn.Module):
    """A concatenation that another reader cuts across its parts."""

    def __init__(self) -> None:
        """Create 24 + 12 features, read as 36 and as 9 x 4."""
        super().__init__()
        self.first = nn.Linear(8, 24)
        self.second = nn.Linear(8, 12)
        self.plain = nn.Linear(36, 6)
        self.swapped = nn.Linear(36, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 8] to [batch, 6]."""
        joint = torch.cat([self.first(x), self.second(x)], -1)
        swapped = joint.view(x.shape[0], 9, 4).transpose(1, 2).reshape(x.shape[0], 36)
        result: Tensor = self.plain(joint.relu()) + self.swapped(swapped)
        return result


class TiedWeight(nn.Module):
    """A weight that produces units and, transposed, consumes them."""

    def __init__(self) -> None:
        """Create 20 units."""
        super().__init__()
        self.encode = nn.Linear(8, 20, bias=False)
        self.decode = nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 8] to itself."""
        hidden = self.encode(x).relu()
        result: Tensor = self.decode(hidden) + functional.linear(hidden, self.encode.weight.t())
        return result


class OuterProduct(nn.Module):
    """All products of pairs of units, flattened: an index belongs to two units."""

    def __init__(self) -> None:
        """Create 5 units."""
        super().__init__()
        self.up = nn.Linear(8, 5)
        self.down = nn.Linear(25, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 8] to [batch, 3]."""
        hidden = self.up(x)
        result: Tensor = self.down((hidden[:, :, None] * hidden[:, None, :]).flatten(1))
        return result


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` on itself and on another sequence of another width."""

    def __init__(self) -> None:
        """Create 4 heads of 6."""
        super().__init__()
        self.own = nn.MultiheadAttention(24, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(24, 4, kdim=16, vdim=16, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """Map [batch, token, 24] and [batch, other token, 16] to [batch, token, 24]."""
        hidden = self.own(x, x, x, need_weights=False)[0]
        result: Tensor = self.cross(hidden, memory, memory)[0]
        return result


class AcrossUnits(nn.Module):
    """Operators that let every unit depend on the others: none may be removed."""

    def __init__(self) -> None:
        """Create layers of 12 units."""
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.second = nn.Linear(12, 12)
        self.third = nn.Linear(12, 12)
        self.fourth = nn.Linear(12, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, 8] to [batch, 3]."""
        x = self.second(self.norm(self.first(x)))
        x = self.third(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        x = self.fourth(x.softmax(-1))
        result: Tensor = self.last(x[:, torch.arange(11, -1, -1)])
        return result


class EmptyRest(nn.Module):
    """A slice that takes everything, and one that takes nothing, as with full rotary widths."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        turned, rest = hidden[..., :24], hidden[..., 24:]
        result: Tensor = self.down(torch.cat([torch.relu(turned), rest], dim=-1))
        return result


COUPLED: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "concatenation": (Concatenation, (_input(2, 3, 16, 16),)),
    "grouped": (Grouped, (_input(2, 3, 8, 8),)),
    "shuffled-channels": (ShuffledChannels, (_input(2, 3, 8, 8),)),
    "packed-heads": (PackedHeads, (_input(2, 9, 24),)),
    "gates": (Gates, (_input(2, 9, 16),)),
    "shared-keys": (SharedKeys, (_input(2, 9, 24),)),
    "folded-heads": (FoldedHeads, (_input(2, 9, 24),)),
    "mixed-heads": (MixedHeads, (_input(2, 9, 24),)),
    "token-mixer": (TokenMixer, (_input(2, 10, 16),)),
    "computed-weight": (ComputedWeight, (_input(2, 4, 9),)),
    "cut-twice": (CutTwice, (_input(2, 8),)),
    "tied-weight": (TiedWeight, (_input(2, 8),)),
    "outer-product": (OuterProduct, (_input(2, 8),)),
    "empty-rest": (EmptyRest, (_input(2, 8),)),
    "across-units": (AcrossUnits, (_input(2, 8),)),
    "cross-attention": (CrossAttention, (_input(2, 9, 24), _input(2, 7, 16))),
}
