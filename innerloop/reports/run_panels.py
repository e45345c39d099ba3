"""What a run's epochs show, each function drawing one panel on the Axes it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from innerloop.reports import style
from innerloop.reports.records import EpochRecord, RunRecords

Array = NDArray[np.float64]


_HALO = [withStroke(linewidth=2.5, foreground="white")]
"""Keeps a text readable where a line passes behind it."""


def accuracy_panel(axes: Axes, run: RunRecords) -> None:
    """Query accuracy after the last inner step over the epochs, of training and validation tasks."""
    epochs = _epoch_numbers(run)
    train = 100 * _column(run, lambda record: _or_nan(record.train_accuracy))
    validation = 100 * _column(run, lambda record: _or_nan(record.val_accuracy))
    interval = 100 * _column(run, lambda record: record.val_interval)
    _train_and_validation(axes, run, train, validation, interval)
    if np.isfinite(validation).any():
        best = int(np.nanargmax(np.where(np.isfinite(validation), validation, np.nan)))
        _star(axes, epochs[best], validation[best], f"best: {validation[best]:.1f}% in epoch {epochs[best]:.0f}")
    low, high = axes.get_ylim()
    wider = max(0.0, 5.0 - (high - low)) / 2  # no drama in a range of a point or two
    axes.set_ylim(max(low - wider, -2.0), min(high + wider, 101.0))
    axes.yaxis.set_major_locator(_ticks_to_100())
    axes.yaxis.set_major_formatter(_percent_sign())
    axes.set_ylabel("query accuracy")
    axes.set_title("Accuracy on new tasks")
    _mark_changes(axes, run, above=0.3)
    axes.legend(loc="lower right")


def loss_panel(axes: Axes, run: RunRecords) -> None:
    """Query loss after the last inner step over the epochs, on a log axis."""
    epochs = _epoch_numbers(run)
    train = _column(run, lambda record: record.train_loss)
    validation = _column(run, lambda record: record.val_loss)
    interval = _column(run, lambda record: record.val_interval)
    _train_and_validation(axes, run, train, validation, interval)
    positive = np.where(np.isfinite(validation) & (validation > 0), validation, np.nan)
    if np.isfinite(positive).any():
        best = int(np.nanargmin(positive))
        _star(axes, epochs[best], positive[best], f"best: {positive[best]:.3g} in epoch {epochs[best]:.0f}")
    _log_axis(axes, [train, validation, validation + interval])
    axes.set_ylabel("query loss (log scale)")
    axes.set_title("Loss on new tasks")
    _mark_changes(axes, run, falling=True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))


def inner_steps_panel(axes: Axes, run: RunRecords, *, lines: int = 5, beside: bool = True) -> None:
    """Validation query accuracy (or loss) after inner step 0 .. K, one line for each of a few epochs.

    The legend stands ``beside`` the panel; else in it, where there is room from two inner steps on.
    """
    classify = run.is_classification
    shown = _spread(len(run.epochs), lines)
    for place, index in enumerate(shown):
        record = run.epochs[index]
        values = _per_step(record, classify)
        steps = np.arange(len(values))
        final = index == shown[-1]
        axes.plot(
            steps,
            values,
            color=style.VERMILLION if final else style.ORDERED(place / max(len(shown) - 2, 1)),
            linestyle="-" if final else style.LINE_STYLES[place % len(style.LINE_STYLES)],
            linewidth=2.6 if final else 1.5,
            marker=style.MARKERS[place % len(style.MARKERS)] if not final else "o",
            markersize=6 if final else 4.5,
            zorder=4 if final else 3,
            label=f"epoch {record.epoch}",
        )
        if final and classify:
            _name_points(axes, steps, values)
    if classify:
        if run.ways is not None:
            axes.axhline(100 / run.ways, color=style.GREY, linewidth=1, linestyle=(0, (2, 2)), zorder=2)
            note = f"chance, 1 in {run.ways}"
            axes.annotate(
                note, (1, 100 / run.ways), (0, 3), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", va="bottom", fontsize=7.5, color=style.GREY,
            )  # fmt: skip
        low, high = axes.get_ylim()
        axes.set_ylim(max(min(low, high - 4), -2.0), min(high + 0.08 * (high - low), 106.0))
        axes.yaxis.set_major_locator(_ticks_to_100())
        axes.yaxis.set_major_formatter(_percent_sign())
    else:
        _log_axis(axes, [_per_step(run.epochs[index], classify) for index in shown])
    most = max(len(_per_step(run.epochs[index], classify)) for index in shown) - 1
    axes.set_xlim(-0.09 * most - 0.02, 1.04 * most + 0.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set_xlabel("inner step (0: before adaptation)")
    axes.set_ylabel("query accuracy" if classify else "query loss (log scale)")
    axes.set_title("What each inner step gives")
    style.tidy(axes)
    if beside or most < 2:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif classify:
        axes.legend(loc="lower right", bbox_to_anchor=(0, 0.12, 1, 0.88))  # above the line of chance
    else:
        axes.legend(loc="upper right")


def rates_panel(axes: Axes, run: RunRecords) -> None:
    """Heat map of the last epoch's inner rates: parameter tensors from input to output, by inner step."""
    rates = run.epochs[-1].rates
    if not rates:
        raise ValueError(f"run {run.name} has no inner rates")
    steps = max(len(values) for values in rates.values())
    table = np.full((len(rates), steps), np.nan)
    for row, values in enumerate(rates.values()):
        table[row, : len(values)] = values
    finite = table[np.isfinite(table)]
    centre = run.initial_inner_lr
    if centre is None:
        centre = float(np.median(finite)) if finite.size else 0.0
    away = np.abs(finite - centre)
    reach = float(np.percentile(away, 98)) if away.size else 0.0
    constant = reach <= 1e-6 * abs(centre)
    if constant:
        reach = abs(centre) / 2 or 1.0
    image = axes.imshow(
        np.ma.masked_invalid(table),
        cmap=style.DIVERGING,
        norm=Normalize(centre - reach, centre + reach),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_facecolor(style.PALE)
    axes.set_xticks(_few_ticks(steps), [str(step + 1) for step in _few_ticks(steps)])
    font = 8.0 if len(rates) <= 30 else 6.5
    axes.set_yticks(range(len(rates)), [_shorten(name) for name in rates], fontsize=font)
    axes.set_xticks(np.arange(steps + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rates) + 1) - 0.5, minor=True)
    axes.grid(True, which="minor", color="white", linewidth=1.0)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("inner step")
    axes.set_ylabel("parameter tensor, input to output")
    changed = "constant" if constant else f"after epoch {run.epochs[-1].epoch}"
    axes.set_title(f"Inner rate α, {changed}")
    figure = _figure(axes)
    beyond = bool(away.size) and float(away.max()) > reach * (1 + 1e-9)
    low = beyond and float(finite.min()) < centre - reach
    high = beyond and float(finite.max()) > centre + reach
    bar = figure.colorbar(
        image, ax=axes, pad=0.03, fraction=0.06, aspect=30,
        extend="both" if low and high else "min" if low else "max" if high else "neither",
    )  # fmt: skip
    bar.set_label(f"inner rate α (started at {centre:g})")
    bar.outline.set_visible(False)
    bar.ax.axhline(centre, color=style.GREY, linewidth=0.8)
    _write_cells(axes, table, centre, reach)


