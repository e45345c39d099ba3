"""Where a computation first left the numbers: which layer, at which inner step.

A loss or a meta-gradient that is NaN or infinite says that something went wrong long before. The offending task is run
once more, through the unrolled inner loop as ``meta_gradients.reverse`` has it, with hooks on every module and on every
gradient that flows through one. What is seen first is what went first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from innerloop.closed_forms import ClosedForms
from innerloop.inner_loop import MetaParameters
from innerloop.learner import MetaLearner
from innerloop.model_state import random_state, set_random_state
from innerloop.tasks import Examples, Task, select_task


@dataclass(frozen=True)
class FirstNonFinite:
    """The first value that was NaN or infinite.

    Attributes:
        task: index in the meta-batch.
        inner_step: 1 .. K; 0 for what was so before the first.
        what: ``"meta-parameter"``, ``"input"`` (of a module), ``"output"``, ``"loss"``, ``"gradient"`` (of the inner
            step, by a module's output or by a parameter), ``"fast weight"`` (after the step) or ``"meta-gradient"``
            (on the walk back through the inner loop, by a module's output or by a meta-parameter).
        layer: the module's or the parameter tensor's name.
        examples: ``"support"`` or ``"query"``, the set that the module was called with; empty where there is none.
    """

    task: int
    inner_step: int
    what: str
    layer: str
    examples: str = ""

    def __str__(self) -> str:
        if self.what == "meta-parameter":
            return f"the meta-parameter {self.layer} was not finite before the inner loop began"
        on = f" on the {self.examples} set" if self.examples else ""
        return f"the first to go was the {self.what} of {self.layer}{on} at inner step {self.inner_step}"


class _FoundError(Exception):
    """Nothing after the first is of interest."""


def first_non_finite(learner: MetaLearner, tasks: Task, epoch: float, only: int | None = None) -> FirstNonFinite | None:
    """The first value of a meta-batch's computation that is not finite, and None where all are.

    Nothing is changed: neither gradients, nor statistics, nor the random generators.

    Args:
        learner: as it was when the meta-batch was worked through.
        tasks: the meta-batch, ``[T, ...]``.
        epoch: where training is.
        only: look at this task alone, where it is known which one it was.
    """
    size = len(pytree.tree_leaves(tasks.support.inputs)[0])
    device = next(iter(learner.meta.adapted.values())).device
    generators = random_state(device)
    try:
        for index in range(size) if only is None else [only]:
            watch = _Watch(index)
            with watch.on(learner.model), torch.enable_grad():
                try:
                    _run(learner, select_task(tasks, index), epoch, watch)
                except _FoundError:
                    return watch.found
    finally:
        set_random_state(generators, device)
    return None


@dataclass
class _Watch:
    """Looks at values as they come, and keeps the first that is not finite."""

    task: int
    found: FirstNonFinite | None = None
    step: int = 0
    examples: str = ""
    backward: str = "gradient"
    hooks: list[Any] = field(default_factory=list)

    def see(self, what: str, layer: str, value: Any, *, step: int | None = None, examples: str = "") -> None:
        """Note a value that is not finite, if it is the first."""
        if self.found is None and not _finite(value):
            self.found = FirstNonFinite(self.task, self.step if step is None else step, what, layer, examples)

    def check(self, what: str, named: dict[str, Tensor]) -> None:
        """Look at tensors by name; stop if anything was found by now."""
        for name, tensor in named.items():
            self.see(what, name, tensor)
        if self.found is not None:
            raise _FoundError

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Watch every module of the model."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self._entered, name), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(self._left, name)))
        try:
            yield
        finally:
            for handle in (*handles, *self.hooks):
                handle.remove()

    def _entered(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.see("input", name or type(module).__name__, (args, kwargs), examples=self.examples)

    def _left(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        name = name or type(module).__name__
        self.see("output", name, output, examples=self.examples)
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                flowed = partial(self._flowed, name, self.step, self.examples)
                self.hooks.append(leaf.register_hook(flowed))  # type: ignore[no-untyped-call]

    def _flowed(self, name: str, step: int, examples: str, gradient: Tensor) -> None:
        self.see(self.backward, name, gradient, step=step, examples=examples)


def _run(learner: MetaLearner, task: Task, epoch: float, watch: _Watch) -> None:
    """One task's meta-gradient by autograd through the unrolled inner loop, watched."""
    plan, loop = learner.plan(epoch), learner.loop
    second_order = plan.mode != "first-order"
    meta = MetaParameters(
        *({n: t.detach().requires_grad_(t.requires_grad) for n, t in group.items()} for group in learner.meta)
    )
    watch.check("meta-parameter", {f"{group}/{n}": t for group, ts in meta._asdict().items() for n, t in ts.items()})
    statistics, theta = learner.statistics, meta.adapted
    state = loop.rule.initial_state(theta)
    total: Tensor = next(iter(theta.values())).new_zeros(())

    def loss_of(name: str, examples: Examples, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        watch.examples = name
        with ClosedForms():
            loss, _, buffers = loop.network.loss({**theta, **meta.fixed_at_step(k)}, statistics.at_step(k), examples)
        watch.see("loss", "the model", loss, examples=name)
        watch.check("output", {})
        return loss, buffers

    for k, weight in enumerate(plan.weights):
        watch.step = k + 1
        loss, buffers = loss_of("support", task.support, k)
        statistics = statistics.updated(k, buffers)
        values = torch.autograd.grad(loss, list(theta.values()), create_graph=True, materialize_grads=True)
        g = dict(zip(theta, values if second_order else [v.detach() for v in values], strict=True))
        watch.check("gradient", g)
        theta, state = loop.update(theta, state, g, meta.rates, k)
        watch.check("fast weight", theta)
        if isinstance(weight, Tensor) or weight != 0:
            loss, buffers = loss_of("query", task.query, k)
            statistics = statistics.updated(k, buffers)
            total = total + weight * loss
    watch.backward = "meta-gradient"
    learned = {f"{group}/{n}": t for group, ts in meta._asdict().items() for n, t in ts.items() if t.requires_grad}
    gradients = torch.autograd.grad(total, list(learned.values()), materialize_grads=True)
    watch.check("meta-gradient", dict(zip(learned, gradients, strict=True)))


def _finite(value: Any) -> bool:
    leaves: Sequence[Any] = pytree.tree_leaves(value)
    return all(bool(leaf.isfinite().all()) for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
