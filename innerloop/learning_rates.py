"""Inner learning rates: one constant (MAML), one a tensor and step (LSLR), one an element (Meta-SGD)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def constant(theta: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    """MAML: the same fixed alpha for all parameters and steps; a scalar for each name, not learned."""
    return {name: torch.tensor(rate, dtype=t.dtype.to_real(), device=t.device) for name, t in theta.items()}


def per_layer_per_step(theta: Mapping[str, Tensor], rate: float, inner_steps: int) -> dict[str, Tensor]:
    """LSLR (MAML++): a learned alpha for every parameter tensor and inner step; ``[K]`` for each name."""
    return {
        name: torch.full((inner_steps,), rate, dtype=t.dtype.to_real(), device=t.device, requires_grad=True)
        for name, t in theta.items()
    }


def per_element(theta: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    """Meta-SGD (Li et al. 2017): a learned alpha of the parameter's own shape, the same at every step."""
    # Not full_like: see per_step.stack.
    real = {name: t.detach().real if t.is_complex() else t.detach() for name, t in theta.items()}
    return {name: t.clone().fill_(rate).requires_grad_() for name, t in real.items()}


def at_step(rates: Mapping[str, Tensor], name: str, k: int, lslr: bool) -> Tensor:
    """alpha_k of one parameter. Steps beyond those that were trained use the last step's rate."""
    rate = rates[name]
    return rate[min(k, len(rate) - 1)] if lslr else rate
