"""MetaLearner: a model, a loss and a method, ready for an optimiser's loop."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from innerloop import learning_rates, per_step
from innerloop.inner_loop import InnerLoop, MetaParameters
from innerloop.meta_gradients import META_GRADIENTS, GradientMode, LossWeights, TaskGradient
from innerloop.methods import Method, maml
from innerloop.network import Loss, Network, Normalisation, evaluating
from innerloop.per_step import Statistics
from innerloop.precision import Precision
from innerloop.tasks import Examples, Task, as_task, concatenated, meta_batch_size, select_task, stacked
from innerloop.update_rules import UPDATE_RULES, Tensors

MetaBatch = tuple[tuple[Any, Any], tuple[Any, Any]]
Parallel = Literal["auto", "loop", "vmap"]

_SMALL_MODEL = 10_000
"""Parameters under which, on a CPU and without convolutions, an operation's overhead costs more than its arithmetic."""


class NonFiniteLossError(ArithmeticError):
    """A support or query loss became NaN or infinite.

    Attributes:
        task: index in the meta-batch.
        inner_step: 1 .. K, the step at which it was first seen.
        which: ``"support"`` (the loss that the step was to descend) or ``"query"`` (the loss after it).
    """

    def __init__(self, which: str, task: int, inner_step: int, value: float) -> None:
        self.which, self.task, self.inner_step = which, task, inner_step
        super().__init__(f"the {which} loss of task {task} is {value} at inner step {inner_step}")


@dataclass(frozen=True)
class MetaBatchResult:
    """What ``MetaLearner.backward`` saw on a meta-batch of T tasks.

    Attributes:
        loss: mean over tasks of sum_k w_k L_query(theta^k).
        support_losses: ``[T, K]``, the loss that inner step k descended.
        query_losses: ``[T, K]``, after each inner step; NaN where w_k = 0 and it was not computed.
        query_outputs: the model's outputs on the query set after the last step, tensors ``[T, ...]``.
    """

    loss: Tensor
    support_losses: Tensor
    query_losses: Tensor
    query_outputs: Any


class Plan(NamedTuple):
    """What a meta-gradient is to be, at one time in training.

    Attributes:
        mode: how it is computed.
        weights: w_1 .. w_K of the query losses.
    """

    mode: GradientMode
    weights: LossWeights


