"""A run is a folder: config.json, metrics.jsonl, events.jsonl, checkpoints/, summary.json, figures/.

Every file has a version (``reports.formats``). Fields that a reader does not know it passes over, except in
config.json: an unknown setting would mean another run than the one described, and is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from innerloop.reports.formats import CONFIG_VERSION, EVENTS_VERSION, check_version
from innerloop.training.checkpoints import (
    CheckpointError,
    NewerFormatError,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
    write_all,
    write_atomically,
    write_error,
    write_json,
)
from innerloop.training.config import MESSAGE, Config, ConfigError, config_from_json, config_to_json

EVENTS_BYTES = 256 * 1024
"""events.jsonl grows no further: the older half is dropped."""


class State(NamedTuple):
    """A saved state, and what was wrong with a newer one that could not be read (empty: nothing)."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]
    path: Path
    damage: str


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where the states are."""
        return self.path / "checkpoints"

    @property
    def latest(self) -> Path:
        """The state that ``--resume`` goes on from."""
        return self.checkpoints / "latest.safetensors"

    @property
    def previous(self) -> Path:
        """The state saved before the latest, which stands in for it if it is damaged."""
        return self.checkpoints / "previous.safetensors"

    @property
    def epoch_start(self) -> Path:
        """The state when the epoch began, which a diverged run rolls back to (kept where that is its policy)."""
        return self.checkpoints / "epoch-start.safetensors"

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The checkpoint kept of an epoch that is among the best on validation."""
        return self.checkpoints / f"epoch-{epoch:04d}.safetensors"

    @property
    def metrics(self) -> Path:
        """One JSON object a finished epoch."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object for whatever went other than planned: divergence, damage, resuming."""
        return self.path / "events.jsonl"

    @property
    def summary(self) -> Path:
        """Test scores and where they come from; there when the run has ended."""
        return self.path / "summary.json"

    @property
    def created(self) -> bool:
        """Whether the run has been started."""
        return (self.path / "config.json").is_file()

    @property
    def started(self) -> bool:
        """Whether there is a state to go on from."""
        return self.latest.exists() or self.previous.exists()

    def require_unused(self) -> None:
        """Raise ``ConfigError`` if there is something at the path already.

        What a run leaves that is killed while it makes its folder is nothing.
        """
        if not self.path.exists() or (self.path.is_dir() and all(map(self._is_nothing, self.path.iterdir()))):
            return
        raise ConfigError(
            f"{self.path} exists already. Go on with that run: innerloop train --resume {self.path}; "
            "or name another folder: --out DIR"
        )

    def _is_nothing(self, path: Path) -> bool:
        if path == self.checkpoints and path.is_dir():
            return not any(path.iterdir())
        return path.match(".config.json.*.tmp")

    def create(self, preset: str, config: Config) -> None:
        """Make the folder and write the resolved config.

        Raises:
            ConfigError: there is something at the path already.
        """
        self.require_unused()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(
            self.path / "config.json",
            {"version": CONFIG_VERSION, "preset": preset, "config": config_to_json(config)},
        )

    def read_config(self) -> tuple[str, Config]:
        """Preset name and config of the run.

        Raises:
            ConfigError: the folder is not a run, or its config is not one of this version.
        """
        path = self.path / "config.json"
        if not path.is_file():
            raise ConfigError(f"{self.path} is not a run: it has no config.json")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            version, preset, values = record["version"], str(record["preset"]), record["config"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(f"{path} is not a run's config: {error!r}"[:MESSAGE]) from None
        check_version(str(path), version, CONFIG_VERSION, ConfigError)
        try:
            return preset, config_from_json(values)
        except ConfigError as error:
            raise ConfigError(f"{path} does not hold a run's settings: {error}") from None

    @contextmanager
    def one_writer(self) -> Iterator[None]:
        """Keep other processes from writing to the run meanwhile; the lock ends with the process, however it ends.

        Raises:
            ConfigError: another process is at it.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        descriptor = os.open(self.checkpoints, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another process is training {self.path}: wait for it, or stop it") from None
            except OSError:
                pass  # a file system without locks
            yield
        finally:
            os.close(descriptor)

    def tidy(self, ended: bool = False) -> None:
        """Remove what killed writers left, and checkpoints of epochs that no saved state counts among the best.

        Once the run has ended, the latest state alone counts.
        """
        remove_leftovers([self.path, self.checkpoints, self.path / "figures"])
        counting = (self.latest,) if ended else (self.latest, self.previous, self.epoch_start)
        kept = {epoch for path in counting for epoch in _best(path)}
        if not kept:
            return
        for file in self.checkpoints.glob("epoch-[0-9]*.safetensors"):
            number = file.stem.removeprefix("epoch-")
            if number.isdigit() and int(number) not in kept:
                file.unlink(missing_ok=True)

    def save_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write the latest state; what was the latest becomes the previous one."""
        save_checkpoint(self.latest, tensors, values, previous=self.previous)

    def load_state(self) -> State:
        """The latest state that is whole, on the CPU.

        Raises:
            NewerFormatError: it is of a newer version.
            CheckpointError: none can be read; the message says what is wrong with each.
        """
        wrong = []
        for path in (self.latest, self.previous):
            try:
                tensors, values = load_checkpoint(path)
            except NewerFormatError:
                raise
            except (CheckpointError, FileNotFoundError) as error:
                wrong.append(str(error))
                continue
            damage = f"{wrong[0]}. Went on from the state before it, {path}" if wrong else ""
            return State(tensors, values, path, damage)
        raise CheckpointError(f"{self.path} has no state to go on from: {'; '.join(wrong)}")

    def set_aside_damage(self, state: State) -> None:
        """Take a damaged latest state out of the way, so that the next one saved does not push out the good one."""
        if state.path != self.latest and self.latest.exists():
            os.replace(self.latest, self.latest.with_suffix(".damaged"))

    def usable(self, epochs: list[int]) -> tuple[list[int], list[str]]:
        """Those of the epochs whose checkpoints are whole, and what is wrong with the others.

        Raises:
            CheckpointError: none is.
        """
        good, wrong = [], []
        for epoch in epochs:
            try:
                load_checkpoint(self.epoch_checkpoint(epoch))
            except (CheckpointError, FileNotFoundError) as error:
                wrong.append(str(error))
            else:
                good.append(epoch)
        if epochs and not good:
            raise CheckpointError(f"none of the checkpoints of {self.path} can be read: {'; '.join(wrong)}")
        return good, wrong

    def ranked(self) -> tuple[list[int], list[str]]:
        """Epochs whose checkpoints are whole, the best by their own word first; what is wrong with others.

        Raises:
            CheckpointError: there are some, and none is whole.
        """
        found, wrong = [], []
        for path in sorted(self.checkpoints.glob("epoch-[0-9]*.safetensors")):
            try:
                header = load_checkpoint(path)[1]
                value, epoch = header.get("val"), header.get("epoch")
                if not (isinstance(value, int | float) and isinstance(epoch, int)):
                    raise CheckpointError(f"{path} does not say its epoch and how good it is")
                if path != self.epoch_checkpoint(epoch):
                    raise CheckpointError(f"{path} says that it is of epoch {epoch}")
            except CheckpointError as error:
                wrong.append(str(error))
            else:
                found.append((value, epoch))
        if wrong and not found:
            raise CheckpointError(f"none of the checkpoints of {self.path} can be read: {'; '.join(wrong)}")
        return [epoch for _, epoch in sorted(found, reverse=True)], wrong

    def require_state_or_none_yet(self) -> None:
        """Raise ``ConfigError`` where training has come further than its first epoch and the state is not there.

        A run as it is published has its best checkpoints only: to begin it anew would write over its record.
        """
        if self.started or not self.metrics.is_file():
            return
        if self.summary.is_file() or self.metrics.read_bytes().count(b"\n") > 1:
            raise ConfigError(
                f"{self.path} has no state to go on from ({self.latest} is missing). It can be evaluated and adapted; "
                "to train it again, take its config.json's settings and another folder"
            )

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one epoch's metrics, and see them on the disk.

        Raises:
            WriteError: the disk is full, say; the file is as it was.
        """
        _append(self.metrics, record)

    def keep_metrics_until(self, epoch: int) -> None:
        """Drop what was written after ``epoch`` by a run that was killed before it saved its state."""
        if not self.metrics.is_file():
            return
        text = self.metrics.read_text(encoding="utf-8", errors="replace")
        kept = "".join(line + "\n" for line in text.splitlines() if _epoch_of(line) <= epoch)
        if kept != text:
            write_atomically(self.metrics, kept.encode())

    def note(self, event: str, message: str, **fields: Any) -> None:
        """Add an event to events.jsonl. A log that cannot be written stops nothing."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = {"version": EVENTS_VERSION, "time": now, "event": event, "message": message, **fields}
        with suppress(OSError):
            _append(self.events, record)
            if self.events.stat().st_size > EVENTS_BYTES:
                lines = self.events.read_bytes().splitlines(keepends=True)
                size = 0
                for first in reversed(range(len(lines))):
                    size += len(lines[first])
                    if size > EVENTS_BYTES // 2:
                        break
                write_atomically(self.events, b"".join(lines[first + 1 :]))


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a file, whole or not at all."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        try:
            before = os.lseek(descriptor, 0, os.SEEK_END)
            half = before > 0 and os.lseek(descriptor, -1, os.SEEK_END) >= 0 and os.read(descriptor, 1) != b"\n"
            try:
                # What a killed writer left half-written stays a line of its own.
                write_all(descriptor, ("\n" * half + json.dumps(record) + "\n").encode())
            except OSError:
                os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise write_error(path, error) from error


def _epoch_of(line: str) -> float:
    """The epoch of a line of metrics.jsonl; infinite for a line that was not written to its end."""
    try:
        return int(json.loads(line)["epoch"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return float("inf")


def _best(path: Path) -> set[int]:
    """Epochs that a state counts among the best; none where it cannot be read."""
    try:
        return {int(epoch) for _, epoch in load_checkpoint(path)[1]["best"]}
    except (CheckpointError, FileNotFoundError, KeyError, ValueError, TypeError, OverflowError):
        return set()
