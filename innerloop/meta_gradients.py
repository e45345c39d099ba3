"""The gradient of a task's query loss by the meta-parameters, in three ways that agree.

    loss = sum_k w_k L(f(theta^k), query)          theta^{k+1} = U_k(theta^k, g_k, alpha_k)

1. ``reverse``: autograd through the unrolled loop. Its memory grows with the number of inner steps K.
2. ``mixed``: walk the loop keeping theta^k, then walk back with the adjoint lambda (Kemaev et al. 2025,
   MixFlow-MG). For the SGD rule::

       lambda_K = w_K grad L_q(theta^K)
       lambda_k = lambda_{k+1} - H_k (alpha_k * lambda_{k+1}) + w_k grad L_q(theta^k)
       d alpha_k = - g_k * lambda_{k+1}                     summed to alpha's shape
       d psi     = - d/dpsi <g_k, alpha_k * lambda_{k+1}>   any other meta-parameter of the support loss

   H_k u and the psi term come from differentiating g_k = grad L along u. The last few steps keep g_k and its graph for
   that; the others compute it once more, so that memory does not grow with K beyond the fast weights.
3. ``first-order``: the same walk without the H and psi terms (FOMAML).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from innerloop import together
from innerloop.closed_forms import ClosedForms
from innerloop.inner_loop import InnerLoop, MetaParameters, SecondOrder, State, detached
from innerloop.model_state import Randomness
from innerloop.network import replayed_randomness
from innerloop.per_step import Statistics
from innerloop.tasks import Task
from innerloop.update_rules import Tensors

GradientMode = Literal["reverse", "mixed", "first-order"]
LossWeights = Sequence[Tensor | float]
"""w_1 .. w_K of the query losses. A loss whose weight is the number 0 is not computed."""


NO_GRADIENT = MetaParameters({}, {}, {}, {})


class TaskGradient(NamedTuple):
    """One task's share of a meta-gradient.

    Attributes:
        loss: sum_k w_k L_query(theta^k).
        gradient: its gradient by every meta-parameter (by the rates only where they are learned).
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
    loop: InnerLoop, meta: MetaParameters, statistics: Statistics, task: Task, weights: LossWeights
) -> TaskGradient:
    """Exact meta-gradient by autograd through the unrolled inner loop."""
    meta = MetaParameters(
        *({n: t.detach().requires_grad_(t.requires_grad) for n, t in group.items()} for group in meta)
    )
    # Parameters that start from zero are adapted and not learned: theta^0 takes part in the graph all the same.
    meta = meta._replace(adapted={n: t.requires_grad_() for n, t in meta.adapted.items()})
    theta, state = meta.adapted, loop.rule.initial_state(meta.adapted)
    total = _zero(theta)
    record = _Record()
    for k, weight in enumerate(weights):
        psi = meta.fixed_at_step(k)
        with ClosedForms():
            loss, _, buffers = loop.network.loss({**theta, **psi}, statistics.at_step(k), task.support)
        statistics = statistics.updated(k, buffers)
        g = torch.autograd.grad(loss, list(theta.values()), create_graph=True, materialize_grads=True)
        theta, state = loop.update(theta, state, dict(zip(theta, g, strict=True)), meta.rates, k)
        record.support_losses.append(loss)
        if _counts(weight):
            loss, record.outputs, buffers = loop.network.loss({**theta, **psi}, statistics.at_step(k), task.query)
            statistics = statistics.updated(k, buffers)
            total = total + weight * loss
        record.query_losses.append(loss if _counts(weight) else None)
    learned = {(i, n): t for i, group in enumerate(meta) for n, t in group.items() if t.requires_grad}
    values = torch.autograd.grad(total, list(learned.values()), materialize_grads=True)
    gradients = dict(zip(learned, values, strict=True))
    gradient = MetaParameters(
        *({n: gradients[i, n] for n in group if (i, n) in gradients} for i, group in enumerate(meta))
    )
    return record.result(total, gradient, statistics)


def mixed(
    loop: InnerLoop, meta: MetaParameters, statistics: Statistics, task: Task, weights: LossWeights
) -> TaskGradient:
    """Exact meta-gradient by the adjoint walk: memory does not grow with K beyond the fast weights."""
    return _adjoint_walk(loop, meta, statistics, task, weights, second_order=True)


