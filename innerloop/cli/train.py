"""``innerloop train``: meta-train a preset, with any setting changed."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from innerloop.cli.ranks import peeked_timeout, to_be_launched
from innerloop.cli.tables import print_test
from innerloop.methods import METHODS
from innerloop.training.config import PRESETS, Config, ConfigError, config_to_json, validated
from innerloop.training.distributed import TIMEOUT_SECONDS, Ranks, joined, launch, restarted
from innerloop.training.progress import Progress
from innerloop.training.run_folder import RunFolder
from innerloop.training.trainer import FinishedRun, InterruptedRunError, train

MethodName = Literal["maml", "fomaml", "meta_sgd", "anil", "boil", "maml_plus_plus"]


@dataclass(frozen=True)
class TrainArguments:
    """Everything that ``innerloop train PRESET`` takes; the defaults are those of the preset and the method."""

    config: Annotated[tyro.conf.OmitArgPrefixes[Config], tyro.conf.arg(name="")]
    method: MethodName = "maml_plus_plus"
    """Sets the switches below; each can be changed on top."""
    out: Path | None = None
    """Folder of the run. Default: runs/PRESET-METHOD-TIME."""
    resume: Path | None = None
    """Go on with the run in this folder."""
    devices: int = 0
    """Ranks on this machine: GPUs where there are any, else CPU processes (0: one, or what torchrun starts)."""
    timeout: float = TIMEOUT_SECONDS
    """Seconds that a rank waits for the others before the run ends."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the summary as JSON on standard output, and no progress."""
    quiet: bool = False
    """No progress."""


def run(arguments: Sequence[str]) -> int:
    """Train as the command line says."""
    with joined(peeked_timeout(arguments)) as ranks:
        plan = _plan(list(arguments), ranks)
        if to_be_launched(plan.devices, ranks):
            place = [] if plan.resumed else ["--out", str(plan.folder.path)]
            return launch(plan.devices, ["train", *arguments, *place])
        finished = _train(plan, ranks)
    if not ranks.main:
        return 0
    with plan.progress.waiting("drawing figures"):
        # Only now: what draws them takes a fifth of the time to import all of this.
        from innerloop.training.figures import write_figures

        figures = write_figures(plan.folder.path, plan.config.test_steps, finished.source, finished.learner)
    if plan.json:
        print(json.dumps(finished.summary))
    else:
        tasks = plan.config.evaluation.test_tasks
        print_test(finished.summary["test"], plan.config.regression, f"test, {tasks} tasks")
        plan.progress.console.print(
            f"figures: {', '.join(sorted(str(f) for f in figures))}", highlight=False, soft_wrap=True
        )
    return 0


class _Plan(NamedTuple):
    """What the command line asks for, found to be possible."""

    folder: RunFolder
    preset: str
    config: Config
    resumed: bool
    devices: int
    json: bool
    progress: Progress
    command: str


def _plan(arguments: list[str], ranks: Ranks) -> _Plan:
    preset = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    if preset is not None and preset not in PRESETS:
        close = get_close_matches(preset, PRESETS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"unknown preset {preset!r}; {hint}There are {', '.join(PRESETS)}")
    resumed, method = _peek(arguments)
    if resumed is not None:
        folder = RunFolder(resumed)
        stored_preset, stored = ranks.shared(folder.read_config)
        chosen = _parse(arguments, stored_preset, method or "maml_plus_plus", stored)
        if preset not in (None, stored_preset):
            raise ConfigError(f"{resumed} is a run of preset {stored_preset}, not of {preset}: leave the preset out")
        if method is not None:
            raise ConfigError(f"{resumed} has a method already: leave --method {method} out, or start another run")
        config = _resumable(resumed, stored, validated(chosen.config))
        preset = stored_preset
    else:
        preset = preset or "quickstart"
        method = method or PRESETS[preset].method
        chosen = _parse(arguments, preset, method, PRESETS[preset].config(method))
        config = validated(chosen.config)
        folder = _new_or_unfinished(chosen.out, preset, method, config, ranks)
    progress = Progress(shown=ranks.main and not (chosen.json or chosen.quiet))
    command = shlex.join(["innerloop", "train", preset, *arguments])
    return _Plan(folder, preset, config, resumed is not None, chosen.devices, chosen.json, progress, command)


