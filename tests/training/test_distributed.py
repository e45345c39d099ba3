"""Ranks over torch.distributed: the same gradients, statistics and runs as one process, whatever happens to a rank.

Ranks are real processes that talk over gloo on the loopback interface. Most start from a server that has imported
everything once; the rest are started by torchrun itself.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop import MetaLearner, NonFiniteLossError, maml_plus_plus
from innerloop.data import ClassImages, Episodes, Sinusoids
from innerloop.training.distributed import DistributedWorkers, Ranks, joined
from innerloop.training.evaluation import evaluate
from innerloop.training.workers import TaskOutputs, WorkerError, Workers

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["innerloop.cli.train", "innerloop.cli.evaluate", __name__])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """Ranks 0 .. size - 1, each calling ``function(*arguments)`` in a process of its own."""

    def __init__(self, size: int, function: Callable[..., Any], *arguments: Any) -> None:
        port = free_port()
        self.processes, self.connections = [], []
        for rank in range(size):
            here, there = _FORKS.Pipe(duplex=False)
            environment = {
                "RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_RUN_ID": "test",
                "GLOO_SOCKET_IFNAME": "lo" if sys.platform.startswith("linux") else "lo0",
                "INNERLOOP_CACHE": os.environ["INNERLOOP_CACHE"],
            }
            process = _FORKS.Process(target=_call, args=(there, environment, function, arguments), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join(10)

    def result(self, rank: int) -> Any:
        """What the rank's function returned, or the exception that it raised."""
        if not self.connections[rank].poll(100):
            raise TimeoutError(f"rank {rank} does not end")
        try:
            return self.connections[rank].recv()
        except EOFError:
            self.processes[rank].join(10)
            return self.processes[rank].exitcode

    def results(self) -> list[Any]:
        return [self.result(rank) for rank in range(len(self.processes))]


def _call(connection: Connection, environment: dict[str, Any], function: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    torch.set_num_threads(1)
    try:
        answer = function(*arguments)
    except Exception as error:
        answer = RuntimeError(f"{type(error).__name__}: {error}")
    connection.send(answer)
    connection.close()
    os._exit(0)


class Counting(nn.Module):
    """Buffers that are not norm statistics: one that calls change, one that they count in, two that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(2**60))
        self.register_buffer("mask", torch.tensor([0.1, -torch.inf, torch.nan], dtype=torch.float64))
        self.register_buffer("on", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1 * x.mean().detach())
        self.calls += 1
        return x


def make_source() -> Episodes:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (18, 1, 6, 6), dtype=torch.uint8, generator=generator)
    classes = ClassImages(images, (3,) * 6, tuple("abcdef"))
    return Episodes({"train": classes, "val": classes}, ways=3, shots=1, queries=2, dtype=torch.float64)


def make_learner(seed: int = 0, bnrs: bool = True) -> MetaLearner:
    torch.manual_seed(seed)
    convolution = nn.Conv2d(1, 3, 3).to(memory_format=torch.channels_last)
    model = nn.Sequential(convolution, nn.BatchNorm2d(3), Counting(), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))
    return MetaLearner(model.double(), F.cross_entropy, maml_plus_plus(inner_steps=2, da_epochs=0, bnrs=bnrs))


SIZES = (7, 5, 3, 1)  # uneven shares, and fewer tasks than ranks


def updates(workers: Workers) -> dict[str, Any]:
    """Meta-gradients, statistics, results and outputs of a few updates."""
    optimizer = torch.optim.SGD(workers.learner.parameters(), lr=0.1)
    seen: dict[str, Any] = {}
    for size in SIZES:
        result, targets = workers.backward(11 * size, size, epoch=1.0)
        seen |= {f"{size} grad {n}": p.grad for n, p in workers.learner.named_parameters()}
        seen[f"{size} losses"], seen[f"{size} outputs"] = result.support_losses, result.query_outputs
        seen[f"{size} loss"], seen[f"{size} targets"] = result.loss, targets
        optimizer.step()
        optimizer.zero_grad()
        seen |= {f"{size} state {n}": t.clone() for n, t in workers.learner.state_dict().items()}
        seen[f"{size} bits"] = bits(workers.learner)
    mine = evaluate(workers, "val", 17, steps=4, regression=False)
    seen |= {"batch": mine.outputs["batch"], "running": mine.outputs["running"], "targets": mine.targets}
    return {name: t.detach().numpy() if isinstance(t, Tensor) else t for name, t in seen.items()}


def bits(learner: MetaLearner) -> str:
    """A hash of every tensor of the learner."""
    tensors = learner.state_dict().items()
    return hashlib.sha256(b"".join(n.encode() + t.numpy().tobytes() for n, t in tensors)).hexdigest()


def _updates_of_a_rank(bnrs: bool) -> dict[str, Any]:
    with joined(timeout=60) as ranks:
        # Every rank draws its own weights: rank 0's are to be taken.
        return updates(DistributedWorkers(make_learner(ranks.rank, bnrs), make_source(), ranks))


@pytest.mark.parametrize(("size", "bnrs"), [(1, True), (2, True), (4, True), (3, False)])
def test_gradients_statistics_and_outputs_are_those_of_one_process(size: int, bnrs: bool) -> None:
    with Processes(size, _updates_of_a_rank, bnrs) as ranks:
        alone = updates(Workers(make_learner(bnrs=bnrs), make_source()))
        results = ranks.results()
    for found in results:
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            if "bits" in name:
                assert found[name] == results[0][name], name  # the same on all ranks
            else:
                torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, equal_nan=True, msg=name)
                if "mask" in name:
                    assert found[name].tobytes()[:16] == value.tobytes()[:16]  # what no task changes stays to the bit
