"""A meta-training step over several processes: what it takes here, and a model of what it takes elsewhere.

python benchmarks/distributed.py measure                writes benchmarks/results/distributed.json, in some minutes
python benchmarks/distributed.py bytes                  what the ranks of each preset exchange in a step
python benchmarks/distributed.py model PRESET --step-ms 719 --gbit 10 --latency-us 50
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro

from innerloop.bench.cases import CASES, Case
from innerloop.bench.contenders import CONTENDERS, Contender, FixedTasks, Step, _innerloop
from innerloop.bench.measuring import measure, ratios
from innerloop.learner import MetaLearner
from innerloop.training.building import build_learner
from innerloop.training.checkpoints import write_json
from innerloop.training.config import PRESETS, ConfigError
from innerloop.training.distributed import DistributedWorkers, exchanged_bytes, joined
from innerloop.training.environment import environment
from innerloop.training.memory import keep_freed_memory
from innerloop.training.progress import Progress
from innerloop.training.workers import WorkerError, available_cores

RESULTS = Path(__file__).parent / "results" / "distributed.json"
ALONE, WORKERS, RANKS = "one process, one thread", "two worker processes", "two ranks"


def _alone(case: Case) -> Step:
    step = _innerloop(case, processes=1)
    torch.set_num_threads(1)
    return step


def _two_ranks(case: Case) -> Step:
    """Rank 0 in the calling process, and rank 1 in another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    other = multiprocessing.get_context("spawn").Process(target=_rank_one, args=(port, case), daemon=True)
    other.start()
    return _rank(0, port, case)


def _rank_one(port: int, case: Case) -> None:
    step = _rank(1, port, case)
    with suppress(WorkerError):  # rank 0 is gone: all is measured
        while True:
            step()


def _rank(rank: int, port: int, case: Case) -> Step:
    size = 2
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "benchmark",
    }
    torch.set_num_threads(max(1, available_cores() // size))
    keep_freed_memory()
    ranks = ExitStack().enter_context(joined())
    model = case.build_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = MetaLearner(model, F.cross_entropy, case.build_method())
    workers = DistributedWorkers(learner, FixedTasks(case.meta_batch()), ranks)

    def step() -> float:
        ranks.shared(lambda: None)  # rank 1 waits here until rank 0 is asked for a step
        result, _ = workers.backward(0, case.tasks, 0)
        for p in learner.parameters():
            p.grad = None
        return float(result.loss)

    return step


CONTENDERS |= {ALONE: Contender(_alone), WORKERS: Contender(lambda c: _innerloop(c, 2)), RANKS: Contender(_two_ranks)}


@dataclass(frozen=True)
class Measure:
    """Time a step of one process, of two worker processes and of two ranks, in turn."""

    cases: tuple[str, ...] = ("omniglot-mamlpp", "mini-imagenet-maml")
    """Which steps of ``innerloop bench``."""
    rounds: int = 15
    """Steps of each that count."""
    out: Path = RESULTS
    """The file to write."""

    def run(self) -> None:
        """Measure and record."""
        names, records = (ALONE, WORKERS, RANKS), {}
        for name in self.cases:
            if name not in CASES:
                raise ConfigError(f"there is no case {name!r}; there are {', '.join(CASES)}")
        progress = Progress()
        for name in self.cases:
            with progress.task(name, len(names) * (self.rounds + 2)) as bar:
                measured = measure(CASES[name], names, self.rounds, tick=lambda who: bar.advance(1, who))
            records[name] = {
                who: {
                    "seconds": m.seconds,
                    "median": m.median,
                    "loss": m.loss,
                    "speedup": statistics.median(ratios(measured[ALONE], m)),
                }
                for who, m in measured.items()
            }
            for who, record in records[name].items():
                print(
                    f"{name}, {who}: {record['median']:.3f} s/step, {record['speedup']:.2f} times one process's speed"
                )
        where = environment(torch.device("cpu"), available_cores())
        cases = {name: {"case": asdict(CASES[name]), "contenders": records[name]} for name in self.cases}
        write_json(self.out, {"version": 1, "rounds": self.rounds, "cases": cases, "environment": where})


@dataclass(frozen=True)
class Bytes:
    """What the ranks of each preset exchange in a step."""

    def run(self) -> None:
        """Print a table in Markdown."""
        print("| preset | tasks | meta-parameters | bytes all-reduced in a step |\n|---|---|---|---|")
        for name, preset in PRESETS.items():
            config = preset.config()
            learner = build_learner(config, torch.device("cpu"))
            learned = sum(p.numel() for p in learner.parameters())
            print(f"| {name} | {config.outer.meta_batch} | {learned:,} | {exchanged_bytes(learner):,} |")


@dataclass(frozen=True)
class Model:
    """Predict the time of a step over N devices from the time on one: docs/distributed.md has the formula."""

    preset: tyro.conf.Positional[str]
    """Whose meta-batch and meta-parameters."""
    step_ms: float = 1000.0
    """Time of a step on one device, ms."""
    gbit: float = 10.0
    """Bandwidth of the slowest link between two devices, Gbit/s."""
    latency_us: float = 50.0
    """Time of the smallest message between two devices, us."""
    serial_ms: float = 0.0
    """The part of the step that every device does whole: the outer optimiser, the launch of a recorded graph, ms."""

    def run(self) -> None:
        """Print a table."""
        if self.preset not in PRESETS:
            raise ConfigError(f"there is no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        config = PRESETS[self.preset].config()
        size = exchanged_bytes(build_learner(config, torch.device("cpu")))
        tasks = config.outer.meta_batch
        print(f"{self.preset}: {tasks} tasks, {size:,} bytes")
        print("devices   compute ms   exchange ms   step ms   speedup   efficiency")
        for devices in range(1, tasks + 1):
            compute, exchange = self.times(devices, tasks, size)
            step = compute + exchange
            speedup = self.step_ms / step
            print(f"{devices:7d} {compute:12.1f} {exchange:13.2f} {step:9.1f} {speedup:9.2f} {speedup / devices:11.0%}")

    def times(self, devices: int, tasks: int, size: int) -> tuple[float, float]:
        """Milliseconds of a step's arithmetic and of its exchange."""
        share = -(-tasks // devices) / tasks
        compute = self.serial_ms + (self.step_ms - self.serial_ms) * share
        if devices == 1:
            return compute, 0.0
        wire = 2 * (devices - 1) / devices * size * 8 / (self.gbit * 1e9)
        # Sums, maxima of two dtypes, signals: rings of 2 (N - 1) messages. Three smaller exchanges: N - 1 each.
        messages = (4 * 2 + 3) * (devices - 1) * self.latency_us * 1e-6
        return compute, 1e3 * (wire + messages)


def main() -> None:
    """One of the three."""
    command: Any = tyro.cli(
        Annotated[Measure, tyro.conf.subcommand("measure")]  # type: ignore[arg-type]
        | Annotated[Bytes, tyro.conf.subcommand("bytes")]
        | Annotated[Model, tyro.conf.subcommand("model")],
        description=__doc__,
    )
    command.run()


if __name__ == "__main__":
    main()
