"""How long a run still takes: all of it, with validation, test and figures, from what its parts took so far."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from innerloop.training.config import Config

RECENT = 40
"""Measurements of a part that count: the machine's other work comes and goes."""
FEW, SHORT = 5, 10.0
"""Measurements before an estimate is given, and seconds that are not worth one."""


class TimeLeft:
    """Seconds that are left of a work of several parts, each counted in units of its own.

    A part that has not begun is taken to be as fast as the nearest that has, by the parts' weights.

    Args:
        weights: of each part, in order, what a unit of it takes relative to one of another.
        more: seconds at the end that are none of the parts'.
        clock: seconds.
    """

    def __init__(
        self, weights: Mapping[str, float], more: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.weights, self.more = dict(weights), more
        self.units = dict.fromkeys(weights, 0)
        self._clock, self._since = clock, clock()
        self._recent: dict[str, deque[tuple[int, float]]] = {part: deque(maxlen=RECENT) for part in weights}
        self._begun = False

    def mark(self) -> None:
        """What follows counts from now."""
        self._since = self._clock()

    def done(self, part: str, units: int = 1) -> None:
        """Units of a part were done since the last mark; fewer than none where a run went back."""
        now = self._clock()
        self.units[part] = max(0, self.units[part] - units)
        if self._begun and units > 0:  # the very first compiles and allocates, and says little of the others
            self._recent[part].append((units, now - self._since))
        self._begun, self._since = True, now

    @property
    def measured(self) -> int:
        """How many measurements there are."""
        return sum(map(len, self._recent.values()))

    def of(self, part: str) -> float | None:
        """Seconds left of a part; None before anything was measured."""
        order = list(self.weights)
        measured = [name for name in order if self._recent[name]]
        if not measured:
            return None
        nearest = min(measured, key=lambda name: abs(order.index(name) - order.index(part)))
        recent = self._recent[nearest]
        pace = sum(seconds for _, seconds in recent) / sum(units for units, _ in recent)
        return self.units[part] * pace * self.weights[part] / self.weights[nearest]

    def total(self) -> float | None:
        """Seconds left of all."""
        parts = [self.of(part) for part in self.weights]
        return None if None in parts else sum(p for p in parts if p is not None) + self.more


class RunTimeLeft(TimeLeft):
    """Of a training run: updates by the order of their derivatives, validation, the test, and figures at the end."""

    def __init__(self, config: Config, first_order: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        size = config.outer.meta_batch
        # Of a task: what these parts took of quickstart's and of Omniglot's runs. The figures take some seconds.
        super().__init__({"order 1": size, "order 2": 1.3 * size, "validation": 0.7, "test": 0.9}, 5.0, clock)
        self.config, self._first_order = config, first_order

    def order(self, epoch: int) -> int:
        """Of the derivatives in an epoch, counted from 0."""
        return 1 if self._first_order else self.config.method.derivative_order(epoch)

    def training(self, epoch: int) -> str:
        """The part that an epoch's updates are of."""
        return f"order {self.order(epoch)}"

    def plan(self, epoch: int, iterations: int) -> None:
        """What is left after some iterations of an epoch. What follows counts from now."""
        outer, evaluation = self.config.outer, self.config.evaluation
        self.units = dict.fromkeys(self.weights, 0)
        for later in range(epoch, outer.epochs):
            self.units[self.training(later)] += outer.iterations
        self.units[self.training(epoch)] -= iterations
        self.units["validation"] = evaluation.val_tasks * (outer.epochs - epoch)
        self.units["test"] = evaluation.test_tasks * min(evaluation.ensemble, outer.epochs)
        self.mark()

    def words(self) -> str | None:
        """How long it will take, once a few updates have shown it; nothing of what is over in seconds."""
        total = self.total()
        if total is None or self.measured < FEW or total < SHORT:
            return None
        training, validation, test = (
            duration(sum(self.of(part) or 0.0 for part in parts))
            for parts in (("order 1", "order 2"), ("validation",), ("test",))
        )
        return f"about {duration(total)} left: training {training}, validation {validation}, test {test}, then figures"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
