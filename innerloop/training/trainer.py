"""The outer loop, top to bottom: epochs of meta-batches, validation, checkpoints, and the test at the end."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch

from innerloop import schedules
from innerloop.data import TaskSource
from innerloop.learner import MetaLearner, NonFiniteLossError
from innerloop.training.building import build_device, build_learner, build_tasks, build_workers
from innerloop.training.checkpoints import load_checkpoint, save_checkpoint, write_json
from innerloop.training.config import Config
from innerloop.training.distributed import ALONE, Ranks
from innerloop.training.environment import environment
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


def train(
    folder: RunFolder, preset: str, config: Config, progress: Progress, command: str = "", ranks: Ranks = ALONE
) -> FinishedRun:
    """Train, or go on training, the run in ``folder``, and test it.

    A new run's folder is made once its data and model have been found good. Of several ranks, all of which call this,
    only the main one reads and writes the folder.

    Raises:
        DivergedError: a loss or the meta-gradient became NaN or infinite; the last good checkpoint is kept.
        InterruptedRunError: SIGINT or SIGTERM came, to whichever rank; the state is saved.
        WorkerError: a worker process or a rank is gone.
    """
    device = build_device(config, ranks)
    with ranks.first_on_each_machine():
        source = build_tasks(config, device, progress=progress.shown)
    learner = build_learner(config, device)
    optimizer = torch.optim.Adam(learner.parameters(), lr=config.outer.outer_lr)
    ranks.shared(lambda: None if folder.created else folder.create(preset, config))
    progress.console.print(f"run folder: {folder.path}", highlight=False, soft_wrap=True)
    with _signals_noted() as caught, build_workers(config, learner, source, device, ranks) as workers:
        measured_on = environment(device, workers.count)
        training = _Training(folder, config, workers, optimizer, progress, caught, ranks)
        if ranks.shared(folder.latest.exists):
            training.load()
        while training.done.epoch < config.outer.epochs:
            training.run_epoch()
            training.finish_epoch()
        result = training.test()
    done = training.done
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
    if ranks.main:
        write_json(folder.summary, summary)
    learner.load_state_dict(next(best_checkpoints(folder, best, ranks)))
    return FinishedRun(summary, source, learner)


@dataclass
class _Training:
    """A run in progress."""

    folder: RunFolder
    config: Config
    workers: Workers
    optimizer: torch.optim.Adam
    progress: Progress
    caught: list[int]
    """Signals that ask the run to stop."""
    ranks: Ranks
    done: Progression = field(default_factory=Progression)

    @property
    def learner(self) -> MetaLearner:
        return self.workers.learner

    def run_epoch(self) -> None:
        """The outer loop's iterations of one epoch, from where it stands."""
        outer, done, sums = self.config.outer, self.done, self.done.sums
        last_save = time.monotonic()
        with self.progress.task(f"epoch {done.epoch + 1}/{outer.epochs}", outer.iterations, sums.iterations) as bar:
            while sums.iterations < outer.iterations:
                started = time.monotonic()
                self._outer_update(done.epoch * outer.iterations + sums.iterations)
                elapsed = time.monotonic() - started
                sums.seconds += elapsed
                done.seconds += elapsed
                bar.advance(1, self._status())
                stop = self.ranks.agreed(self.caught)
                if stop or time.monotonic() - last_save > SAVE_EVERY_SECONDS:
                    self.save()
                    last_save = time.monotonic()
                if stop:
                    raise InterruptedRunError(stop)

    def _outer_update(self, iteration: int) -> None:
        """One meta-batch: its meta-gradient, and a step of the outer optimiser."""
        outer, sums = self.config.outer, self.done.sums
        self.optimizer.param_groups[0]["lr"] = outer_rate(self.config, iteration)
        first = iteration * outer.meta_batch
        try:
            result, targets = self.workers.backward(first, outer.meta_batch, self.done.epoch)
        except NonFiniteLossError as error:
            raise self._diverged(iteration, str(error)) from None
        gradients = {n: p.grad for n, p in self.learner.named_parameters() if p.grad is not None}
        norm = float(torch.nn.utils.get_total_norm(gradients.values()))
        if not math.isfinite(norm):
            names = [n for n, g in gradients.items() if not g.isfinite().all()]
            raise self._diverged(iteration, f"the meta-gradient of {', '.join(names)} is not finite")
        if outer.clip:  # as MAML++ does on mini-ImageNet
            torch.nn.utils.clip_grad_value_(self.learner.parameters(), outer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

        sums.iterations += 1
        sums.loss += float(result.loss)
        if not self.config.regression:
            sums.accuracy += score(result.query_outputs, targets, False).accuracy or 0.0
        sums.gradient_norm += norm
        sums.gradient_norm_max = max(sums.gradient_norm_max, norm)

    def finish_epoch(self) -> None:
        """Validate, write the epoch's metrics, keep its checkpoint if it is among the best, and save the state."""
        done, folder, members = self.done, self.folder, self.config.evaluation.ensemble
        record = self._metrics(self._validate())
        done.epoch += 1
        done.sums = EpochSums()
        value = -record["val_loss"] if record["val_accuracy"] is None else record["val_accuracy"]
        value = value if math.isfinite(value) else -math.inf
        ranked = sorted([*done.best, (value, done.epoch)], key=lambda b: (-b[0], -b[1]))
        done.best, dropped = ranked[:members], ranked[members:]
        if not self.ranks.main:
            return
        if (value, done.epoch) in done.best:
            state = {"epoch": done.epoch, "val": value}
            save_checkpoint(folder.epoch_checkpoint(done.epoch), self.learner.state_dict(), state)
        folder.append_metrics(record)
        self.save()
        for _, epoch in dropped:
            folder.epoch_checkpoint(epoch).unlink(missing_ok=True)
        self.progress.epoch(record, self.config.outer.epochs)

    def _validate(self) -> Evaluation:
        tasks = self.config.evaluation.val_tasks
        with self.progress.task("validation", tasks) as bar:

            def tick(done: int) -> None:
                bar.advance(done)
                if stop := self.ranks.agreed(self.caught):
                    self.save()
                    raise InterruptedRunError(stop)

            steps, regression = self.config.test_steps, self.config.regression
            return evaluate(
                self.workers, "val", tasks, steps=steps, regression=regression, normalisations=("batch",), tick=tick
            )

    def test(self) -> TestResult:
        """Test the checkpoints best on validation. The state was saved when the last epoch ended."""
        tasks, epochs = self.config.evaluation.test_tasks, [epoch for _, epoch in self.done.best]
        with self.progress.task("test", tasks * len(epochs)) as bar:

            def tick(done: int) -> None:
                bar.advance(done)
                if stop := self.ranks.agreed(self.caught):
                    raise InterruptedRunError(stop)

            steps, regression = self.config.test_steps, self.config.regression
            checkpoints = best_checkpoints(self.folder, epochs, self.ranks)
            return evaluate_checkpoints(
                self.workers, checkpoints, "test", tasks, steps=steps, regression=regression, tick=tick
            )

    def _metrics(self, validation: Evaluation) -> dict[str, Any]:
        config, done, sums, last = self.config, self.done, self.done.sums, validation.last["batch"]
        iterations = done.epoch * config.outer.iterations + sums.iterations
        first_order = self.learner.mode == "first-order"
        return {
            "epoch": done.epoch + 1,
            "iterations": iterations,
            "seconds": round(done.seconds, 3),
            "tasks_per_second": round(self._speed(), 2),
            "outer_lr": outer_rate(config, iterations - 1),
            "derivative_order": 1 if first_order else config.method.derivative_order(done.epoch),
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
            "rates": inner_rates(self.learner),
        }

    def _speed(self) -> float:
        """Tasks a second in this epoch."""
        return self.done.sums.iterations * self.config.outer.meta_batch / max(self.done.sums.seconds, 1e-9)

    def _status(self) -> str:
        sums = self.done.sums
        status = f"{self._speed():.1f} tasks/s  loss {sums.loss / sums.iterations:.3f}"
        return status + ("" if self.config.regression else f"  accuracy {sums.accuracy / sums.iterations:.1%}")

    def _diverged(self, iteration: int, what: str) -> DivergedError:
        kept = f"The last good checkpoint is {self.folder.latest}. " if self.folder.latest.exists() else ""
        return DivergedError(
            f"stopped at iteration {iteration + 1}: {what}. {kept}A smaller --inner-lr or --outer-lr, or --clip 10, "
            "usually helps; LSLR (--lslr) and MSL (--msl) make it rarer."
        )

    def save(self) -> None:
        """Write the latest checkpoint: weights, optimiser, generators, and how far training is."""
        if not self.ranks.main:
            return
        tensors = {f"learner/{name}": t for name, t in self.learner.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{slot}": t for slot, t in slots.items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        save_checkpoint(self.folder.latest, tensors, asdict(self.done))

    def load(self) -> None:
        """Take over the latest checkpoint."""
        tensors, state = self.ranks.shared(lambda: load_checkpoint(self.folder.latest))
        learned = {n.removeprefix("learner/"): t for n, t in tensors.items() if n.startswith("learner/")}
        self.learner.load_state_dict(learned)
        slots: dict[int, Tensors] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, index, slot = name.split("/")
                slots.setdefault(int(index), {})[slot] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        torch.set_rng_state(tensors["random/cpu"].cpu())
        if torch.cuda.is_available() and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"].cpu())
        best = [(value, epoch) for value, epoch in state["best"]]
        self.done = Progression(state["epoch"], state["seconds"], EpochSums(**state["sums"]), best)
        if self.ranks.main:
            self.folder.keep_metrics_until(self.done.epoch)


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


def best_checkpoints(folder: RunFolder, epochs: list[int], ranks: Ranks = ALONE) -> Iterator[Tensors]:
    """The learner states kept of these epochs, read by the main rank."""
    for epoch in epochs:
        yield ranks.shared(partial(load_checkpoint, folder.epoch_checkpoint(epoch)))[0]


def best_epochs(folder: RunFolder) -> list[int]:
    """Epochs whose checkpoints are kept, the best on validation first."""
    return [epoch for _, epoch in load_checkpoint(folder.latest)[1]["best"]]


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
