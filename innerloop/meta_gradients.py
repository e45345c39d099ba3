"""The gradient of a task's query loss by the meta-parameters, in three ways that agree.

    loss = sum_k w_k L(f(theta^k), query)          theta^{k+1} = U_k(theta^k, g_k, alpha_k)

1. ``reverse``: autograd through the unrolled loop. Its memory grows with the number of inner steps K.
2. ``mixed``: walk the loop keeping theta^k and g_k only, then walk back with the adjoint lambda (Kemaev et al. 2025,
   MixFlow-MG). For the SGD rule::

       lambda_K = w_K grad L_q(theta^K)
       lambda_k = lambda_{k+1} - H_k (alpha_k * lambda_{k+1}) + w_k grad L_q(theta^k)
       d alpha_k = - g_k * lambda_{k+1}                     summed to alpha's shape
       d psi     = - d/dpsi <g_k, alpha_k * lambda_{k+1}>   any other meta-parameter of the support loss

   H_k u and the psi term come from one forward-over-reverse product, jvp(grad L). No graph outlives a step.
3. ``first-order``: the same walk without the H and psi terms (FOMAML).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import grad, jvp
from torch.utils import _pytree as pytree

from innerloop.inner_loop import InnerLoop, MetaParameters, State
from innerloop.network import random_state, replayed_randomness, set_random_state
from innerloop.per_step import Statistics
from innerloop.tasks import Examples, Task
from innerloop.update_rules import Tensors

GradientMode = Literal["reverse", "mixed", "first-order"]


@dataclass(frozen=True)
class TaskGradient:
    """One task's share of a meta-gradient.

    Attributes:
        loss: sum_k w_k L_query(theta^k).
        gradient: its gradient by every meta-parameter (zeros for those that are not learned).
        support_losses: ``[K]``, the loss that step k descended.
        query_losses: ``[K]``, after each step; NaN where w_k is 0 and it was not computed.
        query_outputs: the model's outputs on the query set after the last step.
        statistics: the buffers that the task left behind.
    """

    loss: Tensor
    gradient: MetaParameters
    support_losses: Tensor
    query_losses: Tensor
    query_outputs: Any
    statistics: Statistics


def reverse(
    loop: InnerLoop, meta: MetaParameters, statistics: Statistics, task: Task, weights: list[float]
) -> TaskGradient:
    """Exact meta-gradient by autograd through the unrolled inner loop."""
    meta = meta.leaves()
    statistics = statistics.copy()
    theta, state = meta.adapted, loop.rule.initial_state(meta.adapted)
    total: Tensor | float = 0.0
    record = _Record(len(weights))
    for k, weight in enumerate(weights):
        fixed = meta.fixed_at_step(k)
        support = loop.gradient(theta, fixed, statistics, k, task.support, create_graph=True)
        theta, state = loop.update(theta, state, support.theta, meta.rates, k)
        record.support(k, support.loss)
        if weight:
            loss, outputs, buffers = loop.network.loss({**theta, **fixed}, statistics.at_step(k), task.query)
            statistics.update(k, buffers)
            total = total + weight * loss
            record.query(k, weight, loss, outputs)
    learned = [t for group in meta.groups().values() for t in group.values() if t.requires_grad]
    assert isinstance(total, Tensor)
    gradients = iter(torch.autograd.grad(total, learned, materialize_grads=True))
    by_group = {
        group: {n: next(gradients) if t.requires_grad else torch.zeros_like(t) for n, t in tensors.items()}
        for group, tensors in meta.groups().items()
    }
    return record.result(MetaParameters(**by_group), statistics)


def mixed(
    loop: InnerLoop, meta: MetaParameters, statistics: Statistics, task: Task, weights: list[float]
) -> TaskGradient:
    """Exact meta-gradient by the adjoint walk: memory does not grow with K beyond the fast weights."""
    return _adjoint_walk(loop, meta, statistics, task, weights, second_order=True)


def first_order(
    loop: InnerLoop, meta: MetaParameters, statistics: Statistics, task: Task, weights: list[float]
) -> TaskGradient:
    """FOMAML's meta-gradient: the support gradients count as constants."""
    return _adjoint_walk(loop, meta, statistics, task, weights, second_order=False)


