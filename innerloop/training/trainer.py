"""The outer loop, top to bottom: epochs of meta-batches, validation, checkpoints, and the test at the end."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter

from innerloop import schedules
from innerloop.data import TaskSource
from innerloop.learner import Compile, MetaLearner, NonFiniteLossError
from innerloop.model_state import random_state, set_random_state
from innerloop.reports.formats import METRICS_VERSION, SUMMARY_VERSION
from innerloop.training.building import build_device, build_learner, build_tasks, build_workers
from innerloop.training.checkpoints import CheckpointError, load_checkpoint, save_checkpoint, write_json
from innerloop.training.config import MESSAGE, Config
from innerloop.training.diagnosis import first_non_finite
from innerloop.training.distributed import ALONE, Ranks
from innerloop.training.environment import environment
from innerloop.training.evaluation import Evaluation, TestResult, evaluate, evaluate_checkpoints, score
from innerloop.training.progress import Progress
from innerloop.training.run_folder import RunFolder
from innerloop.training.time_left import RunTimeLeft, duration
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
    skipped: int = 0
    """Iterations without an update, which diverged; they count in no other sum."""

    @property
    def updates(self) -> int:
        """Iterations that the sums are over."""
        return self.iterations - self.skipped


@dataclass
class Progression:
    """How far training is: with the tensors of a checkpoint, all that a resumed run needs."""

    epoch: int = 0
    seconds: float = 0.0
    sums: EpochSums = field(default_factory=EpochSums)
    best: list[tuple[float, int]] = field(default_factory=list)
    """(validation score, epoch) of the checkpoints kept, the best first; higher is better."""
    rate_factor: float = 1.0
    """On the outer rate: halved whenever the run rolls back."""
    rollbacks: int = 0
    skips_in_a_row: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progression:
        """What ``asdict`` wrote. What an older version lacks has its default; what is unknown is passed over.

        Raises:
            KeyError, TypeError, ValueError: it is not what ``asdict`` wrote.
        """
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        sums = {f.name: known["sums"][f.name] for f in fields(EpochSums) if f.name in known["sums"]}
        return _PROGRESSION.validate_python({**known, "sums": sums})


_PROGRESSION = TypeAdapter(Progression)


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
        CheckpointError: no saved state, or none of the best checkpoints, can be read.
        WriteError: the disk is full, say; the last good state is kept.
        ConfigError: another process is training this run, or it has been trained and has no state to go on from.
    """
    ranks.shared(folder.require_state_or_none_yet)
    device = build_device(config, ranks)
    with ranks.first_on_each_machine():
        source = build_tasks(config, device, progress=progress.shown)
    bits = getattr(source, "bits", None)
    if bits and not config.data.bits:  # what was found is recorded, for images that come later
        config = replace(config, data=replace(config.data, bits=bits))
    config, learner = _compiled_or_not(config, build_learner(config, device), source, folder, progress, ranks)
    optimizer = torch.optim.Adam(learner.parameters(), lr=config.outer.outer_lr)
    ranks.shared(lambda: None if folder.created else folder.create(preset, config))
    progress.console.print(f"run folder: {folder.path}", highlight=False, soft_wrap=True)
    with (
        ExitStack() as locked,
        _signals_noted() as caught,
        build_workers(config, learner, source, device, ranks) as workers,
    ):
        ranks.shared(lambda: locked.enter_context(folder.one_writer()))
        measured_on = environment(device, workers.count)
        training = _Training(folder, config, workers, optimizer, progress, caught, ranks)
        if ranks.shared(lambda: folder.started):
            training.resume()
        elif ranks.main:
            folder.keep_metrics_until(0)  # it was killed before it had saved anything
        while training.done.epoch < config.outer.epochs:
            training.run_epoch()
            training.finish_epoch()
        if ranks.main:
            folder.tidy(ended=True)
        best, result = training.test()
    done = training.done
    summary = {
        "version": SUMMARY_VERSION,
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


def _compiled_or_not(
    config: Config, learner: MetaLearner, source: TaskSource, folder: RunFolder, progress: Progress, ranks: Ranks
) -> tuple[Config, MetaLearner]:
    """Decide what ``--compile auto`` leaves open, once: a run that goes on must round as it did before."""

    def chosen() -> Compile:
        if folder.created:  # by a version that did not compile
            return "off"
        outer = config.outer
        updates = outer.epochs * outer.iterations
        if updates < LEAST_UPDATES:
            return "off"
        share = -(-outer.meta_batch // max(ranks.size, 1))
        estimate = learner.expect(updates, source.meta_batch("train", 0, share), config.outer.epochs - 1)
        assert estimate is not None
        if pays := estimate.pays(updates):
            cost, saved = duration(estimate.seconds), duration(updates * estimate.saved)
            words = f"compiling the inner step takes about {cost} and saves about {saved} (--compile off: without)"
            progress.console.print(words, highlight=False, soft_wrap=True)
        return "on" if pays else "off"

    if config.compute.compile != "auto":
        return config, learner
    choice = ranks.shared(chosen)
    learner.compile(choice)
    return replace(config, compute=replace(config.compute, compile=choice)), learner


LEAST_UPDATES = 500
"""Of a run for which it is worth finding out whether compiling pays."""


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
    left: RunTimeLeft = field(init=False)

    def __post_init__(self) -> None:
        self.left = RunTimeLeft(self.config, first_order=self.learner.mode == "first-order")
        self.progress.remaining = self.left.total

    @property
    def learner(self) -> MetaLearner:
        return self.workers.learner

    def run_epoch(self) -> None:
        """The outer loop's iterations of one epoch, from where it stands."""
        outer, started_at = self.config.outer, self.done.sums.iterations
        if outer.on_divergence == "rollback":
            self._keep_epoch_start()
        last_save = time.monotonic()
        self.left.plan(self.done.epoch, self.done.sums.iterations)
        with self.progress.task(f"epoch {self.done.epoch + 1}/{outer.epochs}", outer.iterations, started_at) as bar:
            while (before := self.done.sums.iterations) < outer.iterations:
                started = time.monotonic()
                self._outer_update(self.done.epoch * outer.iterations + before)
                elapsed = time.monotonic() - started
                self.done.sums.seconds += elapsed
                self.done.seconds += elapsed
                self.left.done(self.left.training(self.done.epoch), self.done.sums.iterations - before)
                bar.advance(self.done.sums.iterations - before, self._status())
                self.progress.estimate(self.left.words())
                stop = self.ranks.agreed(self.caught)
                if stop or time.monotonic() - last_save > SAVE_EVERY_SECONDS:
                    self.save()
                    last_save = time.monotonic()
                if stop:
                    raise InterruptedRunError(stop)

    def _outer_update(self, iteration: int) -> None:
        """One meta-batch: its meta-gradient, and a step of the outer optimiser."""
        outer, sums = self.config.outer, self.done.sums
        self.optimizer.param_groups[0]["lr"] = outer_rate(self.config, iteration) * self.done.rate_factor
        first = iteration * outer.meta_batch
        statistics = self.learner.statistics.copied() if outer.on_divergence == "skip" else None
        try:
            result, targets = self.workers.backward(first, outer.meta_batch, self.done.epoch)
        except NonFiniteLossError as error:
            self._diverged(iteration, str(error), error.task)
            return
        gradients = {n: p.grad for n, p in self.learner.named_parameters() if p.grad is not None}
        norm = float(torch.nn.utils.get_total_norm(gradients.values()))
        if not math.isfinite(norm):
            names = [n for n, g in gradients.items() if not g.isfinite().all()]
            if statistics is not None:
                self.learner.statistics.assign(statistics)
            self._diverged(iteration, f"the meta-gradient of {', '.join(names)} is not finite")
            return
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
        self.done.skips_in_a_row = 0

    def finish_epoch(self) -> None:
        """Validate, write the epoch's metrics, keep its checkpoint if it is among the best, and save the state."""
        done, folder, members = self.done, self.folder, self.config.evaluation.ensemble
        record = self._metrics(self._validate())
        done.epoch += 1
        done.sums = EpochSums()
        value = -record["val_loss"] if record["val_accuracy"] is None else record["val_accuracy"]
        value = value if math.isfinite(value) else -math.inf
        ranked = sorted([*done.best, (value, done.epoch)], key=lambda b: (-b[0], -b[1]))
        done.best = ranked[:members]
        if not self.ranks.main:
            return
        if (value, done.epoch) in done.best:
            state = {"epoch": done.epoch, "val": value}
            save_checkpoint(folder.epoch_checkpoint(done.epoch), self.learner.state_dict(), state)
        folder.append_metrics(record)
        self.save()
        folder.tidy()
        self.progress.epoch(record, self.config.outer.epochs)

    def _validate(self) -> Evaluation:
        tasks = self.config.evaluation.val_tasks
        self.left.mark()
        with self.progress.task("validation", tasks) as bar:

            def tick(done: int) -> None:
                self.left.done("validation", done)
                bar.advance(done)
                if stop := self.ranks.agreed(self.caught):
                    self.save()
                    raise InterruptedRunError(stop)

            steps, regression = self.config.test_steps, self.config.regression
            return evaluate(
                self.workers, "val", tasks, steps=steps, regression=regression, normalisations=("batch",), tick=tick
            )

    def test(self) -> tuple[list[int], TestResult]:
        """Test the checkpoints best on validation, those of them that are whole, and say which epochs they are of.

        The state was saved when the last epoch ended.
        """
        tasks = self.config.evaluation.test_tasks
        best = [epoch for _, epoch in self.done.best]
        epochs, damage = self.ranks.shared(lambda: self.folder.usable(best))
        for what in damage:
            self.warn("damaged", f"{what}. Tested without it")
        self.left.units["test"] = tasks * len(epochs)
        self.left.mark()
        with self.progress.task("test", tasks * len(epochs)) as bar:

            def tick(done: int) -> None:
                self.left.done("test", done)
                bar.advance(done)
                if stop := self.ranks.agreed(self.caught):
                    raise InterruptedRunError(stop)

            steps, regression = self.config.test_steps, self.config.regression
            checkpoints = best_checkpoints(self.folder, epochs, self.ranks)
            return epochs, evaluate_checkpoints(
                self.workers, checkpoints, "test", tasks, steps=steps, regression=regression, tick=tick
            )

    def _metrics(self, validation: Evaluation) -> dict[str, Any]:
        config, done, sums, last = self.config, self.done, self.done.sums, validation.last["batch"]
        iterations = done.epoch * config.outer.iterations + sums.iterations
        updates = sums.updates or math.nan  # an epoch without an update has no mean
        return {
            "version": METRICS_VERSION,
            "epoch": done.epoch + 1,
            "iterations": iterations,
            "seconds": round(done.seconds, 3),
            "tasks_per_second": round(self._speed(), 2),
            "outer_lr": outer_rate(config, iterations - 1) * done.rate_factor,
            "derivative_order": self.left.order(done.epoch),
            "loss_weights": config.method.loss_weights(done.epoch),
            "skipped_updates": sums.skipped,
            "train_loss": sums.loss / updates,
            "train_accuracy": None if config.regression else sums.accuracy / updates,
            "val_loss": last.loss,
            "val_accuracy": last.accuracy,
            "val_interval": last.interval,
            "val_tasks": last.tasks,
            "val_losses_per_step": [s.loss for s in validation.per_step],
            "val_accuracies_per_step": None if config.regression else [s.accuracy for s in validation.per_step],
            "gradient_norm_mean": sums.gradient_norm / updates,
            "gradient_norm_max": sums.gradient_norm_max,
            "rates": inner_rates(self.learner),
        }

    def _speed(self) -> float:
        """Tasks a second in this epoch."""
        return self.done.sums.iterations * self.config.outer.meta_batch / max(self.done.sums.seconds, 1e-9)

    def _status(self) -> str:
        sums = self.done.sums
        if not sums.updates:
            return ""
        status = f"{self._speed():.1f} tasks/s  loss {sums.loss / sums.updates:.3f}"
        return status + ("" if self.config.regression else f"  accuracy {sums.accuracy / sums.updates:.1%}")

    def _diverged(self, iteration: int, what: str, task: int | None = None) -> None:
        """Find out what went first, and skip the update, roll back or stop.

        Raises:
            DivergedError: that is the policy, or the end of its bounds.
        """
        outer, done = self.config.outer, self.done
        self.optimizer.zero_grad()
        tasks = self.workers.source.meta_batch("train", iteration * outer.meta_batch, outer.meta_batch)
        first = first_non_finite(self.learner, tasks, done.epoch, task)
        what = f"{what}; {first}" if first else what
        record: dict[str, Any] = {
            "epoch": done.epoch + 1,
            "iteration": iteration + 1,
            "first": asdict(first) if first else None,
        }
        if outer.on_divergence == "skip" and done.skips_in_a_row < outer.max_skips:
            done.skips_in_a_row += 1
            done.sums.iterations += 1
            done.sums.skipped += 1
            self.warn("skipped", f"skipped the update of iteration {iteration + 1}: {what}", **record)
            return
        if outer.on_divergence == "rollback" and done.rollbacks < outer.max_rollbacks:
            tensors, values = self.ranks.shared(lambda: load_checkpoint(self.folder.epoch_start))
            self._take(tensors, values)
            self.done.rate_factor = done.rate_factor / 2
            self.done.rollbacks, self.done.seconds = done.rollbacks + 1, done.seconds
            self.save()
            back = f"rolled back from iteration {iteration + 1} to the start of epoch {self.done.epoch + 1}"
            record["rate_factor"] = self.done.rate_factor
            self.warn("rolled back", f"{back}, outer rate times {self.done.rate_factor:g}: {what}", **record)
            return
        tried = {"skip": f" after {done.skips_in_a_row} skips", "rollback": f" after {done.rollbacks} rollbacks"}
        stopped = f"stopped at iteration {iteration + 1}{tried.get(outer.on_divergence, '')}: {what}"
        if self.ranks.main:
            self.folder.note("diverged", stopped, **record)
        kept = f"The last good checkpoint is {self.folder.latest}. " if self.folder.started else ""
        raise DivergedError(
            f"{stopped}. {kept}A smaller --inner-lr or --outer-lr, or --clip 10, usually helps; LSLR (--lslr) and MSL "
            "(--msl) make it rarer; --on-divergence skip or rollback goes on."
        )

    def _keep_epoch_start(self) -> None:
        """Keep the state that a diverged epoch is to roll back to: a moment that does not depend on the clock.

        In the middle of an epoch it is there already, unless the run went on with this policy or from an older state.
        """
        if not self.ranks.main:
            return
        if self.done.sums.iterations:
            with suppress(CheckpointError, FileNotFoundError):
                if load_checkpoint(self.folder.epoch_start)[1]["epoch"] == self.done.epoch:
                    return
        save_checkpoint(self.folder.epoch_start, self._tensors(), asdict(self.done))

    def save(self) -> None:
        """Write the state: weights, optimiser, generators, and how far training is."""
        if self.ranks.main:
            self.folder.save_state(self._tensors(), asdict(self.done))

    def _tensors(self) -> Tensors:
        tensors = {f"learner/{name}": t for name, t in self.learner.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{slot}": t for slot, t in slots.items()}
        generators = random_state(self._device)
        return tensors | {f"random/{kind}": t for kind, t in zip(("cpu", "cuda"), generators, strict=False)}

    @property
    def _device(self) -> torch.device:
        return next(iter(self.learner.parameters())).device

    def resume(self) -> None:
        """Go on from the last state that is whole."""
        state = self.ranks.shared(self.folder.load_state)
        try:
            self._take(state.tensors, state.values)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{state.path} is whole, but not a state of this run: {error!r}"[:MESSAGE]) from None
        at = f"epoch {self.done.epoch + 1}, iteration {self.done.sums.iterations + 1}"
        if self.ranks.main:
            self.folder.set_aside_damage(state)
            self.folder.keep_metrics_until(self.done.epoch)
            self.folder.tidy()
            compute = {"device": str(self._device), "precision": self.config.compute.precision}
            self.folder.note("resumed", f"went on at {at}", checkpoint=state.path.name, **compute)
        if state.damage:
            self.warn("damaged", f"{state.damage} ({at})")

    def _take(self, tensors: Tensors, values: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        learned = {n.removeprefix("learner/"): t for n, t in tensors.items() if n.startswith("learner/")}
        self.learner.load_state_dict(learned)
        slots: dict[int, Tensors] = {}
        parameters = self.optimizer.param_groups[0]["params"]
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, index, slot = name.split("/")
                parameter = parameters[int(index)]
                if tensor.shape == parameter.shape:
                    # Laid out in memory as Adam does it: elementwise operations on two layouts round otherwise.
                    tensor = torch.empty_like(parameter).copy_(tensor)
                slots.setdefault(int(index), {})[slot] = tensor
        for number, of_parameter in slots.items():
            shapes = {slot: tuple(tensor.shape) for slot, tensor in of_parameter.items()}
            shape = tuple(parameters[number].shape)
            if shapes != {"step": (), "exp_avg": shape, "exp_avg_sq": shape}:
                raise ValueError(f"the optimiser's state of parameter {number}, {shape}, is {shapes}")
            if (counted := of_parameter["step"].dtype) not in (torch.float32, torch.float64):
                raise ValueError(f"the optimiser's steps of parameter {number} are counted in {counted}")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        generators = [tensors[name].cpu() for name in ("random/cpu", "random/cuda") if name in tensors]
        set_random_state(generators, self._device if len(generators) > 1 else torch.device("cpu"))
        self.done = Progression.from_json(values)

    def warn(self, event: str, message: str, **details: Any) -> None:
        """Say what went wrong, on the console and in the run's events."""
        if self.ranks.main:
            self.folder.note(event, message, **details)
            self.progress.warn(message)


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


def best_epochs(folder: RunFolder) -> tuple[list[int], list[str]]:
    """Epochs whose checkpoints are kept and whole, the best on validation first; and what is wrong with others.

    A run that was published without the state to go on from has checkpoints that say how good they are.

    Raises:
        CheckpointError: the run's states cannot be read, or none of its best checkpoints.
        ConfigError: the folder is not a run.
    """
    if not folder.started:
        # A run as it is published: its checkpoints say themselves how good they are.
        good, damage = folder.ranked()
        return good[: folder.read_config()[1].evaluation.ensemble], [f"{what}. Tested without it" for what in damage]
    state = folder.load_state()
    try:
        best = Progression.from_json(state.values).best
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{state.path} is whole, but not a state of a run: {error!r}"[:MESSAGE]) from None
    good, damage = folder.usable([epoch for _, epoch in best])
    return good, [*([state.damage] if state.damage else []), *(f"{what}. Tested without it" for what in damage)]


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
