"""A run shared out over devices and machines by ``torch.distributed``: one process, a *rank*, for each device.

Every rank holds the same learner and takes its share of each meta-batch's tasks. Once per outer step the ranks add up
their meta-gradients and all take the same step, so that they stay alike to the bit. Rank 0 alone writes files and shows
progress. What is small (losses, outputs, signals) goes over gloo, meta-gradients on GPUs over NCCL.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.utils import _pytree as pytree

from innerloop.data import TaskSource
from innerloop.inner_loop import MetaParameters
from innerloop.learner import MetaBatchResult, MetaLearner
from innerloop.meta_gradients import TaskGradient
from innerloop.per_step import Statistics
from innerloop.tasks import concatenated
from innerloop.training.workers import GradientRequest, Request, TrainingPart, WorkerError, Workers, received, sendable
from innerloop.update_rules import Tensors

T = TypeVar("T")

TIMEOUT_SECONDS = 600
"""How long a rank waits for the others before it gives up, unless told otherwise."""

_START = timedelta(minutes=10)
_DATA = timedelta(days=1)
"""How long the ranks wait for the one that downloads or decodes the data set."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run as one of them sees them. By default there is this one alone.

    Attributes:
        rank: 0 .. size - 1, this process.
        size: how many there are, on all machines together.
        local_rank: 0 .. local_size - 1, this process among those of its machine; which GPU is its own.
        local_size: how many there are on this machine.
        timeout: seconds that a rank waits for the others.
        group: what they talk over; ``None`` where there is nobody to talk to.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    timeout: float = TIMEOUT_SECONDS
    group: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes files and shows progress."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on each of them.

        Raises:
            WorkerError: a rank is gone, or did not come within the timeout.
        """
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with self.talking():
            # It says which ranks are missing, which no other collective does.
            dist.monitored_barrier(self.group, timedelta(seconds=self.timeout), wait_all_ranks=True)
            dist.all_gather_object(values, value, self.group)
        return values

    def shared(self, compute: Callable[[], T]) -> T:
        """What ``compute`` returns or raises on rank 0, on every rank. The others do not call it.

        Raises:
            WorkerError: as ``gather``.
        """
        if self.group is None:
            return compute()
        answer: list[Any] = [None]
        if self.main:
            try:
                answer = [pytree.tree_map(sendable, compute())]
            except (ValueError, OSError) as error:
                answer = [error]
        with self.talking():
            dist.broadcast_object_list(answer, src=0, group=self.group)
        result: T = received(answer[0])
        return result

    def agreed(self, signals: Sequence[int]) -> int | None:
        """A signal that some rank has noted: the same answer on every rank, so that all stop at the same place.

        Raises:
            WorkerError: as ``gather``.
        """
        if self.group is None:
            return signals[0] if signals else None
        number = torch.tensor(signals[0] if signals else 0)
        with self.talking():
            dist.all_reduce(number, dist.ReduceOp.MAX, self.group)
        return int(number) or None

    @contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """One rank of each machine goes first; the others find what it has downloaded and cached."""
        if self.group is None:
            yield
            return
        if self.local_rank > 0:
            with self.talking():
                dist.monitored_barrier(self.group, _DATA)
        try:
            yield
        finally:
            if self.local_rank == 0:
                with self.talking():
                    dist.monitored_barrier(self.group, _DATA)

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Say in our own words that other ranks are gone or hung."""
        try:
            yield
        except RuntimeError as error:
            # gloo's first line, without the place in its source and its advice.
            what = re.sub(r"\[/\S+\] ", "", str(error).strip().splitlines()[0]).split(". This is typically")[0]
            raise WorkerError(
                f"rank {self.rank} lost the others: {what}. (A rank was killed, failed, "
                f"or hung for longer than --timeout {self.timeout:g} s.) What was saved is kept: "
                "torchrun --max-restarts K goes on by itself, innerloop train --resume RUN when you say so"
            ) from None


ALONE = Ranks()
"""A process that shares its work with no rank."""


def launched() -> bool:
    """Whether torchrun (or ``--devices``) has started this process as one of several."""
    return dist.is_available() and dist.is_torchelastic_launched()