MetaGradient = Callable[[InnerLoop, MetaParameters, Statistics, Task, list[float]], TaskGradient]
META_GRADIENTS: dict[GradientMode, MetaGradient] = {"reverse": reverse, "mixed": mixed, "first-order": first_order}


@dataclass
class _Step:
    """What the walk back needs of inner step k."""

    theta: Tensors
    state: State
    g: Tensors
    buffers: Tensors
    randomness: list[Tensor]
    query_gradient: Tensors | None


def _adjoint_walk(
    loop: InnerLoop,
    meta: MetaParameters,
    statistics: Statistics,
    task: Task,
    weights: list[float],
    *,
    second_order: bool,
) -> TaskGradient:
    gradient = meta.zeros()
    statistics = statistics.copy()
    theta: Tensors = {n: t.detach() for n, t in meta.adapted.items()}
    state = loop.rule.initial_state(theta)
    record = _Record(len(weights))
    device = _device(theta)

    steps: list[_Step] = []
    for k, weight in enumerate(weights):
        fixed = meta.fixed_at_step(k)
        step = _Step(theta, state, {}, statistics.at_step(k), random_state(device), None)
        support = loop.gradient(theta, fixed, statistics, k, task.support)
        step.g = support.theta
        with torch.no_grad():
            theta, state = loop.update(theta, state, support.theta, meta.rates, k)
        record.support(k, support.loss)
        if weight:
            query = loop.gradient(theta, fixed, statistics, k, task.query, with_fixed=True)
            step.query_gradient = {n: weight * g for n, g in query.theta.items()}
            _add_fixed(gradient, k, query.fixed, weight)
            record.query(k, weight, query.loss, query.outputs)
        steps.append(step)

    adjoint = {n: torch.zeros_like(t) for n, t in theta.items()}
    adjoint_state = {n: tuple(torch.zeros_like(s) for s in slots) for n, slots in state.items()}
    for k in reversed(range(len(steps))):
        step = steps.pop()
        if step.query_gradient is not None:
            adjoint = {n: adjoint[n] + g for n, g in step.query_gradient.items()}
        adjoint, adjoint_state, u, rates = _update_vjp(loop, meta, step, k, adjoint, adjoint_state)
        for name, rate in rates.items():
            gradient.rates[name] += rate
        if second_order:
            with replayed_randomness(step.randomness, device):
                hvp, fixed_product = _hessian_vector_product(loop, step, meta.fixed_at_step(k), task.support, u)
            adjoint = {n: adjoint[n] + h for n, h in hvp.items()}
            _add_fixed(gradient, k, fixed_product, 1.0)
    gradient.adapted = adjoint
    return record.result(gradient, statistics)


def _update_vjp(
    loop: InnerLoop, meta: MetaParameters, step: _Step, k: int, adjoint: Tensors, adjoint_state: State
) -> tuple[Tensors, State, Tensors, Tensors]:
    """Pull the adjoints of (theta^{k+1}, state^{k+1}) back through the update rule U_k.

    Returns the adjoints of theta^k and state^k, u (that of g_k: -alpha_k * lambda_{k+1} under SGD) and the rates'
    gradients.
    """
    theta, state, u, rates = {}, {}, {}, {}
    for name in adjoint:
        learned = meta.rates[name].requires_grad
        theta_k, g_k = step.theta[name].detach().requires_grad_(), step.g[name].detach().requires_grad_()
        slots = tuple(s.detach().requires_grad_() for s in step.state[name])
        rate = meta.rates[name].detach().requires_grad_(learned)
        with torch.enable_grad():
            moved, states = loop.update({name: theta_k}, {name: slots}, {name: g_k}, {name: rate}, k)
        sources = [theta_k, g_k, *slots, *([rate] if learned else [])]
        pulled = torch.autograd.grad(
            [moved[name], *states[name]],
            sources,
            [adjoint[name], *adjoint_state[name]],
            materialize_grads=True,
        )
        theta[name], u[name], state[name] = pulled[0], pulled[1], tuple(pulled[2 : 2 + len(slots)])
        if learned:
            rates[name] = pulled[-1]
    return theta, state, u, rates


