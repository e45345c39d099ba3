"""Endless drawn characters, made up by a random pen: a data set like Omniglot that needs no download.

A character is one to four pen strokes. A stroke is a path whose heading turns smoothly, with a corner here
and
there: lines, arcs, hooks, waves, loops and dots are all the same few numbers. Later strokes mostly start
    from a
point of an earlier one. Each drawer draws the character with those numbers a little changed, then scales,
shears, rotates and shifts the whole, with a pen of their own. The motor programs of Lake, Salakhutdinov &
Tenenbaum 2015 ("Human-level concept learning through probabilistic program induction") are the model, much
simplified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from innerloop.data._progress import progress_bar
from innerloop.data._random import check_whole, raw_words, uniform
from innerloop.data.classes import SPLITS, ClassImages, ImageDataset, Split
from innerloop.data.images import Fit, prepare_image

DEFAULT_CLASSES: Mapping[Split, int] = {"train": 1000, "val": 100, "test": 400}

MAX_STROKES = 4
PATH_POINTS = 27  # along a stroke, before they are joined up on the canvas
SUPERSAMPLING = 4  # the canvas is 1-bit and 4 times as fine as the image; Omniglot's 105 pixels are 3.75 times 28

# Random words of a character and of one drawing of it: some for the whole, and a column for each stroke.
_WHOLE_WORDS = 8
_STROKE_WORDS = 16
_WORDS = _WHOLE_WORDS + _STROKE_WORDS * MAX_STROKES
_CLASSES_AT_ONCE = 16

# Chosen so that the drawings measure like Omniglot's: ink, extent, and how well the nearest neighbour in
# pixels does.
_FEWER_STROKES = (0.12, 0.40, 0.70)  # chance of at most 1, 2 and 3 strokes
_PEN = 0.056  # diameter, as a share of the image's height
_MARGIN = 0.02

Array = NDArray[np.float64]
Words = NDArray[np.uint64]


class _Strokes(NamedTuple):
    """Pen strokes, each array ``[..., MAX_STROKES]``. Angles in radians, counted clockwise from "right"."""

    heading: Array  # where the stroke sets out to
    length: Array  # in units of the character's box, before it is scaled to its place on the page
    first_turn: Array  # spread evenly over the first third of the stroke
    second_turn: Array
    third_turn: Array
    first_corner: Array  # turned on the spot, after the first third
    second_corner: Array  # ... and after the second
    start_x: Array  # for a stroke that stands alone; otherwise a shift from the stroke it starts from
    start_y: Array
    joint: Array  # how far along the stroke before it this one starts, 0 to 1; negative if it stands alone


def strokes(
    classes: Mapping[Split, int] | None = None,
    *,
    drawers: int = 20,
    size: int = 28,
    seed: int = 0,
    fit: Fit = "stretch",
    progress: bool = False,
) -> ImageDataset:
    """Made-up handwritten characters, each drawn by several drawers.

    Character ``c`` of a split is a pure function of ``(seed, split, c)``, and its drawing by drawer ``d``
    of that and ``d``: asking for more classes or drawers leaves earlier drawings as they were. Splits share
    no character.

    Args:
        classes: how many characters each split gets; default 1000 train, 100 val and 400 test.
        drawers: drawings of each character.
        size: height and width in pixels.
        seed: which endless alphabet.
        fit: ``"ink"``: as :func:`innerloop.data.images.centred_ink` has it; otherwise as they were drawn.
        progress: show a progress bar with the time left.

    Returns:
        uint8 images ``[classes * drawers, 1, size, size]`` for each split; paper is 0, ink up to 255.

    Raises:
        ValueError: for an unknown split or a number out of range.
    """
    wanted = DEFAULT_CLASSES if classes is None else classes
    if not wanted or not set(wanted) <= set(SPLITS):
        raise ValueError(f"classes must map some of {list(SPLITS)} to a number of characters; got {classes!r}")
    for split, count in wanted.items():
        check_whole(f"classes[{split!r}]", count, at_least=1)
    check_whole("drawers", drawers, at_least=1)
    check_whole("size", size, at_least=8, below=1025)
    check_whole("seed", seed, at_least=0)
    dataset: dict[Split, ClassImages] = {}
    with progress_bar(show=progress) as bar:
        job = bar.add_task("Drawing characters", total=sum(wanted.values()))
        for split, count in wanted.items():
            images = np.empty((count, drawers, 1, size, size), dtype=np.uint8)
            for first in range(0, count, _CLASSES_AT_ONCE):
                numbers = range(first, min(first + _CLASSES_AT_ONCE, count))
                points, pens = _draw(numbers, split, drawers, seed)
                drawn = _render(points, pens, size) if fit != "ink" else _render_centred(points, pens, size)
                images[first : numbers.stop] = drawn.reshape(len(numbers), drawers, 1, size, size)
                bar.advance(job, len(numbers))
            dataset[split] = ClassImages(
                images=torch.from_numpy(images).flatten(0, 1),
                sizes=(drawers,) * count,
                names=tuple(f"{split}/character{c:05d}" for c in range(count)),
            )
    return dataset


def _draw(numbers: range, split: Split, drawers: int, seed: int) -> tuple[Array, Array]:
    """The numbered characters by every drawer.

    Returns points ``[n * drawers, MAX_STROKES, PATH_POINTS, 2]`` (x and y down, in [0, 1]; NaN for strokes
    that a character does not have) and pen diameters ``[n * drawers]`` in the same unit.
    """
    words = np.stack([raw_words(seed, f"strokes/{split}", c, _WORDS * (1 + drawers)) for c in numbers])
    words = words.reshape(len(numbers), 1 + drawers, _WORDS)
    own, of_drawing = words[:, :1], words[:, 1:]

    n_strokes = 1 + np.searchsorted(_FEWER_STROKES, uniform(own[..., 0]))
    exists = np.arange(MAX_STROKES) < n_strokes[..., None]
    character = _imagine(_of_strokes(own))
    shape = np.where(exists[..., None, None], _trace(character), np.nan)
    low, high = _bounds(shape)
    on_page = 0.45 + 0.33 * uniform(own[..., 1])  # the longer side of the character's box on the page
    scale = on_page / np.maximum((high - low).max(axis=-1), 0.3)

    points = _trace(_vary(character, _of_strokes(of_drawing)))
    points = (points - ((low + high) / 2)[..., None, None, :]) * scale[..., None, None, None]
    points = np.where(exists[..., None, None], points, np.nan)
    points = _place(points, of_drawing, own)
    pens = _PEN * (1 + 0.12 * _normal(of_drawing[..., 7]))
    return points.reshape(-1, MAX_STROKES, PATH_POINTS, 2), pens.ravel()


def _of_strokes(words: Words) -> Words:
    """The words for single strokes, ``[_STROKE_WORDS, ..., MAX_STROKES]``."""
    columns = words[..., _WHOLE_WORDS:].reshape(*words.shape[:-1], MAX_STROKES, _STROKE_WORDS)
    return np.moveaxis(columns, -1, 0)


def _imagine(words: Words) -> _Strokes:
    """A new character's strokes."""
    u = uniform(words)
    bump = _normal(words)
    line, arc, hook, wave, loop = (u[3] < chance for chance in (0.45, 0.66, 0.76, 0.84, 0.95))  # else a dot
    kinds = [line, arc, hook, wave, loop]
    side = np.where(u[0] < 0.5, -1.0, 1.0)
    straight, bend, round_trip = 0.08 * bump[1], side * (0.4 + 0.8 * u[2]), side * np.pi * (0.62 + 0.1 * u[2])
    has_corner, has_second = hook & (u[8] < 0.45), hook & (u[8] < 0.3)  # lines, arcs and hooks only
    # Mostly to the right or down, as in handwriting; sometimes along a diagonal.
    diagonal = np.floor(u[4] * 4) * np.pi / 4 - np.pi / 8
    heading = np.select([u[5] < 0.35, u[5] < 0.75], [0.0, np.pi / 2], diagonal)
    length = np.select(kinds, [0.4 + 0.7 * u[7]] * 3 + [0.8 + 0.5 * u[7], 0.6 + 0.9 * u[7]], 0.05)
    return _Strokes(
        heading=heading + 0.13 * bump[6],
        length=length * np.where(has_corner, 1.5, 1.0),
        first_turn=np.select(kinds, [straight, bend, straight, 2 * bend, round_trip], 0.0),
        second_turn=np.select(kinds, [straight, bend, straight, np.zeros_like(bend), round_trip], 0.0),
        third_turn=np.select(kinds, [straight, bend, 3 * bend, -2 * bend, round_trip], 0.0),
        first_corner=np.where(has_corner, _corner(u[9], bump[10]), 0.0),
        second_corner=np.where(has_second, _corner(u[11], bump[12]), 0.0),
        start_x=u[13] * 0.8,
        start_y=u[14] * 0.8,
        joint=np.where(u[15] < 0.3, -1.0, np.floor((u[15] - 0.3) / 0.7 * 5) / 4),
    )


