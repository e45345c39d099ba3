"""A 3x3 convolution of images of few channels, and the block that follows it, as one operation.

The result of such a convolution is many times as large as the image and takes less time to compute than to read: nine
products a value for a grey image. So it is never kept. Each derivative computes it again, an image at a time, and only
what has been pooled is written. With z = conv(x, w) + b and y = NormActPool(z), by the chain rule::

    gradient    dw = wgrad(dz, x)     db = sum(dz)        dz NormActPool's gradient
    tangent     that of NormActPool along z. = conv(x, w.) + b.
    curvature   dw. = wgrad(dz., x)   db. = sum(dz.)      dz. NormActPool's curvature along z.

There is no derivative by the images: where one is wanted the two operations are done one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from innerloop.closed_forms import kernels
from innerloop.closed_forms.convolution import Convolution
from innerloop.closed_forms.norm_act_pool import NormActPool, pooled_map
from innerloop.closed_forms.operation import Direction, Operation

_CONVOLUTION = Convolution((1, 1), (1, 1), (1, 1), 1)

MOST_CHANNELS = 4
"""Of the images; with more, computing the convolution again takes longer than reading it."""


class _Point(NamedTuple):
    x: Tensor
    w: Tensor
    b: Tensor
    gamma: Tensor
    beta: Tensor
    y: Tensor
    mean: Tensor
    variance: Tensor
    r: Tensor
    pooled: Tensor
    place: Tensor


@dataclass(frozen=True)
class ConvNormActPool(Operation):
    """``(x, w, b, gamma, beta) -> y`` by the compiled kernels; x ``[n, c, h, w]``, c at most 4, w ``[C, c, 3, 3]``.

    Attributes:
        eps: added to the variance.
        negative_slope: of the leaky ReLU, at least 0.
        pool: window and stride of the max-pooling.
    """

    eps: float
    negative_slope: float
    pool: int

    channels: ClassVar[tuple[int, ...]] = (1, 0, 0, 0, 0)

    def value(self, x: Tensor, w: Tensor, b: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        """y, then mean, variance and r of each channel, the pooled z and its places."""
        n, _, height, width = x.shape
        shape = (n, len(w), height, width)
        mean, variance, r = (torch.empty_like(gamma) for _ in range(3))
        y, pooled = (pooled_map(shape, self.pool, x.dtype) for _ in range(2))
        place = pooled_map(shape, self.pool, torch.uint8)
        made = {"y": y, "mean": mean, "variance": variance, "r": r, "pooled": pooled, "place": place}
        self._call("value", x, w, b, gamma=gamma.contiguous(), beta=beta.contiguous(), **made)
        return tuple(made.values())

    def gradient(self, point: Sequence[Tensor], dy: Tensor, wanted: Sequence[bool]) -> Direction:
        """J^T dy, but for x."""
        p = _Point(*point)
        if not kernels.usable(dy, of_rows=False):
            dz, dgamma, dbeta = self._block.gradient(_block_point(p, _z(p)), dy, [True] * 3)
            return (None, *_CONVOLUTION.gradient((p.x, p.w), dz, [False, True, True])[1:], dgamma, dbeta)  # type: ignore[arg-type]
        dgamma, dbeta, db = (torch.empty_like(p.r) for _ in range(3))
        dw = torch.empty(9 * p.w.shape[1], len(p.w), dtype=dy.dtype)
        self._call_at(p, "gradient", dy=kernels.rows(dy), dgamma=dgamma, dbeta=dbeta, dweight=dw, dbias=db)
        return None, _from_rows(dw, p.w), db, dgamma, dbeta

    def second_order(
        self, point: Sequence[Tensor], dy: Tensor | None, direction: Direction, wanted: Sequence[bool]
    ) -> Direction:
        """Tangent and curvature, but for x."""
        p = _Point(*point)
        _, w_t, b_t, gamma_t, beta_t = direction
        if not all(kernels.usable(t, of_rows=False) for t in (dy, *direction) if t is not None):
            z, tangent_alone = _z(p), [True, False, False, False]
            z_t, *_ = _CONVOLUTION.second_order((p.x, p.w, p.b, z), None, (None, w_t, b_t), tangent_alone)
            of_block = (z_t, gamma_t, beta_t)
            y_t, dz_t, *changes = self._block.second_order(_block_point(p, z), dy, of_block, [True] * 4)
            if dz_t is None:
                return (y_t, *[None] * 5)
            return (y_t, None, *_CONVOLUTION.gradient((p.x, p.w), dz_t, [False, True, True])[1:], *changes)
        y_t = torch.empty_like(p.y) if wanted[0] else None
        dgamma_t, dbeta_t, db_t = (torch.zeros_like(p.r) for _ in range(3))
        dw_t = torch.empty(9 * p.w.shape[1], len(p.w), dtype=p.y.dtype)
        self._call_at(
            p,
            "second_order",
            dy=None if dy is None else kernels.rows(dy),
            weight_t=None if w_t is None else _as_rows(w_t),
            bias_t=None if b_t is None else b_t.contiguous(),
            gamma_t=None if gamma_t is None else gamma_t.contiguous(),
            beta_t=None if beta_t is None else beta_t.contiguous(),
            u_star=torch.empty_like(p.y),
            y_t=y_t,
            dgamma_t=dgamma_t,
            dweight=None if dy is None else dw_t,
            dbias=db_t,
        )
        return y_t, None, _from_rows(dw_t, p.w), db_t, dgamma_t, dbeta_t

    @property
    def _block(self) -> NormActPool:
        return NormActPool(self.eps, self.negative_slope, self.pool)

    def repeated(self, times: int) -> None:
        """The kernels know one weight."""
        return

    def _call_at(self, p: _Point, name: str, **tensors: Tensor | None) -> None:
        tensors |= {"y": p.y, "mean": p.mean, "r": p.r, "pooled": p.pooled, "place": p.place}
        self._call(name, p.x, p.w, p.b, gamma=p.gamma.contiguous(), **tensors)

    def _call(self, name: str, x: Tensor, w: Tensor, b: Tensor, **tensors: Tensor | None) -> None:
        n, inputs, height, width = x.shape
        sizes = (n, height, width, len(w), self.pool)
        bordered = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
        tensors |= {"image": bordered, "weight": _as_rows(w), "bias": b.contiguous()}
        kernels.call(name, sizes, self.eps, self.negative_slope, x.dtype, inputs, **tensors)


def _z(p: _Point) -> Tensor:
    """The convolution in PyTorch's own operations, for directions that have no memory to be read."""
    return _CONVOLUTION.value(p.x, p.w, p.b)[0]


def _block_point(p: _Point, z: Tensor) -> tuple[Tensor, ...]:
    """The point of the second part."""
    return (z, *p[3:])


def _as_rows(w: Tensor) -> Tensor:
    """``[C, c, 3, 3]`` as ``[9 c, C]``, in the order of a patch of the image."""
    return w.permute(2, 3, 1, 0).reshape(-1, len(w)).contiguous()


def _from_rows(rows: Tensor, w: Tensor) -> Tensor:
    """The inverse, laid out in memory as w is."""
    channels, inputs = w.shape[:2]
    return torch.empty_like(w).copy_(rows.view(3, 3, inputs, channels).permute(3, 2, 0, 1))
