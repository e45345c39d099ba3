"""The inner loop: a support set in, fast weights out.

    theta^{k+1} = theta^k - alpha_k * grad L(f(theta^k), support)          k = 0 .. K-1

Everything here is a function of its arguments; ``meta_gradients`` differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vjp
from torch.utils import _pytree as pytree

from innerloop import learning_rates, per_step, together
from innerloop.closed_forms import ClosedForms
from innerloop.network import Network
from innerloop.per_step import Statistics
from innerloop.tasks import Examples
from innerloop.update_rules import Tensors, UpdateRule

State = dict[str, tuple[Tensor, ...]]


class MetaParameters(NamedTuple):
    """What the outer loop learns, by the model's parameter names.

    Attributes:
        adapted: theta^0, the parameters that the inner loop adapts.
        shared: parameters that every inner step uses as they are.
        per_step: stacks ``[K, ...]`` of the norm layers' weights and biases (BNWB).
        rates: inner rates alpha: scalars (MAML), ``[K]`` (LSLR) or of the parameter's shape (Meta-SGD).
    """

    adapted: Tensors
    shared: Tensors
    per_step: Tensors
    rates: Tensors

    def fixed_at_step(self, k: int) -> Tensors:
        """psi_k: the parameters that inner step k uses and does not adapt."""
        return {**self.shared, **per_step.at_step(self.per_step, k)}


SecondOrder = Callable[[Tensors], tuple[Tensors, Tensors]]
"""u -> (H u, d/dpsi <g, u>), for g = grad L(theta, psi) and H its Hessian by theta. Can be called once."""


class Gradient(NamedTuple):
    """A loss on a set of examples, its gradients, and what the call left behind; all constants.

    Attributes:
        theta: g, the gradient by the fast weights.
        fixed: the gradient by psi_k, where it was asked for.
        loss: a scalar.
        outputs: the model's.
        statistics: those after the call.
        second_order: derivatives of g, where its graph was kept.
    """

    theta: Tensors
    fixed: Tensors
    loss: Tensor
    outputs: Any
    statistics: Statistics
    second_order: SecondOrder | None = None


@dataclass(frozen=True)
class InnerLoop:
    """How one task is learned.

    Attributes:
        network: the model and the loss.
        rule: the inner update rule.
        lslr: whether the rates are per step.
        functional: take gradients by ``torch.func``, which ``vmap`` needs; ordinary autograd has less overhead and
            serves operations that ``torch.func`` does not know.
        stored_steps: in mixed mode, the last inner steps whose graphs are kept for the walk back.
    """

    network: Network
    rule: UpdateRule
    lslr: bool
    functional: bool = False
    stored_steps: int = 5

    def gradient(
        self,
        theta: Tensors,
        fixed: Tensors,
        statistics: Statistics,
        k: int,
        examples: Examples,
        *,
        with_fixed: bool = False,
        keep_graph: bool = False,
    ) -> Gradient:
        """Grad L(f(theta), examples) with the norm layers of inner step k.

        ``with_fixed`` asks for the gradient by psi_k (``fixed``) too, ``keep_graph`` for the derivatives of the
        gradient by theta.
        """
        theta, fixed = detached(theta), detached(fixed)
        take = self._functional_gradient if self.functional else self._autograd_gradient
        return take(theta, fixed, statistics, k, examples, with_fixed, keep_graph)

    def _autograd_gradient(
        self,
        theta: Tensors,
        fixed: Tensors,
        statistics: Statistics,
        k: int,
        examples: Examples,
        with_fixed: bool,
        keep_graph: bool,
    ) -> Gradient:
        if with_fixed or keep_graph:
            for t in fixed.values():
                t.requires_grad_()
        for t in theta.values():
            t.requires_grad_()
        by = {**theta, **fixed} if with_fixed else theta
        with torch.enable_grad():
            with ClosedForms() if keep_graph else nullcontext():
                loss, outputs, buffers = self.network.loss({**fixed, **theta}, statistics.at_step(k), examples)
            with self.network.differentiated({**fixed, **theta}, statistics.at_step(k)):
                values = torch.autograd.grad(loss, list(by.values()), create_graph=keep_graph, materialize_grads=True)
        gradients = dict(zip(by, values, strict=True))

        def second_order(u: Tensors) -> tuple[Tensors, Tensors]:
            varying = {n: g for n, g in gradients.items() if n in theta and g.requires_grad}
            sources = {**theta, **fixed}
            if not varying:
                return {n: torch.zeros_like(t) for n, t in theta.items()}, {
                    n: torch.zeros_like(t) for n, t in fixed.items()
                }
            with self.network.differentiated({**fixed, **theta}, statistics.at_step(k)):
                along = torch.autograd.grad(
                    list(varying.values()), list(sources.values()), [u[n] for n in varying], materialize_grads=True
                )
            products = dict(zip(sources, along, strict=True))
            return {n: products[n] for n in theta}, {n: products[n] for n in fixed}

        return Gradient(
            {n: gradients[n].detach() for n in theta},
            {n: gradients[n].detach() for n in fixed} if with_fixed else {},
            loss.detach().clone(),  # a copy: mse_loss's scalar lives in memory as large as the unreduced loss
            outputs,
            statistics.updated(k, buffers),
            second_order if keep_graph else None,
        )

    def _functional_gradient(
        self,
        theta: Tensors,
        fixed: Tensors,
        statistics: Statistics,
        k: int,
        examples: Examples,
        with_fixed: bool,
        keep_graph: bool,
    ) -> Gradient:
        def loss_of(theta: Tensors, fixed: Tensors) -> tuple[Tensor, tuple[Tensor, Any, Tensors]]:
            with ClosedForms() if keep_graph else nullcontext():
                loss, outputs, buffers = self.network.loss({**fixed, **theta}, statistics.at_step(k), examples)
            return loss, (loss, outputs, buffers)

        second_order = None
        fixed_gradient: Tensors = {}
        if keep_graph:
            g, second_order, aux = vjp(grad(loss_of, has_aux=True), theta, fixed, has_aux=True)  # type: ignore[misc]
        elif with_fixed:
            (g, fixed_gradient), aux = grad(loss_of, argnums=(0, 1), has_aux=True)(theta, fixed)
        else:
            g, aux = grad(loss_of, has_aux=True)(theta, fixed)
        loss, outputs, buffers = aux
        return Gradient(g, fixed_gradient, loss.detach(), outputs, statistics.updated(k, buffers), second_order)

    def update(self, theta: Tensors, state: State, g: Tensors, rates: Tensors, k: int) -> tuple[Tensors, State]:
        """theta^{k+1} and the update rule's new state."""
        if together.pays({**theta, **rates}):
            return self._packed_update(theta, state, g, rates, k)
        stepped = {
            name: self.rule.stepped(
                theta[name], state[name], g[name], learning_rates.at_step(rates, name, k, self.lslr), k
            )
            for name in theta
        }
        return {n: t for n, (t, _) in stepped.items()}, {n: s for n, (_, s) in stepped.items()}

    def _packed_update(self, theta: Tensors, state: State, g: Tensors, rates: Tensors, k: int) -> tuple[Tensors, State]:
        """``update`` of all parameters end to end."""
        # Of LSLR's rates those of step k are taken at once, so that the derivative puts them back at once.
        if self.lslr:
            stacked = torch.stack([rates[n] for n in theta], dim=1)
            alphas = stacked[min(k, len(stacked) - 1)].unbind()
        else:
            alphas = tuple(rates[n] for n in theta)
        alpha = together.packed([a.expand(t.shape) for a, t in zip(alphas, theta.values(), strict=True)])
        slots = tuple(together.packed([state[n][i] for n in theta]) for i in range(self.rule.slots))
        moved, slots = self.rule.step(
            together.packed(list(theta.values())), slots, together.packed([g[n] for n in theta]), alpha, k
        )
        states = [together.unpacked(s, theta) for s in slots]
        return together.unpacked(moved, theta), {n: tuple(s[n] for s in states) for n in theta}

    def update_adjoint(
        self, theta: Tensors, state: State, g: Tensors, rates: Tensors, k: int, adjoints: tuple[Tensors, State]
    ) -> tuple[Tensors, State, Tensors, Tensors]:
        """The adjoints of theta^k, state, g_k and the learned rates, from those of what ``update`` makes of them.

        Under SGD these are lambda, nothing, -alpha_k * lambda and -g_k * lambda (summed to the rate's shape).
        """

        def update(theta: Tensors, state: State, g: Tensors, rates: Tensors) -> tuple[Tensors, State]:
            return self.update(theta, state, g, rates, k)

        if self.functional:
            found: tuple[Tensors, State, Tensors, Tensors] = vjp(update, theta, state, g, rates)[1](adjoints)
            return found
        learned = {n: r for n, r in rates.items() if r.requires_grad}
        sources = pytree.tree_map(lambda t: t.detach().requires_grad_(), (theta, state, g, learned))
        leaves, structure = pytree.tree_flatten(sources)
        with torch.enable_grad():
            outputs = pytree.tree_leaves(update(sources[0], sources[1], sources[2], {**rates, **sources[3]}))
        values = torch.autograd.grad(outputs, leaves, pytree.tree_leaves(adjoints), materialize_grads=True)
        found = pytree.tree_unflatten(values, structure)
        return found

    def step(self, theta: Tensors, state: State, g: Tensors, rates: Tensors, k: int) -> tuple[Tensors, State]:
        """``update`` on constants, the fast weights laid out in memory as the initialisation is.

        A convolution of a one-channel image knows only by its weight's strides that it is to work channels-last, which
        elementwise operations lose, and runs two to three times slower without them.
        """
        moved, state = self.update(theta, state, g, rates, k)
        if not self.functional:
            moved = {
                n: t if t.stride() == theta[n].stride() else torch.empty_like(theta[n]).copy_(t)
                for n, t in moved.items()
            }
        return moved, state

    def trajectory(
        self, meta: MetaParameters, statistics: Statistics, support: Examples, steps: int
    ) -> Iterator[tuple[Tensors, Statistics, Tensor | None]]:
        """theta^0, theta^1, .. theta^steps, as constants, with the statistics and the support loss that led there.

        More steps than were trained go on with the last step's rates, norm weights and statistics.
        """
        rates = detached(meta.rates)
        theta = {n: t.detach().clone() for n, t in meta.adapted.items()}  # the optimiser moves the initialisation
        state = self.rule.initial_state(theta)
        yield theta, statistics, None
        for k in range(steps):
            support_gradient = self.gradient(theta, meta.fixed_at_step(k), statistics, k, support)
            statistics = support_gradient.statistics
            theta, state = self.step(theta, state, support_gradient.theta, rates, k)
            yield theta, statistics, support_gradient.loss


def detached(tensors: Tensors) -> Tensors:
    """The same values as constants."""
    return {name: t.detach() for name, t in tensors.items()}
