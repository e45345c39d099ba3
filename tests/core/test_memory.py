"""Mixed mode's memory does not grow with the inner steps beyond the fast weights."""

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from oracle import make
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from innerloop import Examples, Task, maml, stack_tasks


class PeakMemory(TorchDispatchMode):
    """Most bytes held at one time in tensors that operations made; those of ``given`` do not count."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen = {t.untyped_storage()._cdata for t in tree_leaves(given)}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.live += size
                    weakref.finalize(storage, self.freed, key, size)
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


WIDTH, BATCH = 8, 2000  # an activation is some hundred times the size of the weights


def peak(way: str, steps: int, tasks: int = 1, stored_steps: int = 0) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
    examples = Examples(torch.randn(BATCH, WIDTH), torch.randn(BATCH, 1))
    meta_batch = stack_tasks([Task(examples, examples)] * tasks)
    learner = make(model, F.mse_loss, maml(inner_steps=steps, msl=True), way, stored_steps)
    with PeakMemory(meta_batch) as memory:
        learner.backward(meta_batch, epoch=0)
    return memory.peak


ACTIVATION = BATCH * WIDTH * 8
WEIGHTS = (2 * (WIDTH * WIDTH + WIDTH) + WIDTH + 1) * 8


def test_reverse_keeps_the_graph_of_every_step() -> None:
    """What mixed mode is there to avoid; and a check that the measure sees graphs."""
    assert peak("reverse", 8) - peak("reverse", 2) > 6 * 4 * ACTIVATION


def test_mixed_and_first_order_keep_fast_weights_and_gradients_alone() -> None:
    for way in ("mixed", "first-order", "mixed vmap", "first-order vmap"):
        peak(way, 1)  # what torch makes once
        growth = peak(way, 8) - peak(way, 2)
        assert growth < 6 * 8 * WEIGHTS, way  # theta, the query gradient and small change
        assert 6 * 8 * WEIGHTS < ACTIVATION  # so that one kept activation would be seen


def test_mixed_keeps_the_graphs_of_as_many_steps_as_it_is_told() -> None:
    for way in ("mixed", "mixed vmap"):
        peak(way, 1)
        three, two = (peak(way, 8, stored_steps=stored) for stored in (3, 2))
        assert 4 * ACTIVATION < three - two < 10 * ACTIVATION, way  # a step's graph
        growth = peak(way, 8, stored_steps=2) - peak(way, 3, stored_steps=2)
        assert growth < 5 * 8 * WEIGHTS, way


def test_looping_over_tasks_takes_memory_for_one() -> None:
    outputs = BATCH * 8
    for way in ("mixed", "first-order", "reverse"):
        growth = peak(way, 2, tasks=6) - peak(way, 2, tasks=2)
        assert growth < 4 * (2 * outputs + 1000), way  # a task leaves its query outputs behind
        assert 2 * outputs + 1000 < ACTIVATION  # one that a task kept would be seen