def first_order(
    loop: InnerLoop, meta: MetaParameters, statistics: Statistics, task: Task, weights: LossWeights
) -> TaskGradient:
    """FOMAML's meta-gradient: the support gradients count as constants."""
    return _adjoint_walk(loop, meta, statistics, task, weights, second_order=False)


MetaGradient = Callable[[InnerLoop, MetaParameters, Statistics, Task, LossWeights], TaskGradient]
META_GRADIENTS: dict[GradientMode, MetaGradient] = {
    "reverse": reverse,
    "mixed": mixed,
    "first-order": first_order,
}


class Ahead(NamedTuple):
    """Inner step k: what it gives, and what the walk back needs of it.

    Attributes:
        theta: theta^{k+1}.
        state: the update rule's.
        statistics: those after the step's calls.
        g: the support gradient g_k.
        second_order: derivatives of g, where its graph was kept.
        support_loss: what the step descended.
        query_loss: after it; None where w_k is 0.
        outputs: of the query set.
        query_theta: w_k times the query loss's gradient by theta^{k+1}.
        query_psi: the same by psi_k.
    """

    theta: Tensors
    state: State
    statistics: Statistics
    g: Tensors
    second_order: SecondOrder | None
    support_loss: Tensor
    query_loss: Tensor | None
    outputs: Any
    query_theta: Tensors
    query_psi: Tensors


class Back(NamedTuple):
    """The walk back over inner step k: adjoints of theta^k and the state, and the step's share of other gradients."""

    adjoint: Tensors
    adjoint_state: State
    psi: Tensors
    rates: Tensors


def ahead(
    loop: InnerLoop,
    theta: Tensors,
    state: State,
    psi: Tensors,
    rates: Tensors,
    statistics: Statistics,
    k: int,
    task: Task,
    weight: Tensor | float,
    keep_graph: bool,
) -> Ahead:
    """Inner step k, and the query loss after it if it counts."""
    support = loop.gradient(theta, psi, statistics, k, task.support, keep_graph=keep_graph)
    statistics = support.statistics
    theta, state = loop.step(theta, state, support.theta, rates, k)
    found = Ahead(theta, state, statistics, support.theta, support.second_order, support.loss, None, None, {}, {})
    if not _counts(weight):
        return found
    query = loop.gradient(theta, psi, statistics, k, task.query, with_fixed=True)
    return found._replace(
        statistics=query.statistics,
        query_loss=query.loss,
        outputs=query.outputs,
        query_theta=_scaled(query.theta, weight),
        query_psi=_scaled(query.fixed, weight),
    )


def back(
    loop: InnerLoop,
    theta: Tensors,
    state: State,
    g: Tensors,
    rates: Tensors,
    k: int,
    second_order: SecondOrder | None,
    adjoint: Tensors,
    adjoint_state: State,
) -> Back:
    """From the adjoints of theta^{k+1} and its state to those of theta^k; first order without ``second_order``."""
    # u, the adjoint of g_k, is -alpha_k * lambda_{k+1} under SGD.
    adjoint, adjoint_state, u, rate = loop.update_adjoint(theta, state, g, rates, k, (adjoint, adjoint_state))
    psi: Tensors = {}
    if second_order is not None:
        hvp, psi = second_order(u)
        adjoint = added(adjoint, hvp)
    return Back(adjoint, adjoint_state, psi, rate)


@dataclass
class _Step:
    """What the walk back needs of inner step k; its gradients by theta^{k+1} and psi_k come from the query loss."""

    theta: Tensors
    state: State
    g: Tensors
    """Empty where the step is computed again."""
    statistics: Statistics
    randomness: Randomness | None
    second_order: SecondOrder | None
    query_theta: Tensors
    query_psi: Tensors


