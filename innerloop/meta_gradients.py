"""The gradient of a task's query loss by the meta-parameters, in three ways that agree.

    loss = sum_k w_k L(f(theta^k), query)          theta^{k+1} = U_k(theta^k, g_k, alpha_k)

1. ``reverse``: autograd through the unrolled loop. Its memory grows with the number of inner steps K.
2. ``mixed``: walk the loop keeping theta^k and g_k only, then walk back with the adjoint lambda (Kemaev et al. 2025,
   MixFlow-MG). For the SGD rule::

       lambda_K = w_K grad L_q(theta^K)
       lambda_k = lambda_{k+1} - H_k (alpha_k * lambda_{k+1}) + w_k grad L_q(theta^k)
       d alpha_k = - g_k * lambda_{k+1}                     summed to alpha's shape
       d psi     = - d/dpsi <g_k, alpha_k * lambda_{k+1}>   any other meta-parameter of the support loss

   H_k u and the psi term come from one forward-over-reverse product, the tangent of grad L. No graph outlives a step.
3. ``first-order``: the same walk without the H and psi terms (FOMAML).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp
from torch.utils import _pytree as pytree

from innerloop.batch_norm import ClosedFormBatchNorm
from innerloop.inner_loop import InnerLoop, MetaParameters, State, detached
from innerloop.network import random_state, replayed_randomness, set_random_state
from innerloop.per_step import Statistics
from innerloop.tasks import Examples, Task
from innerloop.update_rules import Tensors

GradientMode = Literal["reverse", "mixed", "first-order"]


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
    loop: InnerLoop, meta: MetaParameters, statistics: Statistics, task: Task, weights: list[float]
) -> TaskGradient:
    """Exact meta-gradient by autograd through the unrolled inner loop."""
    meta = MetaParameters(
        *({n: t.detach().requires_grad_(t.requires_grad) for n, t in group.items()} for group in meta)
    )
    theta, state = meta.adapted, loop.rule.initial_state(meta.adapted)
    total: Tensor = next(iter(theta.values())).new_zeros(())
    record = _Record()
    for k, weight in enumerate(weights):
        psi = meta.fixed_at_step(k)
        loss, _, buffers = loop.network.loss({**theta, **psi}, statistics.at_step(k), task.support)
        statistics = statistics.updated(k, buffers)
        g = torch.autograd.grad(loss, list(theta.values()), create_graph=True, materialize_grads=True)
        theta, state = loop.update(theta, state, dict(zip(theta, g, strict=True)), meta.rates, k)
        record.support_losses.append(loss)
        if weight:
            loss, record.outputs, buffers = loop.network.loss({**theta, **psi}, statistics.at_step(k), task.query)
            statistics = statistics.updated(k, buffers)
            total = total + weight * loss
        record.query_losses.append(loss if weight else None)
    learned = {(i, n): t for i, group in enumerate(meta) for n, t in group.items() if t.requires_grad}
    values = torch.autograd.grad(total, list(learned.values()), materialize_grads=True)
    gradients = dict(zip(learned, values, strict=True))
    gradient = MetaParameters(
        *({n: gradients[i, n] for n in group if (i, n) in gradients} for i, group in enumerate(meta))
    )
    return record.result(total, gradient, statistics)


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
META_GRADIENTS: dict[GradientMode, MetaGradient] = {
    "reverse": reverse,
    "mixed": mixed,
    "first-order": first_order,
}


@dataclass
class _Step:
    """What the walk back needs of inner step k; its gradients by theta^{k+1} and psi_k come from the query loss."""

    theta: Tensors
    state: State
    g: Tensors
    buffers: Tensors
    randomness: list[Tensor]
    query_theta: Tensors
    query_psi: Tensors


def _adjoint_walk(
    loop: InnerLoop,
    meta: MetaParameters,
    statistics: Statistics,
    task: Task,
    weights: list[float],
    *,
    second_order: bool,
) -> TaskGradient:
    theta = detached(meta.adapted)
    state = loop.rule.initial_state(theta)
    rates = detached(meta.rates)
    device = _device(theta)
    total = next(iter(theta.values())).new_zeros(())
    record = _Record()

    steps: list[_Step] = []
    for k, weight in enumerate(weights):
        psi = meta.fixed_at_step(k)
        buffers, randomness = statistics.at_step(k), random_state(device)
        support = loop.gradient(theta, psi, statistics, k, task.support)
        statistics = support.statistics
        step = _Step(theta, state, support.theta, buffers, randomness, {}, {})
        theta, state = loop.step(theta, state, support.theta, rates, k)
        record.support_losses.append(support.loss)
        if weight:
            query = loop.gradient(theta, psi, statistics, k, task.query, with_fixed=True)
            statistics, record.outputs = query.statistics, query.outputs
            step.query_theta, step.query_psi = _scaled(query.theta, weight), _scaled(query.fixed, weight)
            total = total + weight * query.loss
        record.query_losses.append(query.loss if weight else None)
        steps.append(step)

    adjoint: Tensors = {n: torch.zeros_like(t) for n, t in theta.items()}
    adjoint_state: State = {n: tuple(torch.zeros_like(s) for s in slots) for n, slots in state.items()}
    rate_gradient: Tensors = {}
    psi_gradients: list[Tensors] = []
    for k in reversed(range(len(steps))):
        step = steps.pop()
        adjoint = _sum(adjoint, step.query_theta)

        def update(theta: Tensors, state: State, g: Tensors, rates: Tensors, k: int = k) -> tuple[Tensors, State]:
            return loop.update(theta, state, g, rates, k)

        # u, the adjoint of g_k, is -alpha_k * lambda_{k+1} under SGD.
        pull_back = vjp(update, step.theta, step.state, step.g, rates)[1]
        adjoint, adjoint_state, u, rate_k = pull_back((adjoint, adjoint_state))
        rate_gradient = _sum(rate_gradient, {n: r for n, r in rate_k.items() if meta.rates[n].requires_grad})
        psi_gradient = step.query_psi
        if second_order:
            with replayed_randomness(step.randomness, device):
                hvp, psi_product = _hessian_vector_product(loop, step, meta.fixed_at_step(k), task.support, u)
            adjoint, psi_gradient = _sum(adjoint, hvp), _sum(psi_gradient, psi_product)
        psi_gradients.append(psi_gradient)
    psi_gradients.reverse()

    shared: Tensors = {}
    for psi_gradient in psi_gradients:
        shared = _sum(shared, {n: g for n, g in psi_gradient.items() if n in meta.shared})
    stacks = {
        n: torch.stack([g[n] if n in g else torch.zeros_like(stack[0]) for g in psi_gradients])
        for n, stack in meta.per_step.items()
    }
    return record.result(total, MetaParameters(adjoint, shared, stacks, rate_gradient), statistics)


def _hessian_vector_product(
    loop: InnerLoop, step: _Step, fixed: Tensors, support: Examples, u: Tensors
) -> tuple[Tensors, Tensors]:
    """H_k u and d/dpsi <g_k, u>: the tangent along u of grad L(theta^k, psi_k).

    Since second derivatives commute, the tangent of the psi-gradient is the psi-gradient of <g_k, u>.
    """

    def support_loss(theta: Tensors, fixed: Tensors, targets: Any) -> Tensor:
        return loop.network.loss({**theta, **fixed}, step.buffers, Examples(support.inputs, targets))[0]

    fixed = detached(fixed)
    model = loop.network.model
    if loop.functional:
        return _functional_forward_over_reverse(support_loss, step.theta, fixed, support.targets, u)
    if model not in _WITHOUT_FORWARD_MODE:
        try:
            return _forward_over_reverse(support_loss, step.theta, fixed, support.targets, u)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(
                f"{type(model).__name__} has an operation without forward-mode derivatives, so mixed mode "
                f"differentiates its gradient in reverse, with more memory per inner step. ({error})",
                stacklevel=2,
            )
            _WITHOUT_FORWARD_MODE.add(model)
            set_random_state(step.randomness, _device(step.theta))
    return _reverse_over_reverse(support_loss, step.theta, fixed, support.targets, u)


_WITHOUT_FORWARD_MODE: WeakSet[nn.Module] = WeakSet()
SupportLoss = Callable[[Tensors, Tensors, Any], Tensor]


def _forward_over_reverse(
    support_loss: SupportLoss, theta: Tensors, fixed: Tensors, targets: Any, u: Tensors
) -> tuple[Tensors, Tensors]:
    """Dual numbers through ordinary autograd: the operations, and so the dropout masks, are those of the walk.

    (``torch.func`` takes another path through dropout and draws other masks from the same state.)
    """
    with forward_ad.dual_level(), torch.enable_grad(), ClosedFormBatchNorm():
        theta = {n: _dual(t.detach().requires_grad_(), u[n]) for n, t in theta.items()}
        fixed = {n: t.detach().requires_grad_() for n, t in fixed.items()}
        # Real-valued targets get a tangent of zeros: F.mse_loss fails on the symbolic zero that constants have.
        targets = pytree.tree_map_only(_is_real, lambda t: _dual(t, torch.zeros_like(t)), targets)
        loss = support_loss(theta, fixed, targets)
        # create_graph: some backward formulas have a tangent only where they are differentiable themselves.
        sources = {**theta, **fixed}
        gradients = torch.autograd.grad(loss, list(sources.values()), create_graph=True, materialize_grads=True)
        tangents = [forward_ad.unpack_dual(g).tangent for g in gradients]  # type: ignore[no-untyped-call]
        products = {
            name: torch.zeros_like(gradient) if tangent is None else tangent.detach()
            for name, gradient, tangent in zip(sources, gradients, tangents, strict=True)
        }
    return {n: products[n] for n in theta}, {n: products[n] for n in fixed}


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual


def _functional_forward_over_reverse(
    support_loss: SupportLoss, theta: Tensors, fixed: Tensors, targets: Any, u: Tensors
) -> tuple[Tensors, Tensors]:
    """The same by ``torch.func``, which ``vmap`` needs."""
    leaves, structure = pytree.tree_flatten(targets)
    real = {i: t for i, t in enumerate(leaves) if _is_real(t)}

    def gradients(theta: Tensors, real: dict[int, Tensor]) -> tuple[Tensors, Tensors]:
        targets = pytree.tree_unflatten([real.get(i, t) for i, t in enumerate(leaves)], structure)
        both: tuple[Tensors, Tensors] = grad(support_loss, argnums=(0, 1))(theta, fixed, targets)
        return both

    zeros = {i: torch.zeros_like(t) for i, t in real.items()}
    products: tuple[Tensors, Tensors] = jvp(gradients, (theta, real), (u, zeros))[1]
    return products


def _is_real(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _reverse_over_reverse(
    support_loss: SupportLoss, theta: Tensors, fixed: Tensors, targets: Any, u: Tensors
) -> tuple[Tensors, Tensors]:
    theta = {n: t.detach().requires_grad_() for n, t in theta.items()}
    fixed = {n: t.detach().requires_grad_() for n, t in fixed.items()}
    sources = [*theta.values(), *fixed.values()]
    with torch.enable_grad():
        g = torch.autograd.grad(
            support_loss(theta, fixed, targets),
            list(theta.values()),
            create_graph=True,
            materialize_grads=True,
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


def _sum(a: Tensors, b: Tensors) -> Tensors:
    """Sums by name; a name that only one has keeps its value."""
    return {**b, **{n: t + b[n] if n in b else t for n, t in a.items()}}


def _scaled(tensors: Tensors, weight: float) -> Tensors:
    return {n: weight * t for n, t in tensors.items()}


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
