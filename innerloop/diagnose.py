"""Why does it not learn? A learner looked at on a few tasks, and what is odd about it, the likeliest reason first.

Everything is measured on tasks: losses after each inner step, the same at other inner rates, with the classes numbered
otherwise, under each normalisation, the meta-gradient of first and of second order, units that never fire. A finding is
a function of these observations; to add one is to add a function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from innerloop.model_state import Randomness
from innerloop.tasks import Examples, Task, as_meta_batch, meta_batch_size, select_task

if TYPE_CHECKING:
    from innerloop.learner import MetaLearner

FACTORS = (0.1, 0.3, 3.0, 10.0, 100.0, 1000.0)
"""Of the inner rates, that are tried."""
_RECTIFIERS = (nn.ReLU, nn.ReLU6)


@dataclass(frozen=True)
class Finding:
    """Something odd.

    Attributes:
        kind: a word for it, the same always.
        likelihood: that it is why nothing is learned, 0 to 100, to order findings by.
        measured: what was seen, in figures.
        meaning: what it likely means.
        remedy: the option to change, in Python and on the command line.
    """

    kind: str
    likelihood: int
    measured: str
    meaning: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.measured}. {self.meaning}. {self.remedy}"


@dataclass
class Observations:
    """What was measured; tensors over T tasks and inner steps 0 .. K.

    Attributes:
        support_losses, query_losses: ``[T, K + 1]``.
        query_accuracies, support_accuracies: ``[T, K + 1]``; None where targets are no classes.
        ways: classes of a task, 0 where there are none.
        answers: query examples that an accuracy is over.
        unlike: largest over smallest number of support examples of a class.
        by_normalisation: query accuracy after the last step.
        renumbered: query accuracy after the last step, with the classes numbered otherwise.
        at_rates: mean support and query loss after the last step with the inner rates times a factor.
        input_mean, input_deviation: of all numbers in the support inputs; NaN where there are none.
        gradient_norms: ``[T]``, of the exact meta-gradient.
        parameter_norm: of what is learned.
        without_gradient: learned meta-parameters whose meta-gradient is zero in every task.
        order_cosine: between the first-order and the exact meta-gradient; NaN where that is not known.
        dead: fraction of units that are zero for all examples, by layer.
        first_order: whether the method takes first-order meta-gradients only.
        zero_head: whether parameters start from zero in every task.
    """

    support_losses: Tensor
    query_losses: Tensor
    query_accuracies: Tensor | None = None
    support_accuracies: Tensor | None = None
    ways: int = 0
    answers: int = 0
    unlike: float = 1.0
    by_normalisation: dict[str, float] = field(default_factory=dict)
    renumbered: float = math.nan
    at_rates: dict[float, tuple[float, float]] = field(default_factory=dict)
    input_mean: float = math.nan
    input_deviation: float = math.nan
    gradient_norms: Tensor = field(default_factory=lambda: torch.zeros(0))
    parameter_norm: float = math.nan
    without_gradient: list[str] = field(default_factory=list)
    order_cosine: float = math.nan
    dead: dict[str, float] = field(default_factory=dict)
    first_order: bool = False
    zero_head: bool = False

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / self.ways if self.ways else math.nan

    @property
    def noise(self) -> float:
        """What two accuracies may differ by for want of examples: two standard errors, at the most."""
        return 2 * math.sqrt(0.5 / max(self.answers, 1))

    def accuracy(self, step: int) -> float:
        """Mean query accuracy after a step; NaN where targets are no classes."""
        return math.nan if self.query_accuracies is None else float(self.query_accuracies[:, step].mean())


def observe(
    learner: MetaLearner, tasks: Any, epoch: float | None = None, tick: Callable[[], None] = lambda: None
) -> Observations:
    """Measure, and leave the learner as it was. ``tick`` is called at most ``ticks(T)`` times."""
    like = next(iter(learner.meta.adapted.values()))
    batch = as_meta_batch(tasks, like)
    size = meta_batch_size(batch)
    each = [select_task(batch, i) for i in range(size)]
    randomness = Randomness.now(like.device)
    try:
        walks = [_walk(learner, task, tick) for task in each]
        found = Observations(torch.stack([w[0] for w in walks]), torch.stack([w[1] for w in walks]))
        method = learner.method
        found.first_order, found.zero_head = not method.second_order, bool(method.zero_init)
        if all(w[3] is not None for w in walks):
            _observe_classes(learner, each, walks, found, tick)
        for factor in FACTORS:
            with _rates_times(learner, factor):
                ends = [_walk(learner, task, tick, last=True) for task in each]
            means = [float(torch.stack([end[i][-1] for end in ends]).mean()) for i in (0, 1)]  # type: ignore[index]
            found.at_rates[factor] = (means[0], means[1])
        numbers = [t for t in pytree.tree_leaves([t.support.inputs for t in each]) if isinstance(t, Tensor)]
        if values := [t.flatten().double() for t in numbers if t.is_floating_point()]:
            everything = torch.cat(values)
            found.input_mean, found.input_deviation = float(everything.mean()), float(everything.std())
        found.dead = _dead_units(learner, each)
        _observe_gradients(learner, batch, epoch, found, tick)
        return found
    finally:
        randomness.restore(like.device)


def ticks(tasks: int) -> int:
    """Steps of the work on so many tasks."""
    return (2 + len(FACTORS)) * tasks + 2


def diagnose(
    learner: MetaLearner, tasks: Any, epoch: float | None = None, tick: Callable[[], None] = lambda: None
) -> list[Finding]:
    """What is odd about a learner on a meta-batch, the likeliest reason not to learn first; empty if nothing is."""
    return findings(observe(learner, tasks, epoch, tick))


def findings(seen: Observations) -> list[Finding]:
    """What follows from observations, the likeliest first."""
    found = [finding for check in CHECKS if (finding := check(seen)) is not None]
    return sorted(found, key=lambda finding: -finding.likelihood)


# Checks


def not_finite(seen: Observations) -> Finding | None:
    """Losses or meta-gradients that are no numbers."""
    losses = torch.cat([seen.support_losses, seen.query_losses])
    bad = int((~losses.isfinite()).any(1).sum())
    if not bad and bool(seen.gradient_norms.isfinite().all()):
        return None
    where = f"{bad} of {len(losses)} series of losses are NaN or infinite" if bad else "the meta-gradient is not finite"
    return Finding(
        "not finite", 100, where, "The inner loop diverges, or the inputs are no numbers",
        "Look for NaN in the data; lower the inner rate: inner_lr=, --inner-lr",
    )  # fmt: skip


def inputs_unscaled(seen: Observations) -> Finding | None:
    """Inputs far from zero mean and unit deviation, or all alike."""
    mean, deviation = seen.input_mean, seen.input_deviation
    constant = deviation < 1e-6 * max(1.0, abs(mean))
    if not constant and not (deviation > 20 or abs(mean) > 20 * max(deviation, 1.0)):
        return None
    measured = f"the support inputs have mean {mean:.3g} and deviation {deviation:.3g}"
    if constant:
        return Finding(
            "inputs all alike", 99, measured, "There is nothing in them to learn from",
            "Look at what is read: a wrong column, an empty picture, ink that is cut off",
        )  # fmt: skip
    return Finding(
        "inputs not scaled", 94, measured, "Rates and initial weights are made for inputs of about unit size",
        "Scale the inputs: divide pixels by 255, subtract the mean and divide by the deviation (Episodes(mean=, std=))",
    )  # fmt: skip


def dead_units(seen: Observations) -> Finding | None:
    """ReLUs that give zero for every example: no gradient goes through them."""
    dead = {name: share for name, share in seen.dead.items() if share > 0.5}
    if not dead:
        return None
    shown = ", ".join(f"{name} {share:.0%}" for name, share in list(dead.items())[:4])
    return Finding(
        "dead units", 97 if max(dead.values()) > 0.99 else 78, f"units that are zero for all examples: {shown}",
        "No gradient goes through them: an outer rate that was too large pushed their biases below everything, or they "
        "were initialised so",
        "Start again with a lower outer rate (lr=, --outer-lr), a norm layer before them, or leaky ReLU",
    )  # fmt: skip


def rates_too_small(seen: Observations) -> Finding | None:
    """The support loss hardly falls, and would at a larger rate."""
    start, end = float(seen.support_losses[:, 0].mean()), float(seen.support_losses[:, -1].mean())
    fall = (start - end) / max(abs(start), 1e-12)
    best = min((f for f in FACTORS if f > 1), key=lambda f: _or_infinite(seen.at_rates.get(f, (math.inf,) * 2)[0]))
    there = seen.at_rates.get(best, (math.inf, math.inf))
    if not (fall < 0.02 and there[0] < end - 0.01 * abs(start)):
        return None
    return Finding(
        "inner rates too small", 92,
        f"the support loss goes from {start:.4g} to {end:.4g} in {seen.support_losses.shape[1] - 1} inner steps, with "
        f"rates {best:g} times as large to {there[0]:.4g}",
        "The inner loop hardly moves: what is learned is one model for all tasks",
        "Raise inner_lr= (--inner-lr), or let it be learned: lslr=True (--lslr), meta_sgd",
    )  # fmt: skip


def rates_too_large(seen: Observations) -> Finding | None:
    """The query loss is much better at a smaller rate, or the support loss rises."""
    start, end = float(seen.support_losses[:, 0].mean()), float(seen.support_losses[:, -1].mean())
    query = float(seen.query_losses[:, -1].mean())
    best = min((f for f in FACTORS if f < 1), key=lambda f: _or_infinite(seen.at_rates.get(f, (math.inf,) * 2)[1]))
    there = seen.at_rates.get(best, (math.inf, math.inf))
    rises = not end < 1.05 * start + 1e-9
    # What no rate makes better than guessing has another reason.
    useful = 0.9 * math.log(seen.ways) if seen.ways else 0.95 * float(seen.query_losses[:, 0].mean())
    if not (there[1] < useful and there[1] < 0.8 * _or_infinite(query) and (rises or there[1] < 0.5 * query)):
        return None
    return Finding(
        "inner rates too large", 91,
        f"the support loss goes from {start:.4g} to {end:.4g} and the query loss ends at {query:.4g}, with rates "
        f"{best:g} times as large at {there[1]:.4g}",
        "The inner loop oversteps",
        "Lower inner_lr= (--inner-lr), or let it be learned: lslr=True (--lslr)",
    )  # fmt: skip


def support_loss_stays(seen: Observations) -> Finding | None:
    """The support loss does not fall at any rate."""
    start, end = float(seen.support_losses[:, 0].mean()), float(seen.support_losses[:, -1].mean())
    least = min([end, *(losses[0] for losses in seen.at_rates.values())], key=_or_infinite)
    if start - least > 0.02 * abs(start) or start < 1e-6:
        return None
    return Finding(
        "the support loss stays", 90,
        f"{start:.4g} before the inner loop, and at best {least:.4g} after it at any rate",
        "What the inner loop adapts has no say in the support loss, or every support set looks the same to it",
        "Look at adapt= and adapt_except= (--adapt, --adapt-except), at frozen layers (requires_grad), and at the "
        "support sets' targets",
    )  # fmt: skip


def memorised(seen: Observations) -> Finding | None:
    """The query set is answered before the inner loop."""
    if not seen.ways or seen.accuracy(0) < seen.chance + 0.4 * (1 - seen.chance):
        return None
    return Finding(
        "the tasks are memorised", 89,
        f"query accuracy is {seen.accuracy(0):.1%} before the inner loop (guessing: {seen.chance:.1%}) and "
        f"{seen.accuracy(-1):.1%} after it",
        "A class has the same number in every task, so that one model answers all of them and the support set is not "
        "needed (Yin et al. 2020); new classes will be told at the rate of guessing",
        "Number the classes of each task anew, at random; zero_init=('head.*',), --zero-init 'head.*'",
    )  # fmt: skip


def query_does_not_follow(seen: Observations) -> Finding | None:
    """The support set is learned and the query set is not."""
    if not seen.ways or seen.support_accuracies is None:
        return None
    support, query = float(seen.support_accuracies[:, -1].mean()), seen.accuracy(-1)
    if support < seen.chance + 0.35 * (1 - seen.chance) or query > seen.chance + 0.15 * (1 - seen.chance):
        return None
    return Finding(
        "the query set does not follow", 87,
        f"after the inner loop {support:.1%} of the support set are told right, and {query:.1%} of the query set "
        f"(guessing: {seen.chance:.1%})",
        "Support and query labels do not mean the same classes (shuffled, or numbered apart), or training has not "
        "begun to work",
        "Print one task: the same label must be the same class in both sets. If it is, train longer",
    )  # fmt: skip


def query_loss_rises(seen: Observations) -> Finding | None:
    """As ``query_does_not_follow``, of regression."""
    if seen.ways:
        return None
    s0, s1 = float(seen.support_losses[:, 0].mean()), float(seen.support_losses[:, -1].mean())
    q0, q1 = float(seen.query_losses[:, 0].mean()), float(seen.query_losses[:, -1].mean())
    if not (s1 < 0.7 * s0 and q1 > 1.1 * q0):
        return None
    return Finding(
        "the query set does not follow", 87,
        f"the support loss falls from {s0:.4g} to {s1:.4g}, and the query loss rises from {q0:.4g} to {q1:.4g}",
        "Support and query set are not of one task, or the inner loop fits the support set's noise",
        "Look at one task; fewer inner steps (inner_steps=, --inner-steps), more support examples (--shots)",
    )  # fmt: skip


def order_of_classes(seen: Observations) -> Finding | None:
    """Other numbers for the same classes give another accuracy."""
    if not seen.ways or math.isnan(seen.renumbered):
        return None
    if seen.accuracy(-1) - seen.renumbered < max(0.1, seen.noise) or memorised(seen) is not None:
        return None
    return Finding(
        "the numbering of classes matters", 80,
        f"query accuracy {seen.accuracy(-1):.1%}, and {seen.renumbered:.1%} with the same classes numbered otherwise",
        "The learned head prefers some numberings of the classes to others",
        "Let the head start from zero: zero_init=('head.*',), --zero-init 'head.*'; number classes at random",
    )  # fmt: skip


def unequal_support(seen: Observations) -> Finding | None:
    """Classes with many more support examples than others."""
    if seen.unlike < 3:
        return None
    return Finding(
        "unequal support sets", 83, f"some classes have {seen.unlike:.3g} times as many support examples as others",
        "A mean over examples is ruled by the large classes, and so are the answers",
        "Weigh the classes in the loss (F.cross_entropy(weight=)); innerloop adapt does so by itself (--weighing)",
    )  # fmt: skip


def transductive(seen: Observations) -> Finding | None:
    """Answers that lean on the other query examples."""
    by = seen.by_normalisation
    if not by or by["batch"] - by["support"] < max(0.15, seen.noise):
        return None
    return Finding(
        "answers depend on each other", 60,
        "query accuracy by normalisation: " + ", ".join(f"{name} {value:.1%}" for name, value in by.items()),
        "The norm layers use the query set's own statistics, which tell of all its examples (transductive); one new "
        "example alone is told as under running or support",
        "Ask with normalisation='support'; report it by name; train with more query examples (--queries), or with norm "
        "layers that know no batch (nn.GroupNorm)",
    )  # fmt: skip


def gradients_explode(seen: Observations) -> Finding | None:
    """Meta-gradients far larger than what they change, or in a few tasks far larger than in the others."""
    norms = seen.gradient_norms
    if not len(norms) or not bool(norms.isfinite().all()):
        return None
    middle, most = float(norms.median()), float(norms.max())
    if most < 20 * max(seen.parameter_norm, 1e-3) and not (most > 50 * middle and most > seen.parameter_norm):
        return None
    return Finding(
        "meta-gradients explode", 82,
        f"their norm is {middle:.3g} (median over tasks) and {most:.3g} at most; that of the parameters is "
        f"{seen.parameter_norm:.3g}",
        "The unrolled inner loop multiplies gradients: rates or steps are too many for this network",
        "Lower inner_lr= (--inner-lr), clip (--clip 10), multi-step loss (msl=True, --msl), a norm layer in each block",
    )  # fmt: skip


def gradients_vanish(seen: Observations) -> Finding | None:
    """Meta-gradients of nearly nothing while the loss is not small."""
    norms = seen.gradient_norms
    small = len(norms) and float(norms.max()) < 1e-6 * max(seen.parameter_norm, 1e-3)
    if not small or float(seen.query_losses[:, -1].mean()) < 1e-3:
        return None
    return Finding(
        "meta-gradients vanish", 93, f"their norm is {float(norms.max()):.3g} at most",
        "Nothing leads from the query loss to the parameters: it is saturated, detached, or every path is dead",
        "Look for .detach(), no_grad and saturating activations in the model and in the loss",
    )  # fmt: skip


def parameters_without_gradient(seen: Observations) -> Finding | None:
    """Learned parameters that no query loss depends on."""
    if not seen.without_gradient or gradients_vanish(seen) is not None:
        return None
    shown = ", ".join(seen.without_gradient[:5]) + (", ..." if len(seen.without_gradient) > 5 else "")
    return Finding(
        "parameters without a gradient", 70, f"the meta-gradient of {shown} is zero in every task",
        "The forward does not use them, or what follows is dead",
        "Use them, or freeze them: requires_grad_(False)",
    )  # fmt: skip


def first_order_differs(seen: Observations) -> Finding | None:
    """A first-order method where second derivatives matter."""
    if not seen.first_order or not seen.order_cosine < 0.5:
        return None
    return Finding(
        "first order is another direction", 75,
        f"the cosine between the first-order and the exact meta-gradient is {seen.order_cosine:.2f}",
        "What first order leaves out matters here",
        "Take exact meta-gradients: second_order=True, --second-order (--da-epochs 0)",
    )  # fmt: skip


CHECKS: tuple[Callable[[Observations], Finding | None], ...] = (
    not_finite,
    inputs_unscaled,
    dead_units,
    gradients_vanish,
    rates_too_small,
    rates_too_large,
    support_loss_stays,
    memorised,
    query_does_not_follow,
    query_loss_rises,
    gradients_explode,
    order_of_classes,
    unequal_support,
    first_order_differs,
    parameters_without_gradient,
    transductive,
)
"""Everything that is looked for."""


# Measuring

Walk = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Losses on support and query set after each step, and accuracies where targets are classes."""


