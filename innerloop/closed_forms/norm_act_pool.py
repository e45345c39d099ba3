"""Batch normalisation, leaky ReLU and max-pooling as one operation, to second order in closed form.

With x^ = (x - mu) r, r = (var + eps)^(-1/2), and E the mean over a channel's N values::

    value       y = pool(leaky(gamma x^ + beta))

Leaky ReLU keeps the order of its inputs and the affine map keeps or reverses it, so pooling can come first, by the sign
of gamma. Everything after that is at the size of the pooled map. A star marks a tensor read where the pooling looked,
scatter is the way back, and da = leaky' dy::

    value       y  = leaky(gamma x^* + beta)
    gradient    dx = kappa (scatter(da) - s1 - s2 x^)          kappa = gamma r, s1 = sum(da) / N, s2 = sum(da x^*) / N
                dgamma = N s2,  dbeta = N s1
    tangent     y. = leaky' (gamma. x^* + gamma x^*. + beta.)  x^. = r (x. - E x. - m x^),  m = E[x^ x.]
    curvature   dx. = kappa. (scatter(da) - s1 - s2 x^) - kappa (s2. x^ + s2 x^.)
                kappa. = gamma. r - kappa r m,  s2. = sum(da x^*.) / N
                dgamma. = N s2.,  dbeta. = 0

so that the activations at full size are read or written a handful of times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop.closed_forms import kernels
from innerloop.closed_forms.operation import Direction, Operation


class _Point(NamedTuple):
    x: Tensor
    gamma: Tensor
    beta: Tensor
    y: Tensor
    mean: Tensor
    variance: Tensor
    r: Tensor
    pooled: Tensor | None = None
    places: Tensor | None = None
    """Where each pooled value stood: in its plane, or (bytes, from the kernels) in its window."""

    @property
    def star(self) -> Tensor:
        """x*."""
        return self.x if self.pooled is None else self.pooled

    @property
    def values(self) -> int:
        """N."""
        return self.x.numel() // self.x.shape[1]

    @property
    def suits_kernels(self) -> bool:
        """Whether places are as the kernels have them."""
        return self.places is None or self.places.dtype == torch.uint8

    def for_kernels(self) -> dict[str, Tensor | None]:
        """All but x, by their names in kernels.c."""
        gamma = self.gamma.contiguous()
        return {
            "gamma": gamma,
            "y": self.y,
            "mean": self.mean,
            "r": self.r,
            "pooled": self.pooled,
            "place": self.places,
        }

    def in_plane(self, window: int | None) -> _Point:
        """The same, with places in the plane, as PyTorch has it."""
        if self.places is None or window is None or not self.suits_kernels:
            return self
        rows, columns, width = *self.places.shape[2:], self.x.shape[3]
        device, place = self.x.device, self.places.long()
        corner = torch.arange(rows, device=device)[:, None] * width + torch.arange(columns, device=device)
        return self._replace(places=corner * window + place // window * width + place % window)


@dataclass(frozen=True)
class NormActPool(Operation):
    """``(x, gamma, beta) -> y``; x ``[n, C, ...]``, normalised by its own statistics.

    Attributes:
        eps: added to the variance.
        negative_slope: of the leaky ReLU, at least 0; ``None`` for no activation.
        pool: window and stride of the max-pooling, over ``[n, C, h, w]``; ``None`` for none.
    """

    eps: float
    negative_slope: float | None = None
    pool: int | None = None

    channels: ClassVar[tuple[int, ...]] = (1, 0, 0)

    @property
    def reads_output(self) -> bool:
        """Of y only the sign, for leaky'."""
        return self.negative_slope is not None

    def value(self, x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        """y, then mean, variance and r of each channel, and where there is pooling x* and its index."""
        if not gamma.shape == beta.shape == x.shape[1:2]:
            raise ValueError(
                f"{x.shape[1]} channels need as many gammas and betas, got {tuple(gamma.shape)} and {tuple(beta.shape)}"
            )
        fits = self.pool is None or self.pool <= min(kernels.LARGEST_POOL, *x.shape[2:])
        if fits and kernels.usable(x, gamma, beta):
            return self._compiled_value(x, gamma, beta)
        mean, variance = _statistics(x)
        r = torch.rsqrt(variance + self.eps)
        kept: tuple[Tensor, ...] = (mean, variance, r)
        star = x
        if self.pool is not None:
            star, index = _pooled(x, gamma, self.pool)
            kept = (*kept, star, index)
        y = torch.addcmul(_channels(beta - gamma * r * mean, x), star, _channels(gamma * r, x))
        if self.negative_slope is not None:
            y = torch.nn.functional.leaky_relu_(y, self.negative_slope)
        return (y, *kept)

    def gradient(self, point: Sequence[Tensor], dy: Tensor, wanted: Sequence[bool]) -> Direction:
        """J^T dy."""
        p = _Point(*point)
        if p.suits_kernels and kernels.usable(p.x, dy):
            return self._compiled_gradient(p, dy, wanted)
        p = p.in_plane(self.pool)
        da = self._before_activation(p, dy)
        dbeta, dgamma = _sums(da, p.star, p.mean, p.r)
        dx = None
        if wanted[0]:
            kappa = p.gamma * p.r
            s1, s2 = dbeta / p.values, dgamma / p.values
            of_x = -kappa * s2 * p.r
            dx = self._scatter(p, da, kappa)
            dx = torch.addcmul(dx, p.x, _channels(of_x, dx))
            dx += _channels(-kappa * s1 - of_x * p.mean, dx)
        return dx, dgamma, dbeta

    def second_order(
        self, point: Sequence[Tensor], dy: Tensor | None, direction: Direction, wanted: Sequence[bool]
    ) -> Direction:
        """Tangent and curvature."""
        p = _Point(*point)
        if p.suits_kernels and kernels.usable(p.x, dy, *direction):
            return self._compiled_second_order(p, dy, direction, wanted)
        p = p.in_plane(self.pool)
        of = (p.x, p.gamma, p.beta)
        x_t, gamma_t, beta_t = (torch.zeros_like(t) if d is None else d for t, d in zip(of, direction, strict=True))
        x_mean, m = (s / p.values for s in _sums(x_t, p.x, p.mean, p.r))
        x_t_star = x_t if p.places is None else _read(x_t, p.places)
        kappa = p.gamma * p.r
        y_t = dx_t = dgamma_t = None
        if wanted[0]:
            of_star = p.r * (gamma_t - kappa * m)
            y_t = torch.addcmul(
                _channels(beta_t - kappa * x_mean - of_star * p.mean, p.y), p.star, _channels(of_star, p.y)
            )
            y_t = self._before_activation(p, torch.addcmul(y_t, x_t_star, _channels(kappa, p.y)))
        if dy is not None:
            da = self._before_activation(p, dy)
            s1, s2 = (s / p.values for s in _sums(da, p.star, p.mean, p.r))
            _, along = _sums(da, x_t_star, torch.zeros_like(p.mean), torch.ones_like(p.r))
            s2_t = p.r * (along / p.values - x_mean * s1 - m * s2)
            kappa_t = gamma_t * p.r - kappa * p.r * m
            dgamma_t = p.values * s2_t
            if wanted[1]:
                of_x_t = -kappa * s2 * p.r
                of_x = p.r * (kappa * s2 * p.r * m - kappa_t * s2 - kappa * s2_t)
                dx_t = self._scatter(p, da, kappa_t)
                dx_t = torch.addcmul(dx_t, p.x, _channels(of_x, dx_t))
                dx_t = torch.addcmul(dx_t, x_t, _channels(of_x_t, dx_t))
                dx_t += _channels(-kappa_t * s1 - of_x * p.mean - of_x_t * x_mean, dx_t)
        return y_t, dx_t, dgamma_t, torch.zeros_like(p.beta)

    def _before_activation(self, p: _Point, dy: Tensor) -> Tensor:
        """Multiply by leaky'; the slope at 0 is the negative one, as PyTorch has it."""
        if self.negative_slope is None:
            return dy
        da: Tensor = torch.ops.aten.leaky_relu_backward(dy, p.y, self.negative_slope, True)
        return da

    def _scatter(self, p: _Point, da: Tensor, scale: Tensor) -> Tensor:
        """The product scale da, put where the pooling looked: memory of its own."""
        scaled = da * _channels(scale, da)
        if p.places is None or self.pool is None:
            return scaled
        window = [self.pool, self.pool]
        scattered: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            scaled, p.x, window, window, [0, 0], [1, 1], False, p.places
        )
        return scattered

    # The same three by the compiled kernels.

    def _call(self, name: str, x: Tensor, **tensors: Tensor | None) -> None:
        n, c, *plane = x.shape
        h, w = plane or (1, 1)
        slope = 1.0 if self.negative_slope is None else self.negative_slope
        kernels.call(name, (n, h, w, c, self.pool or 0), self.eps, slope, x.dtype, 0, x=x, **tensors)

    def _compiled_value(self, x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        mean, variance, r = (torch.empty_like(gamma) for _ in range(3))
        made = {"mean": mean, "variance": variance, "r": r}
        if self.pool is None:
            made["y"] = torch.empty_like(x)
        else:
            made["y"] = pooled_map(x.shape, self.pool, x.dtype)
            made |= {"pooled": torch.empty_like(made["y"]), "place": pooled_map(x.shape, self.pool, torch.uint8)}
        self._call("value", x, gamma=gamma.contiguous(), beta=beta.contiguous(), **made)
        return made.pop("y"), *made.values()

    def _compiled_gradient(self, p: _Point, dy: Tensor, wanted: Sequence[bool]) -> Direction:
        dx = torch.empty_like(p.x) if wanted[0] else None
        dgamma, dbeta = torch.empty_like(p.r), torch.empty_like(p.r)
        self._call("gradient", p.x, **p.for_kernels(), dy=kernels.rows(dy), dx=dx, dgamma=dgamma, dbeta=dbeta)
        return dx, dgamma, dbeta

    def _compiled_second_order(
        self, p: _Point, dy: Tensor | None, direction: Direction, wanted: Sequence[bool]
    ) -> Direction:
        x_t, gamma_t, beta_t = direction
        y_t = torch.empty_like(p.y) if wanted[0] else None
        dx_t = torch.empty_like(p.x) if wanted[1] else None
        dgamma_t, dbeta_t = torch.zeros_like(p.r), torch.zeros_like(p.r)
        self._call(
            "second_order",
            p.x,
            **p.for_kernels(),
            dy=None if dy is None else kernels.rows(dy),
            u=None if x_t is None else kernels.rows(x_t),
            gamma_t=None if gamma_t is None else gamma_t.contiguous(),
            beta_t=None if beta_t is None else beta_t.contiguous(),
            u_star=torch.empty_like(p.y) if self.pool else None,
            y_t=y_t,
            dx_t=dx_t,
            dgamma_t=dgamma_t,
        )
        return y_t, dx_t, dgamma_t, dbeta_t


def normalised(
    op: Operation,
    inputs: Sequence[Tensor],
    values: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> Tensor:
    """The output of an operation that keeps mean and variance of ``values`` values a channel.

    Running statistics move towards those by ``momentum``, the variance in its unbiased form.

    Raises:
        ValueError: one value a channel, which has no variance.
    """
    if values == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {inputs[0].shape}")
    y, mean, variance, *_ = op.apply(*inputs)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
            running_var.mul_(1 - momentum).add_(variance, alpha=momentum * values / (values - 1))
    return y


def pooled_map(shape: Sequence[int], window: int, dtype: torch.dtype) -> Tensor:
    """Room for what pooling leaves of ``[n, C, h, w]``, channels-last."""
    n, c, h, w = shape
    return torch.empty(n, c, h // window, w // window, dtype=dtype, memory_format=torch.channels_last)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel."""
    if x.device.type == "cpu" and not kernels.are_switched_off():  # Inductor does not know it
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean, variance
    variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
    return mean, variance


def _pooled(x: Tensor, gamma: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Each x where gamma x is largest in each window, and the index of that place in its plane."""
    index = torch.ops.aten.max_pool2d_with_indices(x * _channels(gamma.sign(), x), [window, window])[1]
    return _read(x, index), index


def _read(x: Tensor, index: Tensor) -> Tensor:
    """``[n, C, h, w]`` at the index of a pooling, in the index's layout."""
    if not index.is_contiguous(memory_format=torch.channels_last):
        return x.reshape(*x.shape[:2], -1).gather(2, index.reshape(*index.shape[:2], -1)).view(index.shape)
    n, c, h, w = index.shape
    rows, places = (t.permute(0, 2, 3, 1).reshape(n, -1, c) for t in (x, index))
    return rows.gather(1, places).view(n, h, w, c).permute(0, 3, 1, 2)


def _sums(u: Tensor, x: Tensor, mean: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of u and of u x^ over each channel, in one pass: what batch norm's own backward takes for beta and gamma."""
    _, u_x_hat, u_sum = torch.ops.aten.native_batch_norm_backward(
        u, x, torch.ones_like(r), None, None, mean, r, True, 0.0, [False, True, True]
    )
    return u_sum, u_x_hat


def _channels(per_channel: Tensor, x: Tensor) -> Tensor:
    """``[C]`` in the shape that broadcasts against ``[n, C, ...]``."""
    return per_channel.view(-1, *[1] * (x.ndim - 2))
