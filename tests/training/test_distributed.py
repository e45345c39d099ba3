"""Ranks over torch.distributed: the same gradients, statistics and runs as one process, whatever happens to a rank.

Ranks are real processes that talk over gloo on the loopback interface. Most start from a server that has imported
everything once; the rest are started by torchrun itself.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.run
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop import MetaLearner, maml_plus_plus
from innerloop.cli.main import main
from innerloop.cli.ranks import to_be_launched
from innerloop.data import ClassImages, Episodes, Split
from innerloop.learner import NonFiniteLossError
from innerloop.tasks import Task
from innerloop.training import figures
from innerloop.training.building import build_workers
from innerloop.training.checkpoints import load_checkpoint
from innerloop.training.config import PRESETS, Config, ConfigError
from innerloop.training.distributed import DistributedWorkers, exchanged_bytes, joined
from innerloop.training.evaluation import evaluate
from innerloop.training.progress import Bar
from innerloop.training.workers import Workers

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch._dynamo", "innerloop.cli.train", "innerloop.cli.evaluate", __name__])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """Ranks 0 .. size - 1, each calling ``function(*arguments)`` in a process of its own."""

    def __init__(self, size: int, function: Callable[..., Any], *arguments: Any) -> None:
        port = free_port()
        self.function = function
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
            if self.function is torchrun:  # it has processes of its own to stop
                process.terminate()
                process.join(40)
            process.kill()
            process.join(10)

    def result(self, rank: int) -> Any:
        """What the rank's function returned, or the exception that it raised."""
        if not self.connections[rank].poll(300):
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
    mine = evaluate(workers, "val", 11, steps=3, regression=False)
    seen |= {"batch": mine.outputs["batch"], "running": mine.outputs["running"], "targets": mine.targets}
    return {name: t.detach().numpy() if isinstance(t, Tensor) else t for name, t in seen.items()}


def bits(learner: MetaLearner) -> str:
    """A hash of every tensor of the learner."""
    tensors = learner.state_dict().items()
    return hashlib.sha256(b"".join(n.encode() + t.numpy().tobytes() for n, t in tensors)).hexdigest()


def _updates_of_a_rank(bnrs: bool) -> dict[str, Any]:
    with joined(timeout=60) as ranks:
        # Every rank draws its own weights: rank 0's are to be taken.
        workers = DistributedWorkers(make_learner(ranks.rank, bnrs), make_source(), ranks)
        sent, all_reduce = [], dist.all_reduce
        dist.all_reduce = lambda flat, *rest: (sent.append(flat), all_reduce(flat, *rest))  # type: ignore[assignment]
        seen = updates(workers)
        # One buffer for each dtype and operation: float64 sums, float64 and int64 maxima.
        assert sum(flat.nbytes for flat in sent) == len(SIZES) * exchanged_bytes(workers.learner)
        assert len(sent) == len(SIZES) * 3
        return seen


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


class SpoiltTask:
    """A source whose training task 2 has a NaN in its query set."""

    def __init__(self) -> None:
        self.source = make_source()

    def meta_batch(self, split: Split, start: int, size: int) -> Task:
        tasks = self.source.meta_batch(split, start, size)
        if start <= 2 < start + size:
            tasks.query.inputs[2 - start, 0] = torch.nan
        return tasks

    def task(self, split: Split, index: int) -> Task:
        return self.source.task(split, index)


def _diverging_rank() -> tuple[str, bool]:
    with joined(timeout=60) as ranks:
        workers = DistributedWorkers(make_learner(), SpoiltTask(), ranks)
        before = bits(workers.learner)
        try:
            workers.backward(0, 4, epoch=0)
        except NonFiniteLossError as error:
            unchanged = all(p.grad is None for p in workers.learner.parameters()) and before == bits(workers.learner)
            return str(error), unchanged
        return "no error", False


def test_a_non_finite_loss_is_raised_on_all_ranks_alike() -> None:
    with Processes(3, _diverging_rank) as ranks:
        assert ranks.results() == [("the query loss of task 2 is nan at inner step 1", True)] * 3


def _wrong_ranks() -> list[str]:
    said = []

    def fail() -> None:
        raise FileNotFoundError("no such checkpoint")

    with joined(timeout=60) as ranks:
        for wrong in (
            lambda: ranks.shared(fail),
            lambda: build_workers(config_with(processes=2), make_learner(), make_source(), torch.device("cpu"), ranks),
            lambda: to_be_launched(3, ranks),
        ):
            try:
                wrong()
            except (OSError, ConfigError) as error:
                said.append(str(error))
        assert ranks.agreed([signal.SIGINT] if ranks.rank == 1 else []) == signal.SIGINT
        assert ranks.agreed([]) is None
        assert not to_be_launched(2, ranks)
        assert not to_be_launched(0, ranks)
    return said


