"""Tasks shared out over processes: the same result as in one, and no hang when a worker dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from innerloop import MetaLearner, maml_plus_plus
from innerloop.data import ClassImages, Episodes
from innerloop.training.building import build_workers
from innerloop.training.config import PRESETS, ConfigError
from innerloop.training.evaluation import evaluate
from innerloop.training.workers import WorkerError, Workers


def make_source() -> Episodes:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (18, 1, 6, 6), dtype=torch.uint8, generator=generator)
    classes = ClassImages(images, (3,) * 6, tuple("abcdef"))
    dataset = {"train": classes, "val": classes}
    return Episodes(dataset, ways=3, shots=1, queries=2, dtype=torch.float64)


def make_learner() -> MetaLearner:
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 3, 3)
    model = nn.Sequential(convolution, nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
    return MetaLearner(model, F.cross_entropy, maml_plus_plus(inner_steps=2, da_epochs=0))


@pytest.fixture(scope="module")
def three() -> Iterator[Workers]:
    with Workers(make_learner(), make_source(), processes=3) as workers:
        yield workers


@pytest.mark.parametrize("size", [7, 3, 2, 1])  # uneven shares, and fewer tasks than processes
def test_gradients_and_statistics_are_those_of_one_process(three: Workers, size: int) -> None:
    alone = Workers(make_learner(), make_source())
    alone.learner.load_state_dict(three.learner.state_dict())
    results = [workers.backward(11, size, epoch=1.0)[0] for workers in (three, alone)]
    for mine, theirs in zip(three.learner.parameters(), alone.learner.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)
        mine.grad = None
    for name, statistic in alone.learner.state_dict().items():
        torch.testing.assert_close(three.learner.state_dict()[name], statistic, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[0].support_losses, results[1].support_losses, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[0].query_outputs, results[1].query_outputs, rtol=1e-12, atol=1e-14)


def test_workers_see_every_update(three: Workers) -> None:
    optimizer = torch.optim.Adam(three.learner.parameters(), lr=0.1)
    for i in range(3):
        three.backward(3 * i, 3, epoch=0)
        optimizer.step()
        optimizer.zero_grad()
    alone = Workers(make_learner(), make_source())
    alone.learner.load_state_dict(three.learner.state_dict())
    mine, theirs = (evaluate(w, "val", 17, steps=4, regression=False) for w in (three, alone))
    assert len(mine.targets) == 17
    for normalisation in ("batch", "running"):
        torch.testing.assert_close(mine.outputs[normalisation], theirs.outputs[normalisation], rtol=1e-12, atol=1e-12)


def test_an_error_in_a_worker_is_raised_here() -> None:
    with (
        Workers(make_learner(), make_source(), processes=2) as workers,
        pytest.raises(ValueError, match="has no split 'test'"),
    ):
        next(workers.outputs("test", 20, 2, ("batch",)))


def test_a_dead_worker_is_an_error_and_not_a_hang() -> None:
    with Workers(make_learner(), make_source(), processes=2) as workers:
        workers.backward(0, 2, epoch=0)
        os.kill(workers._processes[0].pid or 0, signal.SIGKILL)
        with pytest.raises(WorkerError, match="a worker process died"):
            workers.backward(2, 2, epoch=0)


def test_processes_are_for_the_cpu() -> None:
    config = PRESETS["quickstart"].config()
    config = replace(config, compute=replace(config.compute, processes=2))
    with pytest.raises(ConfigError, match="--processes 2 is for the CPU"):
        build_workers(config, make_learner(), make_source(), torch.device("meta"))
