"""The outer loop, top to bottom: epochs of meta-batches, validation, checkpoints, and the test at the end."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import innerloop
from innerloop import schedules
from innerloop.data import TaskSource
from innerloop.learner import MetaLearner, NonFiniteLossError
from innerloop.training.building import build_device, build_learner, build_tasks, build_workers
from innerloop.training.checkpoints import load_checkpoint, save_checkpoint, write_json
from innerloop.training.config import Config
from innerloop.training.evaluation import Evaluation, TestResult, evaluate, evaluate_checkpoints, score
from innerloop.training.progress import Progress
from innerloop.training.run_folder import RunFolder
from innerloop.training.workers import Workers
from innerloop.update_rules import Tensors

SAVE_EVERY_SECONDS = 30.0
"""At most this much work is lost when the process is killed."""


class DivergedError(ArithmeticError):
    """Training met a NaN or infinite loss or gradient and stopped."""


class InterruptedRunError(Exception):
    """The run was asked to stop, and saved its state."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")


@dataclass
class EpochSums:
    """Sums over the iterations of the epoch in progress."""

    iterations: int = 0
    loss: float = 0.0
    accuracy: float = 0.0
    gradient_norm: float = 0.0
    gradient_norm_max: float = 0.0
    seconds: float = 0.0


@dataclass
class Progression:
    """How far training is: with the tensors of a checkpoint, all that a resumed run needs."""

    epoch: int = 0
    seconds: float = 0.0
    sums: EpochSums = field(default_factory=EpochSums)
    best: list[tuple[float, int]] = field(default_factory=list)
    """(validation score, epoch) of the checkpoints kept, the best first; higher is better."""


class FinishedRun(NamedTuple):
    """A run that has ended: its summary, the tasks it used, and the learner with its best checkpoint."""

    summary: dict[str, Any]
    source: TaskSource
    learner: MetaLearner


def train(folder: RunFolder, preset: str, config: Config, progress: Progress, command: str = "") -> FinishedRun:
    """Train, or go on training, the run in ``folder``, and test it.

    A new run's folder is made once its data and model have been found good.

    Raises:
        DivergedError: a loss or the meta-gradient became NaN or infinite; the last good checkpoint is kept.
        InterruptedRunError: SIGINT or SIGTERM came; the state is saved.
    """
    device = build_device(config)
    source = build_tasks(config, device, progress=progress.shown)
    learner = build_learner(config, device)
    optimizer = torch.optim.Adam(learner.parameters(), lr=config.outer.outer_lr)
    if not folder.created:
        folder.create(preset, config)
    progress.console.print(f"run folder: {folder.path}", highlight=False, soft_wrap=True)
    done = Progression()
    if folder.latest.exists():
        done = _load(folder, learner, optimizer, device)
        folder.keep_metrics_until(done.epoch)
    with _signals_noted() as caught, build_workers(config, learner, source, device) as workers:
        measured_on = environment(device, workers.count)
        while done.epoch < config.outer.epochs:
            _train_epoch(folder, config, workers, optimizer, done, progress, caught)
            _finish_epoch(folder, config, workers, optimizer, done, progress, caught)
        result = _test(folder, config, workers, done, progress, caught)
    best = [epoch for _, epoch in done.best]
    summary = {
        "version": 1,
        "title": f"{preset}, {config.data.dataset}",
        "preset": preset,
        "command": command,
        "seed": config.compute.seed,
        "epochs": done.epoch,
        "iterations": done.epoch * config.outer.iterations,
        "train_seconds": round(done.seconds, 1),
        "best_epochs": best,
        "test": result.to_json(),
        "environment": measured_on,
    }
    write_json(folder.summary, summary)
    learner.load_state_dict(next(best_checkpoints(folder, best)))
    return FinishedRun(summary, source, learner)


