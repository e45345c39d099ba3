"""Meta-gradients by compiled graphs: one for each function that an inner step repeats, whatever the number of steps.

Traced with all derivatives in them, these functions become flat graphs, which Inductor fuses: a small network's step
is then a few calls in the place of thousands of operations. Rates, weights of the multi-step loss, statistics and the
number of the step are arguments, never constants of a graph. Inductor keeps what it compiled on disk.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from innerloop.engines.pieces import Given, Group, Layout, Nest, Pieces, over_tasks
from innerloop.engines.tracing import Backend, NotCompiledError, compiled
from innerloop.inner_loop import InnerLoop, MetaParameters
from innerloop.meta_gradients import LossWeights, TaskGradient, by_psi
from innerloop.per_step import Statistics
from innerloop.tasks import Task, stacked
from innerloop.update_rules import Tensors

TIMEOUT = 300.0
"""Seconds that one graph may take to compile."""

_EMPTY = MetaParameters({}, {}, {}, {})
_NONE = Given(*[[]] * len(Given._fields))


class Compiled:
    """The gradients of meta-batches by compiled graphs.

    A graph is made when it is first needed, for each shape of tasks, derivative order and whether a query loss counts;
    also when a module changes its mode or another plain attribute. What a model's Python does besides computing (a
    count of calls, a feature kept to be looked at) is done while tracing, and not again.

    Args:
        loop: of the learner.
        vmapped: whether all tasks of a meta-batch are computed at once.
        timeout: seconds that one graph may take to compile.
        backend: ``"eager"`` runs the traced graphs as they are.
    """

    def __init__(self, loop: InnerLoop, vmapped: bool, timeout: float = TIMEOUT, backend: Backend = "inductor") -> None:
        self._loop, self._timeout, self._backend = loop, timeout, backend
        self._vmapped = vmapped
        self._programs: dict[Hashable, _Program] = {}
        self._attributes = _Attributes(loop.network.model)
        self.refused: str | None = None
        """Why nothing is compiled any more."""
        self.seconds = 0.0
        """Spent on tracing and compiling."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which another process makes itself, or finds on disk."""
        return {**self.__dict__, "_programs": {}}

    def gradients(
        self,
        meta: MetaParameters,
        statistics: Statistics,
        tasks: Task,
        weights: LossWeights,
        second_order: bool,
        otherwise: Callable[[], TaskGradient],
    ) -> TaskGradient:
        """``MetaLearner.planned_gradients``; ``otherwise()`` where nothing can be compiled, with a warning once."""
        device = next(iter(meta.adapted.values())).device
        if self.refused is not None or self._loop.network.recomputes or torch.is_autocast_enabled(device.type):
            return otherwise()
        try:
            return self._gradients(meta, statistics, tasks, weights, second_order)
        except NotCompiledError as error:
            result = otherwise()  # which raises what has nothing to do with compiling
            self.refused = str(error)
            warnings.warn(
                f"{type(self._loop.network.model).__name__} is not compiled: {error}. It is trained without",
                stacklevel=5,
            )
            return result

    def _gradients(
        self, meta: MetaParameters, statistics: Statistics, tasks: Task, weights: LossWeights, second_order: bool
    ) -> TaskGradient:
        support, support_tensors = Nest.of(tasks.support)
        query, query_tensors = Nest.of(tasks.query)
        sets = [_settled(t) for t in support_tensors], [_settled(t) for t in query_tensors]
        shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for group in sets for t in group)
        now = self._attributes.now()
        key = (support, query, shapes, second_order, now, torch.get_num_threads(), torch.get_default_dtype())
        for vmapped in (True, False) if self._vmapped else (False,):
            program = self._programs.get((key, vmapped))
            if program is None:
                layout = _layout(self._loop, meta, statistics, support, query)
                program = _Program(self, layout, second_order, vmapped)
            try:
                result = program.run(meta, statistics, *sets, weights)
            except NotCompiledError:
                if not vmapped:
                    raise
                self._vmapped = False  # nn.LSTM, for one
                continue
            self._programs[key, vmapped] = program
            return result
        raise AssertionError

    def made(self, function: Callable[[Given], Any], given: Given) -> Callable[[Given], Any]:
        """A function of the inner step, compiled for arguments like these."""
        sizes: list[int] = []
        kinds: list[type] = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            rest = iter(tensors)
            found = function(Given(*([next(rest) for _ in group] for group in given)))
            kinds[:], sizes[:] = [type(found)], [len(group) for group in found]
            return [t for group in found for t in group]

        started = time.monotonic()
        arguments = [t for group in given for t in group]
        small = sum(t.numel() for t in arguments) < _SMALL
        call = compiled(flat, arguments, self._backend, self._timeout, 1 if small else torch.get_num_threads())
        self.seconds += time.monotonic() - started
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        spans = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        kind = kinds[0]

        def run(given: Given) -> Any:
            with torch.no_grad():
                found = call(*[t for group in given for t in group])
            return kind(*[found[span] for span in spans])

        return run

    @property
    def loop(self) -> InnerLoop:
        """Of one step: by functions, with that step's rates."""
        return replace(self._loop, functional=True, lslr=False)

    @property
    def lslr(self) -> bool:
        """Whether the rates are per step."""
        return self._loop.lslr


