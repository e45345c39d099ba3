"""One task after the other: memory for one, whatever their number."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from innerloop.adapted import Asked, TaskOutputs, task_outputs
from innerloop.engines.engine import Plan, Subject
from innerloop.inner_loop import MetaParameters
from innerloop.meta_gradients import META_GRADIENTS, NO_GRADIENT, TaskGradient
from innerloop.tasks import Task, meta_batch_size, select_task, stacked


class Loop:
    """The tasks one by one."""

    def gradients(self, subject: Subject, tasks: Task, plan: Plan) -> TaskGradient:
        """``Engine.gradients``."""
        total: MetaParameters | None = None
        rest: list[TaskGradient] = []
        for i in range(meta_batch_size(tasks)):
            result = META_GRADIENTS[plan.mode](*subject, select_task(tasks, i), plan.weights)
            total = result.gradient if total is None else pytree.tree_map(torch.add, total, result.gradient)
            rest.append(result._replace(gradient=NO_GRADIENT))
        assert total is not None
        return stacked(rest)._replace(gradient=total)

    def outputs(self, subject: Subject, tasks: Task, asked: Asked) -> TaskOutputs:
        """``Engine.outputs``."""
        return stacked([task_outputs(*subject, select_task(tasks, i), asked) for i in range(meta_batch_size(tasks))])
