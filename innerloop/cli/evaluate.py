"""``innerloop evaluate``: test a run on held-out classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from innerloop.cli.arguments import parsed
from innerloop.cli.ranks import peeked_timeout, to_be_launched
from innerloop.cli.tables import print_test
from innerloop.learner import Compile
from innerloop.training.building import build_device, build_learner, build_tasks, build_workers
from innerloop.training.checkpoints import write_json
from innerloop.training.config import ComputeConfig, ConfigError, Positive, Precision, Steps, Threads
from innerloop.training.distributed import TIMEOUT_SECONDS, Ranks, joined, launch
from innerloop.training.environment import environment
from innerloop.training.evaluation import evaluate_checkpoints
from innerloop.training.progress import Progress
from innerloop.training.run_folder import RunFolder
from innerloop.training.trainer import best_checkpoints, best_epochs


@dataclass(frozen=True)
class EvaluateArguments:
    """Test the checkpoints of a run that are best on validation: the single best, and the ensemble of all kept."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    tasks: Positive = 600
    """Test tasks."""
    split: Literal["test", "val", "train"] = "test"
    """Which classes."""
    steps: Steps = 0
    """Inner steps (0: those of the run). More than were trained go on with the last step's rates and norm layers."""
    data: Path | None = None
    """Folder of the data set, where it is not the run's."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."""
    threads: Threads = 0
    """CPU threads of each process (0: the cores shared out over the processes)."""
    processes: Threads = 0
    """Processes that tasks are shared out to, on a CPU (0: one for each core that helps)."""
    precision: Precision = "float32"
    """Of convolutions, whatever the run was trained in; tf32 (a GPU's) and bf16 are faster and round more."""
    compile: Compile = "off"
    """Compile an inner step, by PyTorch's Inductor: for many tasks on a small network."""
    compile_timeout: Positive = 300
    """Seconds that a function of it may take to compile; it goes on without after that."""
    devices: int = 0
    """Ranks on this machine: GPUs where there are any, else CPU processes (0: one, or what torchrun starts)."""
    timeout: float = TIMEOUT_SECONDS
    """Seconds that a rank waits for the others before the evaluation ends."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the result as JSON on standard output, and no progress."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate as the command line says."""
    with joined(peeked_timeout(arguments)) as ranks:
        return _run(arguments, ranks)


def _run(arguments: Sequence[str], ranks: Ranks) -> int:
    chosen = parsed(EvaluateArguments, arguments, "innerloop evaluate")
    folder = RunFolder(chosen.run)
    preset, config = ranks.shared(folder.read_config)
    epochs, damage = ranks.shared(lambda: best_epochs(folder))
    if not epochs:
        raise ConfigError(f"{chosen.run} has no finished epoch to test; go on: innerloop train --resume {chosen.run}")
    if to_be_launched(chosen.devices, ranks):
        return launch(chosen.devices, ["evaluate", *arguments])
    config = replace(
        config,
        data=replace(config.data, data=chosen.data or config.data.data),
        # Of the run's own settings only the seed says what the tasks are; the others were its machine's.
        compute=ComputeConfig(
            seed=config.compute.seed,
            device=chosen.device,
            threads=chosen.threads,
            processes=chosen.processes,
            precision=chosen.precision,
            compile=chosen.compile,
            compile_timeout=chosen.compile_timeout,
        ),
    )
    progress = Progress(shown=ranks.main and not chosen.json)
    for what in damage if ranks.main else ():
        progress.warn(what)
    device = build_device(config, ranks)
    with ranks.first_on_each_machine():
        source = build_tasks(config, device, progress=progress.shown)
    learner = build_learner(config, device)
    steps = chosen.steps or config.test_steps
    with (
        progress.task(f"{chosen.split} tasks", chosen.tasks * len(epochs)) as bar,
        build_workers(config, learner, source, device, ranks) as workers,
    ):
        result = evaluate_checkpoints(
            workers,
            best_checkpoints(folder, epochs, ranks),
            chosen.split,
            chosen.tasks,
            steps=steps,
            regression=config.regression,
            tick=bar.advance,
        )
        measured_on = environment(device, workers.count)
    if not ranks.main:
        return 0
    scores = result.to_json()
    record = {
        "version": 1,
        "preset": preset,
        "split": chosen.split,
        "steps": steps,
        "precision": chosen.precision,
        "epochs": epochs,
        "test": scores,
        "environment": measured_on,
    }
    write_json(chosen.run / "evaluation.json", record)
    if chosen.json:
        print(json.dumps(record))
    else:
        print_test(scores, config.regression, f"{chosen.split}, {chosen.tasks} tasks, {steps} inner steps")
    return 0