def _corner(choice: Array, bump: Array) -> Array:
    """Right angles and sharp turns, to either side."""
    return np.select([choice < 0.35, choice < 0.7, choice < 0.85], [1.55, -1.55, 2.4], -2.4) + 0.12 * bump


def _vary(character: _Strokes, words: Words) -> _Strokes:
    """The same strokes as a drawer remembers them."""
    bump = _normal(words)
    return _Strokes(
        heading=character.heading + 0.11 * bump[0],
        length=character.length * np.exp(0.13 * bump[1]),
        first_turn=character.first_turn * (1 + 0.15 * bump[2]) + 0.06 * bump[3],
        second_turn=character.second_turn * (1 + 0.15 * bump[4]) + 0.06 * bump[5],
        third_turn=character.third_turn * (1 + 0.15 * bump[6]) + 0.06 * bump[7],
        first_corner=character.first_corner * (1 + 0.08 * bump[8]),
        second_corner=character.second_corner * (1 + 0.08 * bump[9]),
        start_x=character.start_x + 0.04 * bump[10],
        start_y=character.start_y + 0.04 * bump[11],
        joint=np.where(character.joint < 0, -1.0, np.clip(character.joint + 0.05 * bump[12], 0, 1)),
    )


def _trace(pen: _Strokes) -> Array:
    """The strokes' paths, ``[..., MAX_STROKES, PATH_POINTS, 2]``."""
    along = (np.arange(PATH_POINTS) + 0.5) / PATH_POINTS
    thirds = [np.clip(3 * along - third, 0, 1) for third in range(3)]
    heading = (
        pen.heading[..., None]
        + pen.first_turn[..., None] * thirds[0]
        + pen.second_turn[..., None] * thirds[1]
        + pen.third_turn[..., None] * thirds[2]
        + pen.first_corner[..., None] * (along > 1 / 3)
        + pen.second_corner[..., None] * (along > 2 / 3)
    )
    directions = np.stack([np.cos(heading), np.sin(heading)], axis=-1)
    paths = np.cumsum(directions * (pen.length / PATH_POINTS)[..., None, None], axis=-2)
    for s in range(MAX_STROKES):
        start = np.stack([pen.start_x[..., s], pen.start_y[..., s]], axis=-1)
        if s:
            at = np.rint(np.maximum(pen.joint[..., s], 0) * (PATH_POINTS - 1)).astype(np.int64)
            joined = np.take_along_axis(paths[..., s - 1, :, :], at[..., None, None], axis=-2)[..., 0, :]
            start = np.where(pen.joint[..., s, None] < 0, start, joined + 0.15 * (start - 0.4))
        paths[..., s, :, :] += start[..., None, :]
    return paths


