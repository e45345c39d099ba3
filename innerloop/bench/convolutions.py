"""The floor: the convolutions that a step cannot do without, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from innerloop.bench.cases import Case, native
from innerloop.inner_loop import MetaParameters
from innerloop.learner import MetaBatchResult
from innerloop.meta_gradients import TaskGradient
from innerloop.per_step import Statistics
from innerloop.tasks import Task, meta_batch_size, select_task


class _Layer(NamedTuple):
    """A convolution as the network called it, and directions of its inputs."""

    x: Tensor
    w: Tensor
    dy: Tensor
    u: Tensor
    w_t: Tensor
    bias: bool
    arguments: tuple[Any, ...]
    first: bool

    def forward(self, x: Tensor, w: Tensor) -> None:
        torch.convolution(x, w, None, *self.arguments)

    def backward(self, x: Tensor, w: Tensor, dx: bool, dw: bool) -> None:
        wanted = [dx, dw, dw and self.bias]
        torch.ops.aten.convolution_backward(self.dy, x, w, [len(w)], *self.arguments, wanted)


class ConvolutionsAlone:
    """Stands in for a ``MetaLearner`` in the worker processes: the same tasks, the convolutions of their gradients.

    An inner step takes the gradient on the support set (forward, and both halves backward), the tangent (twice
    forward) and the four halves of the curvature and of the second way back; a query set whose loss counts, a
    gradient. The input of a first layer has neither gradient nor tangent. One task's layers follow each other as
    in the network, each on its own activations.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = native(case.build_model()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weights = case.build_method().loss_weights(0)
        self._layers: dict[int, list[_Layer]] = {}

    def share_memory(self) -> None:
        """Nothing is shared."""

    def parameters(self) -> Iterator[Tensor]:
        """Nothing is learned."""
        return iter(())

    def task_gradients(self, tasks: Task, epoch: float | None = None) -> TaskGradient:
        """The convolutions of the gradients of these tasks."""
        for i in range(meta_batch_size(tasks)):
            task = select_task(tasks, i)
            support, query = (self._seen(e.inputs) for e in task)
            for weight in self.weights:
                self._gradient(support)
                if weight:
                    self._gradient(query)
            for _ in self.weights:
                self._second_order(support)
        none = torch.zeros(meta_batch_size(tasks))
        nothing: dict[str, Tensor] = {}
        empty = MetaParameters(nothing, nothing, nothing, nothing)
        return TaskGradient(none, empty, none, none, none, Statistics(nothing, nothing))

    def accumulate(self, parts: Sequence[TaskGradient], epoch: float | None = None) -> MetaBatchResult:
        """No result."""
        none = torch.zeros(())
        return MetaBatchResult(none, none, none, none)

    def _gradient(self, layers: list[_Layer]) -> None:
        for layer in layers:
            layer.forward(layer.x, layer.w)
        for layer in reversed(layers):
            layer.backward(layer.x, layer.w, not layer.first, True)

    def _second_order(self, layers: list[_Layer]) -> None:
        for layer in layers:
            layer.forward(layer.x, layer.w_t)
            if not layer.first:
                layer.forward(layer.u, layer.w)
                layer.backward(layer.x, layer.w_t, True, False)
                layer._replace(bias=False).backward(layer.u, layer.w, False, True)
        for layer in reversed(layers):
            layer.backward(layer.x, layer.w, not layer.first, True)

    @torch.no_grad()
    def _seen(self, inputs: Tensor) -> list[_Layer]:
        """The convolutions that the network makes of a set of this size."""
        if len(inputs) not in self._layers:
            self._layers.clear() if len(self._layers) > 2 else None
            with _Recorder() as recorder:
                self.model(inputs)
            self._layers[len(inputs)] = recorder.layers
        return self._layers[len(inputs)]


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.layers: list[_Layer] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is F.conv2d:
            x, w, b, stride, padding, dilation, groups = args
            arguments = (stride, padding, dilation, False, (0, 0), groups)
            dy, u, w_t = (torch.randn_like(t) for t in (y, x, w))
            self.layers.append(_Layer(x.clone(), w.detach(), dy, u, w_t, b is not None, arguments, not self.layers))
        return y
