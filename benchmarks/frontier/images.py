"""Images: MNIST's 10,000-image split, with a small convolutional net or a small ViT.

7,000 images are trained on, 1,000 tune, 2,000 test; drawn once. Augmentation: shifts by up to 2
pixels and rotations by up to 12 degrees. The files are those of MNIST's test set
(t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz, http://yann.lecun.com/exdb/mnist/).
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tasks import Batch, Quality, Split

_TUNING, _TEST = 1000, 2000
_SHIFT, _DEGREES = 2, 12
_MEAN, _DEVIATION = 0.1307, 0.3081
_EVALUATED = 500


class ConvolutionalNet(nn.Module):
    """A residual net with batch norms: one block per width, each but the first halves the image.

    At the last width `repeated` more blocks follow, which keep size and width.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64), repeated: int = 0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        pairs = pairwise(widths)
        self.blocks = nn.Sequential(
            *(_ConvolutionalBlock(before, after) for before, after in pairs),
            *(_RepeatedBlock(widths[-1]) for _ in range(repeated)),
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [image, class] of images [image, 1, height, width]."""
        hidden = torch.relu(self.norm(self.blocks(self.stem(images))))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


class _ConvolutionalBlock(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(before, after, 1, stride=2, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        entry = torch.relu(self.norm1(hidden))
        inner = self.conv2(torch.relu(self.norm2(self.conv1(entry))))
        result: Tensor = inner + self.shortcut(entry)
        return result


class _RepeatedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.conv1(torch.relu(self.norm1(hidden)))
        result: Tensor = hidden + self.conv2(torch.relu(self.norm2(inner)))
        return result


class VisionTransformer(nn.Module):
    """Patches as tokens, pre-norm blocks, the mean of all tokens is classified."""

    def __init__(self, width: int = 64, depth: int = 6, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (28 // patch) ** 2, width))
        self.blocks = nn.ModuleList(_TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [image, class] of images [image, 1, 28, 28]."""
        hidden = self.embed(images).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden).mean(1))
        return logits


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        images, tokens, width = hidden.shape
        qkv = self.qkv(self.norm1(hidden)).view(images, tokens, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.proj(mixed.transpose(1, 2).reshape(images, tokens, width))
        result: Tensor = hidden + self.down(F.gelu(self.up(self.norm2(hidden))))
        return result


class Images:
    """The workload; `kind` of the model is "cnn" or "vit".

    Args:
        data: Directory of the two files.
    """

    def __init__(self, data: Path) -> None:
        images = _read(data, "images").view(-1, 1, 28, 28)
        images = (images.float() / 255 - _MEAN) / _DEVIATION
        labels = _read(data, "labels").long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        parts = {
            "test": order[:_TEST],
            "tuning": order[_TEST : _TEST + _TUNING],
            "training": order[_TEST + _TUNING :],
        }
        self._parts = {name: (images[part], labels[part]) for name, part in parts.items()}

    @property
    def samples(self) -> int:
        """Number of training images."""
        return len(self._parts["training"][1])

    def model(self, seed: int, arguments: Mapping[str, Any]) -> nn.Module:
        """Return a new model; a CNN's channels are last in memory, which is faster on CPUs."""
        torch.manual_seed(seed)
        rest = {name: value for name, value in arguments.items() if name != "kind"}
        if arguments["kind"] == "vit":
            return VisionTransformer(**rest)
        net: nn.Module = ConvolutionalNet(**rest)
        return nn.utils.convert_conv2d_weight_memory_format(net, torch.channels_last)

    def grouped(self, order: Sequence[int], size: int, seed: int) -> list[list[int]]:
        """Return the epoch in its order."""
        return [list(order[start : start + size]) for start in range(0, len(order), size)]

    def batch(self, samples: Sequence[int], seed: int) -> Batch:
        """Return augmented images."""
        images, labels = (part[list(samples)] for part in self._parts["training"])
        return {"images": _moved(images, seed), "labels": labels}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of every image."""
        return F.cross_entropy(model(batch["images"]).float(), batch["labels"], reduction="none")

    def evaluate(self, model: nn.Module, split: Split) -> Quality:
        """Return loss and accuracy on images as they are."""
        images, labels = self._parts[split]
        logits = torch.cat([model(part) for part in images.split(_EVALUATED)])
        return Quality(
            loss=F.cross_entropy(logits, labels).item(),
            accuracy=100 * (logits.argmax(1) == labels).double().mean().item(),
        )


def _moved(images: Tensor, seed: int) -> Tensor:
    """Shift and rotate images [image, 1, 28, 28] at random."""
    generator = torch.Generator().manual_seed(seed)
    count = len(images)
    angles = (2 * torch.rand(count, generator=generator) - 1) * math.radians(_DEGREES)
    shifts = (2 * torch.rand(count, 2, generator=generator) - 1) * 2 * _SHIFT / images.shape[-1]
    cosine, sine = angles.cos(), angles.sin()
    rows = torch.stack([cosine, -sine, shifts[:, 0], sine, cosine, shifts[:, 1]], dim=1)
    grid = F.affine_grid(rows.view(count, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _read(data: Path, what: str) -> Tensor:
    """Return a file in IDX format as a flat tensor of bytes."""
    found = sorted(data.glob(f"*{what}*.gz"))
    if not found:
        raise SystemExit(f"expected MNIST's {what} as a .gz file in {data}, found none")
    with gzip.open(found[0]) as file:
        content = bytearray(file.read())
    return torch.frombuffer(content, dtype=torch.uint8, offset=4 + 4 * content[3])
