"""The block of few-shot convolutional networks, convolution included."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from innerloop import closed_forms
from innerloop.closed_forms import kernels, triton_block
from innerloop.nn.norm_act_pool import NormActPool
from innerloop.precision import rounds_convolutions


class ConvNormActPool(nn.Sequential):
    """A 3x3 convolution and a ``NormActPool``: ``[n, c, h, w] -> [n, C, h', w']``.

    Of images of up to four channels, in float32 or float64 on a CPU, the two are one operation
    (``innerloop.closed_forms``) that keeps nothing of the convolution's size. On a GPU the two are one operation of
    Triton's kernels, for any number of channels, with every derivative, for all vmapped tasks at once. Everywhere else
    they are done one after the other.

    Args:
        channels: c.
        filters: C.
        stride: of the convolution.
        negative_slope: of the leaky ReLU, at least 0.
        pool: window and stride of the max-pooling; ``None`` for none.
    """

    def __init__(
        self, channels: int, filters: int, stride: int = 1, negative_slope: float = 0.01, pool: int | None = 2
    ) -> None:
        super().__init__(
            nn.Conv2d(channels, filters, 3, padding=1, stride=stride), NormActPool(filters, negative_slope, pool)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for ``[n, c, h, w]``.

        Raises:
            ValueError: as ``NormActPool``.
        """
        conv, norm = cast(tuple[nn.Conv2d, NormActPool], tuple(self))
        if _by_tasks(x, conv, norm):
            return _of_tasks(x, conv, norm)
        if norm.pool is None or not _as_one(x, conv, norm):
            y: Tensor = norm(conv(x))
            return y
        fused = closed_forms.ConvNormActPool(norm.eps, norm.negative_slope, norm.pool)
        assert conv.bias is not None
        return norm.normalised(fused, x, conv.weight, conv.bias, values=x.numel() // x.shape[1])


def _of_tasks(x: Tensor, conv: nn.Conv2d, norm: NormActPool) -> Tensor:
    """The block by Triton's kernels, which move the running statistics too."""
    values = x.numel() // x.shape[1]
    if values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    *running, momentum = norm.running_statistics()
    dot = triton_block.products(x.dtype)
    op = closed_forms.TaskBlock(norm.eps, norm.negative_slope, norm.pool or 1, dot, momentum)
    y, _, *moved = op.apply(x, conv.weight, conv.bias, norm.weight, norm.bias, *running)[:4]
    if running[0] is not None:
        if torch._C._are_functorch_transforms_active():  # where buffers are copies, that others may take the place of
            norm.running_mean, norm.running_var = moved
        else:
            for buffer, value in zip(running, moved, strict=True):
                cast(Tensor, buffer).copy_(value)
    return y


def _fit(x: Tensor, conv: nn.Conv2d, norm: NormActPool) -> bool:
    """Whether this is the block that there are kernels for."""
    return (
        x.ndim == 4
        and x.shape[1] == conv.in_channels
        and norm.uses_batch
        and not closed_forms.autocast([x])
        and (norm.pool or 1) <= min(*x.shape[2:], kernels.LARGEST_POOL)
        and conv.stride == (1, 1)
        and not (conv._forward_hooks or norm._forward_hooks)
        and not torch.compiler.is_compiling()
    )


def _by_tasks(x: Tensor, conv: nn.Conv2d, norm: NormActPool) -> bool:
    """Whether Triton's kernels serve, which know every derivative and any number of tasks."""
    of_filters = (conv.bias, norm.weight, norm.bias)
    return (
        conv.bias is not None
        and norm.momentum is not None
        and triton_block.usable(x, conv.weight, *(t for t in of_filters if t is not None))
        and not rounds_convolutions()
        and _fit(x, conv, norm)
        and len(x) * x.shape[2] * x.shape[3] * max(x.shape[1], conv.out_channels) <= triton_block.MOST_VALUES
    )


def _as_one(x: Tensor, conv: nn.Conv2d, norm: NormActPool) -> bool:
    """Whether there is one operation for these, and it has all the derivatives that may be asked for."""
    return (
        norm.pool is not None
        and conv.in_channels <= closed_forms.MOST_CHANNELS
        and _fit(x, conv, norm)
        and not x.requires_grad
        and kernels.usable(x, conv.weight, conv.bias, norm.weight, norm.bias, of_rows=False)
        and forward_ad.unpack_dual(x).tangent is None  # type: ignore[no-untyped-call]
    )
