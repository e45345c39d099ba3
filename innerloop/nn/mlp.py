"""The regression network of MAML's sinusoid experiment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them (Finn et al. 2017, section 5.1: two hidden layers of 40).

    ``[n, inputs] -> [n, outputs]``.
    """

    def __init__(self, inputs: int = 1, outputs: int = 1, hidden: Sequence[int] = (40, 40)) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs for inputs ``[n, inputs]``."""
        out: Tensor = self.head(self.body(x))
        return out
