"""One small network of every kind that must work, each with a loss, tasks and the name pattern of its head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from innerloop import Examples, Task, stack_tasks

WAYS = 3
_PLACE = ["cpu"]
"""Where models and examples are made: the last."""


@contextmanager
def placed_on(device: str) -> Iterator[None]:
    """Within it, models and examples are made on this device."""
    _PLACE.append(device)
    try:
        yield
    finally:
        _PLACE.pop()


def placed(tree: Any) -> Any:
    """A nest of tensors, or a module, on that device."""
    if isinstance(tree, nn.Module):
        return tree.to(_PLACE[-1])
    return pytree.tree_map_only(Tensor, lambda t: t.to(_PLACE[-1]), tree)


NORM = (nn.BatchNorm2d, nn.BatchNorm1d, nn.LayerNorm, nn.GroupNorm)


class ConvNet(nn.Module):
    """Ordinary batch norm, max-pool and leaky ReLU."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.LeakyReLU(0.01), nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding=1), norm(4), nn.LeakyReLU(0.01), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Linear(16, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.branch = nn.Sequential(
            nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        )
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.tanh(x + self.branch(x)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=dropout, batch_first=True)
        self.embed = nn.Linear(3, 4)
        self.head = nn.Linear(4, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class DictOutput(nn.Module):
    """Returns a dict; its loss is custom."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_scale = self.head(torch.tanh(self.body(x))).unbind(1)
        return {"mean": mean, "log_scale": log_scale}


def gaussian_loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    error = (targets[:, 0] - outputs["mean"]) * torch.exp(-outputs["log_scale"])
    return (0.5 * error**2 + outputs["log_scale"]).mean()


class Tied(nn.Module):
    """The embedding is also the output layer: one parameter with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 5)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.head(self.embedding(tokens).mean(1))))


class Frozen(nn.Module):
    """A frozen first layer and a frozen gamma."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5).requires_grad_(False)
        self.norm = nn.BatchNorm1d(5)
        self.norm.weight.requires_grad_(False)
        self.middle = nn.Linear(5, 5)
        self.head = nn.Linear(5, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.norm(self.first(x)))))


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Dropout(0.4))
        self.head = nn.Linear(12, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class OwnBuffer(nn.Module):
    """A float buffer that is no norm layer's, that the model moves in training and that its output depends on."""

    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3))
        self.body = nn.Linear(3, 5)
        self.head = nn.Linear(5, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(torch.tanh(self.body(x - self.center)))
        if self.training:
            self.center.mul_(0.8).add_(0.2 * x.detach().mean(0))
        return out


class RunningNorm2d(nn.BatchNorm2d):
    """A norm layer that normalises with its running statistics in training too, as batch renormalisation does."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean.clone(), self.running_var.clone()
        with torch.no_grad():
            self.running_mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
            self.running_var.mul_(0.9).add_(0.1 * x.var((0, 2, 3)))
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)


class TwoInputs(nn.Module):
    """Called with a tuple or a dict of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 5)
        self.right = nn.Linear(2, 5)
        self.head = nn.Linear(5, WAYS)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(first)) * self.right(second))


@dataclass(frozen=True)
class Case:
    """A network with what a meta-learner needs to train it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    targets: Callable[[int], Any]
    loss: Callable[[Any, Any], Tensor]
    head: str = "head.*"

    def model(self) -> nn.Module:
        """The network with norm weights and statistics away from their 1s and 0s, so that mistakes show."""
        torch.manual_seed(1)
        model = self.build()
        for module in model.modules():
            if isinstance(module, NORM):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
                if getattr(module, "running_var", None) is not None:
                    nn.init.uniform_(module.running_mean, -0.5, 0.5)
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
        return model.to(_PLACE[-1])

    def examples(self, n: int) -> Examples:
        return placed(Examples(self.inputs(n), self.targets(n)))

    def tasks(self, size: int = 2, seed: int = 2) -> Task:
        """A meta-batch of random tasks; support and query sets of different sizes."""
        torch.manual_seed(seed)
        return stack_tasks([Task(self.examples(6), self.examples(5)) for _ in range(size)])


def _labels(n: int) -> Tensor:
    return torch.arange(n) % WAYS


def _images(n: int) -> Tensor:
    return torch.randn(n, 1, 8, 8)


def _vectors(n: int) -> Tensor:
    return torch.randn(n, 3)


def _sequences(n: int) -> Tensor:
    return torch.randn(n, 4, 3)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


CASES: dict[str, Case] = {
    "mlp_regressor": Case(_mlp, _vectors, lambda n: torch.randn(n, 1), F.mse_loss, head="4.*"),
    "conv_batch_norm": Case(ConvNet, _images, _labels, F.cross_entropy),
    "residual": Case(Residual, _images, _labels, F.cross_entropy),
    "group_norm": Case(lambda: ConvNet(lambda c: nn.GroupNorm(2, c)), _images, _labels, F.cross_entropy),
    "cumulative_batch_norm": Case(
        lambda: ConvNet(lambda c: nn.BatchNorm2d(c, momentum=None)), _images, _labels, F.cross_entropy
    ),
    "running_norm": Case(lambda: ConvNet(RunningNorm2d), _images, _labels, F.cross_entropy),
    "lstm": Case(Recurrent, _sequences, _labels, F.cross_entropy),
    "transformer": Case(Transformer, _sequences, _labels, F.cross_entropy),
    "transformer_dropout": Case(lambda: Transformer(0.3), _sequences, _labels, F.cross_entropy),
    "dict_output": Case(DictOutput, _vectors, lambda n: torch.randn(n, 1), gaussian_loss),
    "tied": Case(Tied, lambda n: torch.randint(5, (n, 3)), lambda n: torch.arange(n) % 5, F.cross_entropy),
    "frozen": Case(Frozen, _vectors, _labels, F.cross_entropy),
    "dropout": Case(Dropout, _vectors, _labels, F.cross_entropy),
    "own_buffer": Case(OwnBuffer, _vectors, _labels, F.cross_entropy),
    "tuple_inputs": Case(TwoInputs, lambda n: (torch.randn(n, 3), torch.randn(n, 2)), _labels, F.cross_entropy),
    "dict_inputs": Case(
        TwoInputs,
        lambda n: {"second": torch.randn(n, 2), "first": torch.randn(n, 3)},
        _labels,
        F.cross_entropy,
    ),
}

NOT_VMAPPED = ("lstm", "cumulative_batch_norm")
"""torch's vmap knows neither nn.LSTM with unbatched weights nor a cumulative average, whose factor it reads out."""