def _adjoint_walk(
    loop: InnerLoop,
    meta: MetaParameters,
    statistics: Statistics,
    task: Task,
    weights: LossWeights,
    *,
    second_order: bool,
) -> TaskGradient:
    theta = detached(meta.adapted)
    state = loop.rule.initial_state(theta)
    rates = detached(meta.rates)
    device = _device(theta)
    statistics = statistics.apart()
    total = _zero(theta)
    record = _Record()

    steps: list[_Step] = []
    for k, weight in enumerate(weights):
        stored = second_order and k >= len(weights) - loop.stored_steps
        # Asking for the generator's state waits for a GPU, which a CUDA graph may not.
        randomness = Randomness.now(device) if second_order and not stored else None
        made = ahead(loop, theta, state, meta.fixed_at_step(k), rates, statistics, k, task, weight, stored)
        g = made.g if stored or not second_order else {}
        steps.append(
            _Step(theta, state, g, statistics, randomness, made.second_order, made.query_theta, made.query_psi)
        )
        theta, state, statistics = made.theta, made.state, made.statistics
        record.support_losses.append(made.support_loss)
        record.query_losses.append(made.query_loss)
        if made.query_loss is not None:
            record.outputs = made.outputs
            total = total + weight * made.query_loss

    adjoint = together.each(torch.zeros_like, theta)
    adjoint_state: State = {n: tuple(torch.zeros_like(s) for s in slots) for n, slots in state.items()}
    rate_gradient: Tensors = {}
    psi_gradients: list[Tensors] = []
    for k in reversed(range(len(steps))):
        step = steps.pop()
        adjoint = added(adjoint, step.query_theta)
        if second_order and step.second_order is None:
            assert step.randomness is not None
            with replayed_randomness(step.randomness, device):  # the same dropout masks
                psi = meta.fixed_at_step(k)
                again = loop.gradient(step.theta, psi, step.statistics, k, task.support, keep_graph=True)
            step.g, step.second_order = again.theta, again.second_order
        adjoint, adjoint_state, psi_gradient, rate_k = back(
            loop, step.theta, step.state, step.g, meta.rates, k, step.second_order, adjoint, adjoint_state
        )
        rate_gradient = added(rate_gradient, {n: r for n, r in rate_k.items() if meta.rates[n].requires_grad})
        psi_gradients.append(added(step.query_psi, psi_gradient))
    psi_gradients.reverse()
    shared, stacks = by_psi(meta, psi_gradients)
    return record.result(total, MetaParameters(adjoint, shared, stacks, rate_gradient), statistics.stacked())


def by_psi(meta: MetaParameters, by_step: Sequence[Tensors]) -> tuple[Tensors, Tensors]:
    """The gradients by psi_0 .. psi_{K-1} as those by the shared parameters and by the stacks."""
    shared: Tensors = {}
    for gradient in by_step:
        shared = added(shared, {n: g for n, g in gradient.items() if n in meta.shared})
    stacks = {
        n: torch.stack([g[n] if n in g else torch.zeros_like(stack[0]) for g in by_step])
        for n, stack in meta.per_step.items()
    }
    return shared, stacks


def _zero(tensors: Tensors) -> Tensor:
    """A loss of nothing: real, also of complex parameters."""
    like = next(iter(tensors.values()))
    return torch.zeros((), dtype=like.dtype.to_real(), device=like.device)


def _device(tensors: Tensors) -> torch.device:
    return next(iter(tensors.values())).device


def added(a: Tensors, b: Tensors) -> Tensors:
    """Sums by name; a name that only one has keeps its value."""
    both = together.each(torch.add, {n: t for n, t in a.items() if n in b}, b)
    return {**b, **a, **both}


def _counts(weight: Tensor | float) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def _scaled(tensors: Tensors, weight: Tensor | float) -> Tensors:
    return together.each(lambda t: weight * t, tensors)


class _Record:
    """Losses and outputs as an inner loop meets them."""

    def __init__(self) -> None:
        self.support_losses: list[Tensor] = []
        self.query_losses: list[Tensor | None] = []
        self.outputs: Any = None

    def result(self, total: Tensor, gradient: MetaParameters, statistics: Statistics) -> TaskGradient:
        missing = torch.full_like(total, torch.nan)
        query_losses = [missing if loss is None else loss for loss in self.query_losses]
        return TaskGradient(
            total.detach(),
            gradient,
            torch.stack(self.support_losses).detach(),
            torch.stack(query_losses).detach(),
            pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, self.outputs),
            statistics,
        )
