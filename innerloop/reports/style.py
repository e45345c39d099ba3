"""How every figure looks and how it is saved. Nothing here touches pyplot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

from innerloop.reports.files import replacing

DOTS_PER_INCH = 160

# Okabe and Ito's palette, which people with any common colour blindness can tell apart.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
VERMILLION = "#D55E00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
INK = "#222222"
GREY = "#6E6E6E"
PALE = "#D9D9D9"

DIVERGING: Colormap = LinearSegmentedColormap.from_list(
    "blue_vermillion", [BLUE, "#9CC9E3", "#F7F7F7", "#F0B48A", VERMILLION]
)
"""Below the centre blue, at it white, above it vermillion."""
SEQUENTIAL: Colormap = LinearSegmentedColormap.from_list("pale_to_blue", ["#FFFFFF", "#B9D9EB", "#5AA5CF", BLUE])
"""From white for 0 to blue for 1."""
ORDERED: Colormap = LinearSegmentedColormap.from_list("early_to_late", ["#A9CCE3", "#4A97C6", "#0B4F7D", "#06263D"])
"""For lines in an order, such as epochs: the palest is still visible on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES: tuple[Any, ...] = ((0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)), (0, (5, 1.5)), (0, (8, 1.5)))

_SETTINGS: Any = {
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.labelsize": 9.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.facecolor": "white",
    "axes.unicode_minus": True,
    "figure.facecolor": "white",
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.fontsize": 8.0,
    "legend.frameon": True,
    "legend.fancybox": False,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.handlelength": 2.6,
    "text.color": INK,
    "text.usetex": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "savefig.bbox": None,
    "path.simplify": True,
}


@contextmanager
def figure_at(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches to draw on; saved to ``path`` if the block ends well."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG in one move: readers find the old file or the new. The same data gives the same bytes."""
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return path


def tidy(axes: Axes, *, grid: str = "y") -> None:
    """Take away the frame's top and right; put a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid == "both":
        axes.grid(True, color=PALE, linewidth=0.6)
    else:
        axes.yaxis.grid(True, color=PALE, linewidth=0.6)
    axes.tick_params(length=3)
