"""The fused block of few-shot convolutional networks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from innerloop import closed_forms


class NormActPool(nn.BatchNorm2d):
    """Batch norm, leaky ReLU and max-pooling in one: ``[n, C, h, w] -> [n, C, h // pool, w // pool]``.

    The same function as the three modules one after the other, with their first and second derivatives in closed form
    (``innerloop.closed_forms``): a gradient of it, and that gradient's derivative, take a fraction of the time. It is a
    ``BatchNorm2d`` to everything that asks: weight, bias and running statistics have its names, and BNRS and BNWB keep
    them per inner step. Where running statistics normalise, or ``torch.autocast`` chooses precisions, it is the three
    modules.

    Differentiable twice; a third derivative raises ``NotImplementedError``.

    Args:
        num_features: C.
        negative_slope: of the leaky ReLU, at least 0 (0 is ReLU).
        pool: window and stride of the max-pooling; ``None`` for none.
        eps: added to the variance.
        momentum: of the running statistics; ``None`` makes them the mean of all batches.
    """

    def __init__(
        self,
        num_features: int,
        negative_slope: float = 0.01,
        pool: int | None = 2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        if negative_slope < 0:
            raise ValueError(f"negative_slope must be at least 0, got {negative_slope}")
        super().__init__(num_features, eps, momentum)
        self.negative_slope, self.pool = negative_slope, pool

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for ``[n, C, h, w]``.

        Raises:
            ValueError: x has not four dimensions, or one value a channel, which has no variance.
        """
        if self.uses_batch and x.dtype == self.weight.dtype and not closed_forms.autocast([x]):
            self._check_input_dim(x)
            fused = closed_forms.NormActPool(self.eps, self.negative_slope, self.pool)
            return self.normalised(fused, x, values=x.numel() // x.shape[1])
        y = F.leaky_relu(super().forward(x), self.negative_slope)
        return y if self.pool is None else F.max_pool2d(y, self.pool)

    @property
    def uses_batch(self) -> bool:
        """Whether the batch's own statistics normalise it, and not the running ones."""
        return self.training or self.running_mean is None

    def normalised(self, op: closed_forms.Operation, *inputs: Tensor, values: int) -> Tensor:
        """The output of the operation that this layer is (the end of); moves the running statistics."""
        inputs = (*inputs, self.weight, self.bias)
        return closed_forms.normalised(op, inputs, values, *self.running_statistics())

    def running_statistics(self) -> tuple[Tensor | None, Tensor | None, float]:
        """Those that are to be moved, and how far."""
        if not (self.training and self.track_running_stats):
            return None, None, 0.0
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        return self.running_mean, self.running_var, momentum

    def extra_repr(self) -> str:
        """What the constructor was told."""
        norm = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{norm}, negative_slope={self.negative_slope}, pool={self.pool}"