def _walk(learner: MetaLearner, task: Task, tick: Callable[[], None], last: bool = False) -> Walk:
    """One task's inner loop; with ``last``, only its end is judged."""
    loss = learner.loop.network.loss_function
    thetas = list(learner.trajectory(task.support))
    chosen = list(enumerate(thetas))[-1:] if last else list(enumerate(thetas))
    rows: dict[str, list[Tensor]] = {"support": [], "query": [], "support right": [], "query right": []}
    for k, theta in chosen:
        for name, (inputs, targets) in (("support", task.support), ("query", task.query)):
            outputs = learner.predict(theta, k, inputs)
            with torch.no_grad():
                rows[name].append(loss(outputs, targets).detach().double().cpu())
            if _are_classes(outputs, targets):
                rows[f"{name} right"].append((outputs.argmax(-1) == targets).double().mean().cpu())
    tick()
    stacked = {name: torch.stack(values) if values else None for name, values in rows.items()}
    assert stacked["support"] is not None
    assert stacked["query"] is not None
    return stacked["support"], stacked["query"], stacked["support right"], stacked["query right"]


def _are_classes(outputs: Any, targets: Any) -> bool:
    both = isinstance(outputs, Tensor) and isinstance(targets, Tensor)
    return both and outputs.ndim == 2 and targets.ndim == 1 and targets.dtype == torch.long


