"""Accuracy on held-out tasks: mean and 95% interval over tasks, per inner step, both normalisations, ensembles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from innerloop.adapted import TaskOutputs
from innerloop.data import Split
from innerloop.norm_layers import Normalisation
from innerloop.tasks import concatenated
from innerloop.training.workers import Workers
from innerloop.update_rules import Tensors

NORMALISATIONS: tuple[Normalisation, ...] = ("batch", "running", "support")


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


@dataclass(frozen=True)
class Evaluation:
    """Scores after each inner step 0..K (``batch`` normalisation), and after the last by normalisation."""

    per_step: list[Score]
    last: dict[Normalisation, Score]
    outputs: dict[Normalisation, Tensor]
    """After the last inner step, ``[tasks, query examples, ...]``: what an ensemble averages."""
    targets: Tensor
    """``[tasks, query examples, ...]``."""


def confidence_interval(values: Tensor) -> float:
    """Half-width of the 95% confidence interval of the mean: 1.96 s / sqrt(n), s with n - 1 (0 for one value)."""
    n = len(values)
    return 1.96 * float(values.double().std(correction=1)) / math.sqrt(n) if n > 1 else 0.0


def score(outputs: Tensor, targets: Tensor, regression: bool) -> Score:
    """Score of outputs ``[tasks, n, ...]`` (logits, or values for regression) against targets of the same tasks."""
    outputs, targets = outputs.cpu(), targets.cpu()  # means are taken in float64, which some devices lack
    if regression:
        losses = ((outputs - targets).double() ** 2).flatten(1).mean(1)
        return Score(float(losses.mean()), None, confidence_interval(losses), len(losses))
    correct = (outputs.argmax(-1) == targets).double().mean(1)
    loss = F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    return Score(float(loss), float(correct.mean()), confidence_interval(correct), len(correct))


def evaluate(
    workers: Workers,
    split: Split,
    tasks: int,
    *,
    steps: int,
    regression: bool,
    normalisations: tuple[Normalisation, ...] = NORMALISATIONS,
    tick: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Adapt to the first ``tasks`` tasks of a split and score every inner step on the query sets.

    ``tick`` is called with the number of tasks just done; it may raise to stop.
    """
    done: list[TaskOutputs] = []
    for part in workers.outputs(split, tasks, steps, normalisations):
        done.append(part)
        tick(len(part.targets))
    everything = concatenated(done)
    targets = everything.targets
    per_step = [score(everything.per_step[:, k], targets, regression) for k in range(steps + 1)]
    outputs = {n: everything.inductive.get(n, everything.per_step[:, -1]) for n in normalisations}
    return Evaluation(per_step, {n: score(o, targets, regression) for n, o in outputs.items()}, outputs, targets)


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
    workers: Workers,
    checkpoints: Iterator[Tensors],
    split: Split,
    tasks: int,
    *,
    steps: int,
    regression: bool,
    tick: Callable[[int], None] = lambda done: None,
) -> TestResult:
    """Test checkpoints, the best first, one by one and as an ensemble. Leaves the last one in the learner."""
    evaluations: list[Evaluation] = []
    for state in checkpoints:
        workers.learner.load_state_dict(state)
        evaluations.append(evaluate(workers, split, tasks, steps=steps, regression=regression, tick=tick))
    best = evaluations[0]
    ensemble = {
        n: score(torch.stack([e.outputs[n] for e in evaluations]).mean(0), best.targets, regression)
        for n in NORMALISATIONS
    }
    return TestResult(best.last, ensemble, len(evaluations), best.per_step)
