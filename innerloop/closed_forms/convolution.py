"""Convolution to second order in closed form.

With * for convolution, y = x * w + b is linear in x and in w, so its second-order terms are convolutions of one with
the other's tangent. With dgrad and wgrad the two halves of its gradient::

    gradient    dx = dgrad(dy, w)      dw = wgrad(dy, x)      db = sum(dy)
    tangent     y. = x. * w + x * w. + b.
    curvature   dx. = dgrad(dy, w.)    dw. = wgrad(dy, x.)    db. = 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from innerloop.closed_forms.operation import Direction, Operation


@dataclass(frozen=True)
class Convolution(Operation):
    """``(x, w, b) -> y``, b may be ``None``; x ``[n, C, ...]`` with one, two or three more dimensions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    channels: ClassVar[tuple[int, ...]] = (1, 0, 0)

    @property
    def reads_output(self) -> bool:
        """Of y only the shape."""
        return False

    def value(self, x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, ...]:
        """The output y."""
        return (self._convolved(x, w, b),)

    def gradient(self, point: Sequence[Tensor], dy: Tensor, wanted: Sequence[bool]) -> Direction:
        """J^T dy."""
        x, w, *_ = point
        return self._backward(dy, x, w, wanted)

    def second_order(
        self, point: Sequence[Tensor], dy: Tensor | None, direction: Direction, wanted: Sequence[bool]
    ) -> Direction:
        """Tangent and curvature."""
        x, w, b, _ = point
        x_t, w_t, b_t = direction
        w_t = _laid_out_as(w, w_t)
        y_t = dx_t = dw_t = None
        if wanted[0]:
            y_t = self._tangent(point, x_t, w_t, b_t)
        if wanted[1]:
            dx_t = torch.zeros_like(x) if w_t is None else self._backward(dy, x, w_t, [True, False, False])[0]
        if wanted[2]:
            dw_t = torch.zeros_like(w) if x_t is None else self._backward(dy, x_t, w, [False, True, False])[1]
        return y_t, dx_t, dw_t, torch.zeros_like(b) if wanted[3] else None

    def _tangent(self, point: Sequence[Tensor], x_t: Tensor | None, w_t: Tensor | None, b_t: Tensor | None) -> Tensor:
        x, w, _, y = point
        if w_t is not None:
            y_t = self._convolved(x, w_t, b_t)
            return y_t if x_t is None else y_t.add_(self._convolved(x_t, w, None))
        if x_t is not None:
            return self._convolved(x_t, w, b_t)
        return torch.zeros_like(y) if b_t is None else b_t.view(-1, *[1] * (x.ndim - 2)).expand_as(y).clone()

    def repeated(self, times: int) -> Convolution:
        """As many groups more."""
        return replace(self, groups=self.groups * times)

    def _convolved(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        none = (0,) * len(self.stride)
        return torch.convolution(x, w, b, self.stride, self.padding, self.dilation, False, none, self.groups)

    def _backward(self, dy: Tensor | None, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> Direction:
        none = (0,) * len(self.stride)
        gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            dy, x, w, [w.shape[0]], self.stride, self.padding, self.dilation, False, none, self.groups, list(wanted)
        )
        return gradients


def _laid_out_as(w: Tensor, w_t: Tensor | None) -> Tensor | None:
    """The tangent with the weight's strides: of a one-channel image they alone say that work is channels-last."""
    if w_t is None or w_t.stride() == w.stride():
        return w_t
    return torch.empty_like(w).copy_(w_t)