def config_with(**compute: Any) -> Config:
    config = PRESETS["quickstart"].config()
    return replace(config, compute=replace(config.compute, **compute))


def test_errors_and_signals_of_one_rank_are_those_of_all() -> None:
    with Processes(2, _wrong_ranks) as ranks:
        first, second = ranks.results()
    assert first == second
    assert [message.split(":")[0] for message in first] == [
        "no such checkpoint",
        "--processes 2",
        "--devices 3, and torchrun has started 2 ranks",
    ]


def test_the_tasks_of_a_machine_are_made_by_one_rank_first(tmp_path: Path) -> None:
    with Processes(3, _makes_data, tmp_path / "data") as ranks:
        assert sorted(ranks.results()) == ["found", "found", "made"]


def _makes_data(path: Path) -> str:
    with joined(timeout=60) as ranks, ranks.first_on_each_machine():
        if path.exists():
            return "found"
        time.sleep(0.3)
        path.write_text("")
        return "made"


# Runs. The sinusoid network, whose tasks take milliseconds.

TINY = ["train", "sinusoid", "--epochs", "3", "--iterations", "8", "--val-tasks", "3", "--test-tasks", "6"]
TINY += ["--meta-batch", "5", "--outer-lr", "0.01", "--test-steps", "2", "--ensemble", "2"]
ENDLESS = [*TINY, "--epochs", "100000"]


