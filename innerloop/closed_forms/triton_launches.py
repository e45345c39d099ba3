"""The block's operators as launches of ``triton_kernels``: what each kernel is given, in which tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from innerloop.closed_forms import triton_kernels
from innerloop.closed_forms.triton_block import Point, rows, shapes

FEW_CHANNELS = 8
"""Up to so many input channels, taps and channels are one dimension of the matrix product."""
ENOUGH_PROGRAMS = 256
"""To fill a GPU of some 130 processors."""

ROWS = 32
"""In a tile of a pass that multiplies no matrices."""
ROWS_OF_PRODUCT, FEW_ROWS_OF_PRODUCT = 64, 32
"""In a tile of a convolution; the second where there would be too few programs."""
ROWS_OF_SUM, ROWS_OF_SPLIT = 64, 256
"""In a tile of a weight gradient, which sums over rows, and at least in each part where that is split."""

Pair = tuple[Tensor, Tensor]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel. Every launch comes through here, where tests count them."""
    kernel[grid](*arguments, **constants)


def value(
    x: Tensor,
    w: Tensor,
    b: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    eps: float,
    slope: float,
    pool: int,
    dot: str,
    momentum: float,
) -> list[Tensor]:
    """y, mean, moved mean and variance, r, z, pooled z, places."""
    full, small = shapes(x, w, pool)
    y, z = rows(x, small), rows(x, full)
    mean, moved_mean, moved_variance, r = (x.new_empty(full[0], full[2]) for _ in range(4))
    kept = small if pool > 1 else (0,) * 5
    pooled, place = rows(x, kept), rows(x, kept, torch.uint8)
    partials = _convolution(z, (x, w), None, dot, bias=b, sums=1)
    (gamma, gamma_far), (beta, beta_far) = _vector(gamma), _vector(beta)
    (old_mean, mean_far), (old_variance, variance_far) = _vector(running_mean), _vector(running_variance)
    grid, tiles = _tiles(full[0], _rows_of(y), full[2], z.dtype)
    launch(
        triton_kernels.normalise, grid, z, partials, gamma, beta, _any(old_mean, mean), _any(old_variance, r), y,
        mean, moved_mean, moved_variance, r, pooled, place,
        _rows_of(y), _rows_of(z), gamma_far, beta_far, mean_far, variance_far,
        RUNNING=old_mean is not None, momentum=momentum, eps=eps, slope=slope, H=full[3], W=full[4], C=full[2],
        POOL=pool, PARTS=partials.shape[1], **tiles,
    )  # fmt: skip
    return [y, mean, moved_mean, moved_variance, r, z, pooled, place]


def gradient(p: Point, dy: Tensor, by_x: bool, by_w: bool, slope: float, pool: int, dot: str) -> list[Tensor]:
    """dgamma, dbeta, db, and where they are wanted dx and dw."""
    back = _Back(p.dense(_dense), _dense(dy), slope, pool)
    dz = rows(p.z, p.z.shape)
    found = [p.r.new_empty(p.r.shape) for _ in range(3)]
    partials, *_ = back.sums()
    back.spread(partials, dz, found)
    if by_x:
        found.append(rows(p.x, p.x.shape))
        _convolution(found[-1], (dz, p.w), None, dot, back=True)
    if by_w:
        found.append(_weight_gradient(p.w, (dz, p.x), None, dot))
    return found


def second_order(
    p: Point,
    dy: Tensor | None,
    direction: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    by_x: bool,
    by_w: bool,
    slope: float,
    pool: int,
    dot: str,
) -> list[Tensor]:
    """The tangent along (x, w, gamma, beta); with ``dy`` then dgamma., and where they are wanted dx. and dw.."""
    x_t, w_t, gamma_t, beta_t = direction
    back = _Back(p.dense(_dense), None if dy is None else _dense(dy), slope, pool)
    along = None if x_t is None else (x_t, p.w), None if w_t is None else (p.x, w_t)
    tangent = _Tangent(rows(p.z, p.z.shape), p.z.new_empty(0), gamma_t, beta_t)
    tangent = tangent._replace(partials=_convolution(tangent.z, *along, dot, sums=2, at=back.p))
    partials, y_t, moments = back.sums(tangent)
    found = [y_t]
    if dy is None:
        return found
    dz, dz_t = (rows(p.z, p.z.shape) for _ in range(2))
    found.append(p.r.new_empty(p.r.shape))
    back.spread(partials, dz, [found[-1]] * 3, tangent, dz_t, moments)
    if by_x:
        found.append(rows(p.x, p.x.shape))
        _convolution(found[-1], (dz_t, p.w), None if w_t is None else (dz, w_t), dot, back=True)
    if by_w:
        found.append(_weight_gradient(p.w, (dz_t, p.x), None if x_t is None else (dz, x_t), dot))
    return found


