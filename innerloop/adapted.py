"""The model at fast weights theta^k: the tensors that it is called with, and what it answers on query sets."""

from __future__ import annotations

from typing import Any, NamedTuple

from innerloop import norm_layers
from innerloop.inner_loop import InnerLoop, MetaParameters
from innerloop.network import Network
from innerloop.norm_layers import Normalisation
from innerloop.per_step import Statistics
from innerloop.tasks import Task, stacked
from innerloop.update_rules import Tensors


class TaskOutputs(NamedTuple):
    """The model's outputs on the query sets of one task, or, with one more first dimension, of a meta-batch.

    Attributes:
        per_step: after inner step 0..K, in batch normalisation, tensors ``[K + 1, n, ...]``.
        inductive: after the last step, in the other normalisations that were asked for, tensors ``[n, ...]``.
        targets: of the query set.
    """

    per_step: Any
    inductive: dict[Normalisation, Any]
    targets: Any


class Asked(NamedTuple):
    """What is asked of a model on test tasks.

    Attributes:
        steps: inner steps K.
        normalisations: after the last of them; ``"batch"`` is answered after every step, asked for or not.
    """

    steps: int
    normalisations: tuple[Normalisation, ...]

    @property
    def inductive(self) -> list[Normalisation]:
        """Those beside ``"batch"``."""
        return [n for n in dict.fromkeys(self.normalisations) if n != "batch"]


def tensors_at(
    meta: MetaParameters, statistics: Statistics, theta: Tensors, kept: Tensors, inner_step: int
) -> tuple[Tensors, Tensors]:
    """Parameters and buffers (copies) to call the model with at theta^k; norm layers have those of step k - 1.

    ``kept`` are other buffers, as the inner loop left them.
    """
    last = max(inner_step - 1, 0)
    buffers = {n: b.clone() for n, b in {**statistics.at_step(last), **kept}.items()}
    return {**theta, **meta.fixed_at_step(last)}, buffers


def kept_buffers(network: Network, statistics: Statistics) -> Tensors:
    """The buffers that an inner loop hands on to whoever calls the model next: all but the norm layers'."""
    return {n: b for n, b in statistics.shared.items() if n not in network.norm_buffers}


def keep_statistics(network: Network, parameters: Tensors, buffers: Tensors, support: Any) -> None:
    """Leave in ``buffers`` what a pass over the support set makes of them: in norm layers, its statistics."""
    with network.modes.evaluating("batch"), norm_layers.whole_batch_statistics(network.model):
        network.answers(parameters, buffers, support)


def answers(
    network: Network, parameters: Tensors, buffers: Tensors, inputs: Any, normalisation: Normalisation, support: Any
) -> Any:
    """The model's outputs with these tensors, in evaluation mode; ``support`` are the inputs of the support set."""
    if normalisation == "support":
        keep_statistics(network, parameters, buffers, support)
    with network.modes.evaluating(normalisation):
        return network.answers(parameters, buffers, inputs)


def task_outputs(
    loop: InnerLoop, meta: MetaParameters, statistics: Statistics, task: Task, asked: Asked
) -> TaskOutputs:
    """Adapt to a task's support set and answer its query set after every inner step."""
    network, (support, query) = loop.network, task
    walk = loop.trajectory(meta, statistics, support, asked.steps)
    per_step = []
    for k in range(asked.steps + 1):
        with network.modes.adapting():
            theta, left, _ = next(walk)
        kept = kept_buffers(network, left)

        def answered(normalisation: Normalisation, k: int = k, theta: Tensors = theta, kept: Tensors = kept) -> Any:
            tensors = tensors_at(meta, statistics, theta, kept, k)
            return answers(network, *tensors, query.inputs, normalisation, support.inputs)

        per_step.append(answered("batch"))
    return TaskOutputs(stacked(per_step), {n: answered(n) for n in asked.inductive}, query.targets)
