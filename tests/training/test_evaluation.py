"""Scores: means, 95% intervals and ensembles against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from innerloop.training.building import build_device, build_learner, build_tasks
from innerloop.training.config import PRESETS, ConfigError
from innerloop.training.evaluation import confidence_interval, evaluate, evaluate_checkpoints, score
from innerloop.training.workers import Workers


def test_confidence_interval_by_hand() -> None:
    # 0.2, 0.4, 0.9: mean 0.5, deviations -0.3, -0.1, 0.4, s^2 = 0.26 / 2.
    expected = 1.96 * math.sqrt(0.13) / math.sqrt(3)
    assert confidence_interval(torch.tensor([0.2, 0.4, 0.9])) == pytest.approx(expected, rel=1e-6)
    assert confidence_interval(torch.tensor([0.7])) == 0.0


def test_classification_score_by_hand() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 3.0], [0.0, 1.0]]])
    result = score(logits, torch.tensor([[0, 1], [0, 1]]), regression=False)
    assert result.accuracy == 0.75  # task accuracies 1 and 1/2
    assert result.interval == pytest.approx(1.96 * math.sqrt(0.125) / math.sqrt(2))
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    assert result.loss == pytest.approx((softplus(-2) + softplus(-1) + softplus(3) + softplus(-1)) / 4, rel=1e-6)
    assert result.tasks == 2


def test_regression_score_by_hand() -> None:
    result = score(torch.tensor([[[1.0], [2.0]], [[0.0], [0.0]]]), torch.zeros(2, 2, 1), regression=True)
    assert (result.loss, result.accuracy) == (1.25, None)
    assert result.interval == pytest.approx(1.96 * math.sqrt(3.125) / math.sqrt(2))


def test_evaluation_and_ensemble_are_those_of_the_outputs() -> None:
    config = PRESETS["sinusoid"].config()
    config = replace(config, method=replace(config.method, inner_steps=2))
    device = torch.device("cpu")
    source = build_tasks(config, device)
    states = []
    for seed in (0, 1):
        learner = build_learner(replace(config, compute=replace(config.compute, seed=seed)), device)
        states.append({n: t.clone() for n, t in learner.state_dict().items()})
    outputs = []
    for state in states:
        learner.load_state_dict(state)
        result = evaluate(Workers(learner, source), "test", 4, steps=3, regression=True)
        outputs.append(result.outputs["batch"])
        assert len(result.per_step) == 4
        assert result.per_step[3] == result.last["batch"]
        adapted = torch.stack(
            [learner.adapt(source.task("test", i).support, 3)(source.task("test", i).query.inputs) for i in range(4)]
        )
        torch.testing.assert_close(result.outputs["batch"], adapted.detach())
    tested = evaluate_checkpoints(Workers(learner, source), iter(states), "test", 4, steps=3, regression=True)
    targets = torch.stack([source.task("test", i).query.targets for i in range(4)])
    assert tested.ensemble["batch"] == score((outputs[0] + outputs[1]) / 2, targets, True)
    assert tested.best["batch"] == score(outputs[0], targets, True)
    assert tested.members == 2


def test_a_device_that_is_not_there_is_refused() -> None:
    config = PRESETS["sinusoid"].config()
    for name in ("cuda:99", "toaster"):
        with pytest.raises(ConfigError, match=f"--device {name} cannot be used"):
            build_device(replace(config, compute=replace(config.compute, device=name)))