def _observe_classes(
    learner: MetaLearner, each: list[Task], walks: list[Walk], found: Observations, tick: Callable[[], None]
) -> None:
    found.support_accuracies = torch.stack([w[2] for w in walks if w[2] is not None])
    found.query_accuracies = torch.stack([w[3] for w in walks if w[3] is not None])
    found.answers = sum(len(t.query.targets) for t in each)
    labels = torch.stack([t.support.targets for t in each])
    found.ways = max(2, int(labels.max()) + 1, int(torch.stack([t.query.targets for t in each]).max()) + 1)
    counts = torch.stack([row.bincount(minlength=found.ways) for row in labels]).double()
    found.unlike = float((counts.amax(1) / counts.masked_fill(counts == 0, math.inf).amin(1)).mean())
    steps = learner.method.inner_steps
    ends = dict.fromkeys(("batch", "running", "support"), 0.0)
    renumbered = 0.0
    generator = torch.Generator().manual_seed(0)
    for task in each:
        *_, theta = learner.trajectory(task.support)
        for name in ends:
            ends[name] += _right(learner.predict(theta, steps, task.query.inputs, name, task.support.inputs), task)  # type: ignore[arg-type]
        order = torch.randperm(found.ways, generator=generator).to(task.support.targets.device)
        other = Task(*(Examples(part.inputs, order[part.targets]) for part in task))
        *_, theta = learner.trajectory(other.support)
        renumbered += _right(learner.predict(theta, steps, other.query.inputs), other)
        tick()
    found.by_normalisation = {name: value / len(each) for name, value in ends.items()}
    found.renumbered = renumbered / len(each)