def _train_epoch(
    folder: RunFolder,
    config: Config,
    workers: Workers,
    optimizer: torch.optim.Adam,
    done: Progression,
    progress: Progress,
    caught: list[int],
) -> None:
    """The outer loop's iterations of one epoch, from where it stands."""
    outer, sums, learner = config.outer, done.sums, workers.learner
    last_save = time.monotonic()
    with progress.task(f"epoch {done.epoch + 1}/{outer.epochs}", outer.iterations, sums.iterations) as bar:
        while sums.iterations < outer.iterations:
            started = time.monotonic()
            iteration = done.epoch * outer.iterations + sums.iterations
            optimizer.param_groups[0]["lr"] = outer_rate(config, iteration)
            first = iteration * outer.meta_batch
            try:
                result = workers.backward(first, outer.meta_batch, done.epoch)
            except NonFiniteLossError as error:
                raise DivergedError(_divergence(folder, iteration, str(error))) from None
            norm = _clip_and_measure(learner, outer.clip)
            if not torch.isfinite(norm):
                names = [n for n, p in learner.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
                raise DivergedError(
                    _divergence(folder, iteration, f"the meta-gradient of {', '.join(names)} is {norm}")
                )
            optimizer.step()
            optimizer.zero_grad()

            sums.iterations += 1
            sums.loss += float(result.loss)
            if not config.regression:
                targets = workers.source.meta_batch("train", first, outer.meta_batch).query.targets
                sums.accuracy += score(result.query_outputs, targets, False).accuracy or 0.0
            sums.gradient_norm += float(norm)
            sums.gradient_norm_max = max(sums.gradient_norm_max, float(norm))
            elapsed = time.monotonic() - started
            sums.seconds += elapsed
            done.seconds += elapsed
            bar.advance(1, _status(config, sums))
            if caught or time.monotonic() - last_save > SAVE_EVERY_SECONDS:
                _save(folder, learner, optimizer, done)
                last_save = time.monotonic()
            if caught:
                raise InterruptedRunError(caught[0])


def _finish_epoch(
    folder: RunFolder,
    config: Config,
    workers: Workers,
    optimizer: torch.optim.Adam,
    done: Progression,
    progress: Progress,
    caught: list[int],
) -> None:
    """Validate, write the epoch's metrics, keep its checkpoint if it is among the best, and save the state."""
    learner = workers.learner
    with progress.task("validation", config.evaluation.val_tasks) as bar:

        def tick(tasks: int) -> None:
            bar.advance(tasks)
            if caught:
                _save(folder, learner, optimizer, done)
                raise InterruptedRunError(caught[0])

        validation = evaluate(
            workers,
            "val",
            config.evaluation.val_tasks,
            steps=config.test_steps,
            regression=config.regression,
            normalisations=("batch",),
            tick=tick,
        )
    record = _metrics(config, learner, done, validation)
    done.epoch += 1
    done.sums = EpochSums()
    last = validation.last["batch"]
    value = -last.loss if last.accuracy is None else last.accuracy
    done.best = sorted([*done.best, (value, done.epoch)], key=lambda b: (-b[0], -b[1]))
    done.best, dropped = done.best[: config.evaluation.ensemble], done.best[config.evaluation.ensemble :]
    if (value, done.epoch) in done.best:
        save_checkpoint(folder.epoch_checkpoint(done.epoch), learner.state_dict(), {"epoch": done.epoch, "val": value})
    folder.append_metrics(record)
    _save(folder, learner, optimizer, done)
    for _, epoch in dropped:
        folder.epoch_checkpoint(epoch).unlink(missing_ok=True)
    progress.epoch(record, config.outer.epochs)


def _metrics(config: Config, learner: MetaLearner, done: Progression, validation: Evaluation) -> dict[str, Any]:
    sums, last = done.sums, validation.last["batch"]
    iterations = done.epoch * config.outer.iterations + sums.iterations
    return {
        "epoch": done.epoch + 1,
        "iterations": iterations,
        "seconds": round(done.seconds, 3),
        "tasks_per_second": round(sums.iterations * config.outer.meta_batch / max(sums.seconds, 1e-9), 2),
        "outer_lr": outer_rate(config, iterations - 1),
        "derivative_order": 1 if learner.mode == "first-order" else config.method.derivative_order(done.epoch),
        "loss_weights": config.method.loss_weights(done.epoch),
        "train_loss": sums.loss / sums.iterations,
        "train_accuracy": None if config.regression else sums.accuracy / sums.iterations,
        "val_loss": last.loss,
        "val_accuracy": last.accuracy,
        "val_interval": last.interval,
        "val_tasks": last.tasks,
        "val_losses_per_step": [s.loss for s in validation.per_step],
        "val_accuracies_per_step": None if config.regression else [s.accuracy for s in validation.per_step],
        "gradient_norm_mean": sums.gradient_norm / sums.iterations,
        "gradient_norm_max": sums.gradient_norm_max,
        "rates": inner_rates(learner),
    }


def inner_rates(learner: MetaLearner) -> dict[str, list[float]]:
    """Inner rate of each adapted parameter at each step (Meta-SGD: the mean over its elements)."""
    steps = learner.method.inner_steps
    return {
        name: [float(r) for r in rate] if learner.method.lslr else [float(rate.mean())] * steps
        for name, rate in ((n, r.detach()) for n, r in learner.meta.rates.items())
    }


def outer_rate(config: Config, iteration: int) -> float:
    """The outer rate beta of an iteration (counted from 0): annealed under CA, by the epoch and its fraction."""
    outer = config.outer
    if not config.method.ca:
        return outer.outer_lr
    return schedules.cosine_rate(iteration / outer.iterations, outer.epochs, outer.outer_lr, outer.outer_lr_min)


def _clip_and_measure(learner: MetaLearner, clip: float) -> Tensor:
    """The meta-gradient's norm before it is clamped to +-clip (MAML++ does so on mini-ImageNet)."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in learner.parameters() if p.grad is not None])
    if clip:
        torch.nn.utils.clip_grad_value_(learner.parameters(), clip)
    return norm


def _status(config: Config, sums: EpochSums) -> str:
    speed = f"{sums.iterations * config.outer.meta_batch / max(sums.seconds, 1e-9):.1f} tasks/s"
    loss = f"loss {sums.loss / sums.iterations:.3f}"
    return f"{speed}  {loss}" + ("" if config.regression else f"  accuracy {sums.accuracy / sums.iterations:.1%}")


def _divergence(folder: RunFolder, iteration: int, what: str) -> str:
    kept = f"The last good checkpoint is {folder.latest}. " if folder.latest.exists() else ""
    return (
        f"stopped at iteration {iteration + 1}: {what}. {kept}"
        "A smaller --inner-lr or --outer-lr, or --clip 10, usually helps; LSLR (--lslr) and MSL (--msl) make it rarer."
    )


def _test(
    folder: RunFolder,
    config: Config,
    workers: Workers,
    done: Progression,
    progress: Progress,
    caught: list[int],
) -> TestResult:
    tasks = config.evaluation.test_tasks
    with progress.task("test", tasks * len(done.best)) as bar:

        def tick(tasks: int) -> None:
            bar.advance(tasks)
            if caught:
                raise InterruptedRunError(caught[0])

        return evaluate_checkpoints(
            workers,
            best_checkpoints(folder, [epoch for _, epoch in done.best]),
            "test",
            tasks,
            steps=config.test_steps,
            regression=config.regression,
            tick=tick,
        )


def best_checkpoints(folder: RunFolder, epochs: list[int]) -> Iterator[Tensors]:
    """The learner states kept of these epochs."""
    for epoch in epochs:
        yield load_checkpoint(folder.epoch_checkpoint(epoch))[0]


def best_epochs(folder: RunFolder) -> list[int]:
    """Epochs whose checkpoints are kept, the best on validation first."""
    return [epoch for _, epoch in load_checkpoint(folder.latest)[1]["best"]]


def _save(folder: RunFolder, learner: MetaLearner, optimizer: torch.optim.Adam, done: Progression) -> None:
    tensors = {f"learner/{name}": t for name, t in learner.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{slot}": t for slot, t in slots.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    save_checkpoint(folder.latest, tensors, asdict(done))


def _load(folder: RunFolder, learner: MetaLearner, optimizer: torch.optim.Adam, device: torch.device) -> Progression:
    tensors, state = load_checkpoint(folder.latest, device)
    learner.load_state_dict({n.removeprefix("learner/"): t for n, t in tensors.items() if n.startswith("learner/")})
    slots: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, slot = name.split("/")
            slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random/cpu"].cpu())
    if torch.cuda.is_available() and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"].cpu())
    return Progression(
        state["epoch"],
        state["seconds"],
        EpochSums(**state["sums"]),
        [(value, epoch) for value, epoch in state["best"]],
    )


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM in the list yielded; a second SIGINT interrupts at once."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Where a figure was measured."""
    return {
        "innerloop": innerloop.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "arguments": sys.argv[1:],
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or "cpu"


def _commit() -> str | None:
    """Commit of the checkout that innerloop runs from, None when it is installed elsewhere."""
    root = Path(innerloop.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() or None
