"""Layer, group and RMS norm in mixed precision, with all tasks at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import STEPS, meta_batch, meta_gradient
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from innerloop import MetaLearner, maml


class Normed(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 8), norm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x[:, None] * torch.arange(1, 4)[:, None]).mean(1))


def normed(norm: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Normed(norm)


NETWORKS = {
    "layer": normed(nn.LayerNorm),
    "group": normed(lambda n: nn.GroupNorm(2, n)),
    "rms": normed(nn.RMSNorm),
    "batch": normed(nn.BatchNorm1d),
    "attention": Attends,
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("mode", "parallel"), [("mixed", "vmap"), ("mixed", "loop"), ("reverse", "loop")])
def test_gradients(network: str, mode: Any, parallel: Any) -> None:
    """To within what bfloat16 rounds, those of the loop by hand in full precision."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    model, tasks = NETWORKS[network](), meta_batch(lambda: (torch.randn(6, 4), torch.arange(6) % 3))
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        _, expected = meta_gradient(model, tasks)
    with torch.autocast("cpu", torch.bfloat16):
        MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel).backward(tasks)
    a = torch.cat([p.grad.flatten() for p in model.parameters()])
    b = torch.cat([expected[n].flatten() for n, _ in model.named_parameters()])
    assert (a - b).norm() / b.norm() < 0.1
