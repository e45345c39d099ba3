"""The picture of one task going through the inner and the outer loop.

From left to right: the task, then theta^0 .. theta^K as a chain. Above the chain is what drives each inner step
(support loss, inner rates), below it what each step gives (query loss and accuracy), then how these losses enter the
outer loss, and the way the outer update goes back to theta^0. All numbers are the record's; coordinates are inches.
"""

from __future__ import annotations

import math
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from innerloop.reports import style
from innerloop.reports.process import Moment, ProcessRecord, decoded_image

_PITCH = 1.8
_LEFT = 3.5  # centre of theta^0
_CHAIN = 4.75
_QUERY_TOP, _QUERY_BOTTOM = 3.85, 2.95
_BAR_TOP, _BAR_BOTTOM = 1.85, 1.26
_BOTTOM, _HEIGHT = 0.3, 6.85
_MOST_COLUMNS = 7
_SUPPORT, _QUERY, _START, _END = style.GREEN, style.BLUE, style.SKY, style.VERMILLION


def draw_process(path: Path, record: ProcessRecord) -> Path:
    """The picture of a record: support set, inner steps, query losses, and how they make the outer update."""
    width, height = process_size(record)
    with style.figure_at(path, width + 0.3, height + 0.3) as figure:
        process_panel(figure.add_subplot(), record)
    return path


def process_size(record: ProcessRecord) -> tuple[float, float]:
    """Width and height of the picture in inches."""
    return _LEFT + (len(_columns(record.steps)) - 1) * _PITCH + 0.85, _HEIGHT


def _columns(steps: int) -> list[int | None]:
    """The inner steps that have a column; None stands for those left out where there are many."""
    if steps < _MOST_COLUMNS:
        return list(range(steps + 1))
    return [0, 1, 2, None, steps - 1, steps]


def process_panel(axes: Axes, record: ProcessRecord) -> None:
    """Draw the record on Axes of ``process_size``."""
    width, height = process_size(record)
    axes.set_xlim(0, width)
    axes.set_ylim(_BOTTOM, _BOTTOM + height)
    height += _BOTTOM
    axes.set_aspect("equal")
    axes.axis("off")
    columns = _columns(record.steps)
    centres = {k: _LEFT + place * _PITCH for place, k in enumerate(columns) if k is not None}
    _text(
        axes,
        0.05,
        height - 0.18,
        f"{record.method}: how one task is learned, and what is learned from it",
        12,
        bold=True,
    )
    _text(
        axes,
        0.05,
        height - 0.45,
        f"{record.task}, meta-parameters of epoch {record.checkpoint_epoch}; numbers measured",
        8.5,
        colour=style.GREY,
    )
    _task_images(axes, record)
    _chain(axes, record, columns, centres)
    _query(axes, record, centres)
    _outer(axes, record, centres)
    _words(axes, record)


def _task_images(axes: Axes, record: ProcessRecord) -> None:
    """Support images above, query images below."""
    pixels = [decoded_image(text) for row in record.support_images for text in row]
    paper = bool(pixels) and pixels[0].ndim == 2 and float(np.median(np.stack(pixels))) < 32
    classes = len(record.support_images)
    shots = max((len(row) for row in record.support_images), default=1)
    size = min(0.4, 2.1 / classes, 0.8 / shots)
    top = 6.22
    for column, row in enumerate(record.support_images):
        for shot, text in enumerate(row):
            _image(axes, decoded_image(text), 0.1 + column * size, top - (shot + 1) * size, size, paper, _SUPPORT)
    for column, text in enumerate(record.query_images):
        _image(axes, decoded_image(text), 0.1 + column * size, _QUERY_TOP - 0.02 - size, size, paper, _QUERY)
    shown = f"{classes} of the {record.ways} classes shown" if classes < record.ways else f"{record.ways} classes"
    _text(axes, 0.1, 6.4, "support set", 9.5, bold=True, colour=_SUPPORT)
    _text(
        axes,
        0.1,
        top - shots * size - 0.14,
        f"{record.shots} image{'s' * (record.shots > 1)} a class; {shown}",
        7.5,
        colour=style.GREY,
    )
    _text(axes, 0.1, _QUERY_TOP + 0.28, "query set", 9.5, bold=True, colour=_QUERY)
    _text(
        axes,
        0.1,
        _QUERY_TOP - 0.02 - size - 0.14,
        f"{record.queries} image{'s' * (record.queries > 1)} a class, not in the support set",
        7.5,
        colour=style.GREY,
    )


