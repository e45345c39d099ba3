"""Meta-batches by the functions of an inner step: the walks ahead and back, each step a call of a compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from innerloop.adapted import Asked, TaskOutputs
from innerloop.engines.pieces import THERE, Answer, Given, Group, Layout, Nest, Pieces, over_tasks
from innerloop.inner_loop import InnerLoop, MetaParameters
from innerloop.meta_gradients import NO_GRADIENT, LossWeights, TaskGradient, by_psi
from innerloop.norm_layers import Normalisation
from innerloop.per_step import Statistics
from innerloop.tasks import stacked
from innerloop.update_rules import Tensors

_NONE = Given(*[[]] * len(Given._fields))

Made = Callable[[Given], Any]
Halves = tuple[Callable[[Given], Any], Callable[[Any, Given], Any]]


class Maker(Protocol):
    """Who compiles the functions."""

    def made(self, function: Made, given: Given) -> Made:
        """A function, compiled for arguments like these."""

    def halves(self, function: Made, given: Given, late: Collection[str], there: int) -> Halves | None:
        """A function in two parts, for arguments that are known late."""


class _Walked(NamedTuple):
    """One task's results, or, vmapped, all tasks'."""

    loss: Tensor
    gradient: MetaParameters
    support_losses: Tensor
    query_losses: Tensor
    outputs: Group
    shared: Group
    per_step: Group


class Functions:
    """The functions of an inner step for meta-batches of one kind, compiled when they are first called.

    Args:
        maker: compiles them.
        loop: of the learner.
        layout: of what they are given.
        vmapped: whether all tasks are computed at once.
    """

    def __init__(self, maker: Maker, loop: InnerLoop, layout: Layout, vmapped: bool) -> None:
        self.maker, self.layout, self.vmapped, self.lslr = maker, layout, vmapped, loop.lslr
        self.loop = replace(loop, functional=True, lslr=False)  # of one step, with that step's rates
        self._made: dict[Hashable, Made] = {}
        self._halves: dict[Hashable, Halves | None] = {}

    def called(self, key: Hashable, piece: Callable[[], Made], given: Given, one_theta: bool = False) -> Any:
        """A piece's result; ``piece()`` makes it, the first time."""
        function = self._made.get(key)
        if function is None:
            function = self._made[key] = self.maker.made(over_tasks(piece(), self.vmapped, one_theta), given)
        return function(given)

    def halves(self, key: Hashable, piece: Callable[[], Made], given: Given, there: int) -> Halves | None:
        """A piece in two parts, the second for adjoints; None where it cannot be halved."""
        if key not in self._halves:
            late = given._replace(
                adjoint=[torch.zeros_like(t) for t in given.theta],
                adjoint_state=[torch.zeros_like(s) for s in given.state],
            )
            function = over_tasks(piece(), self.vmapped, False)
            self._halves[key] = self.maker.halves(function, late, ("adjoint", "adjoint_state"), there)
        return self._halves[key]

    def of_each(self, t: Tensor, tasks: int) -> Tensor:
        """What all tasks share, for each of them to have its own; not vmapped, as it is."""
        return t.detach().expand(tasks, *t.shape).contiguous() if self.vmapped else settled(t)