def cross_entropy(
    logits: Tensor,
    classes: Tensor,
    dy: Tensor | None,
    along: Tensor | None,
    loss: Tensor | None,
    made: Tensor | None,
    ignored: int,
    order: int,
) -> None:
    """The loss, its gradient, or the second order, into ``loss`` and ``made``."""
    tasks, count, width = logits.shape
    given = (_any(t, logits) for t in (dy, along, loss, made))
    launch(
        triton_kernels.cross_entropy, (tasks,), logits, classes, *given, ignored=ignored, rows=count, C=width,
        ORDER=order, REAL=_REALS[logits.dtype], BM=16, BN=_power(width, 1 << 30),
    )  # fmt: skip


class _Tangent(NamedTuple):
    z: Tensor
    partials: Tensor
    gamma: Tensor | None
    beta: Tensor | None


class _Back(NamedTuple):
    """What derivatives of the block's second part read."""

    p: Point
    dy: Tensor | None
    slope: float
    pool: int

    def sums(self, tangent: _Tangent | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The sums over dy that programs found; along a tangent also y. and its moments E z., m."""
        p, tasks, channels = self.p, self.p.z.shape[0], self.p.z.shape[2]
        grid, tiles = _tiles(tasks, _rows_of(p.y), channels, p.z.dtype)
        partials = p.r.new_empty(tasks, grid[0], 3, channels)
        y_t, moments = (p.r, p.r) if tangent is None else (rows(p.y, p.y.shape), p.r.new_empty(tasks, 2, channels))
        z_t, of_tangent, gamma_t, beta_t = tangent or (p.z, partials, None, None)
        (gamma, gamma_far), (g_t, g_far), (b_t, b_far) = map(_vector, (p.gamma, gamma_t, beta_t))
        star = p.z if self.pool == 1 else p.pooled
        launch(
            triton_kernels.sums, grid, _any(self.dy, p.y), p.y, star, z_t, p.place, gamma, _any(g_t, gamma),
            _any(b_t, gamma), p.mean, p.r, of_tangent, y_t, moments, partials, _rows_of(p.y), _rows_of(p.z),
            gamma_far, g_far, b_far, **self._constants(), TANGENT_PARTS=of_tangent.shape[1], SECOND=tangent is not None,
            DY=self.dy is not None, GAMMA_T=g_t is not None, BETA_T=b_t is not None, **tiles,
        )  # fmt: skip
        return partials, y_t, moments

    def spread(
        self,
        partials: Tensor,
        dz: Tensor,
        of_channels: Sequence[Tensor],
        tangent: _Tangent | None = None,
        dz_t: Tensor | None = None,
        moments: Tensor | None = None,
    ) -> None:
        """The gradient by z, and by gamma, beta and b; along a tangent the first's change too, and dgamma. alone."""
        p = self.p
        grid, tiles = _tiles(p.z.shape[0], _rows_of(p.z), p.z.shape[2], p.z.dtype)
        (gamma, gamma_far), (g_t, g_far) = _vector(p.gamma), _vector(tangent and tangent.gamma)
        launch(
            triton_kernels.spread, grid, self.dy, p.y, p.z, p.z if tangent is None else tangent.z, p.place, gamma,
            _any(g_t, gamma), p.mean, p.r, _any(moments, p.r), partials, dz, _any(dz_t, dz), *of_channels,
            _rows_of(p.y), _rows_of(p.z), gamma_far, g_far, **self._constants(), PARTS=partials.shape[1],
            SECOND=tangent is not None, GAMMA_T=g_t is not None, **tiles,
        )  # fmt: skip

    def _constants(self) -> dict[str, Any]:
        *_, channels, height, width = self.p.z.shape
        return {"slope": self.slope, "H": height, "W": width, "C": channels, "POOL": self.pool}


def _convolution(
    made: Tensor,
    first: Pair | None,
    also: Pair | None,
    dot: str,
    *,
    bias: Tensor | None = None,
    back: bool = False,
    sums: int = 0,
    at: Point | None = None,
) -> Tensor:
    """Write one convolution, or the sum of two, into ``made``; returns the sums that programs found."""
    tasks, _, channels, height, width = made.shape
    x, w = first or also or (made, made)
    inputs, values, real = x.shape[2], _rows_of(made), made.dtype
    packed = inputs <= FEW_CHANNELS and not back
    few = tasks * _parts(values, 64) * _parts(channels, 64) < ENOUGH_PROGRAMS
    tiles = {
        "BM": FEW_ROWS_OF_PRODUCT if few else ROWS_OF_PRODUCT,
        "BN": _power(channels, 32 if few else 64),
        "BK": _power(9 * inputs if packed else inputs, 32),
    }
    grid = (_programs(tasks, values, tiles["BM"]), _parts(channels, tiles["BN"]), tasks)
    partials = made.new_empty((tasks, grid[0], 3, channels) if sums else (0,))
    (x, x_far), (w, w_far) = (_rows(t) for t in first or (made, made))
    (also_x, also_x_far), (also_w, also_w_far) = (_rows(t) for t in also or (made, made))
    offset, offset_far = _vector(bias)
    z, mean, r = (made, made, made) if at is None else (at.z, at.mean, at.r)
    launch(
        triton_kernels.convolve, grid, x, w, also_x, also_w, _any(offset, made), made, partials, z, mean, r, values,
        x_far, w_far, also_x_far, also_w_far, offset_far, H=height, W=width, IN=inputs, OUT=channels, BACK=back,
        FIRST=first is not None, ALSO=also is not None, BIAS=bias is not None, SUMS=sums, REAL=_REALS[real],
        PACKED=packed, DOT=dot, TURNS=_turns(values, tiles["BM"], grid[0]), **tiles,
    )  # fmt: skip
    return partials


def _weight_gradient(w: Tensor, first: Pair, also: Pair | None, dot: str) -> Tensor:
    """``wgrad(*first) + wgrad(*also)`` in the shape of w."""
    (dz, x), (also_dz, also_x) = first, also or first
    tasks, _, outputs, height, width = dz.shape
    inputs, values = x.shape[2], _rows_of(dz)
    packed = inputs <= FEW_CHANNELS
    tiles = {
        "BM": _power(outputs, 32),
        "BN": _power(9 * inputs if packed else inputs, 32 if packed else 64),
        "BK": ROWS_OF_SUM,
    }
    columns = _parts(9 * inputs, tiles["BN"]) if packed else 9 * _parts(inputs, tiles["BN"])
    blocks = _parts(outputs, tiles["BM"]) * columns
    splits = max(1, min(ENOUGH_PROGRAMS // (blocks * tasks), _parts(values, ROWS_OF_SPLIT)))
    size = outputs * 9 * inputs
    made = rows(w, w.shape)
    parts = made if splits == 1 else made.new_empty(tasks, splits, size)
    (x, x_far), (also_x, also_far) = _rows(x), _rows(also_x)
    real = _REALS[dz.dtype]
    launch(
        triton_kernels.weight_gradient, (blocks, splits, tasks), dz, x, also_dz, also_x, parts, values, x_far,
        also_far, H=height, W=width, IN=inputs, OUT=outputs, ALSO=also is not None, REAL=real, PACKED=packed, DOT=dot,
        TURNS=_turns(values, tiles["BK"], splits), **tiles,
    )  # fmt: skip
    if splits > 1:
        grid = (_parts(size, 256), tasks)
        launch(triton_kernels.add_splits, grid, parts, made, size, SPLITS=splits, REAL=real, BLOCK=256)
    return made


_REALS = {torch.float32: tl.float32, torch.float64: tl.float64}


def _tiles(tasks: int, count: int, channels: int, real: torch.dtype) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid and the tiles of a pass over ``count`` rows of channels."""
    programs, width = _programs(tasks, count, ROWS), _power(channels, 32)
    tiles = {"REAL": _REALS[real], "TURNS": _turns(count, ROWS, programs), "BM": ROWS, "BN": width, "BP": 32}
    return (programs, _parts(channels, width), tasks), tiles


def _programs(tasks: int, count: int, tile: int) -> int:
    """How many programs share the rows of a task: each that reads their sums reads all of them."""
    return min(_parts(count, tile), max(64, ENOUGH_PROGRAMS // tasks))


def _turns(count: int, tile: int, programs: int) -> int:
    """Tiles of rows that a program takes."""
    return _parts(_parts(count, tile), programs)


def _parts(count: int, size: int) -> int:
    """How many parts of a size hold so many."""
    return -(-count // size)


def _power(size: int, most: int) -> int:
    """The power of two that holds ``size``, from 16, the least of a matrix product, to ``most``."""
    return max(16, min(most, 1 << (size - 1).bit_length()))


def _rows_of(activations: Tensor) -> int:
    _, images, _, height, width = activations.shape
    return images * height * width


def _any(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for an argument that is not read when there is none."""
    return other if tensor is None else tensor


def _dense(tensor: Tensor) -> Tensor:
    """Memory as the kernels have it: rows of channels, or channels of tasks."""
    if tensor.ndim != 5:
        return tensor.contiguous()
    return tensor.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def _rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The same with each task's part as rows of channels, and how far the tasks are apart."""
    if not tensor[0].permute(0, 2, 3, 1).is_contiguous():
        tensor = _dense(tensor)
    return tensor, tensor.stride(0)


def _vector(tensor: Tensor | None) -> tuple[Any, int]:
    """The same of a value for each channel, or of none."""
    if tensor is None:
        return None, 0
    if not tensor[0].is_contiguous():
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0)


__all__: Sequence[str] = ["gradient", "launch", "second_order", "value"]