def command(*arguments: str, at: int = 0, send: int = 0, to: int = 0) -> int:
    """The command line, in this process; its output goes to ``output-RANK``, figures are not drawn.

    Rank ``to`` sends itself the signal ``send`` at the ``at``-th step of the progress bars: 8 iterations of an epoch,
    1 of its validation, and so on.
    """
    with open(f"output-{os.environ['RANK']}", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    figures.write_figures = lambda *_: []
    left = iter(range(at - 1, -1, -1))

    def advance(*_: Any) -> None:
        if next(left, -1) == 0 and int(os.environ["RANK"]) == to:
            os.kill(os.getpid(), send)

    Bar.advance = advance  # type: ignore[method-assign]
    return main(list(arguments))


def torchrun(log: str, *arguments: str) -> int:
    """torchrun's agent, in this process; its output and that of the ranks goes to a file."""
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        del os.environ[name]
    os.environ["TESTS"] = str(Path(__file__).parent)
    with open(log, "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.distributed.run.main(list(arguments))
    return 0


def curve(run: Path | str) -> list[list[float]]:
    """What each epoch of a run recorded of its training and validation."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [[line["train_loss"], line["gradient_norm_mean"], *line["val_losses_per_step"]] for line in lines]


def scores(run: Path | str) -> list[float]:
    """The test at the end of a run."""
    test = json.loads((Path(run) / "summary.json").read_text())["test"]
    return [
        test["best"]["batch"]["loss"],
        test["ensemble"]["batch"]["interval"],
        *(s["loss"] for s in test["per_step"]),
    ]


def assert_the_same_run(run: Path | str, alone: Path) -> None:
    for mine, theirs in ((curve(run), curve(alone)), ([scores(run)], [scores(alone)])):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-3, atol=0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "write_figures", lambda *_: [])
        path = tmp_path_factory.mktemp("alone") / "run"
        assert main([*TINY, "--out", str(path), "--quiet"]) == 0
    return path


# 12 is in the second epoch, 18 its validation, 28 the test.
@pytest.mark.parametrize(
    ("at", "to", "send"), [(12, 1, signal.SIGTERM), (18, 0, signal.SIGINT), (28, 1, signal.SIGINT)]
)
def test_a_stop_signal_to_one_rank_stops_all_and_the_resumed_run_is_that_of_one_process(
    folder: Path, alone: Path, at: int, to: int, send: int
) -> None:
    with Processes(2, partial(command, at=at, send=send, to=to), *TINY, "--out", "run", "--json") as ranks:
        assert ranks.results() == [128 + send] * 2
    assert Path("output-0").read_text() == Path("output-1").read_text() == ""
    assert not Path("run/summary.json").exists()
    kept = load_checkpoint(Path("run/checkpoints/latest.safetensors"))[1]
    assert (kept["epoch"], kept["sums"]["iterations"]) == {12: (1, 3), 18: (1, 8), 28: (3, 0)}[at]
    # An odd number of ranks, more than the two that began.
    with Processes(3, command, "train", "--resume", "run", "--json") as ranks:
        assert ranks.results() == [0] * 3
    assert_the_same_run("run", alone)
    assert json.loads(Path("output-0").read_text()) == json.loads(Path("run/summary.json").read_text())
    assert [Path(f"output-{rank}").read_text() for rank in (1, 2)] == [""] * 2


def test_evaluation_by_ranks_is_that_of_one_process(folder: Path, alone: Path) -> None:
    shutil.copytree(alone, "run")
    with Processes(2, command, "evaluate", "run", "--tasks", "7", "--json") as ranks:
        assert ranks.results() == [0, 0]
    assert Path("output-1").read_text() == ""
    mine = json.loads(Path("output-0").read_text())
    assert mine == json.loads(Path("run/evaluation.json").read_text())
    assert main(["evaluate", "run", "--tasks", "7", "--json"]) == 0
    theirs = json.loads(Path("run/evaluation.json").read_text())
    for which in ("best", "ensemble"):
        found, expected = mine["test"][which]["batch"], theirs["test"][which]["batch"]
        assert found["tasks"] == expected["tasks"] == 7
        assert [found["loss"], found["interval"]] == pytest.approx([expected["loss"], expected["interval"]], rel=1e-5)


@pytest.mark.parametrize("hung", [0, 1])
def test_a_hung_rank_ends_the_run_with_a_message(folder: Path, hung: int) -> None:
    hangs = partial(command, at=3, send=signal.SIGSTOP, to=hung)
    with Processes(2, hangs, *ENDLESS, "--out", "run", "--quiet", "--timeout", "3") as ranks:
        assert ranks.result(1 - hung) == 1
    said = Path(f"output-{1 - hung}").read_text()
    assert "Traceback" not in said
    assert re.search(rf"rank {1 - hung} lost the others: .*([Rr]anks? {hung}|[Tt]imed out)", said)
    assert "hung for longer than --timeout 3 s" in said


def test_a_killed_rank_is_noticed_at_once(folder: Path) -> None:
    with Processes(3, partial(command, at=3, send=signal.SIGKILL, to=1), *ENDLESS, "--out", "run", "--quiet") as ranks:
        assert ranks.results() == [1, -signal.SIGKILL, 1]
    assert "rank 2 lost the others" in Path("output-2").read_text()


KILLED_ONCE = """
import os, signal, sys
sys.path.insert(0, os.environ["TESTS"])
from test_distributed import command

first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
open("first" if first else "again", "w").close()
sys.exit(command(*sys.argv[1:], at=12 if first else 0, send=signal.SIGKILL, to=1))
"""


def test_a_killed_rank_is_restarted_by_torchrun_and_the_run_ends_as_one_never_killed(folder: Path, alone: Path) -> None:
    Path("rank.py").write_text(KILLED_ONCE)
    launcher = ["--nproc-per-node", "2", "--max-restarts", "1", *rendezvous(), "rank.py"]
    with Processes(1, torchrun, "log", *launcher, *TINY, "--out", "run", "--quiet") as agent:
        assert agent.result(0) == 0, Path("log").read_text()
    assert Path("first").exists()
    assert Path("again").exists()
    assert_the_same_run("run", alone)


def rendezvous() -> list[str]:
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "test"]


def test_two_machines_train_as_one_process(folder: Path, alone: Path) -> None:
    launcher = ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1", *rendezvous(), "-m", "innerloop"]
    arguments = [*launcher, *TINY, "--out", "run", "--quiet"]
    with Processes(1, torchrun, "log-0", *arguments) as one, Processes(1, torchrun, "log-1", *arguments) as other:
        assert [one.result(0), other.result(0)] == [0, 0], Path("log-0").read_text() + Path("log-1").read_text()
    assert_the_same_run("run", alone)
    assert "torchrun" not in Path("log-0").read_text()
    assert json.loads(Path("run/summary.json").read_text())["environment"]["processes"] == 2


def test_under_torchrun_an_unfinished_run_goes_on_and_others_are_refused(folder: Path, alone: Path) -> None:
    shutil.copytree(alone, "finished")
    shutil.copytree(alone, "run")
    Path("run/summary.json").unlink()
    for arguments, code, says in (
        (["--out", "finished"], 2, "finished exists already"),
        (
            ["--out", "run", "--inner-lr", "0.5"],
            2,
            "run cannot go on with other settings: --inner-lr was 0.01, not 0.5",
        ),
        (["--out", "run"], 0, ""),
    ):
        with Processes(2, command, *TINY, *arguments, "--quiet") as ranks:
            assert ranks.results() == [code] * 2
        assert says in Path("output-0").read_text()
    assert scores("run") == pytest.approx(scores("finished"), rel=1e-4)


def test_devices_of_this_machine(folder: Path, alone: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--devices", "2", "--json", "--out", "run"]) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["environment"]["processes"] == 2
    assert printed.err == ""
    assert_the_same_run("run", alone)
    assert main(["evaluate", "nowhere", "--devices", "2"]) == 2
    for wrong in (["--devices", "-1"], ["--timeout", "0"], ["--timeout", "soon"]):
        assert main([*TINY, *wrong]) == 2
        assert wrong[1] in capfd.readouterr().err
