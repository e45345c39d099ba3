"""Operations whose first and second derivatives are written out, so that a gradient is cheap to differentiate.

The walk back through the inner loop differentiates every backward formula once more. PyTorch's are exact; those of
convolution and batch norm are slow: it takes batch norm's apart into some forty passes over the activations, and makes
convolution's of convolutions with kernels the size of an image. Of an operation y(x) with inputs x, four functions
say all there is to say to second order::

    value       y(x)
    gradient    J^T dy
    tangent     J x.                                along a direction x.
    curvature   (d^2 <y, dy> / dx^2) x.             how the gradient changes along x., dy held

The gradient is itself an operation, of (dy, x). Since second derivatives commute, a cotangent u of its result gives dy
the tangent along u and x the curvature along u; and its own tangent is gradient(dy.) + curvature(x.).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

Direction = Sequence[Tensor | None]
"""A tangent or gradient of each input; ``None`` is zero, or was not wanted."""


class Operation(ABC):
    """An operation with one differentiable output and its derivatives in closed form.

    ``point`` is the inputs followed by what ``value`` returned, all of it constant. Under ``vmap`` tasks become
    channels.

    Attributes:
        channels: the dimension of each input that holds its (output) channels; of the output it is 1.
        curved: for each input whether its curvature may be other than zero; ``None``: all.
    """

    channels: ClassVar[tuple[int, ...]]
    curved: ClassVar[tuple[bool, ...] | None] = None

    @property
    def reads_output(self) -> bool:
        """Whether the derivatives read the output's values, so that nobody may change it in place."""
        return True

    @abstractmethod
    def value(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The output, and what of the work is worth keeping for the derivatives."""

    @abstractmethod
    def gradient(self, point: Sequence[Any], dy: Tensor, wanted: Sequence[bool]) -> Direction:
        """J^T dy, for the inputs that are wanted."""

    @abstractmethod
    def second_order(
        self, point: Sequence[Any], dy: Tensor | None, direction: Direction, wanted: Sequence[bool]
    ) -> Direction:
        """The tangent, then the curvature for each input, where they are wanted. A tangent alone needs no ``dy``."""

    def repeated(self, times: int) -> Operation | None:
        """The operation that treats so many times the channels as it does those of one task, if there is one."""
        return self

    def over_tasks(self) -> Operation | None:
        """The operation on tensors with a first dimension of tasks, if there is one: then ``vmap`` takes it."""
        return None

    def __call__(self, *inputs: Any) -> Tensor:
        """The output, differentiable once in any mode, and its gradient once more in any mode."""
        return self.apply(*inputs)[0]

    def apply(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The output with what was kept."""
        outputs: tuple[Tensor, ...] = _Value.apply(self, *inputs)
        return outputs


class _Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Without the search for default arguments, 80 microseconds a call, where ``torch.func`` has no part in it."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


class _Value(_Function):
    @staticmethod
    def forward(op: Operation, *inputs: Any) -> tuple[Tensor, ...]:
        return op.value(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, *arguments = inputs
        ctx.inputs, ctx.kept = len(arguments), len(output) - 1
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        # Detached from its history of changes, y may be changed by what comes next (nn.ReLU(inplace=True)).
        y = output[0] if ctx.op.reads_output else output[0].data
        ctx.save_for_backward(*arguments, y, *output[1:])
        ctx.save_for_forward(*arguments, y, *output[1:])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        if dy is None:
            return (None,) * (1 + len(wanted))
        found = _Gradient.apply(ctx.op, wanted, dy, *ctx.saved_tensors)
        return (None, *_spread(found, wanted))

    @staticmethod
    def jvp(ctx: Any, _: None, *direction: Tensor | None) -> tuple[Tensor | None, ...]:
        tangent_alone = (True, *[False] * ctx.inputs)
        (y_t,) = _SecondOrder.apply(ctx.op, tangent_alone, *direction, None, *ctx.saved_tensors)
        return (y_t, *[None] * ctx.kept)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], op: Operation, *inputs: Any) -> tuple[Any, Any]:
        return _by_channels(_Value, info.batch_size, op, (), inputs, in_dims[1:], op.channels, [1])


