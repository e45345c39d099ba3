"""Ways to take a meta-training step: this library's, the plain loop, the peers, and the convolutions alone.

Each is built in a process of its own and gives a function that takes one step and returns the loss. All do the same
arithmetic: the same network, weights, tasks and method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from innerloop.bench.cases import Case, native
from innerloop.bench.convolutions import ConvolutionsAlone
from innerloop.data import Split
from innerloop.learner import MetaLearner
from innerloop.tasks import Task, select_task
from innerloop.training.memory import keep_freed_memory
from innerloop.training.workers import Workers, available_cores

Step = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """A way to take the step.

    Attributes:
        build: makes the step, in the process that will take it.
        takes: whether it can do a case.
        needs: a package that must be installed for it.
    """

    build: Callable[[Case], Step]
    takes: Callable[[Case], bool] = lambda case: True
    needs: str | None = None

    @property
    def installed(self) -> bool:
        """Whether what it needs is here."""
        return self.needs is None or find_spec(self.needs) is not None


@dataclass(frozen=True)
class FixedTasks:
    """A source of the case's tasks, the same at every step."""

    tasks: Task

    def meta_batch(self, split: Split, start: int, size: int) -> Task:
        """Tasks ``start .. start + size - 1``."""
        return torch.utils._pytree.tree_map(lambda t: t[start : start + size], self.tasks)  # type: ignore[no-any-return]

    def task(self, split: Split, index: int) -> Task:
        """One of them."""
        return select_task(self.tasks, index)


def _innerloop(case: Case, processes: int = 0, **options: Any) -> Step:
    """The library as ``innerloop train`` uses it: a single-threaded process a core, channels-last."""
    model = case.build_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = MetaLearner(model, F.cross_entropy, case.build_method(), **options)
    return _shared_out(case, learner, processes)