class GradientProgram(Functions):
    """Gradients of meta-batches.

    Args:
        second_order: whether they are exact.
    """

    def __init__(self, maker: Maker, loop: InnerLoop, layout: Layout, vmapped: bool, second_order: bool) -> None:
        super().__init__(maker, loop, layout, vmapped)
        self.second_order = second_order
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
        rest = [part._replace(gradient=NO_GRADIENT) for part in parts]
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
        one_theta = self.vmapped and steps == 1

        def of_each(t: Tensor) -> Tensor:
            return self.of_each(t, len(support[0]))

        theta = [settled(t) if one_theta else of_each(t) for t in meta.adapted.values()]
        state = [torch.zeros_like(t) for t in theta for _ in range(layout.slots)]
        if one_theta and state:
            state = [of_each(s) for s in state]
        by_step = _rates_and_psi(meta, layout, steps, self.lslr)
        frozen = [settled(t) for t in _frozen(self.loop.network.model, layout.frozen)]
        shared = [of_each(b) for b in statistics.shared.values()]
        stacks = [[of_each(b) for b in stack.unbind(0)] for stack in statistics.per_step.values()]
        numbers = self._numbers(steps, weights, theta[0])

        losses: list[Group] = []
        seen: list[tuple[Given, Callable[[Given], Any]]] = []
        outputs: Group = []
        for k in range(steps - 1):
            rates, psi = by_step[k]
            counts = _counts(weights[k])
            given = _NONE._replace(
                step=numbers[k], theta=theta, state=state, psi=psi, rates=rates, frozen=frozen,
                buffers=[*shared, *(stack[k] for stack in stacks)], support=support, query=query if counts else [],
            )  # fmt: skip
            halves = self._there_and_back(counts, given) if k >= steps - self.loop.stored_steps else None
            if halves is not None:
                made, kept = halves[0](given)
                seen.append((given, partial(halves[1], kept)))
            else:
                made = self._piece("ahead", counts, given)
                seen.append((given._replace(query=[], query_theta=made.query_theta, g=made.g), self._back_over(made)))
            theta, state = made.theta, made.state
            shared = _left(made.buffers, shared, stacks, k)
            losses.append(made.losses)
        k = steps - 1
        rates, psi = by_step[k]
        given = _NONE._replace(
            step=numbers[k], theta=theta, state=state, psi=psi, rates=rates, frozen=frozen,
            buffers=[*shared, *(stack[k] for stack in stacks)], support=support, query=query,
        )  # fmt: skip
        turn = self._piece("turn", True, given, one_theta)
        shared = _left(turn.buffers, shared, stacks, k)
        losses.append(turn.losses)
        outputs = turn.outputs
        adjoint, adjoint_state = turn.adjoint, turn.adjoint_state
        psi_gradients, rate_gradients = [turn.psi], [turn.rates]
        while seen:
            given, back = seen.pop()
            found = back(given._replace(adjoint=adjoint, adjoint_state=adjoint_state))
            adjoint, adjoint_state = found.adjoint, found.adjoint_state
            psi_gradients.append(found.psi)
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
            rates[layout.theta[place]] = torch.stack(of_steps) if self.lslr else torch.stack(of_steps).sum(0)
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
            [torch.stack(stack, int(self.vmapped)) for stack in stacks],
        )

    def _there_and_back(self, counts: bool, given: Given) -> Halves | None:
        """A step whose costly results are kept for the way back; None in first order, which has no use for them."""
        if not self.second_order:
            return None
        return self.halves(
            ("there and back", counts),
            lambda: Pieces(self.loop, self.layout, True, counts).there_and_back,
            given,
            THERE,
        )

    def _back_over(self, made: Any) -> Callable[[Given], Any]:
        """The way back over a step, which is computed once more."""

        def back(given: Given) -> Any:
            if not self.second_order:  # of constants the update alone is walked back over
                given = given._replace(buffers=[], frozen=[], psi=[], support=[])
            found = self._piece("back", bool(given.query_theta), given)
            return found._replace(psi=_both(found.psi, made.query_psi))

        return back

    def _piece(self, name: str, counts: bool, given: Given, one_theta: bool = False) -> Any:
        def piece() -> Made:
            found: Made = getattr(Pieces(self.loop, self.layout, self.second_order, counts), name)
            return found

        return self.called((name, counts), piece, given, one_theta)

    def _numbers(self, steps: int, weights: LossWeights, like: Tensor) -> list[Group]:
        """K and w_k of every step as tensors; of weights that are numbers, those of this epoch are kept."""
        key = tuple(weights) if not any(isinstance(w, Tensor) for w in weights) else None
        found = self._steps.get(key)
        if found is None:
            real = like.dtype.to_real()
            found = [
                # Filled, not copied from the host, which a CUDA graph cannot record.
                [
                    torch.full((), k, dtype=torch.float64, device=like.device),
                    w.to(real) if isinstance(w, Tensor) else torch.full((), w, dtype=real, device=like.device),
                ]
                for k, w in enumerate(weights)
            ]
            self._steps = {key: found}
        return found