def _chain(axes: Axes, record: ProcessRecord, columns: list[int | None], centres: dict[int, float]) -> None:
    """theta^0 .. theta^K and the inner steps between them."""
    _text(axes, _LEFT + 0.25, _CHAIN + 0.4, "inner loop", 9, bold=True, colour=_SUPPORT, ha="right")
    _rail(axes, 1.3, 6.42, [(a + b) / 2 for a, b in pairwise(centres.values()) if b - a < 1.5 * _PITCH], 0.1, _SUPPORT)
    table = np.array(list(record.rates.values()), dtype=np.float64).reshape(len(record.rates), record.steps)
    finite = table[np.isfinite(table)]
    low = min(0.0, float(finite.min())) if finite.size else 0.0
    high = max(float(finite.max()), low + 1e-9, 0.0) if finite.size else 1.0
    second = 2 in (record.start.derivative_order, record.end.derivative_order)
    for place, k in enumerate(columns):
        x = _LEFT + place * _PITCH
        if k is None:
            _text(axes, x, _CHAIN, "···", 14, ha="center")
        else:
            _box(axes, x - 0.38, _CHAIN - 0.24, 0.76, 0.48, "white", style.INK)
            _text(axes, x, _CHAIN, rf"$\theta^{{{k}}}$", 13, ha="center")
        if place == 0:
            continue
        left, right = x - _PITCH + 0.4, x - 0.4
        _arrow(axes, (left, _CHAIN), (right, _CHAIN), _SUPPORT, 2.0)
        if second:
            _arrow(
                axes,
                (right + 0.05, _CHAIN - 0.2),
                (left - 0.05, _CHAIN - 0.2),
                style.PURPLE,
                1.2,
                line="--",
                bend=-0.22,
            )
        if k is None or columns[place - 1] is None:
            continue
        middle = (left + right) / 2
        _text(axes, middle, 6.22, f"step {k}", 8.5, bold=True, ha="center")
        _text(
            axes, middle, 6.02, f"support loss {_number(record.support_losses[k - 1])}", 8, ha="center", colour=_SUPPORT
        )
        if finite.size:
            _rate_strip(axes, middle, table[:, k - 1], low, high)
    if second:
        _text(axes, _LEFT + _PITCH / 2, _CHAIN - 0.47, "meta-gradient", 7, ha="center", colour=style.PURPLE)
    if finite.size:
        tensors = len(record.rates)
        x = _LEFT + 0.4 + (_PITCH - 0.8) / 2
        _text(
            axes,
            x - 0.75,
            5.58,
            f"inner rate α\nof {tensors} tensors,\ninput to\noutput",
            6.5,
            colour=style.GREY,
            ha="right",
        )


def _rail(axes: Axes, left: float, y: float, stops: list[float], drop: float, colour: str) -> None:
    """A thin line from a set of examples to all that it is used for."""
    axes.plot([left, stops[-1]], [y, y], color=colour, linewidth=1.0, zorder=1)
    for x in stops:
        axes.plot([x, x], [y, y - drop], color=colour, linewidth=1.0, zorder=1)


def _rate_strip(axes: Axes, middle: float, rates: Any, low: float, high: float) -> None:
    """A bar for each parameter tensor from input to output, and their mean, least and largest."""
    bottom, height, width = 5.36, 0.48, 1.2
    scale = height / (high - low)
    zero = bottom - low * scale
    each = width / len(rates)
    for index, rate in enumerate(rates):
        if math.isfinite(rate):
            y = min(zero, zero + rate * scale)
            axes.add_patch(
                Rectangle(
                    (middle - width / 2 + index * each, y),
                    0.8 * each,
                    abs(rate) * scale,
                    facecolor=style.GREY if rate >= 0 else style.ORANGE,
                    linewidth=0,
                )
            )
    axes.plot([middle - width / 2, middle + width / 2], [zero, zero], color=style.INK, linewidth=0.6)
    known = np.asarray(rates)[np.isfinite(rates)]
    if not known.size:
        return
    least, mean, most = (_number(float(value)) for value in (known.min(), known.mean(), known.max()))
    text = f"α = {mean}" if least == most else f"α {mean} ({least} to {most})"
    _text(axes, middle, bottom - 0.14, text, 7, ha="center")


