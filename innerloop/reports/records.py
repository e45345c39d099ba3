"""Reading what a run wrote: its configuration and one record for every finished epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EpochRecord:
    """One line of ``metrics.jsonl``. Accuracies are fractions, None for regression; a lost number is NaN."""

    epoch: int
    """From 1."""
    iterations: int
    """Outer updates so far."""
    outer_lr: float
    derivative_order: int
    loss_weights: list[float]
    """w_1 .. w_K of the query losses."""
    train_loss: float
    train_accuracy: float | None
    val_loss: float
    val_accuracy: float | None
    val_interval: float
    """Half-width of the 95% interval over tasks, of the accuracy, or of the loss for regression."""
    val_tasks: int
    val_losses_per_step: list[float]
    """On the query set after inner step 0 .. K."""
    val_accuracies_per_step: list[float] | None
    gradient_norm_mean: float
    gradient_norm_max: float
    rates: dict[str, list[float]]
    """Inner rate of every adapted parameter tensor at inner step 1 .. K, in network order."""


@dataclass(frozen=True)
class RunRecords:
    """A run's configuration and its epochs in order, at least one."""

    name: str
    config: Mapping[str, Any]
    epochs: list[EpochRecord]

    @property
    def is_classification(self) -> bool:
        """Whether the run counts right answers; otherwise it is regression and only has losses."""
        return any(record.val_accuracy is not None for record in self.epochs)

    @property
    def ways(self) -> int | None:
        """Classes in a task, where the configuration has them."""
        ways = self._setting("data", "ways")
        return int(ways) if self.is_classification and isinstance(ways, int) and ways > 0 else None

    @property
    def initial_inner_lr(self) -> float | None:
        """The inner rate that every tensor and step started from."""
        rate = self._setting("method", "inner_lr")
        return float(rate) if isinstance(rate, (int, float)) and math.isfinite(rate) else None

    @property
    def derivative_switches(self) -> list[int]:
        """Epochs whose derivative order differs from the epoch before."""
        pairs = zip(self.epochs, self.epochs[1:], strict=False)
        return [now.epoch for before, now in pairs if now.derivative_order != before.derivative_order]

    @property
    def msl_end(self) -> int | None:
        """First epoch in which the last inner step's loss alone counts, where earlier ones counted before."""
        pairs = zip(self.epochs, self.epochs[1:], strict=False)
        ends = (now.epoch for before, now in pairs if any(before.loss_weights[:-1]) and not any(now.loss_weights[:-1]))
        return next(ends, None)

    def _setting(self, section: str, key: str) -> object:
        part = self.config.get(section)
        return part.get(key) if isinstance(part, Mapping) else None


def read_run(run: Path) -> RunRecords:
    """Read ``config.json`` (if there) and ``metrics.jsonl`` of a run's folder.

    A last line that a stopped run left half-written is passed over. Where an epoch was recorded twice, by a
    run that went on from a checkpoint, the later record counts.

    Raises:
        FileNotFoundError: there is no ``metrics.jsonl``.
        ValueError: a line that is not a record, or no finished epoch.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"{run} has no metrics.jsonl: not a run's folder, or no epoch has finished") from None
    epochs: dict[int, EpochRecord] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error}): {line[:80]!r}") from None
        record = _epoch_record(fields, f"{path}, line {number}")
        epochs[record.epoch] = record
    if not epochs:
        raise ValueError(f"{path} has no finished epoch yet")
    ordered = [epochs[epoch] for epoch in sorted(epochs)]
    return RunRecords(run.resolve().name, _read_config(run / "config.json"), ordered)


def _read_config(path: Path) -> Mapping[str, Any]:
    """The run's configuration; empty where there is no file."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    config = document.get("config") if isinstance(document, dict) else None
    return config if isinstance(config, dict) else {}


def _epoch_record(fields: object, where: str) -> EpochRecord:
    """One parsed line as a record; ``where`` names it in errors."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a JSON object, got {str(fields)[:80]!r}")
    try:
        per_step = fields["val_accuracies_per_step"]
        return EpochRecord(
            epoch=int(fields["epoch"]),
            iterations=int(fields["iterations"]),
            outer_lr=_number(fields["outer_lr"]),
            derivative_order=int(fields["derivative_order"]),
            loss_weights=_numbers(fields["loss_weights"]),
            train_loss=_number(fields["train_loss"]),
            train_accuracy=_optional(fields["train_accuracy"]),
            val_loss=_number(fields["val_loss"]),
            val_accuracy=_optional(fields["val_accuracy"]),
            val_interval=_number(fields["val_interval"]),
            val_tasks=int(fields["val_tasks"]),
            val_losses_per_step=_numbers(fields["val_losses_per_step"]),
            val_accuracies_per_step=None if per_step is None else _numbers(per_step),
            gradient_norm_mean=_number(fields["gradient_norm_mean"]),
            gradient_norm_max=_number(fields["gradient_norm_max"]),
            rates={str(name): _numbers(rates) for name, rates in fields["rates"].items()},
        )
    except KeyError as error:
        raise ValueError(f"{where} has no {error.args[0]!r}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _number(value: Any) -> float:
    """A number of a record: null and "nan" (as some writers put a non-finite value) are NaN."""
    return math.nan if value is None else float(value)


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _numbers(values: Any) -> list[float]:
    return [_number(value) for value in values]