class OutputsProgram(Functions):
    """Outputs on the query sets of test tasks."""

    def run(
        self, meta: MetaParameters, statistics: Statistics, support: Group, query: Group, asked: Asked
    ) -> TaskOutputs:
        """Of a meta-batch of tasks, whose targets are None: no graph needs them."""
        if self.vmapped:
            return self._walk(meta, statistics, support, query, asked)
        parts = [
            self._walk(meta, statistics, [t[i] for t in support], [t[i] for t in query], asked)
            for i in range(len(support[0]))
        ]
        return stacked(parts)

    def _walk(
        self, meta: MetaParameters, statistics: Statistics, support: Group, query: Group, asked: Asked
    ) -> TaskOutputs:
        layout = self.layout

        def of_each(t: Tensor) -> Tensor:
            return self.of_each(t, len(support[0]))

        theta = [of_each(t) for t in meta.adapted.values()]
        state = [torch.zeros_like(t) for t in theta for _ in range(layout.slots)]
        by_step = _rates_and_psi(meta, layout, max(asked.steps, 1), self.lslr)
        frozen = [settled(t) for t in _frozen(self.loop.network.model, layout.frozen)]
        own = [of_each(b) for b in statistics.shared.values()]
        shared = own
        asked_stacks = [[of_each(b) for b in stack.unbind(0)] for stack in statistics.per_step.values()]
        stacks = [list(stack) for stack in asked_stacks]

        def answered(k: int, normalisation: Normalisation) -> Any:
            last = max(k - 1, 0)
            of_learner = dict(zip(statistics.shared, own, strict=True))
            left = dict(zip(statistics.shared, shared, strict=True))
            buffers = [(of_learner if n in self.loop.network.norm_buffers else left)[n] for n in statistics.shared]
            given = _NONE._replace(
                theta=theta, psi=by_step[last][1], frozen=frozen,
                buffers=[*buffers, *(_at(stack, last) for stack in asked_stacks)],
                support=support if normalisation == "support" else [], query=query,
            )  # fmt: skip

            def piece() -> Made:
                return partial(Pieces(self.loop, layout, False, False).answer, normalisation)

            found: Answer = self.called(normalisation, piece, given)
            assert layout.outputs is not None
            return layout.outputs.filled(found.outputs)

        per_step = [answered(0, "batch")]
        for k in range(asked.steps):
            rates, psi = by_step[k]
            step = [torch.full((), k, dtype=torch.float64, device=theta[0].device), theta[0].real.new_zeros(())]
            given = _NONE._replace(
                step=step, theta=theta, state=state, psi=psi, rates=rates, frozen=frozen,
                buffers=[*shared, *(_at(stack, k) for stack in stacks)], support=support,
            )  # fmt: skip
            made = self.called("adapt", lambda: Pieces(self.loop, layout, True, False).adapt, given)
            theta, state = made.theta, made.state
            shared = _left(made.buffers, shared, stacks, k)
            per_step.append(answered(k + 1, "batch"))
        along = int(self.vmapped)
        steps = pytree.tree_map(lambda *leaves: _along(leaves, along), *per_step)
        return TaskOutputs(steps, {n: answered(asked.steps, n) for n in asked.inductive}, None)


def _left(buffers: Group, shared: Group, stacks: list[Group], k: int) -> Group:
    """The shared ones of the buffers that step k left behind; the others are its entries of the stacks."""
    count = len(shared)
    for stack, buffer in zip(stacks, buffers[count:], strict=True):
        stack[min(k, len(stack) - 1)] = buffer
    return buffers[:count]


def _along(leaves: Sequence[Any], dim: int) -> Any:
    return torch.stack(list(leaves), dim) if isinstance(leaves[0], Tensor) else leaves[0]


def layout_of(loop: InnerLoop, meta: MetaParameters, statistics: Statistics, support: Nest, query: Nest) -> Layout:
    """The names of what a program is given."""
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
    rates = [meta.rates[n].detach() for n in layout.theta]
    by_step = [r.unbind(0) for r in rates] if lslr else [(r,) for r in rates]
    shared = [settled(t) for t in meta.shared.values()]
    stacks = [stack.detach().unbind(0) for stack in meta.per_step.values()]
    return [([_at(r, k) for r in by_step], [*shared, *(_at(stack, k) for stack in stacks)]) for k in range(steps)]


def _at(of_steps: Sequence[Tensor], k: int) -> Tensor:
    """That of step k; steps beyond those that were trained use the last."""
    return of_steps[min(k, len(of_steps) - 1)]


def settled(tensor: Tensor) -> Tensor:
    """Laid out as the graphs have it, a constant."""
    return tensor.detach().contiguous()


def _both(a: Group, b: Group) -> Group:
    return [x + y for x, y in zip(a, b, strict=True)] if a and b else a or b


def _counts(weight: Tensor | float) -> bool:
    return isinstance(weight, Tensor) or weight != 0
