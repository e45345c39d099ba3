"""A run is a folder: config.json, metrics.jsonl, checkpoints/, summary.json, figures/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from innerloop.training.checkpoints import write_atomically, write_json
from innerloop.training.config import CONFIG_VERSION, Config, ConfigError, config_from_json, config_to_json


@dataclass(frozen=True)
class RunFolder:
    """Paths and records of one run."""

    path: Path

    @property
    def latest(self) -> Path:
        """The checkpoint that ``--resume`` goes on from."""
        return self.path / "checkpoints" / "latest.safetensors"

    def epoch_checkpoint(self, epoch: int) -> Path:
        """The checkpoint kept of an epoch that is among the best on validation."""
        return self.path / "checkpoints" / f"epoch-{epoch:04d}.safetensors"

    @property
    def metrics(self) -> Path:
        """One JSON object a finished epoch."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """Test scores and where they come from; there when the run has ended."""
        return self.path / "summary.json"

    @property
    def created(self) -> bool:
        """Whether the run has been started."""
        return (self.path / "config.json").is_file()

    def require_unused(self) -> None:
        """Raise ``ConfigError`` if there is something at the path already."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ConfigError(
                f"{self.path} exists already. Go on with that run: innerloop train --resume {self.path}; "
                "or name another folder: --out DIR"
            )

    def create(self, preset: str, config: Config) -> None:
        """Make the folder and write the resolved config.

        Raises:
            ConfigError: there is something at the path already.
        """
        self.require_unused()
        (self.path / "checkpoints").mkdir(parents=True)
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
            record = json.loads(path.read_text())
            version, preset, values = record["version"], str(record["preset"]), record["config"]
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} is not a run's config: {error!r}") from None
        if version != CONFIG_VERSION:
            raise ConfigError(f"{path} has version {version!r}; this innerloop reads version {CONFIG_VERSION}")
        return preset, config_from_json(values)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one epoch's metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def keep_metrics_until(self, epoch: int) -> None:
        """Drop what was written after ``epoch`` by a run that was killed before it saved its state."""
        if self.metrics.is_file():
            lines = self.metrics.read_text().splitlines()[:epoch]
            write_atomically(self.metrics, "".join(line + "\n" for line in lines).encode())
