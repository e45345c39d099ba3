"""Cross-entropy of class numbers to second order in closed form, each part one kernel of Triton's.

With p the softmax of the logits l, e the one of the class, over the N rows whose class is not to be ignored::

    value       loss = mean(log sum exp l - l_class)
    gradient    dl = dy (p - e) / N
    tangent     loss. = sum((p - e) l.) / N
    curvature   dl. = dy p (l. - sum(p l.)) / N

The rows of a task are a program's: they are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from innerloop.closed_forms import triton_block
from innerloop.closed_forms.operation import Direction, Operation

MOST_CLASSES = 1024
MOST_ROWS = 4096


@dataclass(frozen=True)
class CrossEntropy(Operation):
    """``(logits, classes) -> loss``; logits ``[n, C]``, classes ``[n]``. A class that there is not makes it NaN.

    Attributes:
        ignored: a class number whose rows do not count.
        of_tasks: whether both have a first dimension of tasks.
    """

    ignored: int = -100
    of_tasks: bool = False

    channels: ClassVar[tuple[int, ...]] = (0, 0)

    @property
    def reads_output(self) -> bool:
        """Of the loss nothing."""
        return False

    def value(self, logits: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        """The loss."""
        return (self._shaped(_loss(*self._with_tasks(logits, classes), self.ignored)),)

    def gradient(self, point: Sequence[Tensor], dy: Tensor, wanted: Sequence[bool]) -> Direction:
        """J^T dy."""
        return self._shaped(_loss_gradient(*self._with_tasks(*point[:2], dy), self.ignored)), None

    def second_order(
        self, point: Sequence[Tensor], dy: Tensor | None, direction: Direction, wanted: Sequence[bool]
    ) -> Direction:
        """Tangent and curvature."""
        logits, classes, loss = point
        along = torch.zeros_like(logits) if direction[0] is None else direction[0]
        given = self._with_tasks(logits, classes, torch.zeros_like(loss) if dy is None else dy, along)
        loss_t, dl_t = _loss_second_order(*given, self.ignored)
        return self._shaped(loss_t), self._shaped(dl_t), None

    def over_tasks(self) -> CrossEntropy | None:
        """The same, of tasks."""
        return None if self.of_tasks else replace(self, of_tasks=True)

    def repeated(self, times: int) -> None:
        """Tasks are no channels here."""
        return

    def _with_tasks(self, *tensors: Tensor) -> list[Tensor]:
        return [(t if self.of_tasks else t.unsqueeze(0)).contiguous() for t in tensors]

    def _shaped(self, tensor: Tensor) -> Tensor:
        return tensor if self.of_tasks else tensor.squeeze(0)


class FusedCrossEntropy(TorchFunctionMode):
    """Within it, ``F.cross_entropy`` of class numbers is the operation above where Triton serves."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Divert ``F.cross_entropy``."""
        if func is torch.nn.functional.cross_entropy:
            fused = _diverted(*args, **(kwargs or {}))
            if fused is not None:
                return fused
        return func(*args, **(kwargs or {}))


def _diverted(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    plain = (weight, size_average, reduce, reduction, label_smoothing) == (None, None, None, "mean", 0.0)
    if not (
        plain and input.ndim == 2 and target.ndim == 1 and target.dtype == torch.int64 and len(input) == len(target)
    ):
        return None
    fits = len(input) <= MOST_ROWS and input.shape[1] <= MOST_CLASSES and input.device == target.device
    if not (fits and triton_block.usable(input)):
        return None
    return CrossEntropy(ignore_index)(input, target)


@torch.library.custom_op(
    "innerloop::cross_entropy", mutates_args=(), schema="(Tensor logits, Tensor classes, int ignored) -> Tensor"
)
def _loss(logits: Tensor, classes: Tensor, ignored: int) -> Tensor:
    loss = logits.new_empty(len(logits))
    _start(logits, classes, None, None, loss, None, ignored, 0)
    return loss


@_loss.register_fake
def _(logits: Tensor, classes: Tensor, ignored: int) -> Tensor:
    return logits.new_empty(len(logits))


@torch.library.custom_op(
    "innerloop::cross_entropy_gradient",
    mutates_args=(),
    schema="(Tensor logits, Tensor classes, Tensor dy, int ignored) -> Tensor",
)
def _loss_gradient(logits: Tensor, classes: Tensor, dy: Tensor, ignored: int) -> Tensor:
    dl = torch.empty_like(logits)
    _start(logits, classes, dy, None, None, dl, ignored, 1)
    return dl


@_loss_gradient.register_fake
def _(logits: Tensor, classes: Tensor, dy: Tensor, ignored: int) -> Tensor:
    return torch.empty_like(logits)


@torch.library.custom_op(
    "innerloop::cross_entropy_second_order",
    mutates_args=(),
    schema="(Tensor logits, Tensor classes, Tensor dy, Tensor along, int ignored) -> (Tensor, Tensor)",
)
def _loss_second_order(
    logits: Tensor, classes: Tensor, dy: Tensor, along: Tensor, ignored: int
) -> tuple[Tensor, Tensor]:
    loss_t, dl_t = logits.new_empty(len(logits)), torch.empty_like(logits)
    _start(logits, classes, dy, along, loss_t, dl_t, ignored, 2)
    return loss_t, dl_t


@_loss_second_order.register_fake
def _(logits: Tensor, classes: Tensor, dy: Tensor, along: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits)), torch.empty_like(logits)


def _start(*given: Any) -> None:
    from innerloop.closed_forms import triton_launches

    triton_launches.cross_entropy(*given)
