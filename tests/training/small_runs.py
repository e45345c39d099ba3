"""Small sinusoid runs, and a way to stop them at a chosen moment."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from innerloop.training.config import PRESETS, Config
from innerloop.training.progress import Bar, Progress
from innerloop.training.run_folder import RunFolder


def small(method: str = "maml_plus_plus", **settings: object) -> Config:
    config = PRESETS["sinusoid"].config(method)
    return replace(
        config,
        method=replace(config.method, inner_steps=2, msl_epochs=2, da_epochs=1, **settings),
        outer=replace(config.outer, epochs=3, iterations=7, meta_batch=3),
        evaluation=replace(config.evaluation, val_tasks=5, test_tasks=6, test_steps=3, ensemble=2),
    )


def start(path: Path, config: Config) -> RunFolder:
    folder = RunFolder(path)
    folder.create("sinusoid", config)
    return folder


def records(folder: RunFolder) -> list[dict[str, object]]:
    """The metrics without what a clock measured."""
    clock = ("seconds", "tasks_per_second")
    return [
        {k: v for k, v in json.loads(line).items() if k not in clock}
        for line in folder.metrics.read_text().splitlines()
    ]


class StoppingProgress(Progress):
    """Sends this process a signal at the n-th step of any bar."""

    def __init__(self, at: int, number: signal.Signals = signal.SIGINT) -> None:
        super().__init__(shown=False)
        self.left, self.number = at, number

    @contextmanager
    def task(self, name: str, total: int, completed: int = 0) -> Iterator[Bar]:
        outer = self

        class Stop(Bar):
            def advance(self, steps: int = 1, status: str = "") -> None:
                outer.left -= 1
                if outer.left == 0:
                    os.kill(os.getpid(), outer.number)

        yield Stop(None)