def _right(outputs: Tensor, task: Task) -> float:
    return float((outputs.argmax(-1) == task.query.targets).double().mean())


@contextmanager
def _rates_times(learner: MetaLearner, factor: float) -> Iterator[None]:
    """The inner rates multiplied for a while; with constants of the method as with learned ones."""
    kept = {name: rate.detach().clone() for name, rate in learner.meta.rates.items()}
    with torch.no_grad():
        for rate in learner.meta.rates.values():
            rate.mul_(factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, rate in learner.meta.rates.items():
                rate.copy_(kept[name])


def _dead_units(learner: MetaLearner, each: list[Task]) -> dict[str, float]:
    """Fraction of the units (channels) of each ReLU that are zero for all examples of all tasks, at theta^0."""
    fires: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            values = output.detach().movedim(1, 0).flatten(1) if output.ndim > 1 else output.detach()[None]
            fired = (values > 0).any(1)
            fires[name] = fired | fires[name] if name in fires else fired

        return hook

    handles = [
        module.register_forward_hook(watch(name or type(module).__name__))
        for name, module in learner.model.named_modules()
        if isinstance(module, _RECTIFIERS)
    ]
    try:
        if handles:
            for task in each:
                theta = next(iter(learner.trajectory(task.support, 0)))
                learner.predict(theta, 0, task.support.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float((~fired).double().mean()) for name, fired in fires.items()}


def _observe_gradients(
    learner: MetaLearner, batch: Task, epoch: float | None, found: Observations, tick: Callable[[], None]
) -> None:
    """Meta-gradients of the last step's loss, exact and first-order."""
    from innerloop.engines import Plan

    learned = dict(learner.named_parameters())
    found.parameter_norm = float(torch.cat([t.detach().abs().flatten().double() for t in learned.values()]).norm())
    weights = [0.0] * (learner.method.inner_steps - 1) + [1.0]
    mode: Any = learner.mode if learner.mode in ("reverse", "mixed") else "mixed"

    def gradients(mode: Any) -> list[dict[str, Tensor]]:
        of_tasks = []
        for i in range(meta_batch_size(batch)):
            one: Task = pytree.tree_map(lambda t, i=i: t[i : i + 1] if isinstance(t, Tensor) else t, batch)
            result = learner.planned_gradients(one, Plan(mode, weights)).gradient._asdict()
            named = {f"{group}/{n}": t for group, tensors in result.items() for n, t in tensors.items()}
            of_tasks.append({n: named[n].detach().double().cpu() for n in learned if n in named})
        tick()
        return of_tasks

    first = gradients("first-order")
    try:
        exact = gradients(mode)
    except RuntimeError:  # a model without second derivatives
        exact = first
    norms = [torch.cat([g.abs().flatten() for g in task.values()]).norm() for task in exact]
    found.gradient_norms = torch.stack(norms)
    # Rates of a step that does not count have none, and theirs is no finding.
    weights_of_model = [n for n in learned if n.startswith(("adapted/", "shared/"))]
    found.without_gradient = [
        n.partition("/")[2] for n in weights_of_model if not any(bool(task[n].any()) for task in exact if n in task)
    ]
    if exact is not first:
        a, b = (torch.cat([sum(t[n] for t in of)[None].flatten() for n in of[0]]) for of in (first, exact))  # type: ignore[index]
        if not a.is_complex() and a.norm() > 0 and b.norm() > 0:
            found.order_cosine = float(a @ b / (a.norm() * b.norm()))


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
