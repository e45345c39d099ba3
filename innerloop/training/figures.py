"""The figures of a run: its records, and a test task learned by its best checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from innerloop.data import Episodes, Sinusoids, TaskSource
from innerloop.learner import MetaLearner
from innerloop.reports.figures import (
    CurveTask,
    TaskPicture,
    draw_adapted_curves,
    draw_overview,
    draw_task,
    write_run_figures,
)
from innerloop.reports.groups import method_label, settings, task_text
from innerloop.reports.process import MOST_SHOTS, Moment, ProcessRecord, few_images, write_process
from innerloop.reports.process_panel import draw_process
from innerloop.reports.records import read_run
from innerloop.training.trainer import inner_rates


def write_figures(run: Path, steps: int, source: TaskSource, learner: MetaLearner) -> list[Path]:
    """Write all figures of a finished run into its ``figures`` folder; ``steps`` inner steps on test tasks."""
    written = write_run_figures(run)
    figures = run / "figures"
    if isinstance(source, Sinusoids):
        tasks = [_curve_task(learner, source, i, steps) for i in range(3)]
        return [*written, draw_adapted_curves(figures / "adapted_curves.png", tasks=tasks)]
    assert isinstance(source, Episodes)
    picture = _task_picture(learner, source, 0, steps)
    process = process_record(run, learner, source)
    return [
        *written,
        draw_task(figures / "task.png", picture),
        draw_overview(figures / "overview.png", run, task=picture),
        write_process(figures / "process.json", process),
        draw_process(figures / "process.png", process),
    ]


def _curve_task(learner: MetaLearner, source: Sinusoids, index: int, steps: int) -> CurveTask:
    """The model on the whole range before adaptation, after 1 inner step and after the last."""
    task = source.task("test", index)
    amplitude, phase = source.parameters("test", index)
    x = torch.linspace(-5, 5, 201, dtype=task.support.inputs.dtype, device=task.support.inputs.device)[:, None]
    shown = {0, 1, steps}
    predictions = {
        k: learner.predict(theta, k, x).cpu().numpy()
        for k, theta in enumerate(learner.trajectory(task.support, steps))
        if k in shown
    }
    x = x.cpu()
    return CurveTask(
        task.support.inputs.cpu().numpy(),
        task.support.targets.cpu().numpy(),
        x.numpy(),
        (amplitude * torch.sin(x - phase)).numpy(),
        predictions,
    )


def _task_picture(learner: MetaLearner, source: Episodes, index: int, steps: int) -> TaskPicture:
    """Images of a test task and the query set's class probabilities after each inner step."""
    task = source.task("test", index)
    probabilities = [
        learner.predict(theta, k, task.query.inputs).softmax(-1)
        for k, theta in enumerate(learner.trajectory(task.support, steps))
    ]
    images = source.images("test", index)
    return TaskPicture(
        support_images=images.support.inputs.cpu().numpy(),
        support_labels=images.support.targets.cpu().numpy(),
        query_images=images.query.inputs.cpu().numpy(),
        query_labels=images.query.targets.cpu().numpy(),
        probabilities=torch.stack(probabilities).cpu().numpy(),
        title=f"{source.ways}-way {source.shots}-shot test task",
    )


def process_record(run: Path, learner: MetaLearner, source: Episodes, index: int = 0) -> ProcessRecord:
    """A test task going through the inner steps of training, and how its query losses enter the outer loss.

    Args:
        run: the run's folder, for its settings and schedule.
        learner: with the meta-parameters to use, those of the run's best checkpoint.
        source: its tasks.
        index: which test task.
    """
    records = read_run(run)
    values, method = settings(records), learner.method
    task, images = source.task("test", index), source.images("test", index)
    losses: dict[str, list[float]] = {"support": [], "query": []}
    accuracies = []
    for k, theta in enumerate(learner.trajectory(task.support, method.inner_steps)):
        # Norm layers at theta^k are those of inner step k + 1 for the support set, of step k for the query set.
        support = learner.predict(theta, k + 1, task.support.inputs)
        query = learner.predict(theta, k, task.query.inputs)
        losses["support"].append(float(learner.loop.network.loss_function(support, task.support.targets)))
        losses["query"].append(float(learner.loop.network.loss_function(query, task.query.targets)))
        accuracies.append(float((query.argmax(-1) == task.query.targets).float().mean()))
    epochs = records.planned_epochs
    orders = [1 if learner.mode == "first-order" else method.derivative_order(epoch) for epoch in range(epochs)]
    support_labels, query_labels = (e.targets.cpu().numpy() for e in (images.support, images.query))
    query_images = few_images(images.query.inputs.cpu().numpy(), query_labels, source.ways, 1)
    best = records.summary["best_epochs"][0] if records.summary else records.epochs[-1].epoch
    return ProcessRecord(
        method=method_label(values),
        task=f"{task_text(values)}, test task {index}",
        checkpoint_epoch=int(best),
        ways=source.ways,
        shots=source.shots,
        queries=len(query_labels) // source.ways,
        support_images=few_images(images.support.inputs.cpu().numpy(), support_labels, source.ways, MOST_SHOTS),
        query_images=[text for row in query_images for text in row],
        support_losses=losses["support"],
        query_losses=losses["query"],
        query_accuracies=accuracies,
        rates=inner_rates(learner),
        start=Moment(1, method.loss_weights(0), orders[0]),
        end=Moment(epochs, method.loss_weights(epochs - 1), orders[-1]),
        first_order_epochs=int(np.argmax([*(order == 2 for order in orders), True])),
        learned=_learned(learner),
    )


def _learned(learner: MetaLearner) -> list[str]:
    """What the outer loop learns or keeps besides the initialisation, in words."""
    method = learner.method
    learned = []
    if method.lslr:
        learned.append("inner rates of every tensor and step")
    if method.meta_sgd:
        learned.append("inner rates of every element")
    if method.bnwb and learner.meta.per_step:
        learned.append("norm weights and biases of every step")
    if method.bnrs and learner.statistics.per_step:
        learned.append("running statistics of every step (averaged, not by gradient)")
    return learned
