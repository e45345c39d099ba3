"""The meta-loss as the papers write it, by nothing but torch: what every gradient of the core is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from innerloop import MetaLearner, Method, Task

Tensors = dict[str, Tensor]

EXACT = ("reverse", "mixed", "mixed vmap")
FIRST_ORDER = ("first-order", "first-order vmap")
WAYS = EXACT + FIRST_ORDER
"""Every way to a meta-gradient: the mode, and whether tasks are looped over or vmapped."""


def make(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], method: Method, way: str, stored_steps: int = 2
) -> MetaLearner:
    """A learner that takes one of ``WAYS``, and no other by itself; some of its steps stored and some not."""
    mode, _, vmapped = way.partition(" ")
    return MetaLearner(model, loss, method, mode, parallel="vmap" if vmapped else "loop", stored_steps=stored_steps)


def naive_task_loss(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    support: tuple[Any, Any],
    query: tuple[Any, Any],
    theta: Tensors,
    fixed: list[Tensors],
    rates: list[Mapping[str, Tensor | float]],
    buffers: list[Tensors],
    weights: list[float],
    rule: str = "sgd",
    first_order: bool = False,
) -> Tensor:
    """sum_k w_k L_query(theta^{k+1}), differentiable; ``buffers`` (one dict a step) are moved in place."""
    velocity = {n: torch.zeros_like(t) for n, t in theta.items()}
    square = {n: torch.zeros_like(t) for n, t in theta.items()}
    total: Tensor | float = 0.0

    def call(k: int, examples: tuple[Any, Any]) -> Tensor:
        inputs, targets = examples
        copies = {n: b.clone() for n, b in buffers[k].items()}
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            value = loss(functional_call(model, {**theta, **fixed[k], **copies}, args, kwargs), targets)
        for n, b in buffers[k].items():
            b.copy_(copies[n])
        return value

    for k, weight in enumerate(weights):
        gradients = torch.autograd.grad(
            call(k, support), list(theta.values()), create_graph=True, materialize_grads=True
        )
        for (n, t), g in zip(list(theta.items()), gradients, strict=True):
            g = g.detach() if first_order else g
            if rule == "momentum":
                velocity[n] = 0.9 * velocity[n] + g
                g = velocity[n]
            elif rule == "adam":
                velocity[n] = 0.9 * velocity[n] + 0.1 * g
                square[n] = 0.999 * square[n] + 0.001 * g**2
                root = (square[n] / (1 - 0.999 ** (k + 1)) + 1e-16) ** 0.5
                g = velocity[n] / (1 - 0.9 ** (k + 1)) / root
            theta = {**theta, n: t - rates[k][n] * g}
        if weight:
            total = total + weight * call(k, query)
    return total


def naive(
    learner: MetaLearner, tasks: Task, weights: list[float], *, first_order: bool = False
) -> tuple[float, Tensors, Tensors]:
    """Loss, gradients by every learned meta-parameter, and the statistics left behind, as ``backward`` owes them.

    Of the learner, only its tensors and the values of its method are read.
    """
    steps = len(weights)
    leaves = {n: t.detach().clone().requires_grad_() for n, t in learner.named_parameters()}
    groups: dict[str, Tensors] = {"adapted": {}, "shared": {}, "per_step": {}, "rates": {}}
    for name, leaf in leaves.items():
        group, _, parameter = name.partition("/")
        groups[group][parameter] = leaf
    fixed = [{**groups["shared"], **{n: s[k] for n, s in groups["per_step"].items()}} for k in range(steps)]
    method = learner.method
    if method.lslr:
        rates: list[Any] = [{n: r[k] for n, r in groups["rates"].items()} for k in range(steps)]
    else:
        rates = [groups["rates"] or dict.fromkeys(groups["adapted"], method.inner_lr)] * steps
    statistics = {n: b.clone() for n, b in learner.state_dict().items() if "statistics" in n}
    left: list[Tensors] = []
    losses = []
    size = len(torch.utils._pytree.tree_leaves(tasks)[0])
    for i in range(size):
        task = torch.utils._pytree.tree_map(lambda t, i=i: t[i], tasks)
        mine = {n: b.clone() for n, b in statistics.items()}
        buffers = [
            {
                n.partition("/")[2]: b[k] if n.startswith("per_step") else b  # views: moved in place
                for n, b in mine.items()
            }
            for k in range(steps)
        ]
        losses.append(
            naive_task_loss(
                learner.model, learner.loop.network.loss_function, task.support, task.query, groups["adapted"],
                fixed, rates, buffers, weights, method.inner_rule, first_order,
            )
        )  # fmt: skip
        left.append(mine)
    mean = sum(losses) / size
    gradients = torch.autograd.grad(mean, list(leaves.values()), materialize_grads=True)
    averaged = {
        n: sum(s[n] for s in left) / size if statistics[n].is_floating_point() else left[0][n] for n in statistics
    }
    return mean.item(), dict(zip(leaves, gradients, strict=True)), averaged


def gradients(learner: MetaLearner) -> Tensors:
    """What ``backward`` added to ``.grad``, copied."""
    return {n: t.grad.clone() for n, t in learner.named_parameters()}


def statistics(learner: MetaLearner) -> Tensors:
    """The learner's running statistics, copied."""
    return {n: t.clone() for n, t in learner.state_dict().items() if "statistics" in n}


def relative_difference(a: Tensors, b: Tensors) -> float:
    """Norm of the difference over the norm, of all tensors put together."""
    assert a.keys() == b.keys()
    difference = torch.cat([(a[n] - b[n]).flatten() for n in a])
    return float(difference.norm() / torch.cat([b[n].flatten() for n in b]).norm())


def scramble(learner: MetaLearner) -> MetaLearner:
    """Make the entries of rates and stacks different from each other: equal ones would hide a wrong index."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, t in learner.state_dict().items():
            if name.startswith(("rates/", "per_step")) and t.is_floating_point():
                t.mul_(0.5 + torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t))
    return learner