def msl_weights_panel(axes: Axes, run: RunRecords) -> None:
    """w_k of every inner step's query loss over the epochs; first-order epochs are shaded."""
    epochs = _epoch_numbers(run)
    steps = max(len(record.loss_weights) for record in run.epochs)
    weights = np.full((len(epochs), steps), np.nan)
    for row, record in enumerate(run.epochs):
        weights[row, : len(record.loss_weights)] = record.loss_weights
    for first, last in _first_order_spans(run):
        axes.axvspan(first - 0.5, last + 0.5, color="#F0F0F0", linewidth=0, zorder=0)
    tube = min(2.2, 7 / steps)
    for step in range(steps):
        final = step == steps - 1
        # Lines that lie on each other are drawn like nested tubes: the earliest step widest and undermost.
        covering = sum(
            np.allclose(weights[:, step], weights[:, later], equal_nan=True) for later in range(step + 1, steps)
        )
        axes.plot(
            epochs,
            weights[:, step],
            color=style.VERMILLION if final else style.ORDERED(step / max(steps - 2, 1)),
            linewidth=2.4 if final else 1.5 + tube * covering,
            linestyle="-" if final or covering else style.LINE_STYLES[step % len(style.LINE_STYLES)],
            solid_capstyle="butt",
            marker="o" if final else "" if covering and len(epochs) > 1 else style.MARKERS[(step + 1) % 7],
            markersize=4.5 + tube * covering,
            markevery=_mark_every(len(epochs)),
            zorder=4 if final else 2 + step / steps,
            label=f"step {step + 1}" + (" (last)" if final and steps > 1 else ""),
        )
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("weight $w_k$ of the query loss")
    axes.set_title("Weight of each inner step in the outer loss")
    _epoch_axis(axes, run)
    style.tidy(axes)
    handles, _ = axes.get_legend_handles_labels()
    if steps > 12:
        handles = [handles[index] for index in _spread(steps, 8, geometric=False)]
    orders = {record.derivative_order for record in run.epochs}
    if 1 in orders:
        handles.append(Patch(facecolor="#E4E4E4", edgecolor=style.PALE, label="first-order gradient"))
    if 2 in orders:
        handles.append(Patch(facecolor="white", edgecolor=style.PALE, label="second-order gradient"))
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))