_SMALL = 1_000_000
"""Numbers among a graph's arguments under which threads wait for each other longer than they work."""


class _Walked(NamedTuple):
    """One task's results, or, vmapped, all tasks'."""

    loss: Tensor
    gradient: MetaParameters
    support_losses: Tensor
    query_losses: Tensor
    outputs: Group
    shared: Group
    per_step: Group


@dataclass
class _Program:
    """The compiled functions for meta-batches of one kind, and the walk over them."""

    engine: Compiled
    layout: Layout
    second_order: bool
    vmapped: bool

    def __post_init__(self) -> None:
        self._functions: dict[Hashable, Callable[[Given], Any]] = {}
        self._steps: dict[Any, list[Group]] = {}

    def run(
        self, meta: MetaParameters, statistics: Statistics, support: Group, query: Group, weights: LossWeights
    ) -> TaskGradient:
        """The gradients of a meta-batch."""
        if self.vmapped:
            return self._finished(self._walk(meta, statistics, support, query, weights), statistics)
        parts = [
            self._walk(meta, statistics, [t[i] for t in support], [t[i] for t in query], weights)
            for i in range(len(support[0]))
        ]
        total = parts[0].gradient
        for part in parts[1:]:
            total = pytree.tree_map(torch.add, total, part.gradient)
        rest = [part._replace(gradient=_EMPTY) for part in parts]
        return self._finished(stacked(rest)._replace(gradient=total), statistics)

    def _finished(self, walked: _Walked, statistics: Statistics) -> TaskGradient:
        assert self.layout.outputs is not None
        return TaskGradient(
            walked.loss,
            walked.gradient,
            walked.support_losses,
            walked.query_losses,
            self.layout.outputs.filled(walked.outputs),
            Statistics(
                dict(zip(statistics.shared, walked.shared, strict=True)),
                dict(zip(statistics.per_step, walked.per_step, strict=True)),
            ),
        )

    def _walk(
        self, meta: MetaParameters, statistics: Statistics, support: Group, query: Group, weights: LossWeights
    ) -> _Walked:
        """``meta_gradients``' walk ahead and back, by compiled steps."""
        steps, layout = len(weights), self.layout
        tasks = (len(support[0]),) if self.vmapped else ()
        one_theta = self.vmapped and steps == 1

        def of_each(t: Tensor, wide: bool = True) -> Tensor:
            return t.detach().expand(*tasks, *t.shape).contiguous() if tasks and wide else _settled(t.detach())

        theta = [of_each(t, not one_theta) for t in meta.adapted.values()]
        state = [torch.zeros_like(t) for t in theta for _ in range(layout.slots)]
        if one_theta and state:
            state = [of_each(s) for s in state]
        by_step = _rates_and_psi(meta, layout, steps, self.engine.lslr)
        frozen = [_settled(t) for t in _frozen(self.engine.loop.network.model, layout.frozen)]
        shared = [of_each(b) for b in statistics.shared.values()]
        stacks = [[of_each(b) for b in stack.unbind(0)] for stack in statistics.per_step.values()]
        numbers = self._numbers(steps, weights, theta[0])

        losses: list[Group] = []
        query_psi: list[Group] = []
        seen: list[Given] = []
        outputs: Group = []
        for k in range(steps - 1):
            rates, psi = by_step[k]
            counts = _counts(weights[k])
            given = _NONE._replace(
                step=numbers[k], theta=theta, state=state, psi=psi, rates=rates, frozen=frozen,
                buffers=[*shared, *(stack[k] for stack in stacks)], support=support, query=query if counts else [],
            )  # fmt: skip
            made = self._called("ahead", counts, False, given)
            theta, state = made.theta, made.state
            shared = made.buffers[: len(shared)]
            for stack, buffer in zip(stacks, made.buffers[len(shared) :], strict=True):
                stack[k] = buffer
            losses.append(made.losses)
            query_psi.append(made.query_psi)
            seen.append(given._replace(query=[], query_theta=made.query_theta, g=made.g))
        k = steps - 1
        rates, psi = by_step[k]
        given = _NONE._replace(
            step=numbers[k], theta=theta, state=state, psi=psi, rates=rates, frozen=frozen,
            buffers=[*shared, *(stack[k] for stack in stacks)], support=support, query=query,
        )  # fmt: skip
        turn = self._called("turn", True, one_theta, given)
        shared = turn.buffers[: len(shared)]
        for stack, buffer in zip(stacks, turn.buffers[len(shared) :], strict=True):
            stack[k] = buffer
        losses.append(turn.losses)
        outputs = turn.outputs
        adjoint, adjoint_state = turn.adjoint, turn.adjoint_state
        psi_gradients, rate_gradients = [turn.psi], [turn.rates]
        for k in reversed(range(steps - 1)):
            given = seen.pop()._replace(adjoint=adjoint, adjoint_state=adjoint_state)
            if not self.second_order:  # of constants the update alone is walked back over
                given = given._replace(buffers=[], frozen=[], psi=[], support=[])
            found = self._called("back", bool(given.query_theta), False, given)
            adjoint, adjoint_state = found.adjoint, found.adjoint_state
            psi_gradients.append(_both(found.psi, query_psi[k]))
            rate_gradients.append(found.rates)
        if self.vmapped and not one_theta:
            adjoint = [t.sum(0) for t in adjoint]
        return self._result(meta, adjoint, psi_gradients[::-1], rate_gradients[::-1], losses, outputs, shared, stacks)

    def _result(
        self,
        meta: MetaParameters,
        adjoint: Group,
        psi_gradients: list[Group],
        rate_gradients: list[Group],
        losses: list[Group],
        outputs: Group,
        shared: Group,
        stacks: list[Group],
    ) -> _Walked:
        layout = self.layout
        rates: Tensors = {}
        for i, place in enumerate(layout.learned_rates):
            of_steps = [group[i] for group in rate_gradients]
            rates[layout.theta[place]] = torch.stack(of_steps) if self.engine.lslr else torch.stack(of_steps).sum(0)
        by_name = [dict(zip(layout.psi, group, strict=False)) for group in psi_gradients]
        gradient = MetaParameters(dict(zip(layout.theta, adjoint, strict=True)), *by_psi(meta, by_name), rates)
        counted = [group[2] for group in losses if len(group) > 1]
        missing = torch.full_like(counted[-1], torch.nan) if len(counted) < len(losses) else counted[-1]
        return _Walked(
            counted[0] if len(counted) == 1 else torch.stack(counted).sum(0),
            gradient,
            torch.stack([group[0] for group in losses], -1),
            torch.stack([group[1] if len(group) > 1 else missing for group in losses], -1),
            outputs,
            shared,
            [torch.stack(stack, len(self._tasks(stack[0]))) for stack in stacks],
        )

    def _tasks(self, buffer: Tensor) -> torch.Size:
        return buffer.shape[: int(self.vmapped)]

    def _called(self, name: str, counts: bool, one_theta: bool, given: Given) -> Any:
        key = (name, counts)
        function = self._functions.get(key)
        if function is None:
            pieces = Pieces(self.engine.loop, self.layout, self.second_order, counts)
            piece = over_tasks(getattr(pieces, name), self.vmapped, one_theta)
            function = self._functions[key] = self.engine.made(piece, given)
        return function(given)

    def _numbers(self, steps: int, weights: LossWeights, like: Tensor) -> list[Group]:
        """K and w_k of every step as tensors; of weights that are numbers, those of this epoch are kept."""
        key = tuple(weights) if not any(isinstance(w, Tensor) for w in weights) else None
        found = self._steps.get(key)
        if found is None:
            real = like.dtype.to_real()
            found = [
                [
                    torch.tensor(k, dtype=torch.float64, device=like.device),
                    torch.as_tensor(w, device=like.device).to(real),
                ]
                for k, w in enumerate(weights)
            ]
            self._steps = {key: found}
        return found


