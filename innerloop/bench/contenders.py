"""Ways to take a meta-training step: this library's, the plain loop, the peers, and the floors.

Each is built in a process of its own, for a device, and gives a step to be taken. All do the same arithmetic: the same
network, weights, tasks, loss and method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from innerloop.bench.cases import Case, native
from innerloop.bench.floors import Floor, Kind
from innerloop.data import Split
from innerloop.engines import Compiled
from innerloop.learner import MetaLearner
from innerloop.tasks import Task, select_task
from innerloop.training.memory import keep_freed_memory
from innerloop.training.workers import Workers, available_cores


@dataclass(frozen=True)
class Step:
    """A meta-training step.

    Attributes:
        take: takes it and returns the loss.
        compile_seconds: spent on compiling by now; ``None`` where nothing is compiled.
    """

    take: Callable[[], float]
    compile_seconds: Callable[[], float | None] = lambda: None


@dataclass(frozen=True)
class Contender:
    """A way to take the step.

    Attributes:
        build: makes the step, in the process that will take it.
        takes: whether it can do a case.
        needs: a package that must be installed for it.
        module: what that package is imported as, where it has another name.
        devices: kinds of devices that it is for.
    """

    build: Callable[[Case, torch.device], Step]
    takes: Callable[[Case], bool] = lambda case: True
    needs: str | None = None
    module: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def installed(self) -> bool:
        """Whether what it needs is here."""
        module = self.module or self.needs
        return module is None or find_spec(module) is not None


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


def _innerloop(
    case: Case,
    device: torch.device,
    processes: int = 0,
    capture: bool | None = None,
    tf32: bool = False,
    **options: Any,
) -> Step:
    """The library as ``innerloop train`` uses it.

    On a CPU that is a single-threaded process a core, channels-last, or one for tasks that are vmapped; on a GPU one,
    which captures what it can.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    model = case.build_model(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    learner = MetaLearner(model, case.loss_function(), case.build_method(), **options)
    if capture is None:
        capture = device.type == "cuda" and learner.vmapped
    return _shared_out(case, device, learner, processes or int(learner.vmapped), capture)


def _compiled(case: Case, device: torch.device) -> Step:
    """Compiled graphs, shared out as ``innerloop train`` does; where nothing can be compiled it fails, and says why."""
    model = case.build_model(device)
    learner = MetaLearner(model, case.loss_function(), case.build_method(), compile="on")
    step, graphs = _shared_out(case, device, learner, processes=int(learner.vmapped)), learner.engine
    assert isinstance(graphs, Compiled)

    def take() -> float:
        loss = step.take()
        if graphs.refused is not None:
            raise RuntimeError(f"the step is not compiled: {graphs.refused}")
        return loss

    return Step(take, lambda: graphs.seconds)


def _shared_out(case: Case, device: torch.device, learner: Any, processes: int = 0, capture: bool = False) -> Step:
    cores = available_cores()
    count = 1 if device.type == "cuda" else processes or min(cores, case.tasks)
    threads = max(1, cores // count)
    torch.set_num_threads(threads)
    keep_freed_memory()
    workers = Workers(learner, FixedTasks(case.meta_batch(device)), count, threads, capture=capture)

    def take() -> float:
        result, _ = workers.backward(0, case.tasks, 0)
        for p in learner.parameters():
            p.grad = None
        return float(result.loss)

    return Step(take)


def _floor(case: Case, device: torch.device, kind: Kind) -> Step:
    return _shared_out(case, device, Floor(case, kind, device))


def _plain(case: Case, device: torch.device, layout: torch.memory_format = torch.contiguous_format) -> Step:
    """The loop as one writes it: ``create_graph=True``, the tasks' losses summed, one backward."""
    torch.set_num_threads(available_cores())
    model = native(case.build_model(device)).to(memory_format=layout)  # type: ignore[call-overload]
    method, steps, tasks = case.build_method(), case.inner_steps, case.meta_batch(device)
    loss_of = case.loss_function()
    norm = {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) for p in ("weight", "bias")}
    norm = norm if method.bnwb else set()
    initial = {n: p for n, p in model.named_parameters() if n not in norm}
    stacks = {n: torch.stack([p.detach()] * steps).requires_grad_() for n, p in model.named_parameters() if n in norm}
    rates = {n: torch.full((steps,), method.inner_lr, device=device, requires_grad=method.lslr) for n in initial}
    buffers = [{n: b.clone() for n, b in model.named_buffers()} for _ in range(steps)]
    weights = method.loss_weights(0)
    learned = [*initial.values(), *stacks.values(), *(rates.values() if method.lslr else ())]

    def task_loss(task: Task) -> Tensor:
        theta, total = initial, torch.zeros((), device=device)
        for k in range(steps):
            fixed = {n: s[k] for n, s in stacks.items()} | buffers[k]
            loss = loss_of(functional_call(model, {**theta, **fixed}, task.support.inputs), task.support.targets)
            g = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {n: t - rates[n][k] * d for (n, t), d in zip(theta.items(), g, strict=True)}
            if weights[k]:
                outputs = functional_call(model, {**theta, **fixed}, task.query.inputs)
                total = total + weights[k] * loss_of(outputs, task.query.targets)
        return total

    def take() -> float:
        with sdpa_kernel(SDPBackend.MATH):
            loss = torch.stack([task_loss(select_task(tasks, i)) for i in range(case.tasks)]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
        for p in learned:
            p.grad = None
        return float(loss.detach())

    return Step(take)


def _higher(case: Case, device: torch.device, layout: torch.memory_format = torch.contiguous_format) -> Step:
    """``higher`` as its examples have it: a differentiable copy of network and optimiser, one backward a task."""
    import higher

    torch.set_num_threads(available_cores())
    model = native(case.build_model(device)).to(memory_format=layout)  # type: ignore[call-overload]
    optimiser = torch.optim.SGD(model.parameters(), lr=case.build_method().inner_lr)
    tasks, loss_of = case.meta_batch(device), case.loss_function()

    def take() -> float:
        total = 0.0
        for i in range(case.tasks):
            support, query = select_task(tasks, i)
            with (
                sdpa_kernel(SDPBackend.MATH),
                higher.innerloop_ctx(model, optimiser, copy_initial_weights=False) as (fast, inner),
            ):
                for _ in range(case.inner_steps):
                    inner.step(loss_of(fast(support.inputs), support.targets))
                loss = loss_of(fast(query.inputs), query.targets) / case.tasks
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        model.zero_grad(set_to_none=True)
        return total

    return Step(take)


def _torchopt(case: Case, device: torch.device, layout: torch.memory_format = torch.contiguous_format) -> Step:
    """``torchopt`` as its examples have it: a differentiable optimiser, the state restored after each task."""
    import torchopt

    torch.set_num_threads(available_cores())
    model = native(case.build_model(device)).to(memory_format=layout)  # type: ignore[call-overload]
    optimiser = torchopt.MetaSGD(model, lr=case.build_method().inner_lr)
    tasks, loss_of = case.meta_batch(device), case.loss_function()
    learned = list(model.parameters())

    def take() -> float:
        total = 0.0
        before = torchopt.extract_state_dict(model, by="reference", detach_buffers=True)
        state = torchopt.extract_state_dict(optimiser, by="reference")
        for i in range(case.tasks):
            support, query = select_task(tasks, i)
            with sdpa_kernel(SDPBackend.MATH):
                for _ in range(case.inner_steps):
                    optimiser.step(loss_of(model(support.inputs), support.targets))
                loss = loss_of(model(query.inputs), query.targets) / case.tasks
                loss.backward()  # type: ignore[no-untyped-call]
            torchopt.recover_state_dict(model, before)
            torchopt.recover_state_dict(optimiser, state)
            total += float(loss.detach())
        for p in learned:
            p.grad = None
        return total

    return Step(take)


def _parallel_metalearn(case: Case, device: torch.device) -> Step:
    """``parallel-metalearn`` as its examples have it: all tasks vmapped, chunks as large as the meta-batch.

    Its outer optimiser steps too: here at a rate of 0, so that the weights stay those of the others. Batch norm does
    without running statistics, which its vmap does not take from PyTorch's.
    """
    from metalearn.algorithms import MAML
    from metalearn.inner_optimizers import InnerSGD
    from metalearn.loss.base import BaseLoss
    from metalearn.model_wrappers import MAML_Model
    from torch.func import replace_all_batch_norm_modules_

    torch.set_num_threads(available_cores())
    loss_of, (support, query) = case.loss_function(), case.meta_batch(device)

    class Model(MAML_Model):  # type: ignore[misc]
        def forward(self, x: Tensor, **kwargs: Any) -> dict[str, Any]:
            return {"logits": self.backbone(x), "buffers": dict(self.named_buffers())}

    class Loss(BaseLoss):  # type: ignore[misc]
        def forward(
            self, out_dict: dict[str, Any], targets: dict[str, Tensor], model_states: Any = None, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            loss = loss_of(out_dict["logits"], targets["labels"])
            return loss, loss.detach()

    model = Model(replace_all_batch_norm_modules_(native(case.build_model(device))))
    inner = InnerSGD(model.get_fast_weights(), inner_lr=case.inner_lr, learn_lr=False)
    learner = MAML(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        inner_optimizer=inner,
        support_loss_fn=Loss(),
        inner_steps=case.inner_steps,
        chunk_size=case.tasks,
        device=device,
    )
    tasks = support.inputs, {"labels": support.targets}, query.inputs, {"labels": query.targets}

    def take() -> float:
        with sdpa_kernel(SDPBackend.MATH):
            loss, _ = learner.step(iter([tasks]))
        return float(loss)

    return Step(take)


def _is_maml(case: Case) -> bool:
    return case.method == "maml"


def _convolutional(case: Case) -> bool:
    return case.network in ("conv4", "resnet12")


def _with(build: Callable[..., Step], **options: Any) -> Callable[[Case, torch.device], Step]:
    return lambda case, device: build(case, device, **options)


def _channels_last_maml(case: Case) -> bool:
    return _is_maml(case) and _convolutional(case)


_LAST = {"layout": torch.channels_last}
_CPU, _CUDA = ("cpu",), ("cuda",)
_VMAPPED = {"parallel": "vmap"}
FLOORS = {"convolutions alone": "convolutions", "matrix products alone": "matrix products"}
"""The contenders that are floors, and what they do."""
CONTENDERS: dict[str, Contender] = {
    "innerloop": Contender(_innerloop),
    "innerloop, compiled": Contender(_compiled),
    "innerloop, mixed mode": Contender(_with(_innerloop, mode="mixed")),
    "innerloop, mixed mode, no step stored": Contender(_with(_innerloop, mode="mixed", stored_steps=0)),
    "innerloop, reverse mode": Contender(_with(_innerloop, mode="reverse")),
    "innerloop, bf16 convolutions": Contender(_with(_innerloop, precision="bf16"), _convolutional),
    "innerloop, one process": Contender(_with(_innerloop, processes=1), devices=_CPU),
    "innerloop, looped": Contender(_with(_innerloop, parallel="loop")),
    "innerloop, vmapped": Contender(_with(_innerloop, capture=False, **_VMAPPED)),
    "innerloop, captured": Contender(_with(_innerloop, capture=True, **_VMAPPED), devices=_CUDA),
    "innerloop, captured tf32": Contender(_with(_innerloop, capture=True, tf32=True, **_VMAPPED), devices=_CUDA),
    "innerloop, captured bf16": Contender(
        _with(_innerloop, capture=True, precision="bf16", **_VMAPPED), _convolutional, devices=_CUDA
    ),
    "plain loop": Contender(_plain),
    "plain loop, channels-last": Contender(_with(_plain, **_LAST), _convolutional),
    "higher": Contender(_higher, _is_maml, "higher"),
    "higher, channels-last": Contender(_with(_higher, **_LAST), _channels_last_maml, "higher"),
    "torchopt": Contender(_torchopt, _is_maml, "torchopt"),
    "torchopt, channels-last": Contender(_with(_torchopt, **_LAST), _channels_last_maml, "torchopt"),
    "parallel-metalearn": Contender(_parallel_metalearn, _is_maml, "parallel-metalearn", "metalearn"),
    "convolutions alone": Contender(_with(_floor, kind="convolutions"), _convolutional),
    "matrix products alone": Contender(
        _with(_floor, kind="matrix products"), lambda case: case.network == "transformer"
    ),
}
"""Every way to take a step, by its name."""
DEFAULT = {
    "cpu": ("innerloop", "innerloop, compiled", "plain loop", "higher", "torchopt", "parallel-metalearn", *FLOORS),
    "cuda": (
        "innerloop",
        "innerloop, looped",
        "innerloop, vmapped",
        "innerloop, captured",
        "innerloop, captured tf32",
        "innerloop, captured bf16",
        "innerloop, compiled",
        "plain loop",
        "higher",
        "torchopt",
        "parallel-metalearn",
        *FLOORS,
    ),
}
"""Those that ``innerloop bench`` takes on a kind of device, where they are installed and can do the case."""
