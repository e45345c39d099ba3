"""The figures of a run: its records, and a test task learned by its best checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from innerloop.data import Sinusoids
from innerloop.data.episodes import Episodes
from innerloop.learner import MetaLearner
from innerloop.reports.figures import (
    CurveTask,
    TaskPicture,
    draw_adapted_curves,
    draw_overview,
    draw_task,
    write_run_figures,
)
from innerloop.training.building import build_device, build_learner, build_tasks
from innerloop.training.config import Config
from innerloop.training.run_folder import RunFolder
from innerloop.training.trainer import best_checkpoints, best_epochs


def write_figures(folder: RunFolder, config: Config) -> list[Path]:
    """Write all figures of a finished run into its ``figures`` folder."""
    device = build_device(config)
    source = build_tasks(config, device)
    learner = build_learner(config, device)
    learner.load_state_dict(next(best_checkpoints(folder, best_epochs(folder)[:1])))
    written = write_run_figures(folder.path)
    figures = folder.path / "figures"
    if isinstance(source, Sinusoids):
        tasks = [_curve_task(learner, source, i, config.test_steps) for i in range(3)]
        return [*written, draw_adapted_curves(figures / "adapted_curves.png", tasks=tasks)]
    assert isinstance(source, Episodes)
    picture = _task_picture(learner, source, 0, config.test_steps)
    return [
        *written,
        draw_task(figures / "task.png", picture),
        draw_overview(figures / "overview.png", folder.path, task=picture),
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
