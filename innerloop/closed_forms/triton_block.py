"""The whole block - 3x3 convolution, batch norm, leaky ReLU, max-pooling - by Triton's kernels, for many tasks at once.

The tasks are a dimension of their own, the first, and each may have its own weights. The formulas are those of
``convolution.py`` and ``norm_act_pool.py``; with z = conv(x, w) + b and y = NormActPool(z)::

    value       z with its statistics (1 launch); y, the pooled z and its places (1)
    gradient    sums over dy (1); dz, dgamma, dbeta (1); dw = wgrad(dz, x) (1 or 2); dx = dgrad(dz, w) (1)
    tangent     z. = conv(x., w) + conv(x, w.) with its sums (1); y. (1)
    curvature   sums, with y. (none more); dz, dz., dgamma. (1); dw. = wgrad(dz., x) + wgrad(dz, x.) (1 or 2);
                dx. = dgrad(dz., w) + dgrad(dz, w.) (1)

What follows does not depend on b, which only moves a mean that is taken away: its derivatives are exactly zero.

Each of the three is an operator of PyTorch's, which traces see as one operation with known results.
``TRITON_INTERPRET=1`` runs the kernels on a CPU, slowly, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop.closed_forms.operation import Direction, Operation

MOST_VALUES = 2**31 - 1
"""Of one task's activations: places within a task are counted in 32 bits."""


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels are to work on these: float32 or float64, with Triton there.

    On a GPU ``INNERLOOP_KERNELS=triton`` asks for them, as long as they have not been measured on one; on a CPU they
    are interpreted (``TRITON_INTERPRET=1``), for tests.
    """
    x, asked = tensors[0], os.environ.get("INNERLOOP_KERNELS")
    return (
        on_gpu(x)
        and (asked == "triton" if x.device.type == "cuda" else asked != "0")
        and x.dtype in (torch.float32, torch.float64)
        and all(t.dtype == x.dtype and t.device == x.device for t in tensors)
        and find_spec("triton") is not None
    )


def on_gpu(x: Tensor) -> bool:
    """Whether it is on a GPU, or on a CPU in a GPU's place."""
    return x.device.type == "cuda" or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def products(dtype: torch.dtype) -> str:
    """How matrix products round: as PyTorch is told to, float32's own precision as a sum of three of tf32's."""
    if dtype == torch.float64:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


class Point(NamedTuple):
    """The block's inputs and what ``TaskBlock.value`` made of them."""

    x: Tensor
    w: Tensor
    b: Tensor
    gamma: Tensor
    beta: Tensor
    y: Tensor
    mean: Tensor
    moved_mean: Tensor
    moved_variance: Tensor
    r: Tensor
    z: Tensor
    pooled: Tensor
    place: Tensor

    def dense(self, laid_out: Callable[[Tensor], Tensor]) -> Point:
        """The same, with what ``value`` made ``laid_out``."""
        return Point(*self[:5], *map(laid_out, self[5:]))


