"""Figures with their spread, and what the spread is: over seeds, or over tasks. The two are never mixed.

*Deviation over seeds*: the sample standard deviation of the runs' accuracies, each from a seed of its own. It says how
far another training run may fall from these. One seed has none.

*95% interval over tasks*: how well the mean over the runs at hand is known from the test tasks they were given. It says
nothing of other training runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Which = Literal["best", "ensemble"]
"""The single checkpoint best on validation, or the ensemble of the best few."""

DASH = "–"
"""In a table: not recorded."""


@dataclass(frozen=True)
class Estimate:
    """The mean over seeds of a figure that each run has as a mean over tasks.

    Attributes:
        mean: over the seeds.
        deviation: over the seeds, with n - 1; None with one seed.
        seeds: how many.
        interval: half-width of the 95% interval over tasks of ``mean``. Each seed has tasks of its own, so the
            half-widths h of n runs combine to sqrt(sum h^2) / n.
        tasks: of each seed.
    """

    mean: float
    deviation: float | None
    seeds: int
    interval: float
    tasks: int

    def scaled(self, factor: float) -> Estimate:
        """In another unit: 100 for percent."""
        deviation = None if self.deviation is None else factor * self.deviation
        return Estimate(factor * self.mean, deviation, self.seeds, factor * self.interval, self.tasks)

    def over_seeds(self, digits: int = 2) -> str:
        """``97.65 ± 0.05``, the mean and the deviation over seeds; with one seed the figure alone."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{deviation}"

    def over_tasks(self, digits: int = 2) -> str:
        """``± 0.31``, the 95% interval over tasks."""
        return f"± {self.interval:.{digits}f}"


def estimate(values: Sequence[float], intervals: Sequence[float], tasks: int) -> Estimate:
    """The mean of one figure a seed, ``intervals`` being the half-widths of their 95% intervals over tasks.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("an estimate needs the figure of one seed at least")
    count = len(values)
    return Estimate(
        mean=statistics.fmean(values),
        deviation=statistics.stdev(values) if count > 1 else None,
        seeds=count,
        interval=math.sqrt(sum(h * h for h in intervals)) / count,
        tasks=tasks,
    )


def over_runs(summaries: Sequence[Mapping[str, Any]], which: Which, normalisation: str, figure: str) -> Estimate | None:
    """A test figure of several seeds, ``accuracy`` (a fraction) or ``loss``; None where a run did not record it."""
    scores = [summary.get("test", {}).get(which, {}).get(normalisation) for summary in summaries]
    if not scores or any(score is None or score.get(figure) is None for score in scores):
        return None
    return estimate(
        [float(score[figure]) for score in scores],
        [float(score["interval"]) for score in scores],
        int(scores[0]["tasks"]),
    )
