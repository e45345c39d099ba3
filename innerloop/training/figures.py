"""The figures of a run: its records, and a test task learned by its best checkpoint."""

from __future__ import annotations

from pathlib import Path

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


def write_figures(run: Path, steps: int, source: TaskSource, learner: MetaLearner) -> list[Path]:
    """Write all figures of a finished run into its ``figures`` folder; ``steps`` inner steps on test tasks."""
    written = write_run_figures(run)
    figures = run / "figures"
    if isinstance(source, Sinusoids):
        tasks = [_curve_task(learner, source, i, steps) for i in range(3)]
        return [*written, draw_adapted_curves(figures / "adapted_curves.png", tasks=tasks)]
    assert isinstance(source, Episodes)
    picture = _task_picture(learner, source, 0, steps)
    return [
        *written,
        draw_task(figures / "task.png", picture),
        draw_overview(figures / "overview.png", run, task=picture),
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
