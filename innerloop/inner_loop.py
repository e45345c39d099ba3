"""The inner loop: a support set in, fast weights out.

    theta^{k+1} = theta^k - alpha_k * grad L(f(theta^k), support)          k = 0 .. K-1

Everything here is a function of its arguments; ``meta_gradients`` differentiates it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from innerloop import learning_rates, per_step
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


class Gradient(NamedTuple):
    """A loss on a set of examples, its gradients, and what the call left behind."""

    theta: Tensors
    fixed: Tensors
    loss: Tensor
    outputs: Any
    statistics: Statistics


@dataclass(frozen=True)
class InnerLoop:
    """How one task is learned.

    Attributes:
        network: the model and the loss.
        rule: the inner update rule.
        lslr: whether the rates are per step.
        functional: take gradients by ``torch.func``, which ``vmap`` needs; ordinary autograd has less overhead and
            serves operations that ``torch.func`` does not know.
    """

    network: Network
    rule: UpdateRule
    lslr: bool
    functional: bool = False

    def gradient(
        self,
        theta: Tensors,
        fixed: Tensors,
        statistics: Statistics,
        k: int,
        examples: Examples,
        *,
        with_fixed: bool = False,
    ) -> Gradient:
        """Grad L(f(theta), examples) with the norm layers of inner step k, as constants.

        ``with_fixed`` asks for the gradient by psi_k (``fixed``) too.
        """
        theta, fixed = detached(theta), detached(fixed)
        buffers = statistics.at_step(k)
        wanted = {**theta, **fixed} if with_fixed else theta
        if self.functional:

            def loss_of(wanted: Tensors) -> tuple[Tensor, tuple[Tensor, Any, Tensors]]:
                loss, outputs, left = self.network.loss({**fixed, **wanted}, buffers, examples)
                return loss, (loss, outputs, left)

            gradients, (loss, outputs, left) = grad(loss_of, has_aux=True)(wanted)
        else:
            wanted = {n: t.requires_grad_() for n, t in wanted.items()}
            with torch.enable_grad():
                loss, outputs, left = self.network.loss({**fixed, **wanted}, buffers, examples)
                values = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
            gradients = dict(zip(wanted, values, strict=True))
        return Gradient(
            {n: gradients[n] for n in theta},
            {n: gradients[n] for n in fixed} if with_fixed else {},
            loss.detach().clone(),  # a copy: mse_loss's scalar lives in memory as large as the unreduced loss
            outputs,
            statistics.updated(k, left),
        )

    def update(self, theta: Tensors, state: State, g: Tensors, rates: Tensors, k: int) -> tuple[Tensors, State]:
        """theta^{k+1} and the update rule's new state."""
        stepped = {
            name: self.rule.step(
                theta[name], state[name], g[name], learning_rates.at_step(rates, name, k, self.lslr), k
            )
            for name in theta
        }
        return {n: t for n, (t, _) in stepped.items()}, {n: s for n, (_, s) in stepped.items()}

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
    ) -> Iterator[Tensors]:
        """theta^0, theta^1, .. theta^steps, as constants.

        More steps than were trained go on with the last step's rates, norm weights and statistics.
        """
        theta, rates = detached(meta.adapted), detached(meta.rates)
        state = self.rule.initial_state(theta)
        yield theta
        for k in range(steps):
            support_gradient = self.gradient(theta, meta.fixed_at_step(k), statistics, k, support)
            statistics = support_gradient.statistics
            theta, state = self.step(theta, state, support_gradient.theta, rates, k)
            yield theta


def detached(tensors: Tensors) -> Tensors:
    """The same values as constants."""
    return {name: t.detach() for name, t in tensors.items()}
