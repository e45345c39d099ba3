"""What several runs show beside each other, each function drawing one panel on the Axes it is given."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from innerloop.reports import style
from innerloop.reports.estimates import Which
from innerloop.reports.groups import Comparison, Group
from innerloop.reports.records import EpochRecord, RunRecords
from innerloop.reports.tables import AblationRow, ablation_paper_figure


def ablation_label(row: AblationRow) -> str:
    """A row's name in lines that fit beside a panel, with the seeds that finished where not all did."""
    lines = textwrap.wrap(row.label, 36)
    if row.group is not None and len(row.group.finished) < len(row.group.runs):
        lines.append(f"({len(row.group.finished)} of {len(row.group.runs)} seeds finished)")
    return "\n".join(lines)


def rows_panel(axes: Axes, comparison: Comparison, rows: Sequence[AblationRow]) -> None:
    """A line for each row of a table: measured, with both spreads, and the paper's figure.

    The dot is the mean over seeds of the ensemble's test accuracy, its bar the deviation over seeds (none with one
    seed), small ticks the single seeds, the wide pale band the 95% interval over tasks. The square is the mean over
    seeds of the single best checkpoint's.
    """
    drawn: set[str] = set()
    for place, row in enumerate(rows):
        theirs = ablation_paper_figure(comparison, row)
        if theirs is not None:
            error = None if theirs.spread is None else [[theirs.spread], [theirs.spread]]
            axes.errorbar(
                [theirs.accuracy],
                [place + 0.16],
                xerr=error,
                fmt="D",
                markersize=6,
                markerfacecolor="white",
                markeredgewidth=1.5,
                color=style.ORANGE,
                ecolor=style.ORANGE,
                elinewidth=1.2,
                capsize=3,
                zorder=3,
            )
            drawn.add("paper")
        figure = None if row.group is None else row.group.tested("ensemble")
        if row.group is None or figure is None:
            note = "not run" if row.group is None else "no run finished"
            axes.annotate(
                note,
                (0.015, place - 0.12),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=7.5,
                color=style.GREY,
                style="italic",
            )
            continue
        percent = figure.scaled(100)
        y = place - 0.16
        axes.plot(
            [percent.mean - percent.interval, percent.mean + percent.interval],
            [y, y],
            color=style.BLUE,
            alpha=0.25,
            linewidth=8,
            solid_capstyle="butt",
            zorder=1,
        )
        drawn.add("tasks")
        singles = 100 * np.array(row.group.accuracies("ensemble"))
        if percent.deviation is not None:
            axes.plot(
                singles, np.full(len(singles), y), "|", color=style.INK, markersize=9, markeredgewidth=1, zorder=3
            )
            axes.errorbar(
                [percent.mean],
                [y],
                xerr=[[percent.deviation], [percent.deviation]],
                fmt="none",
                ecolor=style.BLUE,
                elinewidth=1.6,
                capsize=4,
                zorder=2,
            )
            drawn.add("seeds")
        axes.plot([percent.mean], [y], "o", color=style.BLUE, markersize=7, zorder=4)
        drawn.add("mean")
        single = row.group.tested("best")
        if single is not None:
            axes.plot([100 * single.mean], [y], "s", color=style.BLUE, markersize=5, markerfacecolor="white", zorder=5)
            drawn.add("best")
    axes.set_yticks(range(len(rows)), [ablation_label(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    low, high = axes.get_xlim()
    axes.set_xlim(low - 0.06 * (high - low), min(high, 100.5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}%"))
    axes.set_xlabel("test accuracy")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.xaxis.grid(True, color=style.PALE, linewidth=0.6)
    for place in range(len(rows) - 1):
        axes.axhline(place + 0.5, color=style.PALE, linewidth=0.5, zorder=0)
    of_seeds = "mean over seeds" if "seeds" in drawn else "one seed"
    keys: dict[str, Any] = {
        "mean": Line2D(
            [],
            [],
            marker="o",
            linestyle="none",
            color=style.BLUE,
            markersize=7,
            label=f"ensemble of the best checkpoints, {of_seeds}",
        ),
        "best": Line2D(
            [],
            [],
            marker="s",
            linestyle="none",
            color=style.BLUE,
            markerfacecolor="white",
            markersize=5,
            label=f"best checkpoint, {of_seeds}",
        ),
        "seeds": Line2D(
            [],
            [],
            marker="|",
            color=style.BLUE,
            markeredgecolor=style.INK,
            markersize=9,
            linewidth=1.6,
            label="ensembles: single seeds, deviation over seeds",
        ),
        "tasks": Line2D([], [], color=style.BLUE, alpha=0.25, linewidth=8, label="ensembles: 95% interval over tasks"),
        "paper": Line2D(
            [],
            [],
            marker="D",
            linestyle="none",
            color=style.ORANGE,
            markerfacecolor="white",
            markeredgewidth=1.5,
            label="paper (full schedule), with its ±",
        ),
    }
    axes.figure.legend(
        handles=[keys[name] for name in ("mean", "seeds", "tasks", "best", "paper") if name in drawn],
        loc="outside lower center",
        ncols=2,
    )


def title(axes: Axes, text: str, below: str, *, width: int = 88) -> None:
    """A bold title, and a smaller line or two below it that says of what schedule the panel is."""
    lines = textwrap.wrap(below, width)
    axes.set_title(text, pad=8 + 10.5 * len(lines))
    axes.annotate(
        "\n".join(lines),
        (0, 1),
        (0, 5),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=7.5,
        color=style.GREY,
        va="bottom",
    )


@dataclass(frozen=True)
class GroupStyle:
    """How one group's lines look, in every panel of a figure."""

    colour: str
    line: Any
    marker: str


_OTHERS = (
    GroupStyle(style.GREEN, (0, (5, 1.5)), "^"),
    GroupStyle(style.PURPLE, (0, (4, 1.5, 1, 1.5)), "v"),
    GroupStyle(style.ORANGE, (0, (8, 1.5)), "P"),
    GroupStyle(style.SKY, (0, (3, 1, 1, 1, 1, 1)), "X"),
    GroupStyle(style.INK, (0, (1, 1.2)), "D"),
    GroupStyle(style.GREY, "-", "*"),
)


def group_styles(groups: Sequence[Group]) -> list[GroupStyle]:
    """A style for each group: the first MAML and the first MAML++ always look the same."""
    fixed = {
        "MAML": GroupStyle(style.VERMILLION, (0, (4, 1.5)), "s"),
        "MAML++": GroupStyle(style.BLUE, "-", "o"),
    }
    found, others = [], 0
    for group in groups:
        if group.method in fixed:
            found.append(fixed.pop(group.method))
        else:
            found.append(_OTHERS[others % len(_OTHERS)])
            others += 1
    return found


Clock = Literal["epoch", "iterations", "seconds"]
_CLOCK_NAMES: dict[Clock, str] = {
    "epoch": "epoch",
    "iterations": "outer updates",
    "seconds": "training time, {unit}",
}
Series = tuple[NDArray[np.float64], NDArray[np.float64]]


def curves_panel(
    axes: Axes,
    groups: Sequence[Group],
    *,
    clock: Clock = "epoch",
    legend: bool = True,
    look: GroupStyle | None = None,
) -> None:
    """Validation accuracy (or loss) of several groups, over epochs, outer updates or seconds of training.

    Of a group with several seeds every seed is a thin line; the thick one is their mean and the band their deviation,
    as far as all seeds go. Of a single seed the band is the 95% interval over tasks. A line that ends early ends in a
    cross if the run diverged, in an open square if it did not finish.
    """
    classify = groups[0].runs[0].is_classification
    longest = max((run.epochs[-1].seconds for group in groups for run in group.runs if run.epochs), default=0.0)
    unit, length = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 180 else ("seconds", 1.0)

    def time(record: EpochRecord) -> float:
        return record.seconds / length if clock == "seconds" else float(getattr(record, clock))

    def value(record: EpochRecord) -> float:
        return 100 * (record.val_accuracy or math.nan) if classify else record.val_loss

    styles = group_styles(groups) if look is None else [look] * len(groups)
    for group, look in zip(groups, styles, strict=True):
        _group_lines(axes, group, look, time, value)
        first = group.runs[0]
        if len([run for run in group.runs if run.epochs]) == 1 and first.epochs:
            scale = 100 if classify else 1
            band = scale * np.array([record.val_interval for record in first.epochs])
            times, values = _series(first, time, value)
            axes.fill_between(times, values - band, values + band, color=look.colour, alpha=0.18, linewidth=0)
    if classify:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}%"))
    else:
        axes.set_yscale("log")
        plain_log_ticks(axes)
    axes.set_ylabel("validation accuracy" if classify else "validation loss (log scale)")
    axes.set_xlabel(_CLOCK_NAMES[clock].format(unit=unit))
    if clock == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    style.tidy(axes)
    if legend:
        axes.legend(
            handles=legend_handles(groups),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=1 if len(groups) > 3 else 2,
        )


def norms_panel(axes: Axes, group: Group, look: GroupStyle) -> None:
    """Norm of the meta-gradient in every seed of a group: the mean of each epoch, and its largest, dotted."""
    for kind, line, width in (("gradient_norm_mean", "-", 1.3), ("gradient_norm_max", (0, (1, 1.2)), 1.1)):
        for run in group.runs:
            if not run.epochs:
                continue
            times, values = _series(run, lambda r: float(r.epoch), lambda r, kind=kind: float(getattr(r, kind)))  # type: ignore[misc]
            values = np.where(values > 0, values, np.nan)
            axes.plot(times, values, color=look.colour, linestyle=line, linewidth=width, alpha=0.8)
            if kind == "gradient_norm_max" or run.status != "finished":
                _mark_end(axes, run, times, values)
    axes.set_yscale("log")
    plain_log_ticks(axes)
    axes.set_ylabel("norm of the meta-gradient\n(log scale)")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    style.tidy(axes)


def plain_log_ticks(axes: Axes) -> None:
    """Plain numbers on a log axis that spans few decades, powers of ten on others."""
    low, high = axes.get_ylim()
    if low > 0 and math.log10(high / low) < 3:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    else:
        axes.yaxis.set_major_locator(LogLocator())
        axes.yaxis.set_major_formatter(LogFormatterMathtext())
    axes.yaxis.set_minor_formatter(NullFormatter())


def steps_panel(axes: Axes, steps: dict[int, Group], five_step_maml: Group | None, which: Which) -> None:
    """Test accuracy of MAML++ by its number of inner steps, five-step MAML as a line, and the paper's (ensembles')."""
    places, figures = [], []
    for count, group in sorted(steps.items()):
        figure = group.tested(which)
        if figure is not None:
            places.append(count)
            figures.append(figure.scaled(100))
    paper_points = {count: f for count, group in sorted(steps.items()) if (f := group.paper_figure()) is not None}
    if paper_points and which == "ensemble":
        axes.plot(
            list(paper_points),
            [figure.accuracy for figure in paper_points.values()],
            "D",
            markersize=6,
            markerfacecolor="white",
            markeredgewidth=1.5,
            color=style.ORANGE,
            label="MAML++, paper (full schedule)",
            zorder=3,
        )
    means = [figure.mean for figure in figures]
    axes.plot(places, means, "o-", color=style.BLUE, markersize=7, label="MAML++, mean over seeds", zorder=4)
    deviations = [figure.deviation for figure in figures]
    if any(deviation is not None for deviation in deviations):
        axes.errorbar(
            places,
            means,
            yerr=[deviation or 0.0 for deviation in deviations],
            fmt="none",
            ecolor=style.BLUE,
            capsize=4,
            elinewidth=1.4,
            label="deviation over seeds",
            zorder=3,
        )
    for place, figure in zip(places, figures, strict=True):
        axes.plot(
            [place, place],
            [figure.mean - figure.interval, figure.mean + figure.interval],
            color=style.BLUE,
            alpha=0.22,
            linewidth=9,
            solid_capstyle="butt",
            zorder=1,
            label="95% interval over tasks" if place == places[0] else None,
        )
        axes.annotate(
            f"{figure.mean:.1f}",
            (place, figure.mean + max(figure.interval, figure.deviation or 0.0)),
            (0, 5),
            textcoords="offset points",
            fontsize=8,
            color=style.BLUE,
            ha="center",
        )
    reference = None if five_step_maml is None else five_step_maml.tested(which)
    if reference is not None:
        percent = reference.scaled(100)
        axes.axhline(
            percent.mean,
            color=style.VERMILLION,
            linestyle=(0, (4, 1.5)),
            zorder=2,
            label="five-step MAML, mean over seeds" + (" and deviation" if percent.deviation else ""),
        )
        if percent.deviation:
            axes.axhspan(
                percent.mean - percent.deviation,
                percent.mean + percent.deviation,
                color=style.VERMILLION,
                alpha=0.12,
                linewidth=0,
                zorder=0,
            )
    axes.set_xticks(sorted(steps))
    axes.set_xlim(min(steps) - 0.4, max(steps) + 0.5)
    axes.set_xlabel("inner steps of MAML++, in training and at test")
    axes.set_ylabel(f"test accuracy of the {'ensemble' if which == 'ensemble' else 'best checkpoint'}")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.4g}%"))
    style.tidy(axes)


def legend_handles(groups: Sequence[Group]) -> list[Line2D]:
    """One for each group, saying what its band is, and those for the marks at the ends of lines."""
    handles = []
    for group, look in zip(groups, group_styles(groups), strict=True):
        drawn = len([run for run in group.runs if run.epochs])
        band = "95% interval over tasks" if drawn == 1 else "deviation over seeds"
        count = len(group.runs)
        none = f" ({count - drawn} without a finished epoch)" if drawn < count else ""
        label = f"{group.label}: {count} seed{'s' * (count != 1)}{none}, band: {band}"
        handles.append(
            Line2D(
                [],
                [],
                color=look.colour,
                linestyle=look.line,
                marker=look.marker,
                linewidth=2.2,
                label=textwrap.fill(label, 60),
            )
        )
    statuses = {run.status for group in groups for run in group.runs}
    if "diverged" in statuses:
        handles.append(Line2D([], [], linestyle="none", **_ENDS["diverged"], label="diverged here"))
    if "unfinished" in statuses:
        handles.append(Line2D([], [], linestyle="none", **_ENDS["unfinished"], label="not finished"))
    return handles


def norm_handles() -> list[Line2D]:
    """What the lines of ``norms_panel`` are."""
    return [
        Line2D([], [], color=style.INK, linewidth=1.3, label="norm: mean of the epoch, a line a seed"),
        Line2D([], [], color=style.INK, linewidth=1.1, linestyle=(0, (1, 1.2)), label="norm: largest of the epoch"),
    ]


_ENDS: dict[str, dict[str, Any]] = {
    "diverged": {
        "marker": "X",
        "markersize": 9,
        "color": style.INK,
        "markeredgecolor": "white",
        "markeredgewidth": 0.8,
    },
    "unfinished": {
        "marker": "s",
        "markersize": 6,
        "color": style.INK,
        "markerfacecolor": "white",
        "markeredgewidth": 1.2,
    },
}


def _group_lines(
    axes: Axes,
    group: Group,
    look: GroupStyle,
    time: Callable[[EpochRecord], float],
    value: Callable[[EpochRecord], float],
) -> None:
    """Seeds thin; mean and deviation as far as all seeds that finished an epoch go."""
    started = [run for run in group.runs if run.epochs]
    for run in group.runs:
        if not run.epochs:
            axes.plot([0.02], [0.03], transform=axes.transAxes, clip_on=False, zorder=6, **_ENDS[run.status])
            continue
        times, values = _series(run, time, value)
        if len(started) > 1:
            axes.plot(times, values, color=look.colour, linewidth=0.8, alpha=0.55, zorder=2)
        _mark_end(axes, run, times, values)
    if not started:
        return
    shared = min(len(run.epochs) for run in started)
    times = np.mean([_series(run, time, value)[0][:shared] for run in started], axis=0)
    table = np.array([_series(run, time, value)[1][:shared] for run in started])
    mean = table.mean(axis=0)
    if len(started) > 1:
        deviation = table.std(axis=0, ddof=1)
        axes.fill_between(
            times, mean - deviation, mean + deviation, color=look.colour, alpha=0.18, linewidth=0, zorder=1
        )
    axes.plot(
        times,
        mean,
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        linewidth=2.2,
        markersize=5,
        markevery=(0, max(1, math.ceil(shared / 10))),
        zorder=4,
    )


def _series(run: RunRecords, time: Callable[[EpochRecord], float], value: Callable[[EpochRecord], float]) -> Series:
    values = np.array([value(record) for record in run.epochs], dtype=np.float64)
    return np.array([time(record) for record in run.epochs]), np.where(np.isfinite(values), values, np.nan)


def _mark_end(axes: Axes, run: RunRecords, times: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    known = np.flatnonzero(np.isfinite(values))
    if run.status != "finished" and known.size:
        axes.plot([times[known[-1]]], [values[known[-1]]], zorder=6, **_ENDS[run.status])
