"""ResNet-12, the larger backbone of the few-shot literature."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions with batch norm, each followed by 2x2 max-pooling, then global
    average pooling and a linear head (Oreshkin et al. 2018; widths of Lee et al. 2019).

    ``[n, channels, h, w] -> [n, ways]``, logits; h and w at least 16.
    """

    def __init__(self, ways: int, channels: int = 3, widths: Sequence[int] = (64, 160, 320, 640)) -> None:
        super().__init__()
        sizes = [channels, *widths]
        self.blocks = nn.Sequential(*[_Residual(a, b) for a, b in pairwise(sizes)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(sizes[-1], ways)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, ways]`` for images ``[n, channels, h, w]``."""
        logits: Tensor = self.head(self.pool(self.blocks(x)).flatten(1))
        return logits


class _Residual(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, inputs in enumerate((channels, width, width)):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers += [nn.LeakyReLU(0.1)] if i < 2 else []
        self.body = nn.Sequential(*layers)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.after = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.after(self.body(x) + self.shortcut(x))
        return out
