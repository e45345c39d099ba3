"""What an engine is given, and what it does."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from innerloop.adapted import Asked, TaskOutputs
from innerloop.inner_loop import InnerLoop, MetaParameters
from innerloop.meta_gradients import GradientMode, LossWeights, TaskGradient
from innerloop.per_step import Statistics
from innerloop.tasks import Task


class Plan(NamedTuple):
    """What a meta-gradient is to be, at one time in training.

    Attributes:
        mode: how it is computed.
        weights: w_1 .. w_K of the query losses.
    """

    mode: GradientMode
    weights: LossWeights


class Subject(NamedTuple):
    """What is meta-learned, as it is now.

    Attributes:
        loop: how one task is learned.
        meta: meta-parameters.
        statistics: the model's buffers.
    """

    loop: InnerLoop
    meta: MetaParameters
    statistics: Statistics


class Engine(Protocol):
    """A way to compute meta-batches; nothing of the subject is changed."""

    def gradients(self, subject: Subject, tasks: Task, plan: Plan) -> TaskGradient:
        """The gradient summed over the tasks, all else stacked: tensors ``[T, ...]``."""

    def outputs(self, subject: Subject, tasks: Task, asked: Asked) -> TaskOutputs:
        """Outputs on the query sets of test tasks: tensors ``[T, ...]``."""
