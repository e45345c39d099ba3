"""What several runs show beside each other, each function drawing one panel on the Axes it is given."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from innerloop.reports import style
from innerloop.reports.groups import Comparison
from innerloop.reports.tables import AblationRow, ablation_paper_figure, ablation_rows


def ablation_label(row: AblationRow) -> str:
    """A row's name in lines that fit beside a panel, with the seeds that finished where not all did."""
    lines = textwrap.wrap(row.label, 36)
    if row.group is not None and len(row.group.finished) < len(row.group.runs):
        lines.append(f"({len(row.group.finished)} of {len(row.group.runs)} seeds finished)")
    return "\n".join(lines)


def ablation_panel(axes: Axes, comparison: Comparison) -> None:
    """A line for each row of the table of single repairs: measured, with both spreads, and the paper's figure.

    The dot is the mean over seeds of the ensemble's test accuracy, its bar the deviation over seeds (none with one
    seed), small ticks the single seeds, the wide pale band the 95% interval over tasks.
    """
    rows = ablation_rows(comparison)
    drawn: set[str] = set()
    for place, row in enumerate(rows):
        theirs = ablation_paper_figure(comparison, row)
        if theirs is not None:
            error = None if theirs.spread is None else [[theirs.spread], [theirs.spread]]
            axes.errorbar(
                [theirs.accuracy], [place + 0.16], xerr=error, fmt="D", markersize=6, markerfacecolor="white",
                markeredgewidth=1.5, color=style.ORANGE, ecolor=style.ORANGE, elinewidth=1.2, capsize=3, zorder=3,
            )  # fmt: skip
            drawn.add("paper")
        figure = None if row.group is None else row.group.tested("ensemble")
        if row.group is None or figure is None:
            note = "not run" if row.group is None else "no run finished"
            axes.annotate(
                note, (0.015, place - 0.12), xycoords=("axes fraction", "data"), va="center", fontsize=7.5,
                color=style.GREY, style="italic",
            )  # fmt: skip
            continue
        percent = figure.scaled(100)
        y = place - 0.16
        axes.plot(
            [percent.mean - percent.interval, percent.mean + percent.interval], [y, y], color=style.BLUE, alpha=0.25,
            linewidth=8, solid_capstyle="butt", zorder=1,
        )  # fmt: skip
        drawn.add("tasks")
        singles = 100 * np.array(row.group.accuracies("ensemble"))
        if percent.deviation is not None:
            axes.plot(
                singles, np.full(len(singles), y), "|", color=style.INK, markersize=9, markeredgewidth=1, zorder=3
            )
            axes.errorbar(
                [percent.mean], [y], xerr=[[percent.deviation], [percent.deviation]], fmt="none", ecolor=style.BLUE,
                elinewidth=1.6, capsize=4, zorder=2,
            )  # fmt: skip
            drawn.add("seeds")
        axes.plot([percent.mean], [y], "o", color=style.BLUE, markersize=7, zorder=4)
        drawn.add("mean")
    axes.set_yticks(range(len(rows)), [ablation_label(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    low, high = axes.get_xlim()
    axes.set_xlim(low - 0.06 * (high - low), min(high, 100.5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}%"))
    axes.set_xlabel("test accuracy of the ensemble of the best checkpoints")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.xaxis.grid(True, color=style.PALE, linewidth=0.6)
    for place in range(len(rows) - 1):
        axes.axhline(place + 0.5, color=style.PALE, linewidth=0.5, zorder=0)
    keys: dict[str, Any] = {
        "mean": Line2D(
            [], [], marker="o", linestyle="none", color=style.BLUE, markersize=7, label="measured, mean over seeds"
        ),
        "seeds": Line2D(
            [], [], marker="|", color=style.BLUE, markeredgecolor=style.INK, markersize=9, linewidth=1.6,
            label="single seeds; deviation over seeds",
        ),
        "tasks": Line2D([], [], color=style.BLUE, alpha=0.25, linewidth=8, label="95% interval over tasks"),
        "paper": Line2D(
            [], [], marker="D", linestyle="none", color=style.ORANGE, markerfacecolor="white", markeredgewidth=1.5,
            label="paper (full schedule), with its ±",
        ),
    }  # fmt: skip
    axes.legend(
        handles=[keys[name] for name in ("mean", "seeds", "tasks", "paper") if name in drawn],
        loc="upper center", bbox_to_anchor=(0.42, -0.11), ncols=2,
    )  # fmt: skip


def title(axes: Axes, text: str, below: str, *, width: int = 88) -> None:
    """A bold title, and a smaller line or two below it that says of what schedule the panel is."""
    lines = textwrap.wrap(below, width)
    axes.set_title(text, pad=8 + 10.5 * len(lines))
    axes.annotate(
        "\n".join(lines), (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=7.5,
        color=style.GREY, va="bottom",
    )  # fmt: skip
