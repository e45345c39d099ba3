"""Meta-batches by compiled graphs: one for each function that an inner step repeats, whatever the number of steps.

Traced with all derivatives in them, these functions become flat graphs, which Inductor fuses: a small network's step
is then a few calls in the place of thousands of operations. Rates, weights of the multi-step loss, statistics and the
number of the step are arguments, never constants of a graph. Inductor keeps what it compiled on disk.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from innerloop.adapted import Asked, TaskOutputs
from innerloop.engines.engine import Engine, Plan, Subject
from innerloop.engines.pieces import Given, Group, Nest
from innerloop.engines.programs import GradientProgram, Halves, Made, OutputsProgram, layout_of, settled
from innerloop.engines.tracing import Backend, NotCompiledError, distinct, halved, lowered, traced
from innerloop.meta_gradients import TaskGradient
from innerloop.tasks import Task, meta_batch_size

TIMEOUT = 300.0
"""Seconds that one graph may take to compile."""

Result = TypeVar("Result")
Program = TypeVar("Program", GradientProgram, OutputsProgram)


class Compiled:
    """Gradients and outputs of meta-batches by compiled graphs.

    A graph is made when it is first needed, for each shape of tasks, derivative order and whether a query loss counts;
    also when a module changes its mode or another plain attribute. What a model's Python does besides computing (a
    count of calls, a feature kept to be looked at) is done while tracing, and not again.

    Args:
        plain: computes what cannot be compiled.
        model: that is meta-learned.
        vmapped: whether all tasks of a meta-batch are computed at once.
        timeout: seconds that one graph may take to compile.
        backend: ``"eager"`` runs the traced graphs as they are.
    """

    def __init__(
        self,
        plain: Engine,
        model: nn.Module,
        vmapped: bool,
        timeout: float = TIMEOUT,
        backend: Backend = "inductor",
    ) -> None:
        self.plain, self._timeout, self._backend = plain, timeout, backend
        self._vmapped = vmapped
        self._programs: dict[Hashable, Any] = {}
        self._attributes = _Attributes(model)
        self._at_once = 0
        """Test tasks that the graphs are for; fewer are filled up."""
        self.refused: str | None = None
        """Why nothing is compiled any more."""
        self.seconds = 0.0
        """Spent on tracing and compiling."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which another process makes itself, or finds on disk."""
        return {**self.__dict__, "_programs": {}}

    def gradients(self, subject: Subject, tasks: Task, plan: Plan) -> TaskGradient:
        """``Engine.gradients``; those of ``plain`` where nothing can be compiled, with a warning once."""
        second_order = plan.mode != "first-order"

        def make(vmapped: bool, support: Nest, query: Nest) -> GradientProgram:
            layout = layout_of(*subject, support, query)
            return GradientProgram(self, subject.loop, layout, vmapped, second_order)

        def run(program: GradientProgram, support: Group, query: Group) -> TaskGradient:
            return program.run(subject.meta, subject.statistics, support, query, plan.weights)

        return self._or_plain(
            subject,
            lambda: self._by_program(("gradients", second_order), tasks, make, run),
            lambda: self.plain.gradients(subject, tasks, plan),
        )

    def outputs(self, subject: Subject, tasks: Task, asked: Asked) -> TaskOutputs:
        """``Engine.outputs``; those of ``plain`` where nothing can be compiled, with a warning once."""

        def make(vmapped: bool, support: Nest, query: Nest) -> OutputsProgram:
            return OutputsProgram(self, subject.loop, layout_of(*subject, support, query), vmapped)

        def run(program: OutputsProgram, support: Group, query: Group) -> TaskOutputs:
            return program.run(subject.meta, subject.statistics, support, query, asked)

        def by_program() -> TaskOutputs:
            size = meta_batch_size(tasks)
            self._at_once = max(self._at_once, size)
            missing = self._at_once - size if self._vmapped else 0
            frozen = tuple(sorted(subject.loop.network.modes.seen()))
            found = self._by_program(("outputs", frozen), _filled_up(tasks, missing), make, run)
            found = pytree.tree_map_only(Tensor, lambda t: t[:size], found) if missing else found
            return found._replace(targets=tasks.query.targets)

        return self._or_plain(subject, by_program, lambda: self.plain.outputs(subject, tasks, asked))

    def _or_plain(self, subject: Subject, by_program: Callable[[], Result], plain: Callable[[], Result]) -> Result:
        network = subject.loop.network
        device = next(iter(subject.meta.adapted.values())).device
        if self.refused is not None or network.recomputes or torch.is_autocast_enabled(device.type):
            return plain()
        try:
            return by_program()
        except NotCompiledError as error:
            result = plain()  # which raises what has nothing to do with compiling
            self.refused = str(error)
            warnings.warn(
                f"{type(network.model).__name__} is not compiled: {error}. It is computed without", stacklevel=6
            )
            return result

    def _by_program(
        self,
        kind: Hashable,
        tasks: Task,
        make: Callable[[bool, Nest, Nest], Program],
        run: Callable[[Program, Group, Group], Result],
    ) -> Result:
        """A meta-batch's result by the program for what is like it."""
        support, support_tensors = Nest.of(tasks.support)
        query, query_tensors = Nest.of(tasks.query)
        sets = [settled(t) for t in support_tensors], [settled(t) for t in query_tensors]
        shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for group in sets for t in group)
        of_process = torch.get_num_threads(), torch.get_default_dtype()
        key = (kind, support, query, shapes, self._attributes.now(), of_process)
        for vmapped in (True, False) if self._vmapped else (False,):
            program = self._programs.get((key, vmapped)) or make(vmapped, support, query)
            try:
                result = run(program, *sets)
            except NotCompiledError:
                if not vmapped:
                    raise
                self._vmapped = False  # nn.LSTM, for one
                continue
            self._programs[key, vmapped] = program
            return result
        raise AssertionError

    def made(self, function: Made, given: Given) -> Made:
        """A function of the inner step, compiled for arguments like these."""
        of = self._traced(function, given)
        call = self._compiled(of.graph, of.arguments)

        def run(given: Given) -> Any:
            with torch.no_grad():
                return of.grouped(call(*_flat(given)))

        return run

    def halves(self, function: Made, given: Given, late: Collection[str], there: int) -> Halves | None:
        """A function in two parts, compiled: what it gives before the ``late`` arguments are known, and after.

        The first part's result has empty groups in the place of what the second gives, and is what the second needs.
        None where the function cannot be halved.
        """
        of = self._traced(function, given)
        names = [name for name, group in given._asdict().items() for _ in group]
        late_places = [i for i, name in enumerate(names) if name in late]
        early = [i for i in range(len(names)) if i not in late_places]
        early_results = sum(of.sizes[:there])
        parts = halved(of.graph, late_places, early_results)
        if parts is None:
            return None
        first = self._compiled(parts.first, [of.arguments[i] for i in early])
        with torch.no_grad():
            kept = list(first(*[of.arguments[i] for i in early]))[early_results:]
        last = [*parts.again, *late_places]
        second = self._compiled(parts.second, [*kept, *(of.arguments[i] for i in last)])

        def ahead(given: Given) -> Any:
            arguments = _flat(given)
            with torch.no_grad():
                found = list(first(*[arguments[i] for i in early]))
            return of.grouped(found[:early_results], fields=there), found[early_results:]

        def back(kept: Any, given: Given) -> Any:
            arguments = _flat(given)
            with torch.no_grad():
                found = second(*kept, *[arguments[i] for i in last])
            return of.grouped(found, skipped=there)

        return ahead, back

    def _traced(self, function: Made, given: Given) -> _Traced:
        sizes: list[int] = []
        kinds: list[type] = []

        def flat(*tensors: Tensor) -> list[Tensor]:
            rest = iter(tensors)
            found = function(Given(*([next(rest) for _ in group] for group in given)))
            kinds[:], sizes[:] = [type(found)], [len(group) for group in found]
            return [t for group in found for t in group]

        started = time.monotonic()
        arguments = distinct(_flat(given))
        graph = traced(flat, arguments)
        self.seconds += time.monotonic() - started
        return _Traced(graph, arguments, kinds[0], sizes)

    def _compiled(self, graph: GraphModule, arguments: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        started = time.monotonic()
        small = sum(t.numel() for t in arguments) < _SMALL
        call = lowered(graph, arguments, self._backend, self._timeout, 1 if small else torch.get_num_threads())
        self.seconds += time.monotonic() - started
        return call


class _Traced(NamedTuple):
    """A function's graph, and how its results are grouped."""

    graph: GraphModule
    arguments: list[Tensor]
    kind: type
    sizes: list[int]

    def grouped(self, found: Sequence[Tensor], skipped: int = 0, fields: int | None = None) -> Any:
        """Flat results as groups; those of ``fields`` fields after ``skipped``, the others empty."""
        rest = iter(found)
        end = len(self.sizes) if fields is None else skipped + fields
        groups = ([next(rest) for _ in range(size)] if skipped <= i < end else [] for i, size in enumerate(self.sizes))
        return self.kind(*groups)


def _flat(given: Given) -> list[Tensor]:
    return [t for group in given for t in group]


_SMALL = 1_000_000
"""Numbers among a graph's arguments under which threads wait for each other longer than they work."""


def _filled_up(tasks: Task, missing: int) -> Task:
    """With the last task as often again as is missing."""
    if not missing:
        return tasks
    filled: Task = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t[-1:].expand(missing, *t.shape[1:])]), tasks)
    return filled


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
