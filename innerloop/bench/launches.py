"""What a step would ask of a GPU, counted without one: operations that launch kernels, and the bytes they move.

Tensors have shapes and a device, and no values: ``FakeTensorMode`` computes the one and refuses to mix the other, so
that a wrong device shows here too.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from innerloop.bench.cases import Case
from innerloop.learner import MetaLearner


class _NobodyCounted(TorchFunctionMode):
    """A whole number that is read out is 0: of the counters that a learner looks at, nobody has moved one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Divert ``int``."""
        return 0 if func is Tensor.__int__ else func(*args, **(kwargs or {}))


@contextmanager
def fake_gpu() -> Iterator[torch.device]:
    """In this block tensors may be made and computed with on the device that it gives; none has values.

    Reading one, and mixing devices, raise. A build of PyTorch without CUDA has no such device, not even to pretend
    with, so that a name of our own stands for it there; of a process that has taken gradients before, autograd no
    longer learns it.
    """
    device = torch.device("cuda" if torch.version.cuda else _own_device(), 0)
    with FakeTensorMode(), _NobodyCounted():
        yield device


@functools.cache
def _own_device() -> str:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("fakegpu")
    return "fakegpu"


def on(device: torch.device, tree: Any) -> Any:
    """A nest of tensors on the device of ``fake_gpu``, whose shapes alone it keeps; a model in place."""
    if not isinstance(tree, nn.Module):
        return pytree.tree_map_only(Tensor, lambda t: _moved(t, device), tree)
    for module in tree.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(_moved(p, device), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = _moved(b, device)
    return tree


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, operations that launch kernels are counted: not views, not memory without values.

    One that launches several (a convolution's backward, batch norm's) counts as one. Operators of our own launch
    nothing but the kernels that they start.

    Attributes:
        counts: how often each operation was met.
        moved: bytes that each read and wrote, if nothing stays in a cache.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All of them."""
        return self.counts.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count it, and do it."""
        result = func(*args, **(kwargs or {}))
        if not _launches_nothing(func):
            name = func.overloadpacket.__name__
            tensors = [t for t in pytree.tree_leaves((args, kwargs or {}, result)) if isinstance(t, Tensor)]
            self.counts[name] += 1
            self.moved[name] += sum(t.numel() * t.element_size() for t in tensors)
        return result


def _launches_nothing(func: Any) -> bool:
    name = func.overloadpacket.__name__
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return (
        views
        or func.namespace in ("prim", "innerloop")
        or name.startswith(("empty", "new_empty", "sym_"))
        or name in _HOST_ONLY
    )


_HOST_ONLY = {"_unsafe_view", "is_same_size", "lift", "is_pinned"}


def step_launches(case: Case) -> Launches:
    """Of the meta-gradient of one meta-batch, all tasks at once."""
    model, tasks = case.build_model(), case.meta_batch()
    with fake_gpu() as device:
        learner = MetaLearner(on(device, model), F.cross_entropy, case.build_method(), "mixed", parallel="vmap")
        tasks = on(device, tasks)
        launches = Launches()
        with launches:
            result = learner.task_gradients(tasks, 0)
    assert all(t.device == device for t in pytree.tree_leaves(result))
    return launches