@dataclass(frozen=True)
class TaskBlock(Operation):
    """``(x, w, b, gamma, beta, running mean, running variance) -> y``; x ``[n, c, h, w]``, w ``[C, c, 3, 3]``.

    The convolution is padded by 1. Running statistics are constants and may be missing; where they moved to is kept.

    Attributes:
        eps: added to the variance.
        negative_slope: of the leaky ReLU, at least 0.
        pool: window and stride of the max-pooling; 1 for none.
        dot: precision of the matrix products, see ``products``.
        momentum: how far running statistics move.
        of_tasks: whether every tensor has a first dimension of tasks.
    """

    eps: float
    negative_slope: float
    pool: int
    dot: str
    momentum: float = 0.1
    of_tasks: bool = False

    channels: ClassVar[tuple[int, ...]] = (1, 0, 0, 0, 0, 0, 0)
    curved: ClassVar[tuple[bool, ...]] = (True, True, False, True, False, False, False)

    def apply(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """The output with what was kept."""
        return super().apply(*inputs, *[None] * (len(self.channels) - len(inputs)))

    def value(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """y, then of each channel the mean, the moved statistics (without running ones, the batch's own) and r.

        Last z, and the pooled z and its places (empty without pooling).
        """
        settings = (self.eps, self.negative_slope, self.pool, self.dot, self.momentum)
        return tuple(self._without(_value(*self._with_tasks(inputs), *settings)))

    def gradient(self, point: Sequence[Tensor], dy: Tensor, wanted: Sequence[bool]) -> Direction:
        """J^T dy."""
        p, (dy,) = self._point(point), self._with_tasks([dy])
        by_x, by_w, *_ = wanted
        found = iter(self._without(_gradient(p, dy, by_x, by_w, self.negative_slope, self.pool, self.dot)))
        dgamma, dbeta, db = (next(found) for _ in range(3))
        dx = next(found) if by_x else None
        dw = next(found) if by_w else None
        return dx, dw, db, dgamma, dbeta, None, None

    def second_order(
        self, point: Sequence[Tensor], dy: Tensor | None, direction: Direction, wanted: Sequence[bool]
    ) -> Direction:
        """Tangent and curvature."""
        p = self._point(point)
        x_t, w_t, _, gamma_t, beta_t, *_ = self._with_tasks(direction)
        (dy,) = self._with_tasks([dy])
        _, by_x, by_w, *_ = wanted
        settings = (self.negative_slope, self.pool, self.dot)
        found = iter(self._without(_second_order(p, dy, x_t, w_t, gamma_t, beta_t, by_x, by_w, *settings)))
        y_t = next(found)
        dgamma_t = next(found) if dy is not None else None
        dx_t = next(found) if dy is not None and by_x else None
        dw_t = next(found) if dy is not None and by_w else None
        db_t, dbeta_t = (torch.zeros_like(point[i]) if wanted[1 + i] else None for i in (2, 4))
        return y_t, dx_t, dw_t, db_t, dgamma_t, dbeta_t, None, None

    def repeated(self, times: int) -> None:
        """Tasks are no channels here."""
        return

    def over_tasks(self) -> TaskBlock | None:
        """The same, of tasks; tasks of tasks there are not."""
        return None if self.of_tasks else replace(self, of_tasks=True)

    def _point(self, point: Sequence[Tensor]) -> list[Any]:
        """Without the running statistics."""
        return self._with_tasks([*point[:5], *point[7:]])

    def _with_tasks(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        return list(tensors) if self.of_tasks else [None if t is None else t.unsqueeze(0) for t in tensors]

    def _without(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors) if self.of_tasks else [t.squeeze(0) for t in tensors]


# Operators: the tensors of many tasks, [T, ...].


@torch.library.custom_op(
    "innerloop::block_value",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor b, Tensor gamma, Tensor beta, Tensor? running_mean,"
    " Tensor? running_variance, float eps, float slope, int pool, str dot, float momentum) -> Tensor[]",
)
def _value(*given: Any) -> list[Tensor]:
    from innerloop.closed_forms import triton_launches

    return triton_launches.value(*given)


@_value.register_fake
def _(x: Tensor, w: Tensor, *rest: Any) -> list[Tensor]:
    *_, pool, _, _ = rest
    full, small = shapes(x, w, pool)
    of_channels = [x.new_empty(full[0], full[2]) for _ in range(4)]
    kept = small if pool > 1 else (0,) * 5
    return [rows(x, small), *of_channels, rows(x, full), rows(x, kept), rows(x, kept, torch.uint8)]


@torch.library.custom_op(
    "innerloop::block_gradient",
    mutates_args=(),
    schema="(Tensor[] point, Tensor dy, bool by_x, bool by_w, float slope, int pool, str dot) -> Tensor[]",
)
def _gradient(
    point: list[Tensor], dy: Tensor, by_x: bool, by_w: bool, slope: float, pool: int, dot: str
) -> list[Tensor]:
    from innerloop.closed_forms import triton_launches

    return triton_launches.gradient(Point(*point), dy, by_x, by_w, slope, pool, dot)


@_gradient.register_fake
def _(point: list[Tensor], dy: Tensor, by_x: bool, by_w: bool, slope: float, pool: int, dot: str) -> list[Tensor]:
    p = Point(*point)
    found = [torch.empty_like(p.r) for _ in range(3)]
    return [*found, *([rows(p.x, p.x.shape)] if by_x else []), *([rows(p.w, p.w.shape)] if by_w else [])]


@torch.library.custom_op(
    "innerloop::block_second_order",
    mutates_args=(),
    schema="(Tensor[] point, Tensor? dy, Tensor? x_t, Tensor? w_t, Tensor? gamma_t, Tensor? beta_t, bool by_x,"
    " bool by_w, float slope, int pool, str dot) -> Tensor[]",
)
def _second_order(
    point: list[Tensor],
    dy: Tensor | None,
    x_t: Tensor | None,
    w_t: Tensor | None,
    gamma_t: Tensor | None,
    beta_t: Tensor | None,
    by_x: bool,
    by_w: bool,
    slope: float,
    pool: int,
    dot: str,
) -> list[Tensor]:
    from innerloop.closed_forms import triton_launches

    direction = (x_t, w_t, gamma_t, beta_t)
    return triton_launches.second_order(Point(*point), dy, direction, by_x, by_w, slope, pool, dot)


@_second_order.register_fake
def _(point: list[Tensor], dy: Tensor | None, *rest: Any) -> list[Tensor]:
    p = Point(*point)
    by_x, by_w = rest[4:6]
    found = [rows(p.y, p.y.shape)]
    if dy is None:
        return found
    changes = [rows(p.x, p.x.shape)] if by_x else [], [rows(p.w, p.w.shape)] if by_w else []
    return [*found, torch.empty_like(p.r), *changes[0], *changes[1]]


def shapes(x: Tensor, w: Tensor, pool: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of z and of y."""
    tasks, images, _, height, width = x.shape
    full = (tasks, images, w.shape[1], height, width)
    return full, (*full[:3], height // pool, width // pool)


def rows(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Room for ``[T, n, C, h, w]``, channels last in memory."""
    tasks, images, channels, height, width = shape
    room = like.new_empty((tasks, images, height, width, channels), dtype=dtype or like.dtype)
    return room.permute(0, 1, 4, 2, 3)
