"""Batch normalisation with its tangent, its gradient and its gradient's tangent in closed form.

With x^ = (x - mu) r, r = (var + eps)^(-1/2), y = gamma x^ + beta, and E the mean over a channel's values::

    tangent        x^. = r (x. - E x. - m x^),  m = E[x^ x.]          y. = gamma. x^ + gamma x^. + beta.
    gradient       dx = gamma r (dy - s1 - s2 x^),  s1 = E dy, s2 = E[dy x^];  dgamma = N s2, dbeta = N s1
    its tangent    s1. = E dy.,  s2. = E[dy. x^ + dy x^.],  r. = - r^2 m
                   dx. = (gamma r). (dy - s1 - s2 x^) + gamma r (dy. - s1. - s2. x^ - s2 x^.)

PyTorch takes the last of these apart into some forty passes over the activations, which is most of the time of a
Hessian-vector product of a convolutional network. Here it is about fifteen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Optional = Tensor | None


class ClosedFormBatchNorm(TorchFunctionMode):
    """Within it, ``F.batch_norm`` by batch statistics is the closed form (and leaves running statistics alone)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Divert calls of ``F.batch_norm``."""
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _batch_norm(
    input: Tensor,
    running_mean: Optional,
    running_var: Optional,
    weight: Optional = None,
    bias: Optional = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training or weight is None or bias is None:
        with torch._C.DisableTorchFunction():
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y: Tensor = _BatchNorm.apply(input, weight, bias, eps)[0]  # type: ignore[no-untyped-call]
    return y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, r = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.0, eps)
        ctx.save_for_backward(x, gamma, mean, r)
        ctx.save_for_forward(x, gamma, mean, r)
        ctx.mark_non_differentiable(mean, r)
        ctx.eps = eps
        return y, mean, r

    @staticmethod
    def jvp(ctx: Any, x_t: Optional, gamma_t: Optional, beta_t: Optional, eps_t: None) -> tuple[Optional, ...]:
        x, gamma, mean, r = ctx.saved_tensors
        x_hat = _normalised(x, mean, r)
        y_t = torch.zeros_like(x) if beta_t is None else _channels(beta_t, x).expand_as(x)
        if gamma_t is not None:
            y_t = torch.addcmul(y_t, _channels(gamma_t, x), x_hat)
        if x_t is not None:
            m = _mean(x_hat * x_t)
            scale = gamma * r
            y_t = y_t + torch.addcmul(_channels(-scale * _mean(x_t), x), _channels(scale, x), x_t)
            y_t = torch.addcmul(y_t, _channels(-scale * m, x), x_hat)
        return y_t, None, None

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Optional, ...]:
        x, gamma, mean, r = ctx.saved_tensors
        return (*_BatchNormGradient.apply(dy, x, gamma, mean, r, ctx.eps), None)  # type: ignore[no-untyped-call]


class _BatchNormGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, r: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_forward(dy, x, gamma, mean, r)
        dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            dy, x, gamma, None, None, mean, r, True, eps, [True, True, True]
        )
        ctx.save_for_forward(dy, x, gamma, mean, r, dgamma, dbeta)
        return dx, dgamma, dbeta

    @staticmethod
    def jvp(
        ctx: Any, dy_t: Optional, x_t: Optional, gamma_t: Optional, mean_t: None, r_t: None, eps_t: None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dy, x, gamma, mean, r, dgamma, dbeta = ctx.saved_tensors
        x_hat = _normalised(x, mean, r)
        count = x.numel() // x.shape[1]
        s1, s2 = dbeta / count, dgamma / count
        zero = torch.zeros_like(r)
        scale = gamma * r
        scale_t = zero if gamma_t is None else gamma_t * r
        s1_t, s2_t, x_hat_rate, constant = zero, zero, zero, zero
        dx_t = None
        if x_t is not None:
            m, x_mean_t = _mean(x_hat * x_t), _mean(x_t)
            s2_t = r * (_mean(dy * x_t) - x_mean_t * s1 - m * s2)
            scale_t = scale_t - scale * r * m
            x_hat_rate, constant = scale * s2 * r * m, scale * s2 * r * x_mean_t
            dx_t = _channels(-scale * s2 * r, x) * x_t
        if dy_t is not None:
            s1_t, s2_t = _mean(dy_t), s2_t + _mean(dy_t * x_hat)
            part = _channels(scale, x) * dy_t
            dx_t = part if dx_t is None else dx_t + part
        shift = _channels(constant - scale_t * s1 - scale * s1_t, x)
        dx_t = shift.expand_as(x) if dx_t is None else dx_t + shift
        dx_t = torch.addcmul(dx_t, _channels(x_hat_rate - scale_t * s2 - scale * s2_t, x), x_hat)
        dx_t = torch.addcmul(dx_t, _channels(scale_t, x), dy)
        return dx_t, count * s2_t, count * s1_t


def _channels(per_channel: Tensor, x: Tensor) -> Tensor:
    """``[C]`` in the shape that broadcasts against ``[n, C, ...]``."""
    return per_channel.view(-1, *[1] * (x.ndim - 2))


def _mean(x: Tensor) -> Tensor:
    """Mean over all but the channels, ``[C]``."""
    return x.mean([d for d in range(x.ndim) if d != 1])


def _normalised(x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    return torch.addcmul(_channels(-mean * r, x), x, _channels(r, x))
