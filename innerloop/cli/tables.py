"""Tables of results for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_NORMALISATIONS = {
    "batch": "batch (transductive, as the paper)",
    "running": "running (inductive)",
    "support": "support set's (inductive)",
}


def print_test(result: Mapping[str, Any], regression: bool, title: str) -> None:
    """The test of a run: single best checkpoint and ensemble, both normalisations, and each inner step."""
    console = Console()
    figure = "mean squared error" if regression else "accuracy"
    table = Table(title=f"{title}: {figure} ± 95% interval over tasks", title_justify="left", box=None)
    for column in ("normalisation of the query set", "best checkpoint", f"ensemble of {result['members']}"):
        table.add_column(column)
    for name, label in _NORMALISATIONS.items():
        if not (regression and name != "batch"):  # the regression network has no norm layers
            row = (_figure(result[which][name]) for which in ("best", "ensemble"))
            table.add_row("none" if regression else label, *row)
    console.print(table)
    steps = "  ".join(f"{k}: {_figure(s, interval=False)}" for k, s in enumerate(result["per_step"]))
    console.print(f"after each inner step (best checkpoint):  {steps}", highlight=False, soft_wrap=True)


def _figure(score: Mapping[str, Any], interval: bool = True) -> str:
    if score["accuracy"] is None:
        text, half = f"{score['loss']:.4f}", f"{score['interval']:.4f}"
    else:
        text, half = f"{score['accuracy']:.2%}", f"{score['interval']:.2%}"
    return f"{text} ± {half}" if interval else text
