"""Compile where it pays: where the time to be saved is more than the time to compile."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from innerloop.adapted import Asked, TaskOutputs
from innerloop.engines.compiled import Compiled
from innerloop.engines.engine import Engine, Plan, Subject
from innerloop.engines.vmapped import Vmapped
from innerloop.meta_gradients import TaskGradient
from innerloop.model_state import Randomness
from innerloop.tasks import Task, meta_batch_size

logger = logging.getLogger("innerloop")


class Estimate(NamedTuple):
    """What compiling costs and gives, by the number of operations: the same on every machine, since both are overhead.

    Attributes:
        seconds: to compile, once.
        saved: seconds, by each meta-gradient from then on.
    """

    seconds: float
    saved: float

    def pays(self, updates: float) -> bool:
        """Whether so many meta-gradients save more than compiling costs."""
        return updates * self.saved > self.seconds


class Auto:
    """``plain`` until compiling pays: at once where the number of updates is known, else once they have shown it.

    In a loop whose end is not known, graphs are compiled when those updates would have saved what compiling costs: that
    is at most twice the time of the better choice.

    Args:
        plain: an engine without graphs.
        compiled: the one with them.
    """

    def __init__(self, plain: Engine, compiled: Compiled) -> None:
        self.plain, self.compiled = plain, compiled
        self.chosen: Engine = plain
        self._estimate: Estimate | None = None
        self._updates = 0

    def expect(self, subject: Subject, tasks: Task, plan: Plan, updates: int) -> Estimate:
        """Choose now, for so many updates with meta-batches like this."""
        self._estimate = estimate(self.plain, subject, tasks, plan)
        self.chosen = self.compiled if self._estimate.pays(updates) else self.plain
        return self._estimate

    def gradients(self, subject: Subject, tasks: Task, plan: Plan) -> TaskGradient:
        """``Engine.gradients``."""
        if self.chosen is self.plain:
            self._updates += 1
            if self._estimate is None and self._updates > FEW:
                self._estimate = estimate(self.plain, subject, tasks, plan)
            if self._estimate is not None and self._estimate.pays(self._updates):
                logger.info("compiling the meta-gradient, which takes about %.0f s", self._estimate.seconds)
                self.chosen = self.compiled
        return self.chosen.gradients(subject, tasks, plan)

    def outputs(self, subject: Subject, tasks: Task, asked: Asked) -> TaskOutputs:
        """``Engine.outputs``."""
        return self.chosen.outputs(subject, tasks, asked)


FEW = 100
"""Updates after which it is worth counting what one does."""

_PER_OPERATION, _VMAPPED = 6e-6, 25e-6
"""Seconds on the host that an operation of PyTorch's takes beside its arithmetic; the same under ``vmap``."""
_PER_BYTE = 1 / 20e9
"""Seconds to read or write a byte of a tensor too large for a core's own cache."""
_FIRST, _EACH = 8.0, 0.06
"""Seconds to start the compiler, and to compile an operation of an inner step."""


def estimate(plain: Engine, subject: Subject, tasks: Task, plan: Plan) -> Estimate:
    """From one meta-gradient, counted.

    On a CPU convolutions gain nothing by being compiled, and the kernels of ``closed_forms`` would be lost.
    """
    device = next(iter(subject.meta.adapted.values())).device
    before = Randomness.now(device)
    with _Counter() as counted:
        plain.gradients(subject, tasks, plan)
    before.restore(device)
    at_once = isinstance(plain, Vmapped) and plain.works
    steps = len(plan.weights) * (1 if at_once else meta_batch_size(tasks))
    seconds = _FIRST + _EACH * counted.operations / steps
    if counted.convolutions and device.type == "cpu":
        return Estimate(seconds, 0.0)
    overhead = _VMAPPED if at_once else _PER_OPERATION
    return Estimate(seconds, overhead * counted.operations + _PER_BYTE * counted.moved)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations that are not views, and the bytes that those read and write which do little arithmetic."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.convolutions = self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            name = str(func)
            self.operations += 1
            self.convolutions += "convolution" in name
            if not any(product in name for product in ("mm", "convolution")):
                tensors = [t for t in pytree.tree_leaves((args, result)) if isinstance(t, Tensor)]
                self.moved += sum(t.nbytes for t in tensors if t.nbytes > _CACHED)
        return result


_CACHED = 2**18
"""Bytes of a tensor that is still in a cache when it is read again."""
