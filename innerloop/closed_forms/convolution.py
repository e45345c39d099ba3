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

    def _laid_out(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """In the layout in which the device convolves groups fastest."""
        *_, w = tensors
        if not suits_channels_last(w, self.groups):
            return tensors
        return tuple(t.contiguous(memory_format=torch.channels_last) for t in tensors)

    def _convolved(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        none = (0,) * len(self.stride)
        x, w = self._laid_out(x, w)
        return torch.convolution(x, w, b, self.stride, self.padding, self.dilation, False, none, self.groups)

    def _backward(self, dy: Tensor | None, x: Tensor, w: Tensor, wanted: Sequence[bool]) -> Direction:
        none = (0,) * len(self.stride)
        if dy is not None:
            dy, x, w = self._laid_out(dy, x, w)
        gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            dy, x, w, [w.shape[0]], self.stride, self.padding, self.dilation, False, none, self.groups, list(wanted)
        )
        return gradients


def suits_channels_last(w: Tensor, groups: int) -> bool:
    """Whether a grouped convolution with these weights, such as ``vmap`` makes of tasks, is faster in channels-last.

    cuDNN's grouped kernels on an H100, microseconds of value, dgrad and wgrad, 8 groups of 20 images::

                            float32 nchw      float32 nhwc      tf32 nchw       tf32 nhwc
        64 -> 64, 14x14     1229  388   64    122  128  379     40   50   62    21   26   45
        64 -> 64,  7x7       335  120   26     44   47   98     18   19   25    10   13   16
        64 -> 64,  3x3        90   39   21    143   41   17     16   17   16     8   19   10
         1 -> 64, 28x28       89   48  118    221  189  134     90   47  119   222  160  134

    With one channel a group it is depthwise to cuDNN, and slower so; in between nothing was measured.
    """
    return w.device.type == "cuda" and groups > 1 and w.ndim == 4 and w.shape[1] > FEW_CHANNELS


FEW_CHANNELS = 4
"""A group's input channels up to which the layout stays as it is: those of images."""


def _laid_out_as(w: Tensor, w_t: Tensor | None) -> Tensor | None:
    """The tangent with the weight's strides: of a one-channel image they alone say that work is channels-last."""
    if w_t is None or w_t.stride() == w.stride():
        return w_t
    return torch.empty_like(w).copy_(w_t)