def _hessian_vector_product(
    loop: InnerLoop, step: _Step, fixed: Tensors, support: Examples, u: Tensors
) -> tuple[Tensors, Tensors]:
    """H_k u and d/dpsi <g_k, u>: the tangent along u of grad L(theta^k, psi_k).

    Since second derivatives commute, the tangent of the psi-gradient is the psi-gradient of <g_k, u>.
    """

    def support_loss(theta: Tensors, fixed: Tensors) -> Tensor:
        return loop.network.loss({**theta, **fixed}, step.buffers, support)[0]

    fixed = {n: t.detach() for n, t in fixed.items()}
    model = loop.network.model
    if model not in _WITHOUT_FORWARD_MODE:
        randomness = random_state(_device(step.theta))
        try:
            return _forward_over_reverse(support_loss, step.theta, fixed, u)
        except (RuntimeError, NotImplementedError) as error:
            warnings.warn(
                f"{type(model).__name__} has an operation without forward-mode derivatives, so mixed mode "
                f"differentiates its gradient in reverse, with more memory per inner step. ({error})",
                stacklevel=2,
            )
            _WITHOUT_FORWARD_MODE.add(model)
            set_random_state(randomness, _device(step.theta))
    return _reverse_over_reverse(support_loss, step.theta, fixed, u)


_WITHOUT_FORWARD_MODE: WeakSet[nn.Module] = WeakSet()
SupportLoss = Callable[[Tensors, Tensors], Tensor]


def _forward_over_reverse(
    support_loss: SupportLoss, theta: Tensors, fixed: Tensors, u: Tensors
) -> tuple[Tensors, Tensors]:
    def gradients(theta: Tensors) -> tuple[Tensors, Tensors]:
        both: tuple[Tensors, Tensors] = grad(support_loss, argnums=(0, 1))(theta, fixed)
        return both

    products: tuple[Tensors, Tensors] = jvp(gradients, (theta,), (u,))[1]
    return products


def _reverse_over_reverse(
    support_loss: SupportLoss, theta: Tensors, fixed: Tensors, u: Tensors
) -> tuple[Tensors, Tensors]:
    theta = {n: t.detach().requires_grad_() for n, t in theta.items()}
    fixed = {n: t.detach().requires_grad_() for n, t in fixed.items()}
    sources = [*theta.values(), *fixed.values()]
    with torch.enable_grad():
        g = torch.autograd.grad(
            support_loss(theta, fixed), list(theta.values()), create_graph=True, materialize_grads=True
        )
        along = torch.stack([(a * b).sum() for a, b in zip(g, u.values(), strict=True)]).sum()
        products = (
            torch.autograd.grad(along, sources, materialize_grads=True)
            if along.requires_grad
            else [torch.zeros_like(t) for t in sources]
        )
    by_name = dict(zip([*theta, *fixed], products, strict=True))
    return {n: by_name[n] for n in theta}, {n: by_name[n] for n in fixed}


def _device(tensors: Tensors) -> torch.device:
    return next(iter(tensors.values())).device


def _add_fixed(gradient: MetaParameters, k: int, fixed: Tensors, weight: float) -> None:
    """Add a gradient by psi_k to those of the shared parameters and of entry k of the per-step stacks."""
    for name, g in fixed.items():
        if name in gradient.per_step:
            gradient.per_step[name][k] += weight * g
        else:
            gradient.shared[name] += weight * g


class _Record:
    """Losses and outputs as the walk meets them."""

    def __init__(self, steps: int) -> None:
        self.support_losses: list[Tensor | None] = [None] * steps
        self.query_losses: list[Tensor | None] = [None] * steps
        self.outputs: Any = None
        self.loss: Tensor | float = 0.0

    def support(self, k: int, loss: Tensor) -> None:
        self.support_losses[k] = loss.detach()

    def query(self, k: int, weight: float, loss: Tensor, outputs: Any) -> None:
        self.query_losses[k] = loss.detach()
        self.outputs = pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, outputs)
        self.loss = self.loss + weight * loss.detach()

    def result(self, gradient: MetaParameters, statistics: Statistics) -> TaskGradient:
        assert isinstance(self.loss, Tensor)
        missing = torch.full_like(self.loss, torch.nan)

        def stacked(losses: list[Tensor | None]) -> Tensor:
            return torch.stack([missing if loss is None else loss for loss in losses])

        return TaskGradient(
            self.loss, gradient, stacked(self.support_losses), stacked(self.query_losses), self.outputs, statistics
        )
