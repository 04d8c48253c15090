"""Plain torch models of the zoo."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class TransformerWithPadding(nn.Module):
    """A `nn.TransformerEncoder` called with a padding mask."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        """Wrap the encoder."""
        super().__init__()
        self.encoder = encoder

    def forward(self, features: Tensor, padding: Tensor) -> Tensor:
        """Encode [batch, token, width]; `padding` [batch, token] is True where ignored."""
        return cast(Tensor, self.encoder(features, src_key_padding_mask=padding))


class ConvolutionalNetwork(nn.Module):
    """A CNN with BatchNorm, in-place operations, a depthwise convolution and a residual add."""

    def __init__(self, classes: int) -> None:
        """Create 16 channels and a linear classifier."""
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.expand = nn.Conv2d(16, 32, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(32)
        self.project = nn.Conv2d(32, 16, 1)
        self.project_norm = nn.BatchNorm2d(16)
        self.dropout = nn.Dropout2d(0.1)
        self.head = nn.Linear(16, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Classify [batch, 3, height, width] into logits [batch, class]."""
        stem = self.stem_norm(self.stem(images)).relu_()
        hidden = functional.relu(self.expand_norm(self.expand(stem)), inplace=True)
        hidden = self.depthwise_norm(self.depthwise(hidden)).relu_()
        hidden = self.project_norm(self.project(hidden))
        hidden += stem
        hidden = functional.adaptive_avg_pool2d(self.dropout(hidden), 1)
        return cast(Tensor, self.head(torch.flatten(hidden, 1)))


class RecurrentNetwork(nn.Module):
    """Embedding, two LSTM layers with dropout between them, and a classifier."""

    def __init__(self, vocabulary: int, classes: int) -> None:
        """Create width 32."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 32)
        self.lstm = nn.LSTM(32, 32, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(32, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify [batch, token] by the last hidden state into logits [batch, class]."""
        hidden, _ = self.lstm(self.embedding(tokens))
        return cast(Tensor, self.head(hidden[:, -1]))


class FeedForward(nn.Module):
    """A pre-norm residual feed-forward block."""

    def __init__(self) -> None:
        """Create width 32, hidden 64."""
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = nn.Linear(32, 64)
        self.dropout = nn.Dropout(0.1)
        self.down = nn.Linear(64, 32)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the block's output [batch, token, width]."""
        up = functional.gelu(self.up(self.norm(hidden)))
        return hidden + cast(Tensor, self.down(self.dropout(up)))


class RecurrentBlock(nn.Module):
    """One feed-forward block applied three times, so its weights are shared across depth."""

    def __init__(self) -> None:
        """Create the one block and a head."""
        super().__init__()
        self.block = FeedForward()
        self.head = nn.Linear(32, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [batch, token, 32] to [batch, token, 8]."""
        for _ in range(3):
            hidden = self.block(hidden)
        return cast(Tensor, self.head(hidden))


class FlaggedModel(nn.Module):
    """Flags, None and keyword-only arguments, and a dict as output."""

    def __init__(self) -> None:
        """Create two linear layers and a norm."""
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 8)
        self.norm = nn.LayerNorm(32)

    def forward(
        self,
        features: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        normalize: bool = False,
        return_hidden: bool = True,
    ) -> dict[str, Tensor | None]:
        """Return logits [batch, token, 8], and the hidden state if asked for, else None."""
        inputs = self.norm(features) if normalize else features
        hidden = functional.relu(self.first(inputs))
        if bias is not None:
            hidden = hidden + bias
        logits = self.second(hidden) * scale
        return {"logits": logits, "hidden": hidden if return_hidden else None}
