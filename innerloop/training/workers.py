"""Tasks shared out over processes on one machine.

On a CPU the tasks of a meta-batch run faster side by side, one thread each, than one after the other with several
threads in each operation: most operations are too small to split. The main process keeps all state. Workers hold the
same learner in shared memory, so they see every update at once, and are asked for gradients and outputs only.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from innerloop.adapted import TaskOutputs
from innerloop.captured import CapturedGradients
from innerloop.data import Split, TaskSource
from innerloop.learner import MetaBatchResult, MetaLearner
from innerloop.meta_gradients import TaskGradient
from innerloop.norm_layers import Normalisation
from innerloop.training.memory import keep_freed_memory


class WorkerError(RuntimeError):
    """A worker process failed or died."""


class TrainingPart(NamedTuple):
    """The gradients of some tasks, and their query targets ``[T, n, ...]``."""

    gradients: TaskGradient
    targets: Tensor


@dataclass(frozen=True)
class GradientRequest:
    """Ask for the gradients of some tasks of a meta-batch."""

    start: int
    size: int
    epoch: float

    def answer(self, gradients: MetaLearner | CapturedGradients, source: TaskSource) -> TrainingPart:
        """Compute them."""
        tasks = source.meta_batch("train", self.start, self.size)
        return TrainingPart(gradients.task_gradients(tasks, self.epoch), tasks.query.targets)


@dataclass(frozen=True)
class OutputsRequest:
    """Ask to adapt to some tasks of a split and for the outputs on their query sets."""

    split: Split
    indices: range
    steps: int
    normalisations: tuple[Normalisation, ...]

    def answer(self, learner: MetaLearner, source: TaskSource) -> TaskOutputs:
        """Compute them: tensors ``[T, ...]``."""
        tasks = source.meta_batch(self.split, self.indices.start, len(self.indices))
        return learner.task_outputs(tasks, self.steps, self.normalisations)


Request = GradientRequest | OutputsRequest

TASKS_AT_ONCE, VMAPPED_AT_ONCE = 5, 50
"""Evaluation tasks handed to each process at a time: progress shows after each such round."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """The calling process and ``processes - 1`` more, all with the same learner and tasks. Use it in a ``with``.

    Args:
        learner: its tensors move to shared memory, in place.
        source: what tasks are taken from; sent to each worker once.
        processes: 1: everything is done here, as if there were no workers.
        threads: threads of each worker inside an operation; those of the calling process are its own business.
        capture: replay the calling process's meta-gradients as CUDA graphs.
    """

    def __init__(
        self,
        learner: MetaLearner,
        source: TaskSource,
        processes: int = 1,
        threads: int = 1,
        capture: bool = False,
    ) -> None:
        self.learner, self.source = learner, source
        self._gradients = CapturedGradients(learner) if capture else learner
        self._connections: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        if processes > 1:
            learner.share_memory()
        context = multiprocessing.get_context("spawn")
        for _ in range(processes - 1):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, learner, source, threads), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()  # a worker ends when nobody can ask it any more
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
        self._connections, self._processes = [], []

    @property
    def count(self) -> int:
        """Processes, this one included."""
        return len(self._connections) + 1

    def backward(self, start: int, size: int, epoch: float) -> tuple[MetaBatchResult, Tensor]:
        """``MetaLearner.backward`` on training tasks ``start .. start + size - 1``, shared out evenly.

        The same tasks whatever the number of processes; sums are the same but for rounding.

        Returns:
            The result, and the tasks' query targets ``[T, n, ...]``.
        """
        bounds = [start + size * i // self.count for i in range(self.count + 1)]
        spans = [(a, b - a) for a, b in pairwise(bounds) if b > a]
        parts: list[TrainingPart] = self._ask([GradientRequest(first, count, epoch) for first, count in spans])
        result = self.learner.accumulate([part.gradients for part in parts], epoch)
        return result, torch.cat([part.targets for part in parts])

    def outputs(
        self, split: Split, tasks: int, steps: int, normalisations: tuple[Normalisation, ...]
    ) -> Iterator[TaskOutputs]:
        """Outputs on tasks ``0 .. tasks - 1`` of a split, in order, a round of a few tasks at a time."""
        size = VMAPPED_AT_ONCE if self.learner.vmapped else TASKS_AT_ONCE
        for first in range(0, tasks, size * self.count):
            last = min(first + size * self.count, tasks)
            yield from self._ask(
                [
                    OutputsRequest(split, range(start, min(start + size, last)), steps, normalisations)
                    for start in range(first, last, size)
                ]
            )

    def _ask(self, requests: Sequence[Request]) -> list[Any]:
        """Answers to the requests: the last is worked out here, the others by a worker each."""
        asked = list(zip(self._connections, requests[:-1], strict=False))
        try:
            for connection, request in asked:
                connection.send(request)
            last = requests[-1]
            own: Any
            if isinstance(last, GradientRequest):
                own = last.answer(self._gradients, self.source)
            else:
                own = last.answer(self.learner, self.source)
            answers = [received(connection.recv()) for connection, _ in asked]
        except (EOFError, BrokenPipeError, ConnectionResetError):
            codes = [p.exitcode for p in self._processes]
            raise WorkerError(
                f"a worker process died (exit codes {codes}; -9 is often for lack of memory). "
                "What was saved is kept: resume the run, with fewer --processes if memory was short"
            ) from None
        return [*answers, own]


def _work(connection: Connection, learner: MetaLearner, source: TaskSource, threads: int) -> None:
    """A worker's life: answer requests until nobody can ask any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    torch.set_num_threads(threads)
    keep_freed_memory()
    while True:
        try:
            request: Request = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answer = pytree.tree_map(sendable, request.answer(learner, source))
        except Exception as error:
            answer = error
        try:
            connection.send(answer)
        except BrokenPipeError:
            return


def sendable(leaf: Any) -> Any:
    """A tensor as an array, anything else as it is."""
    # A tensor would go through a shared memory file of its own, or a slow pickle.
    return leaf.detach().cpu().numpy() if isinstance(leaf, Tensor) else leaf


def received(answer: Any) -> Any:
    """A nest of what ``sendable`` gave, with tensors again; an exception is raised."""
    if isinstance(answer, Exception):
        raise answer
    return pytree.tree_map(lambda leaf: torch.from_numpy(leaf) if hasattr(leaf, "__array__") else leaf, answer)
