"""MetaLearner: a model, a loss and a method, ready for an optimiser's loop."""

from __future__ import annotations

import math
import numbers
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from innerloop import learning_rates, norm_layers, per_step
from innerloop.adapted import Asked, TaskOutputs, answers, keep_statistics, kept_buffers, tensors_at
from innerloop.engines import Auto, Compiled, Engine, Estimate, Loop, Plan, Subject, Vmapped
from innerloop.engines.compiled import TIMEOUT
from innerloop.explanations import UnsuitableModelError, check_loss, check_model, explained
from innerloop.inner_loop import InnerLoop, MetaParameters
from innerloop.meta_gradients import META_GRADIENTS, NO_GRADIENT, GradientMode, TaskGradient
from innerloop.methods import Method, maml, whole_number
from innerloop.model_state import copied, functions_kept, locked
from innerloop.network import Loss, Network
from innerloop.norm_layers import Normalisation
from innerloop.per_step import Statistics
from innerloop.precision import Precision
from innerloop.rehearsal import check_modes, is_trusted, rehearse
from innerloop.tasks import (
    Examples,
    Task,
    as_meta_batch,
    as_support,
    as_tensors,
    concatenated,
    select_task,
)
from innerloop.update_rules import UPDATE_RULES, Tensors

if TYPE_CHECKING:
    from innerloop.diagnose import Finding

MetaBatch = tuple[tuple[Any, Any], tuple[Any, Any]]
Parallel = Literal["auto", "loop", "vmap"]
Compile = Literal["auto", "on", "off"]

_GRAPH_IS_GONE = ("does not require grad", "backward through the graph a second time")

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


class FastWeights(dict[str, Tensor]):
    """theta^k: adapted parameters by name.

    Attributes:
        buffers: of the model, but for norm layers', as the k support passes left them.
        support_loss: that the step here descended; None of theta^0.
    """

    def __init__(self, theta: Tensors, buffers: Tensors, support_loss: Tensor | None) -> None:
        super().__init__(theta)
        self.buffers, self.support_loss = buffers, support_loss


