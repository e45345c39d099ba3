"""What an inner step repeats, as functions of lists of tensors: each is one compiled graph.

A list holds the tensors of one kind, in the order of their names, which ``Layout`` knows. Under ``vmap`` tensors of
tasks have the tasks as first dimension, and gradients by what all tasks share are summed over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from innerloop.adapted import answers
from innerloop.inner_loop import InnerLoop, State
from innerloop.meta_gradients import ahead, back
from innerloop.network import Network
from innerloop.norm_layers import Normalisation
from innerloop.per_step import Statistics
from innerloop.tasks import Examples, Task
from innerloop.update_rules import Tensors

Group = list[Tensor]


class Given(NamedTuple):
    """What the pieces are functions of; a piece that has no use for something is given an empty list.

    Attributes:
        step: k and w_k, tensors without dimensions.
        theta: fast weights.
        state: of the update rule, slot by slot of each parameter.
        psi: parameters that the step uses and does not adapt.
        rates: of this step.
        buffers: the model's, as the step finds them.
        frozen: parameters that nobody learns.
        support: the tensors of the support set.
        query: those of the query set.
        g: the support gradient, in first order.
        adjoint: of theta^{k+1}, without the query loss's share.
        adjoint_state: of the state after the step.
        query_theta: the query loss's share of the adjoint.
    """

    step: Group
    theta: Group
    state: Group
    psi: Group
    rates: Group
    buffers: Group
    frozen: Group
    support: Group
    query: Group
    g: Group
    adjoint: Group
    adjoint_state: Group
    query_theta: Group


OF_TASKS = {"theta", "state", "buffers", "support", "query", "g", "adjoint", "adjoint_state", "query_theta"}


class Forward(NamedTuple):
    """What ``Pieces.ahead`` gives; the last four are empty where the query loss does not count."""

    theta: Group
    state: Group
    buffers: Group
    g: Group
    losses: Group
    """The support loss, and, if it counts, the query loss and w_k times it."""
    outputs: Group
    query_theta: Group
    query_psi: Group


class Backward(NamedTuple):
    """What ``Pieces.back`` gives."""

    adjoint: Group
    adjoint_state: Group
    psi: Group
    rates: Group


class Turn(NamedTuple):
    """What ``Pieces.turn`` gives: the last step ahead, and back over it."""

    buffers: Group
    losses: Group
    outputs: Group
    adjoint: Group
    adjoint_state: Group
    psi: Group
    rates: Group


class ThereAndBack(NamedTuple):
    """What ``Pieces.there_and_back`` gives: the step ahead, and from ``adjoint`` on the way back."""

    theta: Group
    state: Group
    buffers: Group
    losses: Group
    adjoint: Group
    adjoint_state: Group
    psi: Group
    rates: Group


THERE = 4
"""Fields of ``ThereAndBack`` that are known before the way back."""


class Answer(NamedTuple):
    """What ``Pieces.answer`` gives."""

    outputs: Group


SHARED = {"psi", "rates", "query_psi"}
"""Gradients by what all tasks share."""


@dataclass
class Layout:
    """Names of the tensors in the lists, and the nests that tasks and outputs are.

    Attributes:
        theta: names of adapted parameters.
        psi: names of the others that are learned.
        frozen: names of those that are not.
        buffers: names.
        learned_rates: places in the list of rates of those that are learned.
        slots: state tensors of each adapted parameter.
        support: what a support set is: its nest, with ``None`` for tensors.
        query: the same of a query set.
        outputs: the same of the model's outputs on a query set, known once it was traced.
    """

    theta: list[str]
    psi: list[str]
    frozen: list[str]
    buffers: list[str]
    learned_rates: list[int]
    slots: int
    support: Nest
    query: Nest
    outputs: Nest | None = field(default=None)

    def named_state(self, flat: Sequence[Tensor]) -> State:
        """The update rule's state by parameter."""
        return {n: tuple(flat[i * self.slots : (i + 1) * self.slots]) for i, n in enumerate(self.theta)}