class _Gradient(_Function):
    @staticmethod
    def forward(op: Operation, wanted: Sequence[bool], dy: Tensor, *point: Any) -> tuple[Tensor, ...]:
        return _present(op.gradient(point, dy, wanted), wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, ctx.wanted, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        direction = _spread(cotangents, ctx.wanted)
        needed = ctx.needs_input_grad[2 : 3 + len(direction)]
        if ctx.op.curved is not None:
            needed = tuple(n and c for n, c in zip(needed, (True, *ctx.op.curved), strict=True))
        found = _SecondOrder.apply(ctx.op, needed, *direction, *ctx.saved_tensors) if any(needed) else ()
        rest = len(ctx.saved_tensors) - len(needed)
        return (None, None, *_spread(found, needed), *[None] * rest)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, dy_t: Tensor | None, *point_t: Tensor | None) -> tuple[Tensor, ...]:
        direction = point_t[: len(ctx.wanted)]
        changes: tuple[Tensor, ...] = _SecondOrder.apply(ctx.op, (False, *ctx.wanted), *direction, *ctx.saved_tensors)
        if dy_t is None:
            return changes
        gradients = _Gradient.apply(ctx.op, ctx.wanted, dy_t, *ctx.saved_tensors[1:])
        return tuple(a + b for a, b in zip(changes, gradients, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], op: Operation, wanted: Sequence[bool], *tensors: Any) -> Any:
        outputs = [c for c, w in zip(op.channels, wanted, strict=True) if w]
        channels = [1, *op.channels]
        return _by_channels(_Gradient, info.batch_size, op, (wanted,), tensors, in_dims[2:], channels, outputs)


class _SecondOrder(_Function):
    """Tangent and curvature. What ``value`` kept counts as constant here, so one more derivative raises."""

    @staticmethod
    def forward(op: Operation, wanted: Sequence[bool], *tensors: Any) -> tuple[Tensor, ...]:
        inputs = len(wanted) - 1
        direction, dy, point = tensors[:inputs], tensors[inputs], tensors[inputs + 1 :]
        return _present(op.second_order(point, dy, direction, wanted), wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        _SecondOrder.backward(ctx)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise NotImplementedError(
            "innerloop's closed forms have two derivatives and not a third: to differentiate a meta-gradient, build "
            "the model of nn.BatchNorm2d, nn.LeakyReLU and nn.MaxPool2d in the place of innerloop.nn.NormActPool"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], op: Operation, wanted: Sequence[bool], *tensors: Any) -> Any:
        outputs = [c for c, w in zip([1, *op.channels], wanted, strict=True) if w]
        channels = [*op.channels, 1, *op.channels]
        return _by_channels(_SecondOrder, info.batch_size, op, (wanted,), tensors, in_dims[2:], channels, outputs)


def _present(found: Direction, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """The wanted ones, without the gaps that a Function may not return."""
    return tuple(t for t, w in zip(found, wanted, strict=True) if w and t is not None)


def _spread(found: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The inverse of ``_present``."""
    rest = iter(found)
    return [next(rest) if w else None for w in wanted]


def _folded(size: int, tensor: Tensor | None, dim: int | None, channels: int) -> Tensor | None:
    """Tasks, at ``dim``, made channels, at ``channels``: ``[T, n, C, ...]`` seen as ``[n, T C, ...]``."""
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(channels).expand(*tensor.shape[:channels], size, *tensor.shape[channels:])
    else:
        tensor = tensor.movedim(dim, channels)
    return tensor.flatten(channels, channels + 1)


def _stacked(size: int, tensor: Tensor | None, dim: int | None) -> Tensor | None:
    """Tasks first; what they share stays one in memory."""
    if tensor is None:
        return None
    return tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _by_channels(
    function: type[_Function],
    size: int,
    op: Operation,
    rest: tuple[Any, ...],
    tensors: Sequence[Tensor | None],
    in_dims: Sequence[int | None],
    channels: Sequence[int],
    out_channels: Sequence[int],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """``vmap``: the tasks become channels, which is also how ``vmap`` lays out a convolution's result."""
    of_tasks = op.over_tasks()
    if of_tasks is not None:
        stacked = [_stacked(size, t, d) for t, d in zip(tensors, in_dims, strict=True)]
        results = function.apply(of_tasks, *rest, *stacked)
        return results, (0,) * len(results)
    wide = op.repeated(size)
    if wide is None:
        each = [
            function.apply(
                op,
                *rest,
                *[t if t is None or d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)],
            )
            for i in range(size)
        ]
        return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])
    kept = [min(t.ndim - (d is not None) - 1, 1) for t, d in zip(tensors, in_dims, strict=True) if t is not None]
    channels = [*channels, *kept[len(kept) - (len(tensors) - len(channels)) :]]
    folded = [_folded(size, t, d, c) for t, d, c in zip(tensors, in_dims, channels, strict=True)]
    results = function.apply(wide, *rest, *folded)
    out_channels = [*out_channels, *[min(r.ndim - 1, 1) for r in results[len(out_channels) :]]]
    return tuple(r.unflatten(c, (size, -1)) for r, c in zip(results, out_channels, strict=True)), tuple(out_channels)
