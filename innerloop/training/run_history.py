"""What a run's own records say of why it does not learn."""

from __future__ import annotations

import json
from typing import Any

from innerloop.diagnose import Finding
from innerloop.training.config import Config
from innerloop.training.run_folder import RunFolder


def history_findings(folder: RunFolder, config: Config) -> list[Finding]:
    """Findings from ``metrics.jsonl`` and ``events.jsonl``, in no order."""
    metrics, events = _lines(folder.metrics), _lines(folder.events)
    found = [_diverged(events), _no_progress(metrics, config), _overfitted(metrics)]
    return [finding for finding in found if finding is not None]


def _lines(path: Any) -> list[dict[str, Any]]:
    """The records of a file, as far as they can be read."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _diverged(events: list[dict[str, Any]]) -> Finding | None:
    times = sum("diverge" in str(event.get("event", event.get("kind", ""))) for event in events)
    if not times:
        return None
    return Finding(
        "training diverged", 96, f"{times} times a loss or meta-gradient was NaN or infinite (events.jsonl says where)",
        "The outer rate or the inner rates are too large for this network",
        "Lower --outer-lr or --inner-lr; --clip 10; --on-divergence rollback",
    )  # fmt: skip


def _no_progress(metrics: list[dict[str, Any]], config: Config) -> Finding | None:
    losses = [record["train_loss"] for record in metrics if isinstance(record.get("train_loss"), int | float)]
    if len(losses) < 3:
        return None
    first, last, least = losses[0], losses[-1], min(losses)
    if last > 1.2 * least and last - least > 0.1 * abs(first):
        return Finding(
            "the training loss rises", 85, f"{least:.4g} at its least and {last:.4g} in the last epoch",
            "The outer rate is too large",
            f"Lower --outer-lr (now {config.outer.outer_lr:g}), or anneal it (--ca)",
        )  # fmt: skip
    if first - last > 0.02 * abs(first):
        return None
    updates = sum(int(record.get("iterations", 0)) for record in metrics)
    return Finding(
        "the training loss stays", 84, f"{first:.4g} in the first epoch and {last:.4g} in the last, of {len(losses)}",
        f"{updates} updates at an outer rate of {config.outer.outer_lr:g} did nothing: the rate is far too small or "
        "far too large, or there is nothing to learn in the tasks",
        "Change --outer-lr by factors of ten; see the other findings",
    )  # fmt: skip


def _overfitted(metrics: list[dict[str, Any]]) -> Finding | None:
    if not metrics:
        return None
    train, val = metrics[-1].get("train_accuracy"), metrics[-1].get("val_accuracy")
    if not isinstance(train, int | float) or not isinstance(val, int | float) or train - val < 0.2:
        return None
    return Finding(
        "validation stays behind training", 58, f"accuracy {train:.1%} on training classes and {val:.1%} on others",
        "The training classes are too few, or unlike the others",
        "More classes; --rotations, which makes new ones; fewer --filters",
    )  # fmt: skip