class Nest(NamedTuple):
    """A nest of tensors and other things, without the tensors.

    Attributes:
        structure: of the nest; ``None`` for ``Examples`` of two tensors, which most are and which is quick to compare.
        others: leaves; ``TENSOR`` in the places of tensors.
    """

    structure: pytree.TreeSpec | None
    others: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Any) -> tuple[Nest, Group]:
        """The nest, and its tensors."""
        if type(tree) is Examples and isinstance(tree.inputs, Tensor) and isinstance(tree.targets, Tensor):
            return cls(None, ()), list(tree)
        leaves, structure = pytree.tree_flatten(tree)
        others = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(structure, others), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def filled(self, tensors: Iterable[Tensor]) -> Any:
        """The tree with these tensors."""
        rest = iter(tensors)
        if self.structure is None:
            return Examples(*rest)
        return pytree.tree_unflatten([next(rest) if o is TENSOR else o for o in self.others], self.structure)


TENSOR = "<tensor>"


@dataclass(eq=False)
class _WithFrozen(Network):
    """A network that is given its frozen parameters too, so that a trace has them as arguments."""

    frozen: Tensors = field(default_factory=dict)

    def loss(self, parameters: Any, buffers: Any, examples: Examples) -> tuple[Tensor, Any, Tensors]:
        """``Network.loss``."""
        return super().loss({**self.frozen, **parameters}, buffers, examples)

    def outputs(self, parameters: Any, buffers: Any, inputs: Any) -> Any:
        """``Network.outputs``."""
        return super().outputs({**self.frozen, **parameters}, buffers, inputs)


