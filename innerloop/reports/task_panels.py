"""One task being learned, as a picture: images and how sure the model is of them, or curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from innerloop.reports import style


@dataclass(frozen=True, eq=False)
class TaskPicture:
    """A classification task and what the model said of its query images after every inner step.

    Raises ``ValueError`` for arrays that do not belong together.
    """

    support_images: NDArray[np.uint8]
    """``[n, C, H, W]``, C is 1 or 3."""
    support_labels: ArrayLike
    """``[n]``, from 0 to ways - 1."""
    query_images: NDArray[np.uint8]
    """``[m, C, H, W]``."""
    query_labels: ArrayLike
    """``[m]``."""
    probabilities: ArrayLike
    """``[K+1, m, ways]``, of every class for every query image after inner step 0 .. K."""
    title: str = ""

    def __post_init__(self) -> None:
        for name in ("support", "query"):
            images = np.asarray(getattr(self, f"{name}_images"))
            labels = np.asarray(getattr(self, f"{name}_labels"))
            if images.ndim != 4 or images.shape[1] not in (1, 3):
                raise ValueError(f"{name}_images must be [n, C, H, W] with C 1 or 3, got {images.shape}")
            if labels.shape != images.shape[:1]:
                raise ValueError(f"{name}_labels must be [{len(images)}], one for each image, got {labels.shape}")
            if not len(images):
                raise ValueError(f"{name}_images is empty")
        shape = np.shape(self.probabilities)
        if len(shape) != 3 or shape[1] != len(self.query_images):
            raise ValueError(f"probabilities must be [K+1, {len(self.query_images)}, ways], got {shape}")
        for name in ("support", "query"):
            labels = np.asarray(getattr(self, f"{name}_labels"))
            if labels.min() < 0 or labels.max() >= shape[2]:
                raise ValueError(f"{name}_labels must be from 0 to {shape[2] - 1}, got {sorted(set(labels.tolist()))}")

    @property
    def ways(self) -> int:
        """Classes in the task."""
        return int(np.shape(self.probabilities)[2])

    def right(self) -> NDArray[np.bool_]:
        """``[K+1, m]``: whether the most probable class is the true one."""
        guesses = np.asarray(self.probabilities).argmax(axis=2)
        return np.asarray(guesses == np.asarray(self.query_labels)[None, :])

    def probability_of_truth(self) -> NDArray[np.float64]:
        """``[K+1, m]``: the probability of the true class."""
        table = np.asarray(self.probabilities, dtype=np.float64)
        return np.asarray(table[:, np.arange(table.shape[1]), np.asarray(self.query_labels)])


class TaskSize(NamedTuple):
    """What of a task is drawn, and how large that is in units of one image."""

    rows: int
    shots: int
    width: float
    height: float


_CELL = 1.2  # a cell's width; an image is 1 by 1
_LEFT = 1.05  # room for the name of a row's class
_GAP = 0.55


def task_size(task: TaskPicture, *, most_classes: int = 10, most_shots: int = 5) -> TaskSize:
    """How many classes and shots a picture of the task shows and how large it is."""
    counts = np.bincount(np.asarray(task.support_labels), minlength=task.ways)
    rows, shots = min(task.ways, most_classes), min(int(counts.max()), most_shots)
    cells = np.shape(task.probabilities)[0] * _CELL
    return TaskSize(rows, shots, _LEFT + shots + _GAP + 1 + _GAP / 2 + cells, rows + 2.5)


def task_panel(
    axes: Axes, task: TaskPicture, *, most_classes: int = 10, most_shots: int = 5, unit: float = 0.5
) -> None:
    """A row for each class: its support images, one query image, how sure the model is after each inner step.

    Of more than ``most_classes`` classes or ``most_shots`` images the first are shown and a note says so.
    The bottom line counts all query images. ``unit`` is an image's size in inches, which text follows. Drawn
    characters, bright ink on a dark ground, are shown as ink on paper.
    """
    size = task_size(task, most_classes=most_classes, most_shots=most_shots)
    support_labels, query_labels = np.asarray(task.support_labels), np.asarray(task.query_labels)
    truth, right = task.probability_of_truth(), task.right()
    steps = len(truth)
    paper = _is_drawing(task.support_images)
    font = min(8.5, 15.5 * unit)
    query_left = _LEFT + size.shots + _GAP
    cells_left = query_left + 1 + _GAP / 2

    for row in range(size.rows):
        top = row * 1.0
        axes.text(
            _LEFT - 0.15,
            top + 0.5,
            f"class {row + 1}",
            ha="right",
            va="center",
            fontsize=font,
            color=style.GREY,
        )
        for column, index in enumerate(np.flatnonzero(support_labels == row)[: size.shots]):
            _show_image(axes, task.support_images[index], _LEFT + column, top, paper)
        of_class = np.flatnonzero(query_labels == row)
        if not of_class.size:
            continue
        query = int(of_class[0])
        _show_image(axes, task.query_images[query], query_left, top, paper, frame=style.INK)
        for step in range(steps):
            _show_cell(
                axes,
                cells_left + step * _CELL,
                top,
                float(truth[step, query]),
                bool(right[step, query]),
                font,
            )

    head: dict[str, Any] = {"va": "bottom", "fontsize": font, "fontweight": "bold"}
    axes.text(_LEFT + size.shots / 2, -0.62, "support", ha="center", **head)
    axes.text(query_left + 0.5, -0.62, "query", ha="center", **head)
    axes.text(cells_left + steps * _CELL / 2, -0.62, "probability of the true class", ha="center", **head)
    for step in range(steps):
        centre = cells_left + (step + 0.5) * _CELL
        name = "before" if step == 0 else f"step {step}"
        axes.text(centre, -0.12, name, ha="center", va="bottom", fontsize=font, color=style.GREY)
        axes.text(
            centre, size.rows + 0.2, f"{100 * right[step].mean():.0f}%", ha="center", va="top", fontsize=font,
            fontweight="bold",
        )  # fmt: skip
    count = len(query_labels)
    axes.text(
        cells_left - 0.2, size.rows + 0.2, f"right, of {count} query image{'s' * (count > 1)}:",
        ha="right", va="top", fontsize=font,
    )  # fmt: skip
    _show_key(axes, cells_left, size, task, font)
    axes.set_xlim(-0.05, size.width + 0.05)
    axes.set_ylim(size.rows + 1.35, -1.15)
    axes.set_aspect("equal", anchor="N")
    axes.axis("off")
    axes.set_title(task.title)


def _show_key(axes: Axes, left: float, size: TaskSize, task: TaskPicture, font: float) -> None:
    """What the marks mean, and what is left out."""
    y = size.rows + 1.05
    _show_mark(axes, left + 0.15, y, True, font)
    axes.text(left + 0.4, y, "guess is right", va="center", fontsize=0.92 * font, color=style.GREY)
    _show_mark(axes, left + 2.75, y, False, font)
    axes.text(left + 3.0, y, "guess is wrong", va="center", fontsize=0.92 * font, color=style.GREY)
    left_out = []
    if size.rows < task.ways:
        left_out.append(f"{size.rows} of {task.ways} classes")
    most = int(np.bincount(np.asarray(task.support_labels)).max())
    if size.shots < most:
        left_out.append(f"{size.shots} of {most} shots")
    if left_out:
        note = "shown: " + ", ".join(left_out)
        axes.text(left - 0.2, y, note, ha="right", va="center", fontsize=0.92 * font, color=style.GREY)


def _show_image(axes: Axes, image: NDArray[np.uint8], left: float, top: float, paper: bool, frame: str = "") -> None:
    """One image in the square whose upper left corner is given."""
    pixels = np.moveaxis(np.asarray(image), 0, -1)
    scale: dict[str, Any] = {}
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
        scale = {"cmap": "gray_r" if paper else "gray", "vmin": 0, "vmax": 255}
    extent = (left + 0.05, left + 0.95, top + 0.95, top + 0.05)
    axes.imshow(pixels, extent=extent, interpolation="antialiased", aspect="auto", **scale)
    axes.add_patch(
        Rectangle((left + 0.05, top + 0.05), 0.9, 0.9, fill=False, edgecolor=frame or style.PALE, linewidth=0.8)
    )


def _show_cell(axes: Axes, left: float, top: float, probability: float, right: bool, font: float) -> None:
    """One probability: shade and number, and whether the guess is right as a mark."""
    known = math.isfinite(probability)
    shade = style.SEQUENTIAL(0.75 * probability) if known else style.PALE
    axes.add_patch(
        Rectangle((left + 0.03, top + 0.05), _CELL - 0.06, 0.9, facecolor=shade, edgecolor=style.PALE, linewidth=0.6)
    )
    _show_mark(axes, left + 0.25, top + 0.5, right and known, font)
    axes.text(
        left + 0.43, top + 0.5, f"{probability:.2f}" if known else "n/a", ha="left", va="center",
        fontsize=0.92 * font,
    )  # fmt: skip


def _show_mark(axes: Axes, x: float, y: float, right: bool, font: float) -> None:
    """A disc for right and a cross for wrong: told apart by shape as well as by colour."""
    axes.plot(
        [x], [y], linestyle="none", marker="o" if right else "X", markersize=0.75 * font, zorder=4,
        color=style.GREEN if right else style.VERMILLION, markeredgecolor="white", markeredgewidth=0.8,
    )  # fmt: skip


def _is_drawing(images: NDArray[np.uint8]) -> bool:
    """Whether images are bright ink on a dark ground: one channel, most of it black."""
    return bool(images.shape[1] == 1 and np.median(images) < 32)


class CurveTask(NamedTuple):
    """A regression task of one input and one output. Arrays may be ``[n]`` or ``[n, 1]``."""

    support_x: ArrayLike
    support_y: ArrayLike
    x: ArrayLike
    """Where the curves are drawn, ascending."""
    target: ArrayLike
    """The true function at ``x``."""
    predictions: Mapping[int, ArrayLike]
    """The model at ``x`` after so many inner steps; 0 is before adaptation."""


_CURVES: tuple[tuple[str, Any], ...] = (
    (style.GREY, (0, (1, 1.2))),
    (style.ORANGE, (0, (5, 1.5))),
    (style.BLUE, "-"),
    (style.GREEN, (0, (4, 1.5, 1, 1.5))),
    (style.PURPLE, (0, (8, 2))),
)


def curve_panel(axes: Axes, task: CurveTask, *, title: str = "") -> None:
    """The true function, the support points, and the model after each of the given numbers of inner steps."""
    x, target = _flat(task.x), _flat(task.target)
    axes.plot(x, target, color=style.PALE, linewidth=5, solid_capstyle="round", label="target", zorder=1)
    for place, (steps, values) in enumerate(sorted(task.predictions.items())):
        prediction = _flat(values)
        if prediction.shape != x.shape:
            raise ValueError(f"predictions[{steps}] must have {x.size} values, as x has, got {prediction.size}")
        error = float(np.mean((prediction - target) ** 2))
        colour, line = _CURVES[place % len(_CURVES)]
        when = "before adaptation" if steps == 0 else f"after {steps} step{'s' * (steps > 1)}"
        axes.plot(x, prediction, color=colour, linestyle=line, label=f"{when}: MSE {error:.2g}", zorder=2 + place)
    count = len(_flat(task.support_x))
    axes.plot(
        _flat(task.support_x), _flat(task.support_y), linestyle="none", marker="^", markersize=7,
        color=style.VERMILLION, markeredgecolor="white", markeredgewidth=0.8, zorder=20,
        label=f"support ({count} points)",
    )  # fmt: skip
    axes.set_xlabel("input x")
    axes.set_title(title)
    style.tidy(axes, grid="both")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _flat(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64).reshape(-1)
