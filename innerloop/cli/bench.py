"""``innerloop bench``: the time and memory of a meta-training step beside other ways to take it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from innerloop.bench.cases import CASES
from innerloop.bench.contenders import CONTENDERS, DEFAULT, FLOORS
from innerloop.bench.measuring import Measurement, measure, ratios
from innerloop.training.checkpoints import write_json
from innerloop.training.config import ConfigError
from innerloop.training.environment import environment
from innerloop.training.progress import Progress
from innerloop.training.workers import available_cores


@dataclass(frozen=True)
class BenchArguments:
    """Time a meta-training step of this library beside the plain loop and, where they are installed, the peers.

    Each contender has a process of its own; they take their steps in turn, so that noise falls on all alike. Ratios
    are taken round by round. The peers are higher, torchopt and parallel-metalearn: pip install 'innerloop[bench]'.
    """

    cases: tyro.conf.Positional[tuple[str, ...]] = ("omniglot-mamlpp", "omniglot-maml")
    """Which steps (--list says which there are)."""
    contenders: tuple[str, ...] = ()
    """Which contenders (default: innerloop, the plain loop, the peers, and the floor under them)."""
    device: str = "cpu"
    """cpu, or cuda for a GPU, with contenders of its own."""
    rounds: int = 9
    """Steps of each contender that count."""
    warm_up: int = 2
    """Steps of each before those."""
    list: bool = False
    """List cases and contenders, and measure nothing."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print the results as JSON on standard output, and no progress."""
    out: Path | None = None
    """Write the results as JSON to this file too."""


def run(arguments: Sequence[str]) -> int:
    """Measure as the command line says."""
    chosen = tyro.cli(BenchArguments, args=list(arguments), prog="innerloop bench")
    if chosen.list:
        _list()
        return 0
    device = _device(chosen.device)
    plan = {name: _contenders(name, chosen.contenders, device) for name in chosen.cases}
    if not any(able for able, _ in plan.values()):
        raise ConfigError("; ".join(reason for _, unable in plan.values() for reason in unable.values()))
    for name in ("rounds", "warm_up"):
        if getattr(chosen, name) < (name == "rounds"):
            raise ConfigError(
                f"--{name.replace('_', '-')} must be at least {int(name == 'rounds')}, got {getattr(chosen, name)}"
            )
    progress = Progress(shown=not chosen.json)
    records, failed = {}, False
    for name, (contenders, unable) in plan.items():
        with progress.task(name, len(contenders) * (chosen.rounds + chosen.warm_up)) as bar:
            measured = measure(
                CASES[name], contenders, chosen.rounds, chosen.warm_up, lambda who: bar.advance(1, who), device
            )
        failures = {who: m.failure for who, m in measured.items() if m.failure is not None}
        failed |= bool(failures)
        unable |= failures
        measured = {who: m for who, m in measured.items() if m.failure is None}
        records[name] = {**case_record(name, measured), "unable": unable}
        if not chosen.json:
            _print(name, measured, unable)
    result = {
        "version": 1,
        "rounds": chosen.rounds,
        "cases": records,
        "environment": environment(device, 1 if device.type == "cuda" else available_cores()),
    }
    if chosen.out is not None:
        write_json(chosen.out, result)
    if chosen.json:
        print(json.dumps(result))
    return 1 if failed else 0


def _device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: it is neither a CPU nor a GPU of CUDA's, or there is none here.
    """
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here")
    return torch.device(name)


def case_record(name: str, measured: dict[str, Measurement]) -> dict[str, Any]:
    """What is kept of a case's measurements."""
    ours = measured.get("innerloop")
    contenders = {
        who: {
            **asdict(m),
            "median": m.median,
            "times_innerloop": None if ours is None else _spread(ratios(m, ours)),
        }
        for who, m in measured.items()
    }
    return {"case": asdict(CASES[name]), "contenders": contenders}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _contenders(case: str, asked: Sequence[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The contenders of a case, and why some that were asked for cannot do it.

    Raises:
        ConfigError: there is no such case, or no such contender.
    """
    if case not in CASES:
        raise ConfigError(f"there is no case {case!r}; there are {', '.join(CASES)}")
    for name in asked:
        if name not in CONTENDERS:
            raise ConfigError(f"there is no contender {name!r}; there are {'; '.join(CONTENDERS)}")
    unable: dict[str, str] = {}
    for name in asked:
        if not CONTENDERS[name].installed:
            unable[name] = f"{name} needs the package {CONTENDERS[name].needs}: pip install 'innerloop[bench]'"
        elif not CONTENDERS[name].takes(CASES[case]):
            unable[name] = f"{name} cannot do {case}"
        elif device.type not in CONTENDERS[name].devices:
            unable[name] = f"{name} is not for --device {device.type}"
    wanted = asked or [n for n in DEFAULT[device.type] if CONTENDERS[n].installed and CONTENDERS[n].takes(CASES[case])]
    return [name for name in dict.fromkeys(wanted) if name not in unable], unable


def _list() -> None:
    table = Table("case", "step", box=None)
    for name, case in CASES.items():
        table.add_row(name, ", ".join(f"{k} {v}" for k, v in asdict(case).items()))
    contenders = Table("contender", "", box=None)
    for name, contender in CONTENDERS.items():
        contenders.add_row(name, "" if contender.installed else f"not installed: {contender.needs}")
    console = Console()
    console.print(table)
    console.print(contenders)


def _print(name: str, measured: dict[str, Measurement], unable: dict[str, str]) -> None:
    table = Table(title=name, title_justify="left", box=None)
    on_gpu = any(m.kernels is not None for m in measured.values())
    memory_title = "peak memory of the GPU, kernels" if on_gpu else "peak memory, with libraries"
    for column in ("", "s/step, median (least to most)", "times innerloop's", memory_title):
        table.add_column(column)
    ours = measured.get("innerloop")
    for who, m in measured.items():
        ratio = "" if ours is None else _figures(ratios(m, ours), 2)
        table.add_row(who, _figures(m.seconds, 4), ratio, _memory(m))
    for who in unable:
        table.add_row(who, "–", "–", "–")
    console = Console()
    console.print(table)
    for reason in unable.values():
        console.print(reason, markup=False, highlight=False, soft_wrap=True)
    for who, m in measured.items():
        if m.compile_seconds is not None:
            console.print(f"{who}: {m.compile_seconds:.0f} s of compiling, once", highlight=False)
    for who, of in FLOORS.items():
        if ours is not None and who in measured:
            share = statistics.median(ratios(measured[who], ours))
            console.print(f"share of the {of} in innerloop's step: {share:.0%}", highlight=False)


def _memory(m: Measurement) -> str:
    if m.device_memory is not None:
        return f"{m.device_memory / 1e6:.0f} MB, {m.kernels}"
    if m.memory is None or m.memory_total is None:
        return ""
    return f"{m.memory / 1e6:.0f} MB, {m.memory_total / 1e6:.0f} MB"


def _figures(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
