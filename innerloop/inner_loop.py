"""The inner loop: a support set in, fast weights out.

    theta^{k+1} = theta^k - alpha_k * grad L(f(theta^k), support)          k = 0 .. K-1

Everything here is a function of its arguments; ``meta_gradients`` differentiates it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from innerloop import learning_rates, per_step
from innerloop.network import Network
from innerloop.per_step import Statistics
from innerloop.tasks import Examples
from innerloop.update_rules import Tensors, UpdateRule

State = dict[str, tuple[Tensor, ...]]


@dataclass
class MetaParameters:
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

    def groups(self) -> dict[str, Tensors]:
        """The four dictionaries by their names."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def zeros(self) -> MetaParameters:
        """Zeros of the same shapes, to sum gradients in."""
        return MetaParameters(**{g: {n: torch.zeros_like(t) for n, t in d.items()} for g, d in self.groups().items()})

    def leaves(self) -> MetaParameters:
        """The same values as new autograd leaves; those that are not learned stay constants."""
        return MetaParameters(
            **{
                g: {n: t.detach().requires_grad_(t.requires_grad) for n, t in d.items()}
                for g, d in self.groups().items()
            }
        )

    def fixed_at_step(self, k: int) -> Tensors:
        """psi_k: the parameters that inner step k uses and does not adapt."""
        return {**self.shared, **per_step.at_step(self.per_step, k)}


class StepGradient(NamedTuple):
    """Loss and gradients on one set of examples."""

    loss: Tensor
    theta: Tensors
    fixed: Tensors
    outputs: object


@dataclass(frozen=True)
class InnerLoop:
    """How one task is learned: the network, the update rule, and whether rates are per step (LSLR)."""

    network: Network
    rule: UpdateRule
    lslr: bool

    def gradient(
        self,
        theta: Tensors,
        fixed: Tensors,
        statistics: Statistics,
        k: int,
        examples: Examples,
        *,
        with_fixed: bool = False,
        create_graph: bool = False,
    ) -> StepGradient:
        """grad L(f(theta), examples) with the norm layers of inner step k; updates ``statistics``.

        With ``create_graph`` the gradients can be differentiated again and ``theta`` must require grad already;
        without, they are constants. ``with_fixed`` asks for the gradient by psi_k too.
        """
        if not create_graph:
            theta = {n: t.detach().requires_grad_() for n, t in theta.items()}
            fixed = {n: t.detach().requires_grad_(with_fixed) for n, t in fixed.items()}
        wanted = {**theta, **(fixed if with_fixed else {})}
        with torch.enable_grad():
            loss, outputs, buffers = self.network.loss({**theta, **fixed}, statistics.at_step(k), examples)
            gradients = torch.autograd.grad(
                loss, list(wanted.values()), create_graph=create_graph, materialize_grads=True
            )
        statistics.update(k, buffers)
        by_name = dict(zip(wanted, gradients, strict=True))
        return StepGradient(
            loss, {n: by_name[n] for n in theta}, {n: by_name[n] for n in fixed if n in by_name}, outputs
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

    def trajectory(
        self, meta: MetaParameters, statistics: Statistics, support: Examples, steps: int
    ) -> Iterator[Tensors]:
        """theta^0, theta^1, .. theta^steps, as constants. More steps than were trained go on with the last step's
        rates, norm weights and statistics."""
        theta = {n: t.detach() for n, t in meta.adapted.items()}
        rates = {n: t.detach() for n, t in meta.rates.items()}
        state = self.rule.initial_state(theta)
        yield theta
        for k in range(steps):
            g = self.gradient(theta, meta.fixed_at_step(k), statistics, k, support).theta
            theta, state = self.update(theta, state, g, rates, k)
            yield theta
