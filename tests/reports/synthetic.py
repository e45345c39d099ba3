"""Run folders with records that are made up, for what is drawn and printed from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from innerloop.methods import METHODS
from innerloop.training.config import PRESETS, config_to_json

SCORES = ("batch", "running", "support")


def config(seed: int, method: str = "maml", changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A run's config.json; ``changes`` are "section.name": value."""
    preset = PRESETS["omniglot-20way-1shot-short"]
    values = config_to_json(preset.config())
    values["method"] = json.loads(json.dumps(asdict(METHODS[method](**preset.method_settings))))
    values["compute"]["seed"] = seed
    for name, value in (changes or {}).items():
        section, key = name.split(".")
        values[section][key] = value
    return {"version": 1, "preset": "omniglot-20way-1shot-short", "config": values}


def write_run(
    folder: Path,
    accuracies: Sequence[float],
    *,
    seed: int = 0,
    method: str = "maml",
    changes: Mapping[str, Any] | None = None,
    test: float | None = None,
    interval: float = 0.01,
    scores: Sequence[str] = SCORES,
) -> Path:
    """A run whose validation accuracy goes as given, an epoch each; finished if it has a ``test`` accuracy."""
    folder.mkdir(parents=True)
    document = config(seed, method, {"outer.epochs": 4, **(changes or {})})
    (folder / "config.json").write_text(json.dumps(document))
    steps = document["config"]["method"]["inner_steps"]
    iterations = document["config"]["outer"]["iterations"]
    lines = [
        {
            "epoch": epoch,
            "iterations": iterations * epoch,
            "seconds": 10.0 * epoch,
            "outer_lr": 1e-3,
            "derivative_order": 2,
            "loss_weights": [0.0] * (steps - 1) + [1.0],
            "train_loss": 1.0,
            "train_accuracy": accuracy,
            "val_loss": 1.0,
            "val_accuracy": accuracy,
            "val_interval": 0.02,
            "val_tasks": 50,
            "val_losses_per_step": [1.0] * (steps + 1),
            "val_accuracies_per_step": [accuracy] * (steps + 1),
            "gradient_norm_mean": float(epoch),
            "gradient_norm_max": 3.0 * epoch,
            "rates": {"a.weight": [0.1] * steps, "b.weight": [0.2] * steps},
        }
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if test is not None:

        def score(value: float) -> dict[str, Any]:
            return {"loss": 1.0, "accuracy": value, "interval": interval, "tasks": 600}

        summary = {
            "version": 1,
            "command": f"innerloop train <b> --seed {seed}",
            "seed": seed,
            "train_seconds": 40.0,
            "best_epochs": [1],
            "test": {
                "best": {name: score(test - 0.02 - 0.1 * place) for place, name in enumerate(scores)},
                "ensemble": {name: score(test - 0.1 * place) for place, name in enumerate(scores)},
                "members": 5,
                "per_step": [score(test * k / steps) for k in range(steps + 1)],
            },
            "environment": {"commit": "abc", "torch": "2.13", "device": "a cpu", "cores": 2, "processes": 2},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_grid(
    out: Path, rows: Mapping[str, tuple[str, Mapping[str, Any]]], tests: Mapping[str, Sequence[float | None]]
) -> Path:
    """GRID/ROW/seed-S for each row's (method, changes); a test accuracy of None is a run that diverged in epoch 3."""
    runs = []
    for row, (method, changes) in rows.items():
        for seed, test in enumerate(tests[row]):
            going = [0.5, 0.7, 0.8, 0.9] if test is not None else [0.5, 0.1]
            write_run(out / row / f"seed-{seed}", going, seed=seed, method=method, changes=changes, test=test)
            runs.append({"row": row, "seed": seed, "status": "diverged" if test is None else "done"})
    (out / "grid.json").write_text(json.dumps({"version": 1, "runs": runs}))
    return out
