"""Loops over plain copies of a model, one a task: whatever a forward leaves on a module is there in the next call."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from by_hand import RATE, STEPS, Examples, assert_same_gradients
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

Tasks = tuple[Examples, Examples]


def meta_gradient_by_copies(
    model: nn.Module, tasks: Tasks, loss: Callable[..., Tensor] = F.cross_entropy, *, first_order: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean query loss after ``STEPS`` of each task's own copy of the model, and its gradients."""
    theta_0 = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    losses = []
    for i in range(len(tasks[0][1])):
        support, query = pytree.tree_map(lambda t, i=i: t[i].clone() if isinstance(t, Tensor) else t, tasks)
        own, theta = copy.deepcopy(model), theta_0
        for _ in range(STEPS):
            value = loss(_called(own, theta, support[0]), support[1])
            values = list(theta.values())
            found = torch.autograd.grad(value, values, create_graph=not first_order, materialize_grads=True)
            theta = {n: t - RATE * g for (n, t), g in zip(theta.items(), found, strict=True)}
        losses.append(loss(_called(own, theta, query[0]), query[1]))
    mean = torch.stack(losses).mean()
    values = torch.autograd.grad(mean, list(theta_0.values()), materialize_grads=True)
    return mean.detach(), dict(zip(theta_0, values, strict=True))


def _called(model: nn.Module, parameters: dict[str, Tensor], inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return functional_call(model, parameters, (), inputs)
    return functional_call(model, parameters, inputs if isinstance(inputs, tuple) else (inputs,))


def check_refusal(error: Exception, named: str) -> None:
    """It is of the library's own making, and ``named`` is found in it: not what PyTorch says of its insides."""
    own = type(error).__module__.startswith("innerloop") or type(error) in (ValueError, TypeError)
    if not own or not re.search(named, str(error)):
        raise AssertionError(f"no sentence that names {named}") from error


def exact_or_refused(train: Callable[[], Any], model: nn.Module, expected: dict[str, Tensor], named: str) -> None:
    """``train`` gives these gradients, or says why not in a sentence in which ``named`` is found; never others."""
    try:
        train()
    except (ValueError, TypeError, RuntimeError) as error:
        check_refusal(error, named)
    else:
        assert_same_gradients(model, expected)


def equal_or_refused(answer: Callable[[], Tensor], expected: Tensor, named: str) -> None:
    """``answer`` gives this, or says why not in a sentence in which ``named`` is found; never something else."""
    try:
        found = answer()
    except (ValueError, TypeError, RuntimeError) as error:
        check_refusal(error, named)
    else:
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
