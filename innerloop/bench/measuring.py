"""Contenders side by side: each in a process of its own, asked in turn, so that noise falls on all alike."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from innerloop.bench.cases import CPU, Case
from innerloop.bench.contenders import CONTENDERS, Step


class ContenderError(RuntimeError):
    """A contender's process failed."""


@dataclass
class Measurement:
    """What one contender showed on one case.

    Attributes:
        seconds: of each round's step.
        loss: of the last step; the same for all that do the same arithmetic, but for rounding.
        memory: peak resident memory of its processes together, above what they held with the libraries imported, in
            bytes; ``None`` where the system does not say.
        memory_total: the same with what they held before.
        device_memory: peak of the tensors on the GPU, in bytes; ``None`` elsewhere.
        kernels: that the GPU runs for a step; ``None`` elsewhere.
        compile_seconds: spent on compiling, with an empty cache, in the steps of the warm-up; ``None`` where nothing is
            compiled.
        failure: why it was left behind, where it failed.
    """

    seconds: list[float] = field(default_factory=list)
    loss: float = float("nan")
    failure: str | None = None
    memory: int | None = None
    memory_total: int | None = None
    device_memory: int | None = None
    kernels: int | None = None
    compile_seconds: float | None = None

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds) if self.seconds else float("nan")


def measure(
    case: Case,
    names: Sequence[str],
    rounds: int,
    warm_up: int = 2,
    tick: Callable[[str], None] = lambda _: None,
    device: torch.device = CPU,
) -> dict[str, Measurement]:
    """Time a step of each contender ``rounds`` times, in turn, after ``warm_up`` steps of each that do not count.

    One that fails says so in its measurement, and the others go on.
    """
    results = {name: Measurement() for name in names}
    with ExitStack() as running:
        asked = {name: running.enter_context(_running(case, name, device)) for name in names}
        for turn in range(-warm_up, rounds):
            for name, ask in asked.items():
                tick(name)
                own = results[name]
                if own.failure is not None:
                    continue
                try:
                    seconds, loss = ask("step")
                except ContenderError as error:
                    own.failure, own.seconds = str(error), []
                    continue
                if turn >= 0:
                    own.seconds.append(seconds)
                    own.loss = loss
        for name, ask in asked.items():
            if results[name].failure is None:
                with suppress(ContenderError):  # the times are there, whatever became of it since
                    results[name] = replace(results[name], **ask("rest"))
    return results


def ratios(slower: Measurement, faster: Measurement) -> list[float]:
    """How many times as long the one took as the other, in each round."""
    return [a / b for a, b in zip(slower.seconds, faster.seconds, strict=True)]


@contextmanager
def _running(case: Case, name: str, device: torch.device) -> Iterator[Callable[[str], Any]]:
    """A contender's process; the function asks it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    process = context.Process(target=_serve, args=(there, case, name, device, cache.name))
    process.start()
    there.close()

    def ask(what: str) -> Any:
        try:
            here.send(what)
            answer = here.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            process.join(5)
            raise ContenderError(
                f"{name} died with exit code {process.exitcode} (-9 is often for want of memory)"
            ) from None
        if isinstance(answer, Exception):
            raise ContenderError(f"{name} failed: {answer}")
        return answer

    try:
        yield ask
    finally:
        here.close()
        process.join(timeout=10)
        if process.is_alive():
            process.terminate()
            process.join()
        cache.cleanup()


def _serve(connection: Connection, case: Case, name: str, device: torch.device, cache: str) -> None:
    """A contender's life: a step or what else there is to say, whenever it is asked, until nobody can ask any more."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # an empty one: compiling takes what it takes the first time
    before = _peak([os.getpid()])
    step = None
    while True:
        try:
            what = connection.recv()
        except EOFError:
            break
        try:
            step = step or CONTENDERS[name].build(case, device)
            answer: Any = timed(step, device) if what == "step" else _rest(step, device, before)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send(answer)
    os._exit(0)  # workers end with their pipes; nothing here is worth waiting for


def timed(step: Step, device: torch.device) -> tuple[float, float]:
    """Seconds of a step, or of the mean of some short ones, on a GPU between two of its events, and the loss."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record()
        loss = step.take()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3, loss
    started, taken = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < SHORT or not taken:
        loss, taken = step.take(), taken + 1
    return elapsed / taken, loss


SHORT = 0.05
"""Seconds that a round takes at least, by several steps: what the others left in the caches is not what is measured."""


def operations(step: Step, device: torch.device) -> int:
    """Kernels that the GPU runs for a step, one by one or in a graph; on a CPU, operations of this process."""
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step.take()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profiler.events() or []
    return sum(e.device_type == kind and not e.name.startswith(("Memcpy", "Memset")) for e in events)


def _rest(step: Step, device: torch.device, before: int | None) -> dict[str, Any]:
    """The rest of a measurement, once all steps have been timed."""
    children = [p.pid for p in multiprocessing.active_children() if p.pid is not None]
    total = _peak([os.getpid(), *children])
    # A worker starts as this process did.
    above = None if total is None or before is None else total - before * (1 + len(children))
    on_gpu = device.type == "cuda"
    return {
        "memory": above,
        "memory_total": total,
        "device_memory": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "kernels": operations(step, device) if on_gpu else None,
        "compile_seconds": step.compile_seconds(),
    }


def _peak(processes: Sequence[int]) -> int | None:
    """Peak resident bytes of these processes together."""
    if sys.platform.startswith("linux"):
        total = 0
        for process in processes:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
        return total
    if sys.platform == "darwin" and len(processes) == 1:
        import resource  # which Windows has not

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None
