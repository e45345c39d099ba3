"""A layer of somebody's own that computes otherwise in training: said, since use is then another function."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from by_hand import STEPS, ConvNet, images, vectors
from torch import Tensor, nn

from innerloop import MetaLearner, maml


class OtherNames(nn.Module):
    """A batch norm whose statistics have names that nobody knows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mu", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3)) if self.training else self.mu
        return x - mean[:, None, None]


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x) if self.training else x


def adapted(model: nn.Module, support: tuple[Tensor, Tensor]) -> None:
    MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS)).adapt(support)


def test_it_is_said() -> None:
    with pytest.warns(UserWarning, match=r"ConvNet answers otherwise in evaluation mode.*self\.training"):
        adapted(ConvNet(OtherNames), images())


@pytest.mark.parametrize("model", [ConvNet, lambda: ConvNet(OtherNames).eval()])
def test_not_of_others(model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(model(), images())


@pytest.mark.parametrize("layer", [Noise, lambda: nn.Dropout(0.5), lambda: nn.AlphaDropout(0.5)])
def test_not_of_noise(layer) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.noise, self.head = nn.Linear(4, 5), layer(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.noise(torch.tanh(self.body(x))))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(Net(), vectors())