def _query(axes: Axes, record: ProcessRecord, centres: dict[int, float]) -> None:
    """Query loss and accuracy at every theta^k."""
    _rail(axes, 1.3, _QUERY_TOP + 0.3, [x - 0.3 for x in centres.values()], 0.3, _QUERY)
    for k, x in centres.items():
        _arrow(axes, (x, _CHAIN - 0.26), (x, _QUERY_TOP + 0.02), _QUERY, 1.0)
        used = k > 0 and (record.start.loss_weights[k - 1] or record.end.loss_weights[k - 1])
        _box(axes, x - 0.62, _QUERY_BOTTOM, 1.24, _QUERY_TOP - _QUERY_BOTTOM, "white", _QUERY if used else style.PALE)
        _text(axes, x, _QUERY_TOP - 0.18, f"query loss {_number(record.query_losses[k])}", 8.5, bold=True, ha="center")
        accuracy = record.query_accuracies[k]
        _text(axes, x, _QUERY_TOP - 0.44, f"{100 * accuracy:.0f}% right", 8.5, ha="center")
        known = accuracy if math.isfinite(accuracy) else 0.0
        axes.add_patch(
            Rectangle((x - 0.5, _QUERY_BOTTOM + 0.12), 1.0, 0.14, facecolor="#EEEEEE", linewidth=0, zorder=4)
        )
        axes.add_patch(Rectangle((x - 0.5, _QUERY_BOTTOM + 0.12), known, 0.14, facecolor=_QUERY, linewidth=0, zorder=5))
    _text(
        axes,
        centres[0],
        _QUERY_BOTTOM - 0.16,
        "before adaptation:\nnot in the outer loss",
        7,
        ha="center",
        colour=style.GREY,
        va="top",
    )


def _outer(axes: Axes, record: ProcessRecord, centres: dict[int, float]) -> None:
    """The weighted query losses as arrows into the outer loss, and the outer update back to theta^0."""
    last = centres[record.steps]
    first = centres[1]
    annealed = record.start.loss_weights != record.end.loss_weights
    moments = [(record.start, _START, -0.3), (record.end, _END, 0.3)] if annealed else [(record.end, _END, 0.0)]
    for moment, colour, shift in moments:
        for k, x in centres.items():
            if k == 0:
                continue
            weight = moment.loss_weights[k - 1]
            aside = x + shift
            if weight > 0:
                _arrow(axes, (aside, _QUERY_BOTTOM - 0.03), (aside, _BAR_TOP + 0.03), colour, 1.0 + 9.0 * weight)
            else:
                _text(axes, aside, _BAR_TOP + 0.5, "×", 10, ha="center", colour=style.GREY)
            halo = style.INK if weight > 0 else style.GREY
            _text(axes, aside, _QUERY_BOTTOM - 0.16, f"{_weight(weight)}", 8, ha="center", colour=halo, backed=True)
    if annealed:
        labels = ((record.start, _START, 0.0), (record.end, _END, -0.25))
        for moment, colour, down in labels:
            y = _QUERY_BOTTOM - 0.6 + down
            axes.add_patch(Rectangle((0.1, y - 0.06), 0.22, 0.12, facecolor=colour, linewidth=0))
            _text(axes, 0.4, y, f"weights $w_k$ in epoch {moment.epoch}", 8)
    else:
        axes.add_patch(Rectangle((0.1, _QUERY_BOTTOM - 0.66), 0.22, 0.12, facecolor=_END, linewidth=0))
        _text(axes, 0.4, _QUERY_BOTTOM - 0.6, "weights $w_k$, all of training", 8)
    _box(axes, first - 0.75, _BAR_BOTTOM, last - first + 1.5, _BAR_TOP - _BAR_BOTTOM, "#F4F4F4", style.INK)
    values = (
        f"{_number(record.outer_loss(record.start))} with the first weights, "
        f"{_number(record.outer_loss(record.end))} with the last"
        if annealed
        else _number(record.outer_loss(record.end))
    )
    wide = last - first > 2.5
    formula = r"outer loss $=\sum_k w_k \cdot$ query loss$(\theta^k)$" if wide else "outer loss"
    _text(
        axes,
        (first + last) / 2,
        (_BAR_TOP + _BAR_BOTTOM) / 2 + (0.1 if wide else 0),
        formula,
        9.5,
        ha="center",
        bold=not wide,
    )
    if wide:
        _text(
            axes,
            (first + last) / 2,
            _BAR_BOTTOM + 0.13,
            f"this task: {values}; averaged over the tasks of a meta-batch",
            7.5,
            ha="center",
            colour=style.GREY,
        )
    # The way back: from the outer loss to the left, and up to theta^0.
    turn = centres[0] - 0.85
    middle = (_BAR_TOP + _BAR_BOTTOM) / 2
    axes.plot(
        [first - 0.75, turn, turn], [middle, middle, _CHAIN], color=style.PURPLE, linewidth=2.6, solid_joinstyle="round"
    )
    _arrow(axes, (turn - 0.01, _CHAIN), (centres[0] - 0.4, _CHAIN), style.PURPLE, 2.6)
    _text(axes, turn - 0.08, middle + 0.02, "outer update", 9.5, bold=True, colour=style.PURPLE, ha="right")
    _text(
        axes, turn - 0.08, middle - 0.19, r"$\theta^0 \leftarrow \theta^0 - \beta\,$Adam(meta-gradient)", 8, ha="right"
    )


