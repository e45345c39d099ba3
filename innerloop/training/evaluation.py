"""Accuracy on held-out tasks: mean and 95% interval over tasks, per inner step, both normalisations, ensembles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from innerloop.data import Split, TaskSource
from innerloop.learner import MetaLearner
from innerloop.network import Normalisation
from innerloop.update_rules import Tensors

NORMALISATIONS: tuple[Normalisation, ...] = ("batch", "running")


@dataclass(frozen=True)
class Score:
    """A figure over tasks.

    Attributes:
        loss: mean over tasks of the query loss.
        accuracy: mean over tasks of the fraction of query examples classified right; None for regression.
        interval: half-width of the 95% confidence interval over tasks of the accuracy (regression: of the loss).
        tasks: how many tasks.
    """

    loss: float
    accuracy: float | None
    interval: float
    tasks: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """Scores after each inner step 0..K (``batch`` normalisation), and after the last by normalisation."""

    per_step: list[Score]
    last: dict[Normalisation, Score]
    outputs: dict[Normalisation, Tensor]
    """After the last inner step, ``[tasks, query examples, ...]``: what an ensemble averages."""


def confidence_interval(values: Tensor) -> float:
    """Half-width of the 95% confidence interval of the mean: 1.96 s / sqrt(n), s with n - 1 (0 for one value)."""
    n = len(values)
    return 1.96 * float(values.double().std(correction=1)) / math.sqrt(n) if n > 1 else 0.0


def score(outputs: Tensor, targets: Tensor, regression: bool) -> Score:
    """Score of outputs ``[tasks, n, ...]`` (logits, or values for regression) against targets of the same tasks."""
    if regression:
        losses = ((outputs - targets) ** 2).flatten(1).mean(1)
        return Score(float(losses.mean()), None, confidence_interval(losses), len(losses))
    correct = (outputs.argmax(-1) == targets).double().mean(1)
    loss = F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    return Score(float(loss), float(correct.mean()), confidence_interval(correct), len(correct))


def evaluate(
    learner: MetaLearner,
    source: TaskSource,
    split: Split,
    tasks: int,
    *,
    steps: int,
    regression: bool,
    normalisations: Sequence[Normalisation] = NORMALISATIONS,
    tick: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Adapt to the first ``tasks`` tasks of a split and score every inner step on the query sets.

    ``tick`` is called after each task; it may raise to stop.
    """
    per_step: list[list[Tensor]] = [[] for _ in range(steps + 1)]
    last: dict[Normalisation, list[Tensor]] = {n: [] for n in normalisations}
    targets: list[Tensor] = []
    for i in range(tasks):
        task = source.task(split, i)
        theta: Tensors = {}
        for k, theta in enumerate(learner.trajectory(task.support, steps)):
            per_step[k].append(learner.predict(theta, k, task.query.inputs, "batch"))
        for normalisation in normalisations:
            # The trajectory's last prediction was already made in batch normalisation.
            last[normalisation].append(
                per_step[steps][-1]
                if normalisation == "batch"
                else learner.predict(theta, steps, task.query.inputs, normalisation)
            )
        targets.append(task.query.targets)
        tick()
    expected = torch.stack(targets)
    outputs = {n: torch.stack(o) for n, o in last.items()}
    return Evaluation(
        [score(torch.stack(o), expected, regression) for o in per_step],
        {n: score(o, expected, regression) for n, o in outputs.items()},
        outputs,
    )


@dataclass(frozen=True)
class TestResult:
    """The test of a run, for each normalisation."""

    best: dict[Normalisation, Score]
    """The single checkpoint best on validation."""
    ensemble: dict[Normalisation, Score]
    """Mean of the outputs (logits) of the checkpoints best on validation."""
    members: int
    """How many checkpoints the ensemble has."""
    per_step: list[Score]
    """After each inner step 0..K, of the best checkpoint, in batch normalisation."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def evaluate_checkpoints(
    learner: MetaLearner,
    checkpoints: Iterator[Tensors],
    source: TaskSource,
    split: Split,
    tasks: int,
    *,
    steps: int,
    regression: bool,
    tick: Callable[[], None] = lambda: None,
) -> TestResult:
    """Test checkpoints, the best first, one by one and as an ensemble. Leaves the last one in ``learner``."""
    evaluations: list[Evaluation] = []
    for state in checkpoints:
        learner.load_state_dict(state)
        evaluations.append(evaluate(learner, source, split, tasks, steps=steps, regression=regression, tick=tick))
    targets = torch.stack([source.task(split, i).query.targets for i in range(tasks)])
    ensemble = {
        n: score(torch.stack([e.outputs[n] for e in evaluations]).mean(0), targets, regression) for n in NORMALISATIONS
    }
    best = evaluations[0]
    return TestResult(best.last, ensemble, len(evaluations), best.per_step)