def restarted() -> bool:
    """Whether torchrun has started the processes again because one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def joined(timeout: float = TIMEOUT_SECONDS) -> Iterator[Ranks]:
    """The ranks that torchrun has started; ``ALONE`` where it has not.

    Args:
        timeout: seconds that a rank waits for the others before it gives them up for lost.
    """
    if not launched():
        yield ALONE
        return
    allowed = timedelta(seconds=timeout)
    # Machines start at different times, whatever is allowed between two steps.
    start = max(_START, allowed)
    with Ranks(int(os.environ["RANK"]), timeout=start.total_seconds()).talking():
        store, rank, size = next(rendezvous("env://", timeout=start))
        store = _unused(store, rank, size, start)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=start)
        group = dist.new_group(backend="gloo", timeout=allowed)
    local_rank, local_size = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    yield Ranks(rank, size, local_rank, local_size, timeout, group)
    dist.destroy_process_group()  # not after an error: it would wait for those who are gone


def _unused(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """A part of torchrun's store that no earlier start of the ranks has left its addresses in.

    torchrun keeps one store over restarts, and counts restarts for each machine. So rank 0 names the part, the others
    answer there, and rank 0 confirms whose answers it has read: an earlier one has confirmed other answers.
    """
    if rank == 0:
        part = uuid.uuid4().hex
        store.set("innerloop", part)
        answers = [f"{part}/{other}" for other in range(1, size)]
        if answers:
            store.wait(answers, timeout)
        store.set(f"{part}/confirmed", " ".join(store.get(answer).decode() for answer in answers))
        return PrefixStore(part, store)
    answer, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        part = store.get("innerloop").decode()
        store.set(f"{part}/{rank}", answer)
        if store.check([f"{part}/confirmed"]) and answer in store.get(f"{part}/confirmed").decode():
            return PrefixStore(part, store)
        time.sleep(0.05)
    raise WorkerError(f"rank {rank} has not met the others in {timeout.total_seconds():g} s")


class DistributedWorkers(Workers):
    """All ranks as one: the interface of ``Workers``, called on every rank alike.

    All ranks get all results. Each takes the initial weights of rank 0.

    Args:
        learner: this rank's; all ranks' are alike.
        source: the same tasks on every rank.
        ranks: the processes.
        capture: replay meta-gradients as CUDA graphs.
    """

    def __init__(self, learner: MetaLearner, source: TaskSource, ranks: Ranks, capture: bool = False) -> None:
        super().__init__(learner, source, capture=capture)
        self.ranks = ranks
        on_gpu = next(learner.parameters()).device.type == "cuda"
        timeout = timedelta(seconds=ranks.timeout)
        self._group = dist.new_group(backend="nccl", timeout=timeout) if on_gpu else ranks.group
        learner.load_state_dict(self._over_ranks(learner.state_dict(), self._from_main))

    @property
    def count(self) -> int:
        """Ranks, this one included."""
        return self.ranks.size

    def backward(self, start: int, size: int, epoch: float) -> tuple[MetaBatchResult, Tensor]:
        """``MetaLearner.backward`` on training tasks ``start .. start + size - 1``, shared out evenly.

        The same tasks whatever the number of ranks; sums are the same but for rounding. Ranks beyond the number of
        tasks add zeros.

        Returns:
            The result on all tasks, and their query targets ``[T, n, ...]``, both on the CPU.

        Raises:
            NonFiniteLossError: on every rank, whichever had the task.
            WorkerError: a rank is gone, or did not come within the timeout.
        """
        rank, count = self.ranks.rank, self.ranks.size
        first, end = (start + size * i // count for i in (rank, rank + 1))
        own = GradientRequest(first, end - first, epoch).answer(self._gradients, self.source) if end > first else None
        seen = concatenated(self._gathered(own and _Seen.of(own)))
        gradient, statistics = self._added_up(own and own.gradients, seen.learned, size)
        result = TaskGradient(
            seen.loss, gradient, seen.support_losses, seen.query_losses, seen.query_outputs, statistics
        )
        return self.learner.accumulate([result], epoch), seen.targets

    def _ask(self, requests: Sequence[Request]) -> list[Any]:
        """Answers to the requests, one a rank, on every rank."""
        mine = self.ranks.rank < len(requests)
        return self._gathered(requests[self.ranks.rank].answer(self.learner, self.source) if mine else None)

    def _gathered(self, own: T | None) -> list[T]:
        """What the ranks that had tasks have to show."""
        answers = self.ranks.gather(pytree.tree_map(sendable, own))
        return [received(answer) for answer in answers if answer is not None]

    def _added_up(
        self, own: TaskGradient | None, learned: Sequence[str], tasks: int
    ) -> tuple[MetaParameters, Statistics]:
        """The sum of all tasks' gradients, and what ``Statistics.assign_mean`` makes of all their copies, as one copy.

        Args:
            own: of this rank's tasks, if it has any.
            learned: the names of what gets a gradient.
            tasks: how many there are on all ranks.
        """
        parameters = dict(self.learner.named_parameters())
        gradients = {} if own is None else _by_name(own.gradient)
        terms = {n: gradients[n] if n in gradients else torch.zeros_like(parameters[n]) for n in learned}
        before = _by_name(self.learner.statistics, "statistics/")
        left = {} if own is None else _by_name(own.statistics, "statistics/")
        extremes: Tensors = {}
        for name, value in before.items():
            copies = left.get(name, value[None][:0])
            if not value.is_floating_point():  # a counter: the largest
                least = torch.full_like(value, torch.iinfo(torch.int64).min, dtype=torch.int64)
                extremes[name] = torch.cat([copies, least[None]]).amax(0)
                continue
            terms[name] = copies.sum(0)
            least = torch.full_like(value, -torch.inf)
            extremes[name] = torch.cat([copies, least[None]]).amax(0)
            extremes["minus " + name] = torch.cat([-copies, least[None]]).amax(0)
        sums, extremes = self._over_ranks(terms, self._add), self._over_ranks(extremes, self._highest)
        merged: Tensors = {}
        for name, value in before.items():
            merged[name] = extremes[name]
            if value.is_floating_point():
                mean = sums[name] / tasks
                alike = (extremes[name] == -extremes["minus " + name]) & ~mean.isnan()
                merged[name] = torch.where(alike, extremes[name], mean)
        copy = {name: value[None] for name, value in merged.items()}
        return (
            MetaParameters(*_groups(MetaParameters._fields, {n: sums[n] for n in learned})),
            Statistics(*_groups(Statistics._fields, copy, "statistics/")),
        )

    def _over_ranks(self, tensors: Tensors, collective: Callable[[Tensor], Any]) -> Tensors:
        """``collective`` on all tensors, joined into one flat buffer for each dtype."""
        results: Tensors = {}
        for dtype in dict.fromkeys(t.dtype for t in tensors.values()):
            those = {n: t for n, t in tensors.items() if t.dtype == dtype}
            joined = torch.cat([t.detach().reshape(-1) for t in those.values()])
            # gloo knows the CPU alone; what lies there, or on a GPU with NCCL, is not copied.
            flat = joined if joined.device.type == "cuda" else joined.cpu()
            with self.ranks.talking():
                collective(flat)
            pieces = torch.split(flat.to(joined.device), [t.numel() for t in those.values()])
            for (name, tensor), piece in zip(those.items(), pieces, strict=True):
                results[name] = torch.empty_like(tensor).copy_(piece.view(tensor.shape))
        return results

    def _add(self, flat: Tensor) -> None:
        dist.all_reduce(flat, dist.ReduceOp.SUM, self._group)

    def _highest(self, flat: Tensor) -> None:
        dist.all_reduce(flat, dist.ReduceOp.MAX, self._group)

    def _from_main(self, flat: Tensor) -> None:
        dist.broadcast(flat, 0, self._group)


def exchanged_bytes(learner: MetaLearner) -> int:
    """Bytes of the buffers that the ranks all-reduce in a step: S of the model of its time in docs/distributed.md.

    Meta-gradients once; running statistics as sum, largest and least; counters once, as int64.
    """
    statistics = [t for group in learner.statistics for t in group.values()]
    floats = sum(t.nbytes for t in statistics if t.is_floating_point())
    counters = sum(8 * t.numel() for t in statistics if not t.is_floating_point())
    return sum(p.nbytes for p in learner.parameters()) + 3 * floats + counters


class _Seen(NamedTuple):
    """What a rank saw on its tasks, for all to know: tensors ``[T, ...]``, and the names of what got a gradient."""

    loss: Tensor
    support_losses: Tensor
    query_losses: Tensor
    query_outputs: Any
    targets: Tensor
    learned: list[str]

    @staticmethod
    def of(part: TrainingPart) -> _Seen:
        """Without what is added up."""
        g = part.gradients
        learned = list(_by_name(g.gradient))
        return _Seen(g.loss, g.support_losses, g.query_losses, g.query_outputs, part.targets, learned)


def _by_name(groups: MetaParameters | Statistics, prefix: str = "") -> Tensors:
    return {f"{prefix}{group}/{name}": t for group, tensors in groups._asdict().items() for name, t in tensors.items()}


def _groups(names: Sequence[str], tensors: Tensors, prefix: str = "") -> Iterator[Tensors]:
    """What ``_by_name`` put into one dict, group by group."""
    for group in (f"{prefix}{name}/" for name in names):
        yield {name.removeprefix(group): t for name, t in tensors.items() if name.startswith(group)}


def launch(devices: int, arguments: Sequence[str]) -> int:
    """Run ``python -m innerloop ARGUMENTS`` as ``devices`` ranks on this machine, as torchrun does.

    Returns:
        The exit code: that of the rank that failed first.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks say themselves what went wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if sys.platform.startswith("linux"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="innerloop-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=devices,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "innerloop", *arguments)
        except SignalException as stop:
            return 128 + int(stop.sigval)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                name = signal.Signals(-failure.exitcode).name
                raise WorkerError(f"rank {rank} was stopped by {name} (SIGKILL is often for lack of memory)") from None
            return failure.exitcode
    return 0