class MetaLearner:
    """Meta-learns the initialisation of ``model`` (and rates and norm stacks, as the method says).

    The model is any ``nn.Module`` and stays as it is: its parameters are the initialisation theta^0, which the outer
    optimiser moves in place. Frozen parameters (``requires_grad=False``) are neither adapted nor learned, and norm
    layers frozen by ``layer.eval()`` keep their statistics. Whoever changes the model otherwise (another head, another
    dtype or device, other parameters frozen) makes a new learner; the old one says so. Threads that use one learner
    wait for each other.

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
        compile: ``"on"`` compiles the functions that an inner step repeats, with all derivatives in them, by PyTorch's
            Inductor: a minute or less at the first step, then many times as fast for small models whose operations
            cost more to start than to do, and on a CPU of no use for convolutions. What cannot be compiled (dropout,
            control flow by values, no C++ compiler) is computed as ever, with one warning. Exact modes are then the
            same walk. ``"auto"`` does it once it pays: see ``expect``, for loops whose end is known.
        compile_timeout: seconds that one of these functions may take to compile.

    Raises:
        ValueError: no trainable parameter matches the method's patterns, the mode is unknown, or the model's parameters
            have no shapes yet.
        TypeError: an argument is of the wrong kind.
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
        compile: Compile = "off",
        compile_timeout: float = TIMEOUT,
    ) -> None:
        if compile not in get_args(Compile):
            raise ValueError(f"compile must be one of {', '.join(get_args(Compile))}; got {compile!r}")
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}; got {precision!r}")
        check_model(model)
        check_loss(loss, model)
        if method is not None and not isinstance(method, Method):
            called = f": call it, {method.__name__}()" if callable(method) and hasattr(method, "__name__") else ""
            raise TypeError(f"the method must be a Method, such as innerloop.maml(), got {method!r:.80}{called}")
        stored_steps = whole_number("stored_steps", stored_steps, least=0)
        if parallel not in get_args(Parallel):
            raise ValueError(f"parallel must be one of {', '.join(get_args(Parallel))}; got {parallel!r}")
        if mode != "auto" and mode not in META_GRADIENTS:
            raise ValueError(f"mode must be one of auto, {', '.join(META_GRADIENTS)}; got {mode!r}")
        self._model = model
        self.method = method = method if method is not None else maml()
        self.mode: Literal["auto"] | GradientMode = mode
        self.loop = InnerLoop(
            Network(model, loss, precision), UPDATE_RULES[method.inner_rule], method.lslr, stored_steps=stored_steps
        )
        self.meta = _meta_parameters(model, method)
        self.statistics = _statistics(model, method)
        # Made now, to know later what has changed. Of these tensors there are copies, for every inner step.
        network = self.loop.network
        frozen = {
            f"{layer}.{n}".lstrip(".")
            for layer in network.modes.seen()
            for n, _ in model.get_submodule(layer).named_buffers()
        }
        self._copied = frozenset({*self.meta.per_step, *(self.statistics.per_step.keys() & frozen)})
        self._counters = frozenset(n for n in self.statistics.per_step if n.endswith("num_batches_tracked"))
        network.state.check()
        self._rehearsed: set[str] = set()
        self._user: int | None = None
        self.parallel: Parallel = parallel
        on_cpu = all(p.device.type == "cpu" for p in self.meta.adapted.values())
        convolutional = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
        small = sum(p.numel() for p in model.parameters()) < _SMALL_MODEL and not convolutional
        vmap = parallel == "vmap" or (parallel == "auto" and (small or not on_cpu))
        plain = Vmapped(insists=parallel == "vmap") if vmap else Loop()
        compiled = Compiled(plain, model, vmap, compile_timeout)
        self._engines: dict[Compile, Engine] = {"off": plain, "on": compiled, "auto": Auto(plain, compiled)}
        self.engine = self._engines[compile]

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would be read in part: a learner is made of its arguments once."""
        if name in ("method", "mode", "parallel") and hasattr(self, name):
            raise AttributeError(
                f"{name} of a MetaLearner cannot be changed: make a new one, MetaLearner(..., {name}=)"
            )
        super().__setattr__(name, value)

    @property
    def model(self) -> nn.Module:
        """The model that is meta-learned."""
        return self._model

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """One thread at a time, with autograd as it must be, on the model that the learner was made with.

        Raises:
            ModelChangedError: it is another one by now.
        """
        here = threading.get_ident()
        if self._user == here:  # one method calls another
            self.loop.network.state.check(self._copied, self._counters)
            yield
            return
        # Gradients are taken also where the caller has switched autograd off.
        with locked(self._model), torch.inference_mode(False), explained(self._model):
            self.loop.network.state.check(self._copied, self._counters)
            self._user = here
            try:
                yield
            finally:
                self._user = None

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
                tensor.share_memory_()

    def state_dict(self) -> Tensors:
        """Every tensor that is learned or kept, by name: what ``load_state_dict`` takes, and safetensors saves."""
        with self._in_use():
            return {name: t.detach() for name, t in self._state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, in place.

        Raises:
            ValueError: names or shapes do not fit this model and method.
        """
        with self._in_use():
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

    def backward(
        self,
        tasks: Task | MetaBatch,
        epoch: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> MetaBatchResult:
        """Add the meta-gradient of the mean task loss to ``.grad`` of every learned meta-parameter.

        Looped over, tasks come one after the other and memory does not grow with their number. Running statistics
        become the mean over tasks of what each task left behind.

        Args:
            tasks: a meta-batch, ``((inputs, targets), (inputs, targets))`` of support and query, tensors
                ``[T, n, ...]`` of T tasks with n examples. NumPy arrays and lists of numbers become tensors of the
                model's type; a number, string or None is the same for all tasks.
            epoch: where training is, for methods with schedules (MSL, DA), which need it.
            scaler: scale the query losses by its scale, so that ``scaler.step`` and ``scaler.update`` take it from
                there, as after ``scaler.scale(loss).backward()``.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite; no gradient was added.
            TypeError: the loss was not a scalar, or the tasks hold something that is none of the above.
            ValueError: the method needs the epoch, or ``tasks`` is not a meta-batch.
            ModelChangedError: the model has other parameters than when the learner was made.
            UnsuitableModelError: the model has no second derivative, or is compiled.
        """
        with self._in_use():
            if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
                raise TypeError(f"scaler must be a torch.amp.GradScaler, got {scaler!r:.80}")
            scale = None if scaler is None else scaler.scale(torch.ones((), device=self._like.device))
            return self.accumulate([self.task_gradients(tasks, epoch, scale)], epoch)

    def task_gradients(
        self, tasks: Task | MetaBatch, epoch: float | None = None, scale: Tensor | None = None
    ) -> TaskGradient:
        """Gradients and losses of a meta-batch, changing nothing: the gradient summed over tasks, all else stacked.

        ``accumulate`` takes it from there, so that the tasks of a meta-batch can be shared out over processes.
        ``scale`` is of the gradients alone.
        """
        mode, weights = self.plan(epoch)
        if scale is None:
            return self.planned_gradients(as_meta_batch(tasks, self._like), Plan(mode, weights))
        scaled = Plan(mode, [w and w * scale for w in weights])
        result = self.planned_gradients(as_meta_batch(tasks, self._like), scaled)
        return result._replace(loss=result.loss / scale)

    @property
    def _like(self) -> Tensor:
        """A tensor of the model's type and device."""
        return next(iter(self.meta.adapted.values()))

    def plan(self, epoch: float | None = None) -> Plan:
        """What is to be computed at an epoch.

        Raises:
            ValueError: the method needs the epoch.
        """
        if epoch is None and self.method.needs_epoch:
            raise ValueError("this method has MSL or DA, whose schedules need the epoch: backward(tasks, epoch)")
        number = isinstance(epoch, numbers.Real) and not isinstance(epoch, bool)
        if epoch is not None and not (number and 0 <= epoch < math.inf):
            raise ValueError(f"the epoch must be a number of at least 0, got {epoch!r:.80}")
        second_order = self.method.derivative_order(epoch or 0) == 2
        mode: GradientMode = self.mode if self.mode != "auto" else self._chosen_mode()
        return Plan(mode if second_order else "first-order", self.method.loss_weights(epoch or 0))

    def _chosen_mode(self) -> GradientMode:
        """Reverse where mixed mode would store every graph too: the same memory, and less to do one by one."""
        many = self.method.inner_steps > self.loop.stored_steps
        return "mixed" if self._vmaps or many or self.loop.network.recomputes else "reverse"

    def planned_gradients(self, tasks: Task, plan: Plan) -> TaskGradient:
        """``task_gradients`` as a plan has it."""
        with self._in_use():
            self.loop.network.modes.seen(training=True)
            second_order = plan.mode != "first-order"
            what = "second-order" if second_order else "first-order"
            if what not in self._rehearsed:
                self._rehearse(what, select_task(tasks, 0).support, second_order)
            return self.engine.gradients(self._subject, tasks, plan)

    def compile(self, choice: Compile) -> None:
        """Go on as if the learner had been made with ``compile=choice``."""
        self.engine = self._engines[choice]

    def expect(self, updates: int, tasks: Task | MetaBatch, epoch: float | None = None) -> Estimate | None:
        """Let ``compile="auto"`` decide now, for so many updates with meta-batches like this; otherwise do nothing.

        Returns:
            What it decided by.
        """
        if not isinstance(self.engine, Auto):
            return None
        tasks, plan = as_meta_batch(tasks, self._like), self.plan(epoch)
        with self._in_use():
            return self.engine.expect(self._subject, tasks, plan, updates)

    def task_outputs(
        self,
        tasks: Task | MetaBatch,
        steps: int | None = None,
        normalisations: Sequence[Normalisation] = ("batch",),
    ) -> TaskOutputs:
        """Adapt to the support sets of a meta-batch and answer the query sets: ``trajectory`` and ``predict`` of each.

        Args:
            tasks: a meta-batch, as ``backward`` takes it.
            steps: inner steps, by default those of training.
            normalisations: of the answers after the last step; see ``predict``.

        Returns:
            Outputs after every inner step, tensors ``[T, K + 1, n, ...]``, and those after the last in the other
            normalisations, ``[T, n, ...]``.

        Raises:
            ValueError: ``tasks`` is not a meta-batch, a normalisation is unknown, or the number of steps negative.
        """
        asked = Asked(self._steps(steps), tuple(normalisations))
        for normalisation in asked.normalisations:
            self._check_normalisation(normalisation)
        tasks = as_meta_batch(tasks, self._like)
        with self._in_use():
            self._ready_to_adapt(select_task(tasks, 0).support)
            return self.engine.outputs(self._subject, tasks, asked)

    @property
    def _subject(self) -> Subject:
        return Subject(self.loop, self.meta, self.statistics)

    @property
    def vmapped(self) -> bool:
        """Whether tasks are worked through all at once."""
        return self._vmaps and self.mode != "reverse"

    @property
    def _vmaps(self) -> bool:
        engine = self.engine.plain if isinstance(self.engine, Compiled | Auto) else self.engine
        return isinstance(engine, Vmapped) and engine.works

    def accumulate(self, parts: Sequence[TaskGradient], epoch: float | None = None) -> MetaBatchResult:
        """Add what ``task_gradients`` gave for the parts of one meta-batch to ``.grad``, and merge the statistics.

        Raises:
            NonFiniteLossError: a loss was NaN or infinite; nothing was added.
        """
        result = concatenated([part._replace(gradient=NO_GRADIENT) for part in parts]) if len(parts) > 1 else parts[0]
        outcome = MetaBatchResult(result.loss.mean(), result.support_losses, result.query_losses, result.query_outputs)
        _check_finite(outcome, self.method.loss_weights(epoch or 0))
        size = len(result.loss)
        with self._in_use():
            learned = [
                (group, name, parameter)
                for group, parameters in enumerate(self.meta)
                for name, parameter in parameters.items()
                # zero_init: adapted, and not learned; rates may be neither.
                if parameter.requires_grad and name in parts[0].gradient[group]
            ]
            total = [[part.gradient[group][name].detach() for group, name, _ in learned] for part in parts]
            added: list[Tensor] = reduce(lambda a, b: list(torch._foreach_add(a, b)), total)
            mean = torch._foreach_div(added, size)
            for (_, _, parameter), gradient in zip(learned, mean, strict=True):
                _accumulate(parameter, gradient)
            self.statistics.assign_mean(result.statistics)
        return outcome

    def trajectory(self, support: Examples | tuple[Any, Any], steps: int | None = None) -> Iterator[FastWeights]:
        """theta^0 .. theta^steps on a support set, in evaluation mode; ``predict`` calls the model with one of them.

        Support sets are always normalised with their own batch's statistics, as in training; frozen norm layers keep
        theirs. ``steps`` defaults to those of training; more go on with the last step's rates, norm weights and
        statistics.
        """
        return self._trajectory(as_support(support, self._like), self._steps(steps))

    def _trajectory(self, support: Examples, steps: int) -> Iterator[FastWeights]:
        network = self.loop.network
        walk = self.loop.trajectory(self.meta, self.statistics, support, steps)
        while True:
            # The model is taken for one step at a time: the caller may use it in between.
            with self._in_use():
                self._ready_to_adapt(support)
                with network.modes.adapting():
                    here = next(walk, None)
            if here is None:
                return
            theta, statistics, loss = here
            yield FastWeights(theta, kept_buffers(network, statistics), loss)

    def _ready_to_adapt(self, support: Examples) -> None:
        """See once that the model does in evaluation mode what an inner loop takes it to do."""
        if "adapting" in self._rehearsed:
            return
        network = self.loop.network
        try:
            with network.modes.adapting():
                self._rehearse("adapting", support)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _GRAPH_IS_GONE):
                raise
            network.modes.inner_loop_trains = True
        if not is_trusted(network):
            parameters = {**self.meta.adapted, **self.meta.fixed_at_step(0)}
            check_modes(network, parameters, self.statistics.at_step(0), support)

    def _rehearse(self, what: str, examples: Examples, second_order: bool = False) -> None:
        """See once that the model and the loss are what an inner loop takes them for."""
        network = self.loop.network
        if what in self._rehearsed:
            return
        if not is_trusted(network):
            parameters = {**self.meta.adapted, **self.meta.fixed_at_step(0)}
            buffers = self.statistics.at_step(0)
            rehearse(network, parameters, buffers, examples, second_order=second_order)
            if network.recomputes and self.mode == "reverse":
                raise UnsuitableModelError(
                    "the model computes parts of itself again while a gradient is taken (activation checkpointing), "
                    "which needs each inner step's own weights then: take mode='mixed', or switch checkpointing off"
                )
        self._rehearsed.add(what)

    def _steps(self, steps: int | None) -> int:
        return self.method.inner_steps if steps is None else whole_number("steps", steps, least=0)

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
        inner_step = whole_number("inner_step", inner_step, least=0)
        self._check_normalisation(normalisation)
        if normalisation == "support" and support is None:
            raise ValueError('normalisation="support" needs the inputs of the support set: predict(..., support=)')
        support = support.inputs if isinstance(support, Examples) else support
        with self._in_use():
            _check_fast_weights(fast_weights, self.meta.adapted)
            tensors = self._tensors_at(fast_weights, inner_step)
            support = as_tensors(support, self._like) if normalisation == "support" else None
            inputs = as_tensors(inputs, self._like)
            return answers(self.loop.network, *tensors, inputs, normalisation, support)

    def _tensors_at(self, fast_weights: Tensors, inner_step: int) -> tuple[Tensors, Tensors]:
        kept = fast_weights.buffers if isinstance(fast_weights, FastWeights) else {}
        return tensors_at(self.meta, self.statistics, fast_weights, kept, inner_step)

    def adapt(
        self,
        support: Examples | tuple[Any, Any],
        steps: int | None = None,
        normalisation: Normalisation = "batch",
    ) -> nn.Module:
        """A copy of the model, adapted to a support set: an ordinary ``nn.Module`` in evaluation mode.

        Args:
            support: inputs and targets, without a task dimension. NumPy arrays and lists of numbers become tensors of
                the model's type.
            steps: inner steps, by default those of training. Beyond them the last step's rates, norm weights and
                statistics go on being used.
            normalisation: ``"batch"``: norm layers use the statistics of whatever batch they are given, also in
                evaluation mode; ``"running"``: the meta-trained running statistics; ``"support"``: those of the
                support set. With either of the last two an input's output is its own. Frozen norm layers keep theirs.

        The state dict has the keys of the model's own class. A model of that class that loads it gives, in evaluation
        mode, the same outputs, but after ``"batch"``: no state dict says that a layer is to use its batch's statistics.
        It holds those of the support set then, as after ``"support"``.

        Raises:
            ValueError: an unknown normalisation, a negative number of steps, or ``support`` is no support set.
            NonFiniteLossError: the support loss was NaN or infinite.
            TypeError: something on the model cannot be copied.
        """
        steps = self._steps(steps)
        self._check_normalisation(normalisation)
        support = as_support(support, self._like)
        with self._in_use():
            walk = list(self._trajectory(support, steps))
            theta = walk[-1]
            for k, weights in enumerate(walk[1:], start=1):
                if weights.support_loss is not None and not weights.support_loss.isfinite():
                    raise NonFiniteLossError("support", 0, k, float(weights.support_loss))
            adapted = copied(self.model)
            tensors, buffers = self._tensors_at(theta, steps)
            frozen = self.loop.network.modes.seen()
            by_support = normalisation == "support" or (
                normalisation == "batch" and norm_layers.can_keep_a_batch(self.model, frozen)
            )
            if by_support:
                keep_statistics(self.loop.network, tensors, buffers, support.inputs)
            own = {**dict(adapted.named_parameters()), **dict(adapted.named_buffers())}
            with torch.no_grad():
                for name, value in {**tensors, **buffers}.items():
                    own[name].copy_(value)
        for p in adapted.parameters():
            p.grad = None
        adapted.eval()
        if normalisation == "batch":
            norm_layers.use_batch_statistics(adapted, frozen)
        if "copying" not in self._rehearsed and not is_trusted(self.loop.network):
            self._check_copy(adapted, theta, steps, normalisation, support.inputs)
            self._rehearsed.add("copying")
        return adapted

    def diagnose(self, tasks: Task | MetaBatch, epoch: float | None = None) -> list[Finding]:
        """Why does it not learn? What is odd about the learner on a meta-batch, the likeliest reason first.

        Nothing is changed. Inner loops are walked some six times a task; a dozen tasks tell enough. See
        ``innerloop.diagnose``.
        """
        from innerloop.diagnose import diagnose

        return diagnose(self, tasks, epoch)

    def _check_normalisation(self, normalisation: Normalisation) -> None:
        """Raise ``ValueError`` for a normalisation that there is not, or that the model cannot have."""
        check_normalisation(normalisation)
        layers = norm_layers.by_batch_alone(self.model) if normalisation != "batch" else []
        if layers:
            raise ValueError(
                f"normalisation={normalisation!r}: the model came of adapt(..., normalisation='batch'), and "
                f"{layers[0]} uses its batch's statistics whatever it is told. Load its state dict into a fresh model, "
                "or adapt it with normalisation='support'"
            )

    def _check_copy(
        self, adapted: nn.Module, theta: Tensors, steps: int, normalisation: Normalisation, inputs: Any
    ) -> None:
        """Raise if a copy of the model does not answer as the model does with the same tensors."""
        expected = self.predict(theta, steps, inputs, normalisation, inputs)
        trial = Network(adapted, self.loop.network.loss_function, self.loop.network.precision)
        buffers = {n: b.clone() for n, b in adapted.named_buffers()}
        with torch.inference_mode(False):
            found = trial.answers(dict(adapted.named_parameters()), buffers, inputs)
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            if isinstance(a, Tensor) and not torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True):
                functions = ", ".join(functions_kept(self.model)) or "a function"
                raise TypeError(
                    f"an adapted model is a copy, and a copy of {type(self.model).__name__} gives other answers: it "
                    f"keeps {functions} (a lambda, a hook, a compiled method), which calls the original's layers. Make "
                    "it a method"
                )


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """As ``Tensor.backward`` adds to ``.grad``, with the hooks that people have put there."""
    for hook in (parameter._backward_hooks or {}).values():
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(parameter)


