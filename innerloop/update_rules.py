"""Inner update rules: theta^{k+1} from theta^k and the support gradient g_k. Pure and differentiable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Step = int | Tensor
"""k, counted from 0; a float64 tensor where a graph is to serve every step."""
InnerRule = Literal["sgd", "momentum", "adam"]

MOMENTUM = 0.9
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class UpdateRule:
    """One inner step.

    Attributes:
        slots: how many state tensors the rule keeps for each adapted parameter (all start at zero).
        step: ``(theta, slots, g, alpha, k) -> (theta, slots)`` on one parameter, k counted from 0.
    """

    slots: int
    step: Callable[[Tensor, tuple[Tensor, ...], Tensor, Tensor, Step], tuple[Tensor, tuple[Tensor, ...]]]

    def initial_state(self, theta: Tensors) -> dict[str, tuple[Tensor, ...]]:
        """The rule's state before the first inner step: zeros shaped like each parameter."""
        return {name: tuple(torch.zeros_like(t) for _ in range(self.slots)) for name, t in theta.items()}

    def stepped(
        self, theta: Tensor, slots: tuple[Tensor, ...], g: Tensor, alpha: Tensor, k: Step
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``step``, of a complex parameter as of its real and its imaginary part (as ``torch.optim`` has it)."""
        if not theta.is_complex():
            return self.step(theta, slots, g, alpha, k)
        parts = tuple(map(torch.view_as_real, slots))
        alpha = alpha.unsqueeze(-1) if alpha.ndim else alpha
        moved, parts = self.step(torch.view_as_real(theta), parts, torch.view_as_real(g.resolve_conj()), alpha, k)
        return torch.view_as_complex(moved), tuple(map(torch.view_as_complex, parts))


def _sgd(
    theta: Tensor, slots: tuple[Tensor, ...], g: Tensor, alpha: Tensor, k: Step
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """theta^{k+1} = theta^k - alpha_k g_k (MAML, equation 1)."""
    return theta - alpha * g, ()


def _momentum(
    theta: Tensor, slots: tuple[Tensor, ...], g: Tensor, alpha: Tensor, k: Step
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """v^{k+1} = mu v^k + g_k; theta^{k+1} = theta^k - alpha_k v^{k+1} (as ``torch.optim.SGD``)."""
    velocity = MOMENTUM * slots[0] + g
    return theta - alpha * velocity, (velocity,)


def _adam(
    theta: Tensor, slots: tuple[Tensor, ...], g: Tensor, alpha: Tensor, k: Step
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Adam (Kingma & Ba 2015) with epsilon inside the root.

    ``sqrt(v + eps^2)`` instead of ``sqrt(v) + eps``: the same to within eps, and with a finite derivative where a
    gradient is exactly zero, as behind a dead ReLU, where the usual form gives NaN meta-gradients.
    """
    mean = BETA1 * slots[0] + (1 - BETA1) * g
    square = BETA2 * slots[1] + (1 - BETA2) * g * g
    corrected_mean, corrected_square = _unbiased(mean, BETA1, k), _unbiased(square, BETA2, k)
    return theta - alpha * corrected_mean / (corrected_square + EPSILON**2).sqrt(), (mean, square)


def _unbiased(moment: Tensor, beta: float, k: Step) -> Tensor:
    """A moving average that started from zero, k steps ago."""
    share = 1 - beta ** (k + 1)
    return moment / (share.to(moment.dtype) if isinstance(share, Tensor) else share)


UPDATE_RULES: dict[InnerRule, UpdateRule] = {
    "sgd": UpdateRule(0, _sgd),
    "momentum": UpdateRule(1, _momentum),
    "adam": UpdateRule(2, _adam),
}
