"""The four-block convolutional network of the few-shot experiments."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from innerloop.nn.conv_norm_act_pool import ConvNormActPool


class Conv4(nn.Module):
    """4 x [3x3 convolution, batch norm, leaky ReLU (0.01), 2x2 max-pool], then a linear head (MAML++, section 5).

    ``[n, channels, size, size] -> [n, ways]``, logits.

    Args:
        ways: classes of a task, the width of the head.
        channels: of the input image: 1 (Omniglot) or 3 (mini-ImageNet).
        size: height and width of the input image, at least 16 (5 when strided).
        filters: of every convolution: 64 (Omniglot) or 48 (mini-ImageNet).
        strided: stride-2 convolutions in place of max-pooling, then global average pooling: the variant that makes
            plain MAML unstable (the paper's figure 1).
    """

    def __init__(self, ways: int, channels: int = 1, size: int = 28, filters: int = 64, strided: bool = False) -> None:
        super().__init__()
        if not strided and size < 16:
            raise ValueError(f"four 2x2 poolings need images of at least 16 x 16, got {size} x {size}")
        widths = [channels, *[filters] * 4]
        stride, pool = (2, None) if strided else (1, 2)
        self.blocks = nn.Sequential(*[ConvNormActPool(a, b, stride, 0.01, pool) for a, b in pairwise(widths)])
        self.pool = nn.AdaptiveAvgPool2d(1) if strided else nn.Identity()
        self.head = nn.Linear(filters if strided else filters * (size // 16) ** 2, ways)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # the published code's initialisation
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, ways]`` for images ``[n, channels, size, size]``."""
        logits: Tensor = self.head(self.pool(self.blocks(x)).flatten(1))
        return logits
