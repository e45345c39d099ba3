"""The floors: the convolutions, or the matrix products, that a step cannot do without, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from innerloop.bench.cases import Case, native
from innerloop.learner import MetaBatchResult
from innerloop.meta_gradients import NO_GRADIENT, TaskGradient
from innerloop.per_step import Statistics
from innerloop.tasks import Task, meta_batch_size, select_task

Kind = Literal["convolutions", "matrix products"]
aten = torch.ops.aten


@dataclass(frozen=True)
class _Bilinear(ABC):
    """An operation of the network, linear in both its operands.

    Attributes:
        a: the left operand: an activation, or the network's input.
        b: the right one: a weight, or another activation.
        dy: a cotangent.
        a_t: a tangent of a.
        b_t: a tangent of b.
        of_data: whether a is the network's input, which has neither gradient nor tangent.
    """

    a: Tensor
    b: Tensor
    dy: Tensor
    a_t: Tensor
    b_t: Tensor
    of_data: bool

    @abstractmethod
    def forward(self, a: Tensor, b: Tensor) -> None:
        """The operation."""

    @abstractmethod
    def backward(self, a: Tensor, b: Tensor, da: bool, db: bool) -> None:
        """The wanted halves of its gradient."""


@dataclass(frozen=True)
class _Convolution(_Bilinear):
    bias: bool
    arguments: tuple[Any, ...]

    def forward(self, a: Tensor, b: Tensor) -> None:
        torch.convolution(a, b, None, *self.arguments)

    def backward(self, a: Tensor, b: Tensor, da: bool, db: bool) -> None:
        bias = db and self.bias and a is self.a  # a tangent's gradient has none
        aten.convolution_backward(self.dy, a, b, [len(b)], *self.arguments, [da, db, bias])


@dataclass(frozen=True)
class _Product(_Bilinear):
    def forward(self, a: Tensor, b: Tensor) -> None:
        torch.matmul(a, b)

    def backward(self, a: Tensor, b: Tensor, da: bool, db: bool) -> None:
        if da:
            torch.matmul(self.dy, b.mT)
        if db:
            torch.matmul(a.mT, self.dy)


class Floor:
    """Stands in for a ``MetaLearner`` in the worker processes: of the same tasks' gradients, one kind of operation.

    An inner step takes the gradient on the support set (forward, and both halves backward), the tangent (twice
    forward) and the four halves of the curvature and of the second way back; a query set whose loss counts, a
    gradient. The network's input has neither gradient nor tangent. One task's operations follow each other as in the
    network, each on its own activations.
    """

    def __init__(self, case: Case, kind: Kind, device: torch.device) -> None:
        self.kind: Kind = kind
        self.model = native(case.build_model(device)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weights = case.build_method().loss_weights(0)
        self._recorded: dict[int, list[_Bilinear]] = {}

    def share_memory(self) -> None:
        """Nothing is shared."""

    def parameters(self) -> Iterator[Tensor]:
        """Nothing is learned."""
        return iter(())

    def task_gradients(self, tasks: Task, epoch: float | None = None) -> TaskGradient:
        """The operations of the gradients of these tasks."""
        for i in range(meta_batch_size(tasks)):
            task = select_task(tasks, i)
            support, query = (self._operations(e.inputs) for e in task)
            for weight in self.weights:
                _gradient(support)
                if weight:
                    _gradient(query)
            for _ in self.weights:
                _second_order(support)
        none = torch.zeros(meta_batch_size(tasks))
        return TaskGradient(none, NO_GRADIENT, none, none, none, Statistics({}, {}))

    def accumulate(self, parts: Sequence[TaskGradient], epoch: float | None = None) -> MetaBatchResult:
        """No result."""
        none = torch.zeros(())
        return MetaBatchResult(none, none, none, none)

    def _operations(self, inputs: Tensor) -> list[_Bilinear]:
        """Those that the network makes of a set of this size."""
        if len(inputs) not in self._recorded:
            self._recorded[len(inputs)] = recorded(self.model, inputs, self.kind)
        return self._recorded[len(inputs)]


@torch.no_grad()
def recorded(model: nn.Module, inputs: Tensor, kind: Kind) -> list[_Bilinear]:
    """The operations of a kind that the network makes of these inputs, in their order."""
    with sdpa_kernel(SDPBackend.MATH), _Recorder(inputs, kind) as recorder:  # the attention's products one by one
        model(inputs)
        found: list[_Bilinear] = recorder.operations
    return found


@torch.no_grad()
def _gradient(operations: Sequence[_Bilinear]) -> None:
    for o in operations:
        o.forward(o.a, o.b)
    for o in reversed(operations):
        o.backward(o.a, o.b, not o.of_data, True)


@torch.no_grad()
def _second_order(operations: Sequence[_Bilinear]) -> None:
    for o in operations:
        o.forward(o.a, o.b_t)
        if not o.of_data:
            o.forward(o.a_t, o.b)
            o.backward(o.a, o.b_t, True, False)
            o.backward(o.a_t, o.b, False, True)
    for o in reversed(operations):
        o.backward(o.a, o.b, not o.of_data, True)


class _Operands(NamedTuple):
    a: int
    b: int


_PRODUCTS = {
    aten.mm.default: _Operands(0, 1),
    aten.bmm.default: _Operands(0, 1),
    aten.addmm.default: _Operands(1, 2),
    aten.baddbmm.default: _Operands(1, 2),
}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, inputs: Tensor, kind: Kind) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.data = inputs.untyped_storage().data_ptr()
        self.kind = kind
        self.operations: list[_Bilinear] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if self.kind == "convolutions" and func is aten.convolution.default:
            a, b, bias, *arguments = args
            self.operations.append(_Convolution(*self._operands(a, b, y), bias is not None, tuple(arguments)))
        elif self.kind == "matrix products" and func in _PRODUCTS:
            places = _PRODUCTS[func]
            self.operations.append(_Product(*self._operands(args[places.a], args[places.b], y)))
        return y

    def _operands(self, a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, bool]:
        dy, a_t, b_t = (torch.randn_like(t) for t in (y, a, b))
        return a.clone(), b.detach(), dy, a_t, b_t, a.untyped_storage().data_ptr() == self.data