class _Attributes:
    """Plain attributes of a model's modules (modes, rates of dropout, momenta): a graph has them as they were."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: list[nn.Module] = []

    def now(self) -> Hashable:
        """All of them, and the modules; equal as long as nothing has changed."""
        modules = list(self._model.modules())
        if modules != self._modules:
            self._modules = modules
            attributes = [vars(module) for module in modules]
            self._plain = [(a.get, name) for a in attributes for name, value in a.items() if type(value) in _PLAIN]
            self._hooks = [hooks for a in attributes for hooks in (a["_forward_hooks"], a["_forward_pre_hooks"])]
        return (*map(id, modules), *[get(name) for get, name in self._plain], *map(len, self._hooks))


_PLAIN = (bool, int, float, str, type(None))


def _layout(loop: InnerLoop, meta: MetaParameters, statistics: Statistics, support: Nest, query: Nest) -> Layout:
    psi = list(meta.fixed_at_step(0))
    known = {*meta.adapted, *psi}
    return Layout(
        theta=list(meta.adapted),
        psi=psi,
        frozen=[n for n, _ in loop.network.model.named_parameters() if n not in known],
        buffers=[*statistics.shared, *statistics.per_step],
        learned_rates=[i for i, n in enumerate(meta.adapted) if meta.rates[n].requires_grad],
        slots=loop.rule.slots,
        support=support,
        query=query,
    )


def _frozen(model: nn.Module, names: Sequence[str]) -> Group:
    if not names:
        return []
    own = dict(model.named_parameters())
    return [own[name].detach() for name in names]


def _rates_and_psi(meta: MetaParameters, layout: Layout, steps: int, lslr: bool) -> list[tuple[Group, Group]]:
    """The rates and the parameters that are not adapted, of every step."""
    of_steps = [meta.rates[n].detach().unbind(0) if lslr else (meta.rates[n].detach(),) * steps for n in layout.theta]
    shared = [_settled(t) for t in meta.shared.values()]
    stacks = [stack.detach().unbind(0) for stack in meta.per_step.values()]
    return [([r[k] for r in of_steps], [*shared, *(stack[k] for stack in stacks)]) for k in range(steps)]


def _settled(tensor: Tensor) -> Tensor:
    """Laid out as the graphs have it."""
    return tensor.detach().contiguous()


def _both(a: Group, b: Group) -> Group:
    return [x + y for x, y in zip(a, b, strict=True)] if a and b else a or b


def _counts(weight: Tensor | float) -> bool:
    return isinstance(weight, Tensor) or weight != 0