def _place(points: Array, words: Words, own: Words) -> Array:
    """Turn, shear, scale and shift each drawing ``[n, drawers, ...]``, and keep it on the page."""
    bump = _normal(words)
    angle, shear = 0.10 * bump[..., 0], 0.13 * bump[..., 1]
    size = np.exp(0.12 * bump[..., 2])
    squeeze = np.exp(0.08 * bump[..., 3])
    cos, sin = np.cos(angle), np.sin(angle)
    wide, tall = size * squeeze, size / squeeze
    matrix = np.stack(
        [
            np.stack([wide * cos, wide * (shear * cos - sin)], axis=-1),
            np.stack([tall * sin, tall * (shear * sin + cos)], axis=-1),
        ],
        axis=-2,
    )
    points = np.einsum("ndij,ndspj->ndspi", matrix, points)
    centre = 0.5 + 0.03 * _normal(own[..., 2:4]) + 0.05 * bump[..., 4:6]
    low, high = _bounds(points)
    room = 1 - 2 * (_MARGIN + _PEN)
    shrink = np.minimum(1, room / np.maximum((high - low).max(axis=-1), 1e-9))[..., None]
    half = (high - low) / 2 * shrink
    centre = np.clip(centre, 0.5 - room / 2 + half, 0.5 + room / 2 - half)
    middle = (low + high) / 2
    placed: Array = (points - middle[..., None, None, :]) * shrink[..., None, None]
    placed += centre[..., None, None, :]
    return placed


