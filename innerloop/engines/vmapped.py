"""All tasks at once, by ``torch.func.vmap``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from innerloop import together
from innerloop.adapted import Asked, TaskOutputs, task_outputs
from innerloop.engines.engine import Plan, Subject
from innerloop.engines.loop import Loop
from innerloop.meta_gradients import META_GRADIENTS, TaskGradient
from innerloop.per_step import Statistics
from innerloop.tasks import Task, meta_batch_size
from innerloop.update_rules import Tensors

Result = TypeVar("Result")


class Vmapped:
    """All tasks at once; one by one where a model cannot be vmapped (``nn.LSTM``), with one warning.

    Args:
        insists: raise what vmap raises.
    """

    def __init__(self, insists: bool = False) -> None:
        self.insists = insists
        self.works = True
        """Until a model was met that cannot be vmapped."""
        self._loop = Loop()

    def gradients(self, subject: Subject, tasks: Task, plan: Plan) -> TaskGradient:
        """``Engine.gradients``; in reverse mode, which walks back over autograd's own graph, one by one."""

        def one(subject: Subject, task: Task) -> TaskGradient:
            return META_GRADIENTS[plan.mode](*subject, task, plan.weights)

        def one_by_one() -> TaskGradient:
            return self._loop.gradients(subject, tasks, plan)

        if plan.mode == "reverse" or not self._can(subject):
            return one_by_one()
        try:
            result = _all_at_once(one, subject, tasks)
        except Exception as error:
            return self._otherwise(one_by_one, subject, error)
        gradients, nest = pytree.tree_flatten(result.gradient)
        return result._replace(gradient=pytree.tree_unflatten(together.summed(gradients), nest))

    def outputs(self, subject: Subject, tasks: Task, asked: Asked) -> TaskOutputs:
        """``Engine.outputs``."""

        def one(subject: Subject, task: Task) -> TaskOutputs:
            return task_outputs(*subject, task, asked)

        def one_by_one() -> TaskOutputs:
            return self._loop.outputs(subject, tasks, asked)

        if not self._can(subject):
            return one_by_one()
        try:
            return _all_at_once(one, subject, tasks)
        except Exception as error:
            return self._otherwise(one_by_one, subject, error)

    def _can(self, subject: Subject) -> bool:
        return self.works and not subject.loop.network.recomputes

    def _otherwise(self, one_by_one: Callable[[], Result], subject: Subject, error: Exception) -> Result:
        if self.insists or isinstance(error, torch.OutOfMemoryError):
            raise error
        result = one_by_one()  # which raises what has nothing to do with vmap
        name = type(subject.loop.network.model).__name__
        warnings.warn(f"{name} cannot be vmapped, so tasks are worked through one by one. ({error})", stacklevel=6)
        self.works = False
        return result


def _all_at_once(one: Callable[[Subject, Task], Result], subject: Subject, tasks: Task) -> Result:
    """``one`` of each task; what is no tensor is the same for all."""
    leaves, structure = pytree.tree_flatten(tasks)
    varying = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    functional = replace(subject.loop, functional=True)

    def of_one(statistics: Statistics, own: Tensors) -> Result:
        task = pytree.tree_unflatten([own.get(str(i), leaf) for i, leaf in enumerate(leaves)], structure)
        return one(Subject(functional, subject.meta, statistics), task)

    copies = subject.statistics.expanded(meta_batch_size(tasks))
    result: Result = vmap(of_one, randomness="different")(copies, varying)
    return result
