"""Reading what a run wrote: its configuration and one record for every finished epoch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from innerloop.reports.formats import CONFIG_VERSION, METRICS_VERSION, SUMMARY_VERSION, check_version

Status = Literal["finished", "diverged", "unfinished"]
"""Tested at its end; stopped by a NaN or infinite loss; or going on, or stopped otherwise."""


@dataclass(frozen=True)
class EpochRecord:
    """One line of ``metrics.jsonl``. Accuracies are fractions, None for regression; a lost number is NaN."""

    epoch: int
    """From 1."""
    iterations: int
    """Outer updates so far."""
    seconds: float
    """Of training so far, validation not counted."""
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
    """A run's configuration and its epochs in order."""

    name: str
    config: Mapping[str, Any]
    epochs: list[EpochRecord]
    path: Path = Path()
    preset: str = ""
    summary: Mapping[str, Any] | None = None
    """Test scores and where they come from; None while the run has not finished."""
    status: Status = "unfinished"

    @property
    def is_classification(self) -> bool:
        """Whether the run counts right answers; otherwise it is regression and only has losses."""
        if not self.epochs:
            return self.setting("data", "dataset") != "sinusoid"
        return any(record.val_accuracy is not None for record in self.epochs)

    @property
    def seed(self) -> int:
        """Of the initialisation, the class split and all tasks."""
        seed = self.setting("compute", "seed")
        return seed if isinstance(seed, int) else 0

    @property
    def planned_epochs(self) -> int:
        """Epochs that the run was to have."""
        epochs = self.setting("outer", "epochs")
        return epochs if isinstance(epochs, int) else len(self.epochs)

    @property
    def ways(self) -> int | None:
        """Classes in a task, where the configuration has them."""
        ways = self.setting("data", "ways")
        return int(ways) if self.is_classification and isinstance(ways, int) and ways > 0 else None

    @property
    def initial_inner_lr(self) -> float | None:
        """The inner rate that every tensor and step started from."""
        rate = self.setting("method", "inner_lr")
        return float(rate) if isinstance(rate, (int, float)) and abs(rate) <= sys.float_info.max else None

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

    def setting(self, section: str, key: str) -> object:
        """A value of the configuration; None where it has none."""
        part = self.config.get(section)
        return part.get(key) if isinstance(part, Mapping) else None


def read_run(run: Path) -> RunRecords:
    """Read ``config.json`` and ``summary.json`` (if there) and ``metrics.jsonl`` of a run's folder.

    A last line that a stopped run left half-written is passed over. Where an epoch was recorded twice, by a
    run that went on from a checkpoint, the later record counts.

    Raises:
        FileNotFoundError: there is no ``metrics.jsonl``.
        ValueError: a line that is not a record, or no finished epoch.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run} has no metrics.jsonl: not a run's folder, or no epoch has finished")
    records = read_started_run(run)
    if not records.epochs:
        raise ValueError(f"{path} has no finished epoch yet")
    return records


def read_started_run(run: Path) -> RunRecords:
    """``read_run``, also of a run of which no epoch has finished yet.

    A run of a grid (``GRID/ROW/seed-S``) that did not finish has the status that ``GRID/grid.json`` tells.

    Raises:
        ValueError: a file that is not what a run writes.
    """
    document = _read_json(run / "config.json", CONFIG_VERSION)
    config = document.get("config")
    summary = _read_json(run / "summary.json", SUMMARY_VERSION) or None
    return RunRecords(
        name=run.resolve().name,
        config=config if isinstance(config, dict) else {},
        epochs=_read_epochs(run / "metrics.jsonl"),
        path=run,
        preset=str(document.get("preset", "")),
        summary=summary,
        status="finished" if summary else _status_in_grid(run),
    )


def _read_epochs(path: Path) -> list[EpochRecord]:
    """The epochs of a ``metrics.jsonl``, in order; none where there is no such file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    epochs: dict[int, EpochRecord] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON ({error}): {line[:80]!r}") from None
        record = _epoch_record(fields, f"{path}, line {number}")
        epochs[record.epoch] = record
    return [epochs[epoch] for epoch in sorted(epochs)]


def _read_json(path: Path, newest: int = 1) -> Mapping[str, Any]:
    """A JSON object of a version up to ``newest``; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        return {}
    check_version(str(path), document.get("version", 1), newest)
    return document


def rows_of_grid(folder: Path) -> list[str]:
    """The rows that ``innerloop ablate`` ran into a folder, in their order; empty where there is no ``grid.json``.

    Raises ``ValueError`` for a damaged one.
    """
    return list(dict.fromkeys(str(entry.get("row")) for entry in _grid_entries(folder)))


def _grid_entries(folder: Path) -> list[Mapping[str, Any]]:
    runs = _read_json(folder / "grid.json").get("runs")
    return [entry for entry in runs if isinstance(entry, dict)] if isinstance(runs, list) else []


def _status_in_grid(run: Path) -> Status:
    run = run.resolve()
    for entry in _grid_entries(run.parent.parent):
        if (entry.get("row"), f"seed-{entry.get('seed')}") == (run.parent.name, run.name):
            return "diverged" if entry.get("status") == "diverged" else "unfinished"
    return "unfinished"


def _epoch_record(fields: object, where: str) -> EpochRecord:
    """One parsed line as a record; ``where`` names it in errors."""
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a JSON object, got {str(fields)[:80]!r}")
    check_version(where, fields.get("version", 1), METRICS_VERSION)
    try:
        per_step = fields["val_accuracies_per_step"]
        return EpochRecord(
            epoch=int(fields["epoch"]),
            iterations=int(fields["iterations"]),
            seconds=_number(fields.get("seconds")),
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
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from None


def _number(value: Any) -> float:
    """A number of a record: null and "nan" (as some writers put a non-finite value) are NaN."""
    return math.nan if value is None else float(value)


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _numbers(values: Any) -> list[float]:
    return [_number(value) for value in values]