def _words(axes: Axes, record: ProcessRecord) -> None:
    """What there is to see, in two or three sentences made from the record."""
    steps, start, end = record.steps, record.start, record.end
    if start.loss_weights == end.loss_weights and sum(map(bool, end.loss_weights)) == 1:
        weights = f"Only the query loss after the last inner step, θ^{steps}, enters the outer loss."
    else:
        weights = (
            f"The query loss after every inner step enters the outer loss. In epoch {start.epoch} the weights are "
            f"{_listed(start)}; in epoch {end.epoch} {_listed(end)}."
        )
    through = f"back through all {steps} inner steps" if steps > 1 else "back through the inner step"
    if {start.derivative_order, end.derivative_order} == {2}:
        order = f"The meta-gradient is second order: it goes {through} (dashed)."
    elif {start.derivative_order, end.derivative_order} == {1}:
        order = "The meta-gradient is first order: it takes the gradient at the adapted weights as that of θ^0."
    else:
        order = (
            f"The meta-gradient is first order in the first {record.first_order_epochs} epochs; from then on it is "
            f"second order and goes {through} (dashed)."
        )
    learned = f"Learned with θ^0: {', '.join(record.learned)}." if record.learned else "Nothing but θ^0 is learned."
    width = process_size(record)[0]
    lines = textwrap.wrap(f"{weights} {order} {learned}", int(width * 14))
    for place, line in enumerate(lines):
        line = line.replace(f"θ^{steps}", rf"$\theta^{{{steps}}}$").replace("θ^0", r"$\theta^0$")
        _text(axes, 0.1, 0.9 - 0.23 * place, line, 8.8)


def _listed(moment: Moment) -> str:
    weights = moment.loss_weights
    if len(set(weights)) == 1 and len(weights) > 1:
        return f"{_weight(weights[0])} each"
    if not any(weights[:-1]):
        return f"the last step's is {_weight(weights[-1])} and the others' 0"
    return ", ".join(map(_weight, weights))


def _weight(weight: float) -> str:
    return "0" if weight == 0 else f"{weight:.2f}" if weight >= 0.01 else f"{weight:.3f}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "n/a"
    text = (
        f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3f}"
    )
    return text.replace("-", "−")


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    size: float,
    *,
    bold: bool = False,
    colour: str = style.INK,
    ha: str = "left",
    va: str = "center",
    backed: bool = False,
) -> None:
    box: Any = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85} if backed else None
    axes.text(
        x,
        y,
        text,
        fontsize=size,
        fontweight="bold" if bold else "normal",
        color=colour,
        ha=ha,
        va=va,
        bbox=box,
        zorder=6,
        linespacing=1.1,
    )


def _box(axes: Axes, x: float, y: float, width: float, height: float, face: str, edge: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=face,
            edgecolor=edge,
            linewidth=1.3,
            zorder=3,
        )
    )


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    width: float,
    line: str = "-",
    bend: float = 0.0,
) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle=f"-|>,head_length={4 + 0.5 * width},head_width={2.2 + 0.55 * width}",
            color=colour,
            linewidth=width,
            linestyle=line,
            shrinkA=0,
            shrinkB=0,
            connectionstyle=f"arc3,rad={bend}",
            zorder=4,
            mutation_scale=1,
            joinstyle="miter",
            capstyle="butt",
        )
    )


def _image(axes: Axes, pixels: Any, left: float, bottom: float, size: float, paper: bool, edge: str) -> None:
    scale: dict[str, Any] = {"cmap": "gray_r" if paper else "gray", "vmin": 0, "vmax": 255} if pixels.ndim == 2 else {}
    gap = 0.06 * size
    extent = (left + gap, left + size - gap, bottom + gap, bottom + size - gap)
    axes.imshow(pixels, extent=extent, interpolation="antialiased", aspect="auto", zorder=3, **scale)
    axes.add_patch(
        Rectangle(
            (left + gap, bottom + gap),
            size - 2 * gap,
            size - 2 * gap,
            fill=False,
            edgecolor=edge,
            linewidth=0.8,
            zorder=4,
        )
    )