def _shared_out(case: Case, learner: Any, processes: int = 0) -> Step:
    count = processes or min(available_cores(), case.tasks)
    threads = max(1, available_cores() // count)
    torch.set_num_threads(threads)
    keep_freed_memory()
    workers = Workers(learner, FixedTasks(case.meta_batch()), count, threads)

    def step() -> float:
        result, _ = workers.backward(0, case.tasks, 0)
        for p in learner.parameters():
            p.grad = None
        return float(result.loss)

    return step


def _convolutions(case: Case) -> Step:
    return _shared_out(case, ConvolutionsAlone(case))


def _plain(case: Case, layout: torch.memory_format = torch.contiguous_format) -> Step:
    """The loop as one writes it: ``create_graph=True``, the tasks' losses summed, one backward."""
    torch.set_num_threads(available_cores())
    model = native(case.build_model()).to(memory_format=layout)  # type: ignore[call-overload]
    method, steps, tasks = case.build_method(), case.inner_steps, case.meta_batch()
    norm = {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) for p in ("weight", "bias")}
    norm = norm if method.bnwb else set()
    initial = {n: p for n, p in model.named_parameters() if n not in norm}
    stacks = {n: torch.stack([p.detach()] * steps).requires_grad_() for n, p in model.named_parameters() if n in norm}
    rates = {n: torch.full((steps,), method.inner_lr, requires_grad=method.lslr) for n in initial}
    buffers = [{n: b.clone() for n, b in model.named_buffers()} for _ in range(steps)]
    weights = method.loss_weights(0)
    learned = [*initial.values(), *stacks.values(), *(rates.values() if method.lslr else ())]

    def task_loss(task: Task) -> Tensor:
        theta, total = initial, torch.zeros(())
        for k in range(steps):
            fixed = {n: s[k] for n, s in stacks.items()} | buffers[k]
            loss = F.cross_entropy(
                functional_call(model, {**theta, **fixed}, task.support.inputs), task.support.targets
            )
            g = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {n: t - rates[n][k] * d for (n, t), d in zip(theta.items(), g, strict=True)}
            if weights[k]:
                outputs = functional_call(model, {**theta, **fixed}, task.query.inputs)
                total = total + weights[k] * F.cross_entropy(outputs, task.query.targets)
        return total

    def step() -> float:
        with sdpa_kernel(SDPBackend.MATH):
            loss = torch.stack([task_loss(select_task(tasks, i)) for i in range(case.tasks)]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
        for p in learned:
            p.grad = None
        return float(loss.detach())

    return step


def _higher(case: Case, layout: torch.memory_format = torch.contiguous_format) -> Step:
    """``higher`` as its examples have it: a differentiable copy of network and optimiser, one backward a task."""
    import higher

    torch.set_num_threads(available_cores())
    model = native(case.build_model()).to(memory_format=layout)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(model.parameters(), lr=case.build_method().inner_lr)
    tasks = case.meta_batch()

    def step() -> float:
        total = 0.0
        for i in range(case.tasks):
            support, query = select_task(tasks, i)
            with (
                sdpa_kernel(SDPBackend.MATH),
                higher.innerloop_ctx(model, optimiser, copy_initial_weights=False) as (fast, inner),
            ):
                for _ in range(case.inner_steps):
                    inner.step(F.cross_entropy(fast(support.inputs), support.targets))
                loss = F.cross_entropy(fast(query.inputs), query.targets) / case.tasks
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        model.zero_grad(set_to_none=True)
        return total

    return step


def _torchopt(case: Case, layout: torch.memory_format = torch.contiguous_format) -> Step:
    """``torchopt`` as its examples have it: a differentiable optimiser, the state restored after each task."""
    import torchopt

    torch.set_num_threads(available_cores())
    model = native(case.build_model()).to(memory_format=layout)  # type: ignore[call-overload]
    optimiser = torchopt.MetaSGD(model, lr=case.build_method().inner_lr)
    tasks = case.meta_batch()
    learned = list(model.parameters())

    def step() -> float:
        total = 0.0
        before = torchopt.extract_state_dict(model, by="reference", detach_buffers=True)
        state = torchopt.extract_state_dict(optimiser, by="reference")
        for i in range(case.tasks):
            support, query = select_task(tasks, i)
            with sdpa_kernel(SDPBackend.MATH):
                for _ in range(case.inner_steps):
                    optimiser.step(F.cross_entropy(model(support.inputs), support.targets))
                loss = F.cross_entropy(model(query.inputs), query.targets) / case.tasks
                loss.backward()  # type: ignore[no-untyped-call]
            torchopt.recover_state_dict(model, before)
            torchopt.recover_state_dict(optimiser, state)
            total += float(loss.detach())
        for p in learned:
            p.grad = None
        return total

    return step


def _is_maml(case: Case) -> bool:
    return case.method == "maml"


def _convolutional(case: Case) -> bool:
    return case.network != "transformer"


_LAST = {"layout": torch.channels_last}
CONTENDERS: dict[str, Contender] = {
    "innerloop": Contender(_innerloop),
    "innerloop, mixed mode": Contender(lambda case: _innerloop(case, mode="mixed")),
    "innerloop, mixed mode, no step stored": Contender(lambda case: _innerloop(case, mode="mixed", stored_steps=0)),
    "innerloop, reverse mode": Contender(lambda case: _innerloop(case, mode="reverse")),
    "innerloop, bf16 convolutions": Contender(lambda case: _innerloop(case, precision="bf16"), _convolutional),
    "innerloop, one process": Contender(lambda case: _innerloop(case, processes=1)),
    "plain loop": Contender(_plain),
    "plain loop, channels-last": Contender(lambda case: _plain(case, **_LAST), _convolutional),
    "higher": Contender(_higher, _is_maml, "higher"),
    "higher, channels-last": Contender(
        lambda c: _higher(c, **_LAST), lambda c: _is_maml(c) and _convolutional(c), "higher"
    ),
    "torchopt": Contender(_torchopt, _is_maml, "torchopt"),
    "torchopt, channels-last": Contender(
        lambda c: _torchopt(c, **_LAST), lambda c: _is_maml(c) and _convolutional(c), "torchopt"
    ),
    "convolutions alone": Contender(_convolutions, _convolutional),
}
"""Every way to take a step, by its name."""
DEFAULT = ("innerloop", "plain loop", "higher", "torchopt", "convolutions alone")
"""Those that ``innerloop bench`` takes, where they are installed and can do the case."""
