"""Derivatives written out to second order, and the mode that has a user's own model use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from innerloop.closed_forms.conv_norm_act_pool import MOST_CHANNELS, ConvNormActPool
from innerloop.closed_forms.convolution import Convolution
from innerloop.closed_forms.norm_act_pool import NormActPool, normalised
from innerloop.closed_forms.operation import Operation
from innerloop.closed_forms.triton_block import TaskBlock

__all__ = [
    "MOST_CHANNELS",
    "ClosedForms",
    "ConvNormActPool",
    "Convolution",
    "NormActPool",
    "Operation",
    "TaskBlock",
    "autocast",
    "normalised",
]


class ClosedForms(TorchFunctionMode):
    """Within it, convolutions and batch norm by batch statistics have their derivatives in closed form.

    For a gradient that is to be differentiated again. Running statistics are moved as ever.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Divert ``F.batch_norm`` and ``F.conv1d``, ``conv2d``, ``conv3d``."""
        diverted = _DIVERTED.get(func)
        result = diverted(*args, **(kwargs or {})) if diverted and not autocast(args) else None
        return func(*args, **(kwargs or {})) if result is None else result


def autocast(tensors: Sequence[Any]) -> bool:
    """Whether ``torch.autocast`` decides in which precision operations on these tensors compute.

    It knows PyTorch's operations and not these, which would mix what it rounds with what it does not.
    """
    return any(isinstance(t, Tensor) and torch.is_autocast_enabled(t.device.type) for t in tensors)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    if not training or weight is None or bias is None or not input.dtype == weight.dtype == bias.dtype:
        return None
    values = input.numel() // input.shape[1]
    return normalised(NormActPool(eps), (input, weight, bias), values, running_mean, running_var, momentum)


def _convolution(dimensions: int) -> Callable[..., Tensor | None]:
    def convolution(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor | None:
        def sizes(given: int | Sequence[int]) -> tuple[int, ...]:
            per_dimension = (given,) if isinstance(given, int) else tuple(given)
            return per_dimension * (dimensions // len(per_dimension))

        if isinstance(padding, str) or input.ndim != dimensions + 2:
            return None
        return Convolution(sizes(stride), sizes(padding), sizes(dilation), groups)(input, weight, bias)

    return convolution


_DIVERTED: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.batch_norm: _batch_norm,
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
    F.conv3d: _convolution(3),
}
