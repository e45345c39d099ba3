from __future__ import annotations

import math

import pytest
import torch

from innerloop.data import Sinusoids
from innerloop.tasks import select_task


def test_points_lie_on_the_task_s_wave() -> None:
    source = Sinusoids(shots=5, queries=7, seed=1, dtype=torch.float64)
    tasks = source.meta_batch("train", 3, 4)
    assert tasks.support.inputs.shape == tasks.support.targets.shape == (4, 5, 1)
    assert tasks.query.inputs.shape == (4, 7, 1)
    for offset in range(4):
        amplitude, phase = source.parameters("train", 3 + offset)
        for examples in select_task(tasks, offset):
            torch.testing.assert_close(examples.targets, amplitude * torch.sin(examples.inputs - phase))


def test_tasks_are_pure_functions_of_their_number() -> None:
    source = Sinusoids()
    batch = source.meta_batch("val", 10, 3)
    alone = Sinusoids().task("val", 12)
    assert torch.equal(batch.query.targets[2], alone.query.targets)
    assert not torch.equal(alone.query.inputs, source.task("train", 12).query.inputs)
    assert not torch.equal(alone.query.inputs, Sinusoids(seed=1).task("val", 12).query.inputs)
    assert source.task("test", 10**15).support.inputs.dtype == torch.float32


def test_ranges() -> None:
    source = Sinusoids(shots=20)
    amplitudes, phases = zip(*(source.parameters("train", i) for i in range(2000)), strict=True)
    assert 0.1 <= min(amplitudes) < 0.2
    assert 4.9 < max(amplitudes) <= 5
    assert 0 <= min(phases) < 0.05
    assert math.pi - 0.05 < max(phases) <= math.pi
    x = source.meta_batch("train", 0, 200).support.inputs
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() <= 5
    assert abs(x.mean()) < 0.2


def test_the_first_task_is_pinned() -> None:
    assert Sinusoids().parameters("train", 0) == pytest.approx((0.3534060631761792, 1.394412317303491), abs=1e-12)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="shots must be a whole number"):
        Sinusoids(shots=0)
    with pytest.raises(ValueError, match="floating-point"):
        Sinusoids(dtype=torch.int32)
    with pytest.raises(ValueError, match="split must be one of"):
        Sinusoids().task("training", 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="task index"):
        Sinusoids().task("train", -1)
