"""``innerloop diagnose``: why a run does not learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from innerloop.cli.arguments import parsed
from innerloop.diagnose import CHECKS, Finding, Observations, findings, observe, ticks
from innerloop.training.building import build_device, build_learner, build_tasks
from innerloop.training.checkpoints import CheckpointError, load_checkpoint
from innerloop.training.config import ComputeConfig, ConfigError, Positive, Threads
from innerloop.training.progress import Progress
from innerloop.training.run_folder import RunFolder
from innerloop.training.run_history import history_findings
from innerloop.training.trainer import best_epochs
from innerloop.update_rules import Tensors


@dataclass(frozen=True)
class DiagnoseArguments:
    """Look at why a run does not learn: its inner loop, rates, labels, normalisation, gradients and history.

    Says what is odd, the likeliest reason first, with the option to change; nothing where nothing is. The exit code is
    0 either way.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run, finished or not."""
    tasks: Positive = 8
    """Tasks that are looked at; some thirty inner loops a task."""
    split: Literal["test", "val", "train"] = "val"
    """Which classes."""
    data: Path | None = None
    """Folder of the data set, where it is not the run's."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."""
    threads: Threads = 0
    """CPU threads (0: PyTorch's choice)."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the findings and what they are made of as JSON on standard output, and no progress."""


def run(arguments: Sequence[str]) -> int:
    """Diagnose as the command line says."""
    chosen = parsed(DiagnoseArguments, arguments, "innerloop diagnose")
    folder = RunFolder(chosen.run)
    _, config = folder.read_config()
    config = replace(
        config,
        data=replace(config.data, data=chosen.data or config.data.data),
        compute=ComputeConfig(seed=config.compute.seed, device=chosen.device, threads=chosen.threads),
    )
    progress = Progress(shown=not chosen.json)
    state, epoch = _state(folder)
    device = build_device(config)
    source = build_tasks(config, device, progress=progress.shown)
    learner = build_learner(config, device)
    if state is not None:
        learner.load_state_dict(state)
    with progress.task(f"{chosen.split} tasks", ticks(chosen.tasks)) as bar:
        tasks = source.meta_batch(chosen.split, 0, chosen.tasks)
        seen = observe(learner, tasks, epoch, lambda: bar.advance(1))
    found = [*findings(seen), *history_findings(folder, config)]
    found.sort(key=lambda finding: -finding.likelihood)
    if chosen.json:
        print(
            json.dumps({"version": 1, "epoch": epoch, "findings": [asdict(f) for f in found], "seen": _figures(seen)})
        )
    else:
        _print(found, seen, chosen.tasks, epoch)
    return 0


def _state(folder: RunFolder) -> tuple[Tensors | None, int]:
    """The learner's state of the best epoch; of a run without one, that of its beginning."""
    try:
        epochs, _ = best_epochs(folder)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    if not epochs:
        return None, 0
    return load_checkpoint(folder.epoch_checkpoint(epochs[0]))[0], epochs[0]


def _figures(seen: Observations) -> dict[str, object]:
    def rows(values: object) -> object:
        return None if values is None else [round(float(v), 6) for v in values.mean(0)]  # type: ignore[attr-defined]

    return {
        "support_losses": rows(seen.support_losses),
        "query_losses": rows(seen.query_losses),
        "query_accuracies": rows(seen.query_accuracies),
        "query_accuracy_by_normalisation": seen.by_normalisation,
        "query_accuracy_renumbered": None if seen.renumbered != seen.renumbered else seen.renumbered,
        "losses_at_rates": {f"{factor:g}": losses for factor, losses in seen.at_rates.items()},
        "gradient_norms": [round(float(n), 6) for n in seen.gradient_norms],
        "cosine_of_orders": None if seen.order_cosine != seen.order_cosine else seen.order_cosine,
        "dead_units": seen.dead,
    }


def _print(found: list[Finding], seen: Observations, tasks: int, epoch: int) -> None:
    console = Console()

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    at = f"epoch {epoch}" if epoch else "the initial weights: no epoch is finished"
    losses = " ".join(f"{float(v):.3f}" for v in seen.support_losses.mean(0))
    say(f"{tasks} tasks, {at}. Support loss after each inner step: {losses}")
    say("query loss: " + " ".join(f"{float(v):.3f}" for v in seen.query_losses.mean(0)))
    if seen.query_accuracies is not None:
        say("query accuracy: " + " ".join(f"{float(v):.1%}" for v in seen.query_accuracies.mean(0)))
    if not found:
        say(f"nothing odd was found ({len(CHECKS)} things were looked at)", "green")
    for number, finding in enumerate(found, start=1):
        say(f"{number}. {finding.kind}", "bold")
        for line in (finding.measured, finding.meaning, finding.remedy):
            say(f"   {line}.")
