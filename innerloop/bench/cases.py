"""What is measured: a network, a meta-batch and a method, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from innerloop.methods import METHODS, Method
from innerloop.nn import MLP, Conv4, ConvNormActPool, NormActPool, ResNet12
from innerloop.tasks import Examples, Task

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A meta-training step to be timed.

    Attributes:
        network: conv4, resnet12, transformer, or mlp, the paper's regression network, whose tasks are sinusoids.
        loss: cross entropy or the mean squared error.
        method: maml or maml_plus_plus; the second with the losses of all steps and exact second order.
        tasks: of the meta-batch.
        inner_steps: K.
        inner_lr: the rate of all of them.
        ways: classes of a task; 1 for regression.
        shots: support examples of each class.
        queries: query examples of each class.
        channels: of the images; 1 or 3.
        size: height and width of the images, or length of the transformer's sequences.
        filters: of Conv4's convolutions, of ResNet-12's first block, or the transformer's width.
    """

    network: Literal["conv4", "resnet12", "transformer", "mlp"] = "conv4"
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    method: Literal["maml", "maml_plus_plus"] = "maml"
    tasks: int = 8
    inner_steps: int = 5
    inner_lr: float = 0.05
    ways: int = 20
    shots: int = 1
    queries: int = 1
    channels: int = 1
    size: int = 28
    filters: int = 64

    def build_model(self, device: torch.device = CPU) -> nn.Module:
        """The network, with the same weights every time."""
        torch.manual_seed(0)
        return self._network().to(device)

    def _network(self) -> nn.Module:
        if self.network == "mlp":
            return MLP()
        if self.network == "resnet12":
            widths = [self.filters, *(int(self.filters * m) for m in (2.5, 5, 10))]
            return ResNet12(self.ways, self.channels, widths)
        if self.network == "transformer":
            return Transformer(self.ways, self.filters, self.size)
        return Conv4(self.ways, self.channels, self.size, self.filters)

    def build_method(self) -> Method:
        """The method, its schedules at their start: every step's loss counts, in second order."""
        switches = {"da": False} if self.method == "maml_plus_plus" else {}
        return METHODS[self.method](inner_steps=self.inner_steps, inner_lr=self.inner_lr, **switches)

    def loss_function(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of outputs and targets."""
        return F.mse_loss if self.loss == "mse" else F.cross_entropy

    def meta_batch(self, device: torch.device = CPU) -> Task:
        """Random tasks, the same every time: ``[T, ways * shots, ...]`` and ``[T, ways * queries, ...]``."""
        generator = torch.Generator().manual_seed(1)
        if self.network == "mlp":
            amplitude = 5 * torch.rand(self.tasks, 1, 1, generator=generator)
            phase = math.pi * torch.rand(self.tasks, 1, 1, generator=generator)

        def examples(per_class: int) -> Examples:
            n, t = self.ways * per_class, self.tasks
            if self.network == "mlp":
                x = 10 * torch.rand(t, n, 1, generator=generator) - 5
                return Examples(x, amplitude * torch.sin(x - phase))
            if self.network == "transformer":
                inputs = torch.randint(VOCABULARY, (t, n, self.size), generator=generator)
            else:
                inputs = torch.rand(t, n, self.channels, self.size, self.size, generator=generator)
            return Examples(inputs, torch.arange(self.ways).repeat(t, per_class))

        tasks = Task(examples(self.shots), examples(self.queries))
        return pytree.tree_map(lambda t: t.to(device), tasks)  # type: ignore[no-any-return]


def native(model: nn.Module) -> nn.Module:
    """The same network with the fused blocks taken apart into the modules that anybody has."""
    for name, child in model.named_children():
        if isinstance(child, ConvNormActPool):
            setattr(model, name, native(nn.Sequential(*child)))
        elif isinstance(child, NormActPool):
            norm = nn.BatchNorm2d(child.num_features, child.eps, child.momentum)
            norm.load_state_dict(child.state_dict())
            pool = nn.Identity() if child.pool is None else nn.MaxPool2d(child.pool)
            setattr(model, name, nn.Sequential(norm, nn.LeakyReLU(child.negative_slope), pool))
        else:
            native(child)
    return model


VOCABULARY = 1000


class Transformer(nn.Module):
    """A small text classifier: two pre-norm encoder layers over learned embeddings, then the mean over the tokens.

    ``[n, length] -> [n, ways]``, tokens to logits.
    """

    def __init__(self, ways: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, ways]``."""
        logits: Tensor = self.head(self.encoder(self.tokens(x) + self.places).mean(1))
        return logits


_SINUSOID = Case("mlp", "mse", tasks=25, inner_steps=1, inner_lr=0.01, ways=1, shots=10, queries=10)
CASES: dict[str, Case] = {
    "omniglot-mamlpp": Case(method="maml_plus_plus"),
    "omniglot-maml": Case(),
    "mini-imagenet-maml": Case(tasks=2, ways=5, queries=15, channels=3, size=84, filters=48),
    "resnet12-maml": Case(network="resnet12", tasks=1, ways=5, queries=5, channels=3, size=84),
    "resnet12-small-images-maml": Case(network="resnet12", tasks=2, ways=5, queries=5, channels=3, size=32),
    "transformer-maml": Case(network="transformer", tasks=8, ways=5, queries=5, size=32, filters=64),
    "transformer-wide-maml": Case(network="transformer", tasks=4, ways=5, shots=5, queries=5, size=64, filters=128),
    "sinusoid-maml": _SINUSOID,
    "sinusoid-maml-5-steps": replace(_SINUSOID, inner_steps=5),
}
"""The steps that ``innerloop bench`` knows."""
