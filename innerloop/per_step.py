"""BNRS and BNWB: a stack ``[K, ...]`` of every parameter and buffer of the normalisation layers.

The user's model is left as it is. At inner step k it is called with entry k of each stack in the place of the
layer's own tensor, so that any network with ordinary norm layers can have per-step batch normalisation (MAML++,
section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


def stack(tensors: Mapping[str, Tensor], inner_steps: int) -> dict[str, Tensor]:
    """Each tensor repeated for every inner step: ``[K, ...]``, memory of its own."""
    # Not torch.stack: on the meta device, where a checkpoint is looked at, it imports PyTorch's compiler, 2 s.
    return {name: t.new_empty((inner_steps, *t.shape)).copy_(t.detach()) for name, t in tensors.items()}


def at_step(stacks: Mapping[str, Any], k: int) -> dict[str, Tensor]:
    """Entry k of every stack. Steps beyond those that were trained use the last entry."""
    return {name: s[min(k, len(s) - 1)] for name, s in stacks.items()}


def _with_entry(stack: Any, k: int, entry: Tensor) -> Any:
    """The stack with another entry k, or last."""
    k = min(k, len(stack) - 1)
    if isinstance(stack, tuple):
        return (*stack[:k], entry, *stack[k + 1 :])
    return torch.select_scatter(stack, entry, 0, k)


class Statistics(NamedTuple):
    """The model's buffers as one task's inner loop sees them. Calls give new ones; nothing is changed in place.

    Attributes:
        shared: buffers with one value for all inner steps (every buffer, without BNRS).
        per_step: stacks ``[K, ...]`` of the normalisation layers' buffers (BNRS); tuples of K while they are ``apart``.
    """

    shared: dict[str, Tensor]
    per_step: dict[str, Any]

    def at_step(self, k: int) -> dict[str, Tensor]:
        """The buffers to call the model with at inner step k."""
        return {**self.shared, **at_step(self.per_step, k)}

    def updated(self, k: int, buffers: Mapping[str, Tensor]) -> Statistics:
        """These statistics with the buffers that a call at inner step k left behind."""
        return Statistics(
            {name: buffers[name] for name in self.shared},
            {name: _with_entry(stacked, k, buffers[name]) for name, stacked in self.per_step.items()},
        )

    def apart(self) -> Statistics:
        """The same, each stack a tuple of its entries: a new entry moves none of the others."""
        return self._replace(per_step={name: t.unbind() for name, t in self.per_step.items()})

    def stacked(self) -> Statistics:
        """The inverse of ``apart``."""
        return self._replace(per_step={name: torch.stack(tuple(t)) for name, t in self.per_step.items()})

    def expanded(self, tasks: int) -> Statistics:
        """A copy for each task of a meta-batch, along a new first dimension."""
        return Statistics(*({n: t.expand(tasks, *t.shape).clone() for n, t in group.items()} for group in self))

    def copied(self) -> Statistics:
        """A copy with memory of its own."""
        return Statistics(*({n: t.clone() for n, t in group.items()} for group in self))

    def assign(self, other: Statistics) -> None:
        """Take over other values, in place."""
        for own, values in zip(self, other, strict=True):
            for name, value in own.items():
                value.copy_(values[name])

    def assign_mean(self, tasks: Statistics) -> None:
        """Take over, in place, what the tasks of a meta-batch left behind (``[T, ...]``): the mean of their copies.

        Counters (integer buffers such as ``num_batches_tracked``) are the same in every task; the largest is taken.
        What every task left alike stays so to the bit: the mean of equal numbers can differ from them by rounding.
        """
        for own, copies in zip(self, tasks, strict=True):
            for name, value in own.items():
                left = copies[name]
                alike = (left == left[0]).all(0)
                merged = left.mean(0) if value.is_floating_point() or value.is_complex() else left.amax(0)
                value.copy_(torch.where(alike, left[0], merged))