@dataclass
class Pieces:
    """The functions, of one task; ``over_tasks`` makes them functions of a meta-batch.

    Attributes:
        loop: functional, with rates of one step.
        layout: of the lists.
        second_order: whether the gradient is exact.
        counts: whether the query loss after the step counts.
    """

    loop: InnerLoop
    layout: Layout
    second_order: bool
    counts: bool

    def ahead(self, given: Given) -> Forward:
        """Inner step k."""
        made, _ = self._ahead(given, keep_graph=False)
        return made if not self.second_order else made._replace(g=[])

    def turn(self, given: Given) -> Turn:
        """The last inner step, and back over it. The graph of its gradient is kept."""
        made, second_order = self._ahead(given, keep_graph=self.second_order)
        zeros = [torch.zeros_like(t) for t in made.state]
        given = given._replace(g=made.g, adjoint=made.query_theta, adjoint_state=zeros)
        found = self._back(given, second_order)
        psi = [a + b for a, b in zip(made.query_psi, found.psi, strict=True)] if found.psi else made.query_psi
        return Turn(made.buffers, made.losses, made.outputs, found.adjoint, found.adjoint_state, psi, found.rates)

    def there_and_back(self, given: Given) -> ThereAndBack:
        """Inner step k and the way back over it, of one graph that is to be halved: its gradient is computed once."""
        made, second_order = self._ahead(given, keep_graph=True)
        adjoint = given.adjoint
        if made.query_theta:
            adjoint = [a + b for a, b in zip(adjoint, made.query_theta, strict=True)]
        found = self._back(given._replace(g=made.g, adjoint=adjoint), second_order)
        psi = [a + b for a, b in zip(made.query_psi, found.psi, strict=True)] if made.query_psi else found.psi
        return ThereAndBack(
            made.theta, made.state, made.buffers, made.losses, found.adjoint, found.adjoint_state, psi, found.rates
        )

    def back(self, given: Given) -> Backward:
        """Back over an inner step, whose gradient is computed once more: memory does not grow with the steps."""
        if given.query_theta:
            both = zip(given.adjoint, given.query_theta, strict=True)
            given = given._replace(adjoint=[a + b for a, b in both])
        if not self.second_order:
            return self._back(given, None)
        statistics = Statistics(dict(zip(self.layout.buffers, given.buffers, strict=True)), {})
        support = self.layout.support.filled(given.support)
        loop, theta, psi = self._called(given)
        k: Any = given.step[0]  # a tensor in the place of a number
        again = loop.gradient(theta, psi, statistics, k, support, keep_graph=True)
        return self._back(given._replace(g=list(again.theta.values())), again.second_order)

    def adapt(self, given: Given) -> Forward:
        """Inner step k in use, not in training."""
        with self.loop.network.modes.adapting():
            return self._ahead(given, keep_graph=False)[0]._replace(g=[])

    def answer(self, normalisation: Normalisation, given: Given) -> Answer:
        """The model's outputs on the query set with these fast weights."""
        layout = self.layout
        loop, theta, psi = self._called(given)
        buffers = {n: b.clone() for n, b in zip(layout.buffers, given.buffers, strict=True)}
        support = layout.support.filled(given.support).inputs if given.support else None
        query = layout.query.filled(given.query).inputs
        found = answers(loop.network, {**theta, **psi}, buffers, query, normalisation, support)
        layout.outputs, outputs = Nest.of(found)
        return Answer(outputs)

    def _called(self, given: Given) -> tuple[InnerLoop, Tensors, Tensors]:
        own = self.loop.network
        frozen = dict(zip(self.layout.frozen, given.frozen, strict=True))
        network = _WithFrozen(own.model, own.loss_function, own.precision, frozen=frozen)
        network.__dict__.update(state=own.state, modes=own.modes)
        loop = InnerLoop(network, self.loop.rule, lslr=False, functional=True)
        theta = dict(zip(self.layout.theta, given.theta, strict=True))
        return loop, theta, dict(zip(self.layout.psi, given.psi, strict=True))

    def _ahead(self, given: Given, keep_graph: bool) -> tuple[Forward, Any]:
        layout = self.layout
        k: Any
        k, weight = given.step
        loop, theta, psi = self._called(given)
        query: Any = layout.query.filled(given.query) if self.counts else None
        task = Task(layout.support.filled(given.support), query)
        made = ahead(
            loop,
            theta,
            layout.named_state(given.state),
            psi,
            dict(zip(layout.theta, given.rates, strict=True)),
            Statistics(dict(zip(layout.buffers, given.buffers, strict=True)), {}),
            k,
            task,
            weight if self.counts else 0.0,
            keep_graph,
        )
        losses, outputs = [made.support_loss], list[Tensor]()
        if made.query_loss is not None:
            losses += [made.query_loss, weight * made.query_loss]
            layout.outputs, outputs = Nest.of(made.outputs)
        state = [s for slots in made.state.values() for s in slots]
        buffers = list(made.statistics.shared.values())
        forward = Forward(
            list(made.theta.values()), state, buffers, list(made.g.values()), losses, outputs,
            list(made.query_theta.values()), list(made.query_psi.values()),
        )  # fmt: skip
        return forward, made.second_order

    def _back(self, given: Given, second_order: Any) -> Backward:
        layout = self.layout
        theta, g, rates, adjoint = (
            dict(zip(layout.theta, group, strict=True)) for group in (given.theta, given.g, given.rates, given.adjoint)
        )
        states = layout.named_state(given.state), layout.named_state(given.adjoint_state)
        k: Any = given.step[0]
        found = back(self.loop, theta, states[0], g, rates, k, second_order, adjoint, states[1])
        every = list(found.rates.values())
        return Backward(
            list(found.adjoint.values()),
            [s for slots in found.adjoint_state.values() for s in slots],
            list(found.psi.values()),
            [every[i] for i in layout.learned_rates],
        )


Piece = Callable[[Given], Any]


def over_tasks(piece: Piece, vmapped: bool, one_theta: bool) -> Piece:
    """The piece for all tasks at once, or, not vmapped, for one.

    Args:
        piece: one of the functions of ``Pieces``.
        vmapped: whether the tasks are a first dimension.
        one_theta: whether all tasks have the same theta, without that dimension; its adjoint is then summed too.
    """

    def function(given: Given) -> Any:
        of_tasks = OF_TASKS - {"theta"} if one_theta else OF_TASKS
        dims = tuple(0 if name in of_tasks and group else None for name, group in given._asdict().items())
        found = vmap(lambda *groups: piece(Given(*groups)), in_dims=dims)(*given) if vmapped else piece(given)
        summed = {*SHARED, "adjoint"} if one_theta else SHARED
        return type(found)(
            *(
                [(t.sum(0) if vmapped and name in summed else t).contiguous() for t in group]
                for name, group in found._asdict().items()
            )
        )

    return function
