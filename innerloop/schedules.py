"""What changes over the epochs: the weights of the multi-step loss, the derivative order, the outer rate."""

from __future__ import annotations

import math


def multi_step_loss_weights(inner_steps: int, epoch: float, anneal_epochs: int) -> list[float]:
    """MSL: the weight w_k of the query loss after inner step k = 1..K (MAML++, section 4, and its published code).

    With K inner steps annealed over E epochs, at epoch e < E::

        w_k = max(1/K - e/(K E), 0.03/K)                        for k < K
        w_K = min(1/K + e (K-1)/(K E), 1 - (K-1) 0.03/K)

    and from epoch E on the last step's loss alone counts: w_K = 1.

    Returns:
        K weights that sum to 1, the first step's first.
    """
    steps = inner_steps
    if epoch >= anneal_epochs:
        return last_step_weights(steps)
    least = 0.03 / steps
    early = max(1 / steps - epoch / (steps * anneal_epochs), least)
    last = min(1 / steps + epoch * (steps - 1) / (steps * anneal_epochs), 1 - (steps - 1) * least)
    return [early] * (steps - 1) + [last]


def last_step_weights(inner_steps: int) -> list[float]:
    """Weights of plain MAML: only the query loss after the last inner step counts."""
    return [0.0] * (inner_steps - 1) + [1.0]


def derivative_order(epoch: float, first_order_epochs: int) -> int:
    """DA: 1 (first-order meta-gradients) in the first ``first_order_epochs`` epochs, 2 (exact) after (MAML++)."""
    return 1 if epoch < first_order_epochs else 2


def cosine_rate(time: float, end: float, start_rate: float, end_rate: float) -> float:
    """CA: beta(T) = beta_min + (beta_max - beta_min)/2 (1 + cos(pi T / T_max)), T clamped to T_max, no restart.

    Loshchilov & Hutter 2017 (SGDR) without its restarts, as MAML++ uses it. ``time`` and ``end`` in the same unit.
    """
    if end <= 0:
        return end_rate
    phase = min(time, end) / end
    return end_rate + (start_rate - end_rate) / 2 * (1 + math.cos(math.pi * phase))