def gradient_norm_panel(axes: Axes, run: RunRecords) -> None:
    """Norm of the meta-gradient, mean and largest in each epoch, on a log axis."""
    epochs = _epoch_numbers(run)
    mean = _column(run, lambda record: record.gradient_norm_mean)
    largest = _column(run, lambda record: record.gradient_norm_max)
    every = _mark_every(len(epochs))
    axes.plot(
        epochs, _finite(largest), color=style.ORANGE, linestyle=(0, (4, 1.5)), linewidth=1.4, marker="^",
        markevery=every, label="largest of the epoch",
    )  # fmt: skip
    axes.plot(epochs, _finite(mean), color=style.BLUE, marker="o", markevery=every, label="mean of the epoch")
    _mark_lost(axes, epochs, mean + largest)
    _log_axis(axes, [mean, largest])
    _epoch_axis(axes, run)
    axes.set_ylabel("norm of the meta-gradient (log scale)")
    axes.set_title("Size of the meta-gradient")
    style.tidy(axes)
    _mark_changes(axes, run, falling=True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)


def _train_and_validation(axes: Axes, run: RunRecords, train: Array, validation: Array, interval: Array) -> None:
    """The two lines and the band that accuracy and loss share."""
    epochs = _epoch_numbers(run)
    every = _mark_every(len(epochs))
    axes.plot(
        epochs, _finite(train), color=style.ORANGE, linestyle=(0, (4, 1.5)), linewidth=1.5, marker="s",
        markevery=every, label="training tasks",
    )  # fmt: skip
    tasks = run.epochs[-1].val_tasks
    band = np.nan_to_num(interval, nan=0.0, posinf=0.0, neginf=0.0)
    if len(epochs) == 1:
        axes.errorbar(epochs, _finite(validation), yerr=band, color=style.BLUE, capsize=4, linewidth=1.2)
    axes.fill_between(
        epochs,
        _finite(validation) - band,
        _finite(validation) + band,
        color=style.BLUE,
        alpha=0.22,
        linewidth=0,
    )
    axes.plot(
        epochs, _finite(validation), color=style.BLUE, marker="o", markevery=every,
        label=f"validation, 95% interval ({tasks} tasks)",
    )  # fmt: skip
    _mark_lost(axes, epochs, train + validation)
    _epoch_axis(axes, run)
    style.tidy(axes)


