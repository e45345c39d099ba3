"""The loops that people write by hand, by nothing but torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

WAYS = 3
RATE, STEPS = 0.1, 3

Examples = tuple[Any, Any]
WAYS_TO_A_GRADIENT = [("reverse", "loop"), ("mixed", "loop"), ("mixed", "vmap")]
"""Mode and whether tasks are looped over, of every way to an exact meta-gradient."""


def vectors(n: int = 6, size: int = 4) -> Examples:
    return torch.randn(n, size), torch.arange(n) % WAYS


def images(n: int = 6) -> Examples:
    return torch.randn(n, 1, 8, 8), torch.arange(n) % WAYS


def meta_batch(examples: Callable[[], Examples], tasks: int = 2) -> tuple[Examples, Examples]:
    """Tasks stacked; support and query of the same size."""

    def several() -> Examples:
        inputs, targets = zip(*(examples() for _ in range(tasks)), strict=True)
        return torch.stack(inputs), torch.stack(targets)

    return several(), several()


def adapted(model: nn.Module, support: Examples, loss: Callable[..., Tensor] = F.cross_entropy) -> nn.Module:
    """A copy after ``STEPS`` of plain gradient descent, in the modes that the model is in."""
    model = copy.deepcopy(model)
    inputs, targets = support
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(STEPS):
        gradients = torch.autograd.grad(loss(model(inputs.clone()), targets), parameters, materialize_grads=True)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p -= RATE * g
    return model


def meta_gradient(
    model: nn.Module,
    tasks: tuple[Examples, Examples],
    loss: Callable[..., Tensor] = F.cross_entropy,
    call: Callable[..., Any] = functional_call,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean query loss after ``STEPS``, and its gradients; buffers go from call to call of a task."""
    theta_0 = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    (support_x, support_y), (query_x, query_y) = tasks
    losses = []
    for i in range(len(support_y)):
        tensors = {**theta_0, **{n: b.clone() for n, b in model.named_buffers()}}
        for _ in range(STEPS):
            value = loss(call(model, tensors, (support_x[i].clone(),)), support_y[i].clone())
            theta = {n: tensors[n] for n in theta_0}
            gradients = torch.autograd.grad(value, list(theta.values()), create_graph=True, materialize_grads=True)
            moved = {n: t - RATE * g for (n, t), g in zip(theta.items(), gradients, strict=True)}
            kept = {n: b.detach().clone() for n, b in tensors.items() if n not in theta_0}
            tensors = {**moved, **kept}
        losses.append(loss(call(model, tensors, (query_x[i].clone(),)), query_y[i].clone()))
    mean = torch.stack(losses).mean()
    values = torch.autograd.grad(mean, list(theta_0.values()), materialize_grads=True)
    return mean.detach(), dict(zip(theta_0, values, strict=True))


def assert_same_gradients(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in expected:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


class ConvNet(nn.Module):
    """A backbone with batch norm, and a head; statistics away from 0 and 1, so that mistakes show."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), norm(4), nn.Tanh(), nn.Conv2d(4, 4, 3), norm(4), nn.Tanh())
        self.head = nn.Linear(64, WAYS)
        for module in self.modules():
            if getattr(module, "running_mean", None) is not None:
                nn.init.uniform_(module.running_mean, -0.5, 0.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).flatten(1))
