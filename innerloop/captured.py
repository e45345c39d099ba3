"""Meta-gradients recorded once and replayed: on a GPU, launching a small network's step takes longer than the step.

All tasks are vmapped, and everything from the meta-batch to its gradients is one CUDA graph, which the host launches in
one call. Its inputs and outputs live at fixed places: a new meta-batch is copied in, gradients and losses copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from innerloop.engines import Plan
from innerloop.learner import MetaBatch, MetaBatchResult, MetaLearner
from innerloop.meta_gradients import TaskGradient
from innerloop.tasks import Task, as_meta_batch

WARM_UP = 3
"""Steps taken before one is recorded: libraries choose and set up their kernels in them."""


@dataclass(frozen=True)
class _Recording:
    """A computation at fixed places: ``replay`` reads tasks and weights, and writes the gradients."""

    tasks: Task
    weights: list[Tensor | float]
    gradients: TaskGradient
    replay: Callable[[], None]


class CapturedGradients:
    """A learner's ``task_gradients`` and ``backward`` by CUDA graphs.

    There is one graph for each shape of meta-batch, derivative order and pattern of the multi-step loss. On a CPU the
    same computation goes through the same fixed places without a graph, which is of use to tests alone.

    >>> captured = CapturedGradients(learner)                                              # doctest: +SKIP
    >>> captured.backward(tasks, epoch); optimizer.step(); optimizer.zero_grad()           # doctest: +SKIP

    Args:
        learner: its model draws no random numbers (dropout), and does nothing that waits for the device. Its tensors
            stay where they are, as they do under an optimiser's steps and ``load_state_dict``.

    Raises:
        ValueError: the learner's tasks are not vmapped.
    """

    def __init__(self, learner: MetaLearner) -> None:
        if not learner.vmapped:
            raise ValueError(
                "only vmapped tasks can be captured: MetaLearner(..., parallel='vmap'), not mode='reverse'"
            )
        self.learner = learner
        self._recordings: dict[Hashable, _Recording] = {}

    def backward(self, tasks: Task | MetaBatch, epoch: float | None = None) -> MetaBatchResult:
        """``MetaLearner.backward``."""
        return self.learner.accumulate([self.task_gradients(tasks, epoch)], epoch)

    def task_gradients(self, tasks: Task | MetaBatch, epoch: float | None = None) -> TaskGradient:
        """``MetaLearner.task_gradients``."""
        tasks, plan = as_meta_batch(tasks, self.learner._like), self.learner.plan(epoch)
        given, structure = pytree.tree_flatten(tasks)
        shapes = tuple((t.shape, t.dtype) for t in given)
        key = (structure, shapes, plan.mode, tuple(w != 0 for w in plan.weights))
        if key not in self._recordings:
            self._recordings[key] = self._recorded(tasks, plan)
        recording = self._recordings[key]
        for place, value in zip(pytree.tree_leaves(recording.tasks), given, strict=True):
            place.copy_(value)
        for place, weight in zip(recording.weights, plan.weights, strict=True):
            if isinstance(place, Tensor):
                place.fill_(weight)
        recording.replay()
        copied: TaskGradient = pytree.tree_map_only(Tensor, torch.clone, recording.gradients)
        return copied

    def _recorded(self, tasks: Task, plan: Plan) -> _Recording:
        tasks = pytree.tree_map(torch.clone, tasks)
        like = next(iter(self.learner.meta.adapted.values()))
        # Numbers would be part of the graph; of the weights that MSL moves, only which are zero is.
        weights: list[Tensor | float] = [
            torch.tensor(w, dtype=like.dtype.to_real(), device=like.device) if w else 0.0 for w in plan.weights
        ]
        at_fixed_places = Plan(plan.mode, weights)

        def compute() -> TaskGradient:
            return self.learner.planned_gradients(tasks, at_fixed_places)

        if like.device.type == "cuda":
            return _Recording(tasks, weights, *_captured(compute, like.device))
        gradients = compute()

        def replay() -> None:
            for place, value in zip(pytree.tree_leaves(gradients), pytree.tree_leaves(compute()), strict=True):
                place.copy_(value)

        return _Recording(tasks, weights, gradients, replay)


def _captured(compute: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """What ``compute`` returned, and what writes it there again."""
    here, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            compute()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compute()
    return result, graph.replay