def _mark_lost(axes: Axes, epochs: Array, values: Array) -> None:
    """Crosses at the top edge for epochs whose value is not finite: a gap in a line is easily missed."""
    lost = epochs[~np.isfinite(values)]
    if lost.size:
        axes.plot(
            lost, np.full(lost.size, 0.98), "x", color=style.VERMILLION, markersize=7, markeredgewidth=2,
            transform=axes.get_xaxis_transform(), clip_on=False, label="not a finite number",
        )  # fmt: skip


def _mark_changes(axes: Axes, run: RunRecords, *, above: float = 0.0, falling: bool = False) -> None:
    """Thin lines where the recipe changes: multi-step loss ends, the derivative order switches.

    Their notes stand at the fraction ``above`` of the panel's height, to leave room for a legend. Where the
    lines are ``falling`` with time, notes in the later part stand at the top instead, out of their way.
    """
    orders = {record.epoch: record.derivative_order for record in run.epochs}
    changes = [
        (epoch, "second-order from here" if orders[epoch] == 2 else "first-order from here")
        for epoch in run.derivative_switches
    ]
    if run.msl_end is not None:
        changes.append((run.msl_end, "multi-step loss ends"))
    first, last = run.epochs[0].epoch, run.epochs[-1].epoch
    for epoch, note in changes:
        axes.axvline(epoch - 0.5, color=style.GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        late = falling and epoch - first > 0.4 * (last - first)
        axes.annotate(
            note, (epoch - 0.5, 1 if late else above), (2, -4 if late else 4),
            xycoords=("data", "axes fraction"), textcoords="offset points", rotation=90, ha="left",
            va="top" if late else "bottom", fontsize=7, color=style.GREY, path_effects=_HALO, zorder=1,
        )  # fmt: skip


def _star(axes: Axes, x: float, y: float, label: str) -> None:
    axes.plot(
        [x], [y], linestyle="none", marker="*", markersize=12, color=style.BLUE, markeredgecolor="white",
        markeredgewidth=0.8, zorder=5, label=label,
    )  # fmt: skip


def _name_points(axes: Axes, steps: Array | NDArray[np.int_], values: Array) -> None:
    """The numbers of the highlighted line, above its points (some only, if there are many steps)."""
    for index in _few_ticks(len(values), most=7):
        if math.isfinite(values[index]):
            axes.annotate(
                f"{values[index]:.1f}", (float(steps[index]), values[index]), (-4, 6),
                textcoords="offset points", ha="center", va="bottom", fontsize=7.5, color=style.VERMILLION,
                fontweight="bold", path_effects=_HALO, zorder=10,
            )  # fmt: skip


def _write_cells(axes: Axes, table: Array, centre: float, reach: float) -> None:
    """The value in every cell of a heat map, if cells are large enough to hold it."""
    figure = _figure(axes)
    figure.draw_without_rendering()
    box = axes.get_window_extent()
    rows, columns = table.shape
    points = 72 / figure.dpi
    width, height = box.width / columns * points, box.height / rows * points
    places = _decimals(reach)
    texts = [[_cell_text(value, places) for value in row] for row in table]
    longest = max(len(text) for row in texts for text in row)
    size = min(8.0, 0.75 * height, 0.9 * width / (0.62 * longest))
    if size < 5:
        return
    for row in range(rows):
        for column in range(columns):
            dark = abs(table[row, column] - centre) > 0.7 * reach
            text = axes.text(
                column, row, texts[row][column], ha="center", va="center", fontsize=size,
                color="white" if dark else style.INK,
            )  # fmt: skip
            text.set_in_layout(False)


def _cell_text(value: float, places: int) -> str:
    if not math.isfinite(value):
        return "n/a"
    return f"{round(value, places) + 0.0:.{places}f}".replace("-", "−")  # + 0.0: no minus before a zero


def _decimals(spread: float) -> int:
    """Digits after the point that tell apart values spread this far."""
    return int(min(max(1 - math.floor(math.log10(spread)), 1), 6)) if spread > 0 else 3


def _shorten(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"


def _figure(axes: Axes) -> Figure:
    figure = axes.figure
    if not isinstance(figure, Figure):
        raise TypeError("draw on the Axes of a Figure, not of a SubFigure")
    return figure


def _epoch_axis(axes: Axes, run: RunRecords) -> None:
    """Name and scale the axis of epochs."""
    first, last = run.epochs[0].epoch, run.epochs[-1].epoch
    margin = max(0.02 * (last - first), 0.5)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    each = run.epochs[-1].iterations / last
    axes.set_xlabel(f"epoch ({each:.0f} iterations each)" if each.is_integer() and each >= 1 else "epoch")


def _log_axis(axes: Axes, series: Sequence[Array]) -> None:
    """A log axis that spans the positive values of the series, with plain numbers on it."""
    values = np.concatenate(list(series))
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return
    axes.set_yscale("log", nonpositive="clip")
    low, high = float(values.min()) / 1.15, float(values.max()) * 1.15
    axes.set_ylim(low, high)
    decades = math.log10(high / low)
    if decades < 3:
        ticks = (1.0, 2.0, 5.0) if decades > 1.2 else (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
        axes.yaxis.set_major_locator(LogLocator(subs=ticks))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _percent_sign() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:.3g}%")


def _ticks_to_100() -> MaxNLocator:
    """Ticks for an axis of percent that has room above 100 for numbers over the points, but no tick there."""

    class Ticks(MaxNLocator):
        def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
            return [float(tick) for tick in super().tick_values(vmin, vmax) if tick <= 100]

    return Ticks(nbins=8, steps=[1, 2, 5, 10])


def _epoch_numbers(run: RunRecords) -> Array:
    return np.array([record.epoch for record in run.epochs], dtype=np.float64)


def _column(run: RunRecords, value: Callable[[EpochRecord], float]) -> Array:
    return np.array([value(record) for record in run.epochs], dtype=np.float64)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _finite(values: Array) -> Array:
    """Infinite values as NaN, which lines leave out."""
    return np.where(np.isfinite(values), values, np.nan)


def _per_step(record: EpochRecord, classify: bool) -> Array:
    """After inner step 0 .. K: accuracy in percent, or the loss."""
    if classify:
        return _finite(100 * np.array(record.val_accuracies_per_step or [math.nan], dtype=np.float64))
    return _finite(np.array(record.val_losses_per_step, dtype=np.float64))


def _first_order_spans(run: RunRecords) -> list[tuple[int, int]]:
    """First and last epoch of every stretch of first-order meta-gradients."""
    spans: list[tuple[int, int]] = []
    for record in run.epochs:
        if record.derivative_order != 1:
            continue
        if spans and spans[-1][1] == record.epoch - 1:
            spans[-1] = (spans[-1][0], record.epoch)
        else:
            spans.append((record.epoch, record.epoch))
    return spans


def _spread(count: int, most: int, *, geometric: bool = True) -> list[int]:
    """At most so many indices below ``count``, first and last included; geometric: closer at the start."""
    places = np.geomspace(1, count, most) - 1 if geometric else np.linspace(0, count - 1, most)
    return sorted({round(float(place)) for place in places})


def _few_ticks(count: int, most: int = 20) -> list[int]:
    """All of ``range(count)`` or, if that is many, an even choice with both ends."""
    return list(range(count)) if count <= most else _spread(count, most // 2 + 1, geometric=False)


def _mark_every(count: int) -> tuple[int, int]:
    """Markers on at most about 12 points, so that lines differ in print but stay lines."""
    return (0, max(1, math.ceil(count / 12)))