def _new_or_unfinished(out: Path | None, preset: str, method: str, config: Config, ranks: Ranks) -> RunFolder:
    """The folder of a new run; under torchrun also that of an unfinished one, since torchrun starts things again."""
    if out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise ConfigError("with --max-restarts the run needs a folder to be found again in: --out DIR")
    time = ranks.shared(lambda: datetime.now().strftime("%Y%m%d-%H%M%S"))
    folder = RunFolder(out or ranks.shared(lambda: _unused(Path("runs") / f"{preset}-{method}-{time}")))

    def check() -> None:
        if ranks.group is None or not folder.created or (folder.summary.exists() and not restarted()):
            folder.require_unused()
            return
        stored_preset, stored = folder.read_config()
        if stored_preset != preset:
            raise ConfigError(f"{folder.path} is a run of preset {stored_preset}, not of {preset}: name another --out")
        _resumable(folder.path, stored, config)

    ranks.shared(check)
    return folder


def _unused(path: Path) -> Path:
    """The path, or with a number behind it: two runs may begin within a second."""
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in count(1))
    return next(name for name in names if not name.exists())


def _train(plan: _Plan, ranks: Ranks) -> FinishedRun:
    preset = PRESETS[plan.preset]
    if not plan.resumed and plan.config == preset.config():  # with other settings it is something else
        plan.progress.console.print(f"{plan.preset}: {preset.about}", highlight=False, soft_wrap=True)
    try:
        return train(plan.folder, plan.preset, plan.config, plan.progress, plan.command, ranks)
    except InterruptedRunError:
        plan.progress.console.print(
            f"Saved. Go on with: innerloop train --resume {shlex.quote(str(plan.folder.path))}",
            highlight=False,
            soft_wrap=True,
        )
        raise


def configured(preset: str, arguments: Sequence[str]) -> Config:
    """The config that ``innerloop train PRESET`` makes of its options.

    Raises:
        ConfigError: it is not one that can be run.
    """
    arguments = list(arguments)
    _, method = _peek(arguments)
    method = method or PRESETS[preset].method
    return validated(_parse(arguments, preset, method, PRESETS[preset].config(method)).config)


def _peek(arguments: list[str]) -> tuple[Path | None, str | None]:
    """``--resume`` and ``--method``, on which the defaults of all other options depend."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--method")
    try:
        known, _ = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from None
    if known.method is not None and known.method not in METHODS:
        raise ConfigError(f"unknown method {known.method!r}; there are {', '.join(METHODS)}")
    return known.resume, known.method


def _parse(arguments: list[str], preset: str, method: str, config: Config) -> TrainArguments:
    default = TrainArguments(config=config, method=method)  # type: ignore[arg-type]
    presets = "\n".join(f"  {name}: {p.about}" for name, p in PRESETS.items())
    return tyro.cli(
        TrainArguments,
        args=arguments,
        default=default,
        prog=f"innerloop train {preset}",
        description=f"Meta-train. Defaults are those of preset {preset} with method {method}. Presets:\n\n{presets}",
    )


def _resumable(run: Path, stored: Config, asked: Config) -> Config:
    """The config to go on with: where it is computed may change, what is computed may not."""
    changed = differences(stored, asked)
    if changed:
        raise ConfigError(f"{run} cannot go on with other settings: {'; '.join(changed)}. Start another run instead")
    return asked


def differences(stored: Config, asked: Config) -> list[str]:
    """What is computed otherwise under two configs, by the options' names."""
    now = config_to_json(asked)
    return [
        f"--{name.replace('_', '-')} was {old!r}, not {new!r}"
        for group, values in config_to_json(stored).items()
        for name, old in values.items()
        if group != "compute" or name == "seed"
        for new in [now[group][name]]
        if old != new and name not in _MAY_CHANGE and not (name == "bits" and not new)  # found, and recorded
    ]


_MAY_CHANGE = {"data", "splits_dir", "skip_broken", "download", "on_divergence", "max_skips", "max_rollbacks"}