def _check_fast_weights(given: Any, adapted: Tensors) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what no ``trajectory`` of the learner yielded."""
    expected = "fast_weights are what learner.trajectory yields, tensors by the names of the adapted parameters"
    if not isinstance(given, Mapping):
        raise TypeError(f"{expected}; got a {type(given).__name__}")
    if given.keys() != adapted.keys():
        missing, unknown = sorted(adapted.keys() - given.keys()), sorted(map(str, given.keys() - adapted.keys()))
        raise ValueError(f"{expected}; missing {missing}, unknown {unknown}")
    for name, tensor in given.items():
        if tensor.shape != adapted[name].shape:
            raise ValueError(f"{expected}; {name} has shape {list(tensor.shape)}, expected {list(adapted[name].shape)}")


def check_normalisation(normalisation: str) -> None:
    """Raise ``ValueError`` for what is none."""
    if normalisation not in get_args(Normalisation):
        known = ", ".join(get_args(Normalisation))
        raise ValueError(f"normalisation must be one of {known}; got {normalisation!r:.80}")


def _check_finite(outcome: MetaBatchResult, weights: list[float]) -> None:
    """Raise at the first inner step with a loss that is NaN or infinite."""
    if (outcome.loss + outcome.support_losses.sum()).isfinite():  # so are all losses that it is made of
        return
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
    if not trainable:
        why = "all of its parameters are frozen" if any(True for _ in model.parameters()) else "it has no parameters"
        raise ValueError(f"no trainable parameter in {type(model).__name__}: {why}")
    norm = norm_layers.norm_parameter_names(model) & trainable.keys() if method.bnwb else set()
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
    for pattern in method.zero_init:
        if not any(fnmatchcase(n, pattern) for n in adapted):
            raise ValueError(f"zero_init {pattern!r} matches no adapted parameter; adapted are {', '.join(adapted)}")
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
    norm = norm_layers.norm_buffer_names(model) & buffers.keys() if method.bnrs else set()
    return Statistics(
        {n: b for n, b in buffers.items() if n not in norm},
        per_step.stack({n: buffers[n] for n in sorted(norm)}, method.inner_steps),
    )