class MetaLearner:
    """Meta-learns the initialisation of ``model`` (and rates and norm stacks, as the method says).

    The model is any ``nn.Module`` and stays as it is: its parameters are the initialisation theta^0, which the outer
    optimiser moves in place. Frozen parameters (``requires_grad=False``) are neither adapted nor learned.

    >>> learner = MetaLearner(model, F.cross_entropy, maml_plus_plus())            # doctest: +SKIP
    >>> optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)                # doctest: +SKIP
    >>> learner.backward(tasks, epoch); optimizer.step(); optimizer.zero_grad()    # doctest: +SKIP
    >>> classifier = learner.adapt((images, labels))                               # doctest: +SKIP

    Args:
        model: called with a task's inputs. Move it to its device and dtype first.
        loss: ``loss(model(inputs), targets)``, a scalar tensor.
        method: see ``innerloop.methods``.
        mode: how second-order meta-gradients are computed: ``"mixed"`` (memory does not grow with the inner steps)
            or ``"reverse"`` (autograd through the unrolled loop). ``"first-order"`` makes every meta-gradient first
            order. ``"auto"`` is reverse where tasks are looped over and have no more inner steps than ``stored_steps``,
            and mixed elsewhere.
        stored_steps: in mixed mode, how many of the last inner steps keep the graph of their gradient for the walk
            back, which saves computing it once more: a fifth of the arithmetic. Set it lower where memory is short.
        precision: of convolutions: ``"float32"`` is whatever the model has, ``"bf16"`` rounds their inputs to bfloat16
            where the model is called by this learner; everything else stays as it is.
        parallel: ``"loop"`` works through the tasks one by one, with memory for one; ``"vmap"`` does all at once, in
            mixed and first-order mode. ``"auto"`` is vmap on a GPU and for small models without convolutions, where
            overhead is what costs, and loop for others and for models that cannot be vmapped (``nn.LSTM``).

    Raises:
        ValueError: no trainable parameter matches the method's patterns, or the mode is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        method: Method | None = None,
        mode: Literal["auto"] | GradientMode = "auto",
        parallel: Parallel = "auto",
        stored_steps: int = 5,
        precision: Precision = "float32",
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}; got {precision!r}")
        if stored_steps < 0:
            raise ValueError(f"stored_steps must be 0 or more, got {stored_steps}")
        if parallel not in get_args(Parallel):
            raise ValueError(f"parallel must be one of {', '.join(get_args(Parallel))}; got {parallel!r}")
        if mode != "auto" and mode not in META_GRADIENTS:
            raise ValueError(f"mode must be one of auto, {', '.join(META_GRADIENTS)}; got {mode!r}")
        self.model = model
        self.method = method = method if method is not None else maml()
        self.mode: Literal["auto"] | GradientMode = mode
        self.loop = InnerLoop(
            Network(model, loss, precision), UPDATE_RULES[method.inner_rule], method.lslr, stored_steps=stored_steps
        )
        self.meta = _meta_parameters(model, method)
        self.statistics = _statistics(model, method)
        self.parallel: Parallel = parallel
        on_cpu = all(p.device.type == "cpu" for p in self.meta.adapted.values())
        convolutional = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
        small = sum(p.numel() for p in model.parameters()) < _SMALL_MODEL and not convolutional
        self._vmap = parallel == "vmap" or (parallel == "auto" and (small or not on_cpu))

    def parameters(self) -> Iterator[Tensor]:
        """All learned meta-parameters, for the outer optimiser."""
        return (t for _, t in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Learned meta-parameters as ``group/name``: ``adapted/..., shared/..., per_step/..., rates/...``."""
        for group, tensors in self.meta._asdict().items():
            yield from ((f"{group}/{name}", t) for name, t in tensors.items() if t.requires_grad)

    def share_memory(self) -> None:
        """Move all tensors to shared memory, in place, so that other processes see every update."""
        for tensors in (*self.meta, *self.statistics):
            for tensor in tensors.values():
                tensor.share_memory_()  # type: ignore[no-untyped-call]

    def state_dict(self) -> Tensors:
        """Every tensor that is learned or kept, by name: what ``load_state_dict`` takes, and safetensors saves."""
        return {name: t.detach() for name, t in self._state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, in place.

        Raises:
            ValueError: names or shapes do not fit this model and method.
        """
        own = dict(self._state())
        if own.keys() != state.keys():
            raise ValueError(
                "the state does not fit this model and method: missing "
                f"{sorted(own.keys() - state.keys())}, unexpected {sorted(state.keys() - own.keys())}"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(state[name].shape)} in the state and {tuple(tensor.shape)} here"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters()
        yield from ((f"statistics/{n}", t) for n, t in self.statistics.shared.items())
        yield from ((f"per_step_statistics/{n}", t) for n, t in self.statistics.per_step.items())

    def backward(self, tasks: Task | MetaBatch, epoch: float | None = None) -> MetaBatchResult:
        """Add the meta-gradient of the mean task loss to ``.grad`` of every learned meta-parameter.

        Looped over, tasks come one after the other and memory does not grow with their number. Running statistics
        become the mean over tasks of what each task left behind.

        Args:
            tasks: a meta-batch, ``((inputs, targets), (inputs, targets))`` of support and query, tensors ``[T, ...]``.
            epoch: where training is, for methods with schedules (MSL, DA), which need it.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite; no gradient was added.
            TypeError: the loss was not a scalar.
            ValueError: the method needs the epoch, or ``tasks`` is not a meta-batch.
        """
        return self.accumulate([self.task_gradients(tasks, epoch)], epoch)

    def task_gradients(self, tasks: Task | MetaBatch, epoch: float | None = None) -> TaskGradient:
        """Gradients and losses of a meta-batch, changing nothing: the gradient summed over tasks, all else stacked.

        ``accumulate`` takes it from there, so that the tasks of a meta-batch can be shared out over processes.
        """
        return self.planned_gradients(as_task(tasks), self.plan(epoch))

    def plan(self, epoch: float | None = None) -> Plan:
        """What is to be computed at an epoch.

        Raises:
            ValueError: the method needs the epoch.
        """
        if epoch is None and self.method.needs_epoch:
            raise ValueError("this method has MSL or DA, whose schedules need the epoch: backward(tasks, epoch)")
        second_order = self.method.derivative_order(epoch or 0) == 2
        mode: GradientMode = self.mode if self.mode != "auto" else self._chosen_mode()
        return Plan(mode if second_order else "first-order", self.method.loss_weights(epoch or 0))

    def _chosen_mode(self) -> GradientMode:
        """Reverse where mixed mode would store every graph too: the same memory, and less to do one by one."""
        return "mixed" if self._vmap or self.method.inner_steps > self.loop.stored_steps else "reverse"

    def planned_gradients(self, tasks: Task, plan: Plan) -> TaskGradient:
        """``task_gradients`` as a plan has it."""
        size = meta_batch_size(tasks)
        return self._vmapped(tasks, size, plan) or self._looped(tasks, size, plan)

    @property
    def vmapped(self) -> bool:
        """Whether tasks are worked through all at once."""
        return self._vmap and self.mode != "reverse"

    def accumulate(self, parts: Sequence[TaskGradient], epoch: float | None = None) -> MetaBatchResult:
        """Add what ``task_gradients`` gave for the parts of one meta-batch to ``.grad``, and merge the statistics.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite; nothing was added.
        """
        result = concatenated([_without_gradient(part) for part in parts])
        outcome = MetaBatchResult(result.loss.mean(), result.support_losses, result.query_losses, result.query_outputs)
        _check_finite(outcome, self.method.loss_weights(epoch or 0))
        size = len(result.loss)
        for group, parameters in self.meta._asdict().items():
            for name in getattr(parts[0].gradient, group):
                parameter = parameters[name]
                if not parameter.requires_grad:  # zero_init: adapted, and not learned
                    continue
                gradient = reduce(torch.add, [getattr(p.gradient, group)[name] for p in parts]).detach() / size
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self.statistics.assign_mean(result.statistics)
        return outcome

    def _looped(self, tasks: Task, size: int, plan: Plan) -> TaskGradient:
        """One task after the other."""
        total: MetaParameters | None = None
        rest: list[TaskGradient] = []
        for i in range(size):
            meta_gradient = META_GRADIENTS[plan.mode]
            result = meta_gradient(self.loop, self.meta, self.statistics, select_task(tasks, i), plan.weights)
            total = result.gradient if total is None else pytree.tree_map(torch.add, total, result.gradient)
            rest.append(_without_gradient(result))
        assert total is not None
        return stacked(rest)._replace(gradient=total)

    def _vmapped(self, tasks: Task, size: int, plan: Plan) -> TaskGradient | None:
        """All tasks at once; None where tasks are to be looped over."""
        if not self._vmap or plan.mode == "reverse":
            return None
        loop = replace(self.loop, functional=True)

        def task_gradient(statistics: Statistics, task: Task) -> TaskGradient:
            return META_GRADIENTS[plan.mode](loop, self.meta, statistics, task, plan.weights)

        try:
            result = vmap(task_gradient, randomness="different")(self.statistics.expanded(size), tasks)
        except RuntimeError as error:
            if self.parallel == "vmap" or isinstance(error, torch.OutOfMemoryError):
                raise
            warnings.warn(
                f"{type(self.model).__name__} cannot be vmapped, so tasks are worked through one by one. ({error})",
                stacklevel=4,
            )
            self._vmap = False
            return None
        return result._replace(gradient=pytree.tree_map(lambda t: t.sum(0), result.gradient))

    def trajectory(self, support: Examples | tuple[Any, Any], steps: int | None = None) -> Iterator[Tensors]:
        """theta^0 .. theta^steps on a support set, in evaluation mode; ``predict`` calls the model with one of them.

        Support sets are always normalised with their own batch's statistics, as in training. ``steps`` defaults to
        those of training; more go on with the last step's rates, norm weights and statistics.
        """
        # The inner loop takes gradients, also where the caller has switched autograd off.
        with torch.inference_mode(False):
            support = pytree.tree_map_only(torch.Tensor, lambda t: t.clone() if t.is_inference() else t, support)
        walk = self.loop.trajectory(self.meta, self.statistics, Examples(*support), self._steps(steps))
        while True:
            # The modes are set for one step at a time: the caller may use the model in between.
            with torch.inference_mode(False), evaluating(self.model, "batch"):
                theta = next(walk, None)
            if theta is None:
                return
            yield theta

    def _steps(self, steps: int | None) -> int:
        if steps is not None and steps < 0:
            raise ValueError(f"steps must be 0 or more, got {steps}")
        return self.method.inner_steps if steps is None else steps

    @torch.no_grad()
    def predict(
        self,
        fast_weights: Tensors,
        inner_step: int,
        inputs: Any,
        normalisation: Normalisation = "batch",
        support: Any = None,
    ) -> Any:
        """The model's outputs with theta^k of ``trajectory``, k = ``inner_step``.

        ``normalisation="batch"`` lets the inputs normalise each other (transductive, as in the paper);
        ``"running"`` uses the running statistics of the inner step, ``"support"`` those of the inputs ``support`` at
        the same fast weights (both inductive: an input's output is its own).

        Raises:
            ValueError: normalisation by the support set, without one.
        """
        tensors, buffers = self._tensors_at(fast_weights, inner_step)
        if normalisation == "support":
            if support is None:
                raise ValueError('normalisation="support" needs the inputs of the support set: predict(..., support=)')
            buffers = self._support_statistics(tensors, buffers, support)
        with evaluating(self.model, normalisation):
            return self.loop.network.outputs(tensors, buffers, inputs)

    def _tensors_at(self, fast_weights: Tensors, inner_step: int) -> tuple[Tensors, Tensors]:
        """Parameters and buffers (copies) to call the model with at theta^k; norm layers have those of step k - 1."""
        last = max(inner_step - 1, 0)
        buffers = {n: b.clone() for n, b in self.statistics.at_step(last).items()}
        return {**fast_weights, **self.meta.fixed_at_step(last)}, buffers

    def _support_statistics(self, parameters: Tensors, buffers: Tensors, support: Any) -> Tensors:
        """The buffers as a pass over the support set's inputs leaves them, its statistics in the norm layers'."""
        with evaluating(self.model, "batch"), per_step.whole_batch_statistics(self.model):
            self.loop.network.outputs(parameters, buffers, support)
        return buffers

    def adapt(
        self,
        support: Examples | tuple[Any, Any],
        steps: int | None = None,
        normalisation: Normalisation = "batch",
    ) -> nn.Module:
        """A copy of the model, adapted to a support set: an ordinary ``nn.Module`` in evaluation mode.

        Args:
            support: inputs and targets, without a task dimension.
            steps: inner steps, by default those of training. Beyond them the last step's rates, norm weights and
                statistics go on being used.
            normalisation: ``"batch"``: norm layers use the statistics of whatever batch they are given, also in
                evaluation mode; ``"running"``: the meta-trained running statistics; ``"support"``: those of the
                support set. With either of the last two an input's output is its own.
        """
        steps = self._steps(steps)
        *_, theta = self.trajectory(support, steps)
        adapted = copy.deepcopy(self.model)
        with torch.no_grad():
            tensors, buffers = self._tensors_at(theta, steps)
            if normalisation == "support":
                buffers = self._support_statistics(tensors, buffers, support[0])
            own = {**dict(adapted.named_parameters()), **dict(adapted.named_buffers())}
            for name, value in {**tensors, **buffers}.items():
                own[name].copy_(value)
        for p in adapted.parameters():
            p.grad = None
        if normalisation == "batch":
            for _, layer in per_step.norm_layers(adapted):
                if isinstance(layer, _NormBase):
                    layer.track_running_stats = False
                    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        return adapted.eval()


def _without_gradient(result: TaskGradient) -> TaskGradient:
    return result._replace(gradient=MetaParameters({}, {}, {}, {}))


def _check_finite(outcome: MetaBatchResult, weights: list[float]) -> None:
    """Raise at the first inner step with a loss that is NaN or infinite."""
    computed = torch.tensor([w != 0 for w in weights], device=outcome.query_losses.device)
    bad_support = ~outcome.support_losses.isfinite()
    bad_query = ~outcome.query_losses.isfinite() & computed
    bad = torch.stack([bad_support, bad_query]).nonzero().tolist()  # (which, task, step)
    if bad:
        which, task, step = min(bad, key=lambda b: (b[2], b[0], b[1]))
        losses = (outcome.support_losses, outcome.query_losses)[which]
        raise NonFiniteLossError(("support", "query")[which], task, step + 1, float(losses[task, step]))


def _meta_parameters(model: nn.Module, method: Method) -> MetaParameters:
    """Sort the model's trainable parameters into adapted, shared and per-step ones, and make the rates."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    norm = per_step.norm_parameter_names(model) & trainable.keys() if method.bnwb else set()
    for pattern in (*method.adapt, *method.adapt_except, *method.zero_init):
        if not any(fnmatchcase(name, pattern) for name in trainable):
            raise ValueError(
                f"no trainable parameter of {type(model).__name__} matches {pattern!r}; it has {', '.join(trainable)}"
            )
    adapted: Tensors = {
        n: p
        for n, p in trainable.items()
        if n not in norm
        and any(fnmatchcase(n, pattern) for pattern in method.adapt)
        and not any(fnmatchcase(n, pattern) for pattern in method.adapt_except)
    }
    if not adapted:
        raise ValueError(
            f"nothing is left to adapt: of {', '.join(trainable)} none matches adapt={method.adapt} "
            f"without adapt_except={method.adapt_except}" + (" and the norm layers (BNWB)" if norm else "")
        )
    if method.lslr:
        rates = learning_rates.per_layer_per_step(adapted, method.inner_lr, method.inner_steps)
    elif method.meta_sgd:
        rates = learning_rates.per_element(adapted, method.inner_lr)
    else:
        rates = learning_rates.constant(adapted, method.inner_lr)
    for name in [n for n in adapted if any(fnmatchcase(n, pattern) for pattern in method.zero_init)]:
        adapted[name] = adapted[name].detach().clone().zero_()  # not zeros_like: see per_step.stack
    stacks = per_step.stack({n: trainable[n] for n in sorted(norm)}, method.inner_steps)
    return MetaParameters(
        adapted=adapted,
        shared={n: p for n, p in trainable.items() if n not in adapted and n not in norm},
        per_step={n: s.requires_grad_() for n, s in stacks.items()},
        rates=rates,
    )


def _statistics(model: nn.Module, method: Method) -> Statistics:
    """The model's own buffers, those of the norm layers as stacks under BNRS."""
    buffers = dict(model.named_buffers())
    norm = per_step.norm_buffer_names(model) & buffers.keys() if method.bnrs else set()
    return Statistics(
        {n: b for n, b in buffers.items() if n not in norm},
        per_step.stack({n: buffers[n] for n in sorted(norm)}, method.inner_steps),
    )