def _render(points: Array, pens: Array, size: int) -> NDArray[np.uint8]:
    """Pen paths as uint8 ``[n, size, size]``: draw with a round pen on a fine 1-bit canvas, then average."""
    n = len(points)
    side = size * SUPERSAMPLING
    gaps = np.diff(points, axis=2)
    weights = np.arange(_steps(size))[:, None] / _steps(size)
    on_line = (points[:, :, :-1, None] + gaps[:, :, :, None] * weights).reshape(n, -1, 2)
    drawing, place = np.nonzero(~np.isnan(on_line[..., 0]))
    column, row = np.floor(on_line[drawing, place] * side).astype(np.int64).T
    line = np.zeros((n, side, side), dtype=bool)
    line[drawing, row, column] = True

    # The pen's tip covers the same offsets all along a drawing; with the thickest pens first, the places
    # where it covers a given offset are a slice. The page's margin is wider than the tip, so none falls off
    # the canvas.
    radii = pens * side / 2
    thickest_first = np.argsort(-radii, kind="stable")
    rank, inside = np.nonzero(line.reshape(n, -1)[thickest_first])
    centres = thickest_first[rank] * side**2 + inside
    thinness = -radii[thickest_first][rank]
    canvas = np.zeros(n * side**2, dtype=bool)
    reach = int(radii.max())
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            covering = np.searchsorted(thinness, -np.hypot(dx, dy), side="right")
            canvas[centres[:covering] + (dy * side + dx)] = True
    # Summed over rows first, which are contiguous: far quicker than both axes at once.
    rows = canvas.reshape(n, size, SUPERSAMPLING, side).sum(axis=2, dtype=np.uint8)
    ink = rows.reshape(n, size, size, SUPERSAMPLING).sum(axis=3, dtype=np.int64)
    grey: NDArray[np.uint8] = (ink * 255 // SUPERSAMPLING**2).astype(np.uint8)
    return grey


def _render_centred(points: Array, pens: Array, size: int) -> NDArray[np.uint8]:
    """The same, cut to the ink. Drawn at twice the size, since what is small on the page is made larger."""
    pages = (Image.fromarray(page) for page in _render(points, pens, 2 * size))
    return np.stack([prepare_image(page, size=size, channels=1, fit="ink", invert=False)[0] for page in pages])


def _steps(size: int) -> int:
    """Stamps of the pen from one point of a path to the next: about a pen's radius apart at most.

    The same for all drawings, or a drawing would depend on those that happen to be rendered with it.
    """
    return -(-size // 4)


def _bounds(points: Array) -> tuple[Array, Array]:
    """Corners ``[..., 2]`` of the boxes around drawings ``[..., strokes, points, 2]``, not counting NaN."""
    return np.nanmin(points, axis=(-3, -2)), np.nanmax(points, axis=(-3, -2))


def _normal(words: Words) -> Array:
    """A nearly normal number (mean 0, deviation 1) from each word: four 16-bit parts, summed and scaled."""
    parts = [(words >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
    total = np.sum(parts, axis=0).astype(np.float64) / 65536
    return np.asarray((total - 2) * np.sqrt(3.0))
