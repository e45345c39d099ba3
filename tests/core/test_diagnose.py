"""Learners that are broken on purpose, each in one way, and healthy ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop import Examples, MetaLearner, Task, fomaml, maml, maml_plus_plus, stack_tasks
from innerloop.diagnose import Observations, findings

WAYS, SIZE = 4, 8
CENTRES = 3 * torch.randn(64, SIZE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
"""Of as many classes; an example lies around its class's."""

Draw = Callable[[int], Task]


def classes(
    spread: float = 1.0,
    shots: tuple[int, ...] = (3,) * WAYS,
    queries: int = 6,
    chosen: Callable[[torch.Generator], Tensor] | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
    query_labels: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    support_labels: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> Draw:
    def task(number: int) -> Task:
        generator = torch.Generator().manual_seed(number)
        own = (chosen or (lambda g: torch.randperm(64, generator=g)[:WAYS]))(generator)

        def examples(counts: tuple[int, ...]) -> Examples:
            labels = torch.repeat_interleave(torch.arange(WAYS), torch.tensor(counts))
            noise = spread * torch.randn(len(labels), SIZE, generator=generator, dtype=torch.float64)
            return Examples(scale * (CENTRES[own][labels] + noise) + shift, labels)

        support, query = examples(shots), examples((queries,) * WAYS)
        if support_labels:
            support = Examples(support.inputs, support_labels(support.targets, generator))
        if query_labels:
            query = Examples(query.inputs, query_labels(query.targets, generator))
        return Task(support, query)

    return task


def batch(draw: Draw, start: int, size: int) -> Task:
    return stack_tasks([draw(i) for i in range(start, start + size)])


def network(norm: bool = False) -> nn.Module:
    layers = [nn.Linear(SIZE, 24), *([nn.BatchNorm1d(24)] if norm else []), nn.ReLU(), nn.Linear(24, WAYS)]
    return nn.Sequential(*layers)


def trained(learner: MetaLearner, draw: Draw, updates: int = 60, lr: float = 3e-3) -> MetaLearner:
    optimizer = torch.optim.Adam(learner.parameters(), lr=lr)
    for i in range(updates):
        optimizer.zero_grad()
        learner.backward(batch(draw, 1000 + 4 * i, 4), epoch=100)
        optimizer.step()
    return learner


def kinds(learner: MetaLearner, draw: Draw, tasks: int = 6) -> list[str]:
    return [f.kind for f in learner.diagnose(batch(draw, 0, tasks), epoch=100)]


METHOD = maml(inner_steps=3, inner_lr=0.1)


@pytest.mark.parametrize(
    "method",
    [METHOD, maml_plus_plus(inner_steps=3), fomaml(inner_steps=3), maml(inner_steps=3, meta_sgd=True)],
    ids=["maml", "maml++", "fomaml", "meta-sgd"],
)
@pytest.mark.parametrize("norm", [False, True])
def test_nothing_is_said_of_a_healthy_learner(method, norm: bool) -> None:
    draw = classes()
    learner = trained(MetaLearner(network(norm), F.cross_entropy, method), draw)
    assert kinds(learner, draw) == []


def test_nothing_is_said_of_healthy_regression() -> None:
    def draw(number: int) -> Task:
        generator = torch.Generator().manual_seed(number)
        amplitude, phase = (torch.rand(1, generator=generator, dtype=torch.float64) for _ in range(2))

        def examples() -> Examples:
            x = 4 * torch.rand(10, 1, generator=generator, dtype=torch.float64) - 2
            return Examples(x, (1 + amplitude) * torch.sin(x + 3 * phase))

        return Task(examples(), examples())

    model = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1))
    learner = trained(MetaLearner(model, F.mse_loss, maml(inner_steps=3, inner_lr=0.05)), draw, 100)
    assert kinds(learner, draw) == []


def test_rates_too_small() -> None:
    learner = trained(MetaLearner(network(), F.cross_entropy, maml(inner_steps=3, inner_lr=1e-4)), classes(), 20)
    assert kinds(learner, classes())[0] == "inner rates too small"


def test_rates_too_large() -> None:
    learner = trained(MetaLearner(network(), F.cross_entropy, METHOD), classes())
    with torch.no_grad():
        for rate in learner.meta.rates.values():
            rate.mul_(30)
    assert kinds(learner, classes())[0] == "inner rates too large"


def test_a_loss_that_is_no_number() -> None:
    learner = MetaLearner(network(), F.cross_entropy, METHOD)
    with torch.no_grad():
        learner.model[0].weight[0, 0] = torch.nan
    assert kinds(learner, classes())[0] == "not finite"


def shuffled(labels: Tensor, generator: torch.Generator) -> Tensor:
    return labels[torch.randperm(len(labels), generator=generator)]


@pytest.mark.parametrize("which", ["query_labels", "support_labels"])
def test_labels_shuffled(which: str) -> None:
    """With twelve examples in 8 dimensions, the inner loop learns whatever they are called."""
    healthy, broken = classes(), classes(**{which: shuffled})
    learner = trained(MetaLearner(network(), F.cross_entropy, maml(inner_steps=10, inner_lr=0.3)), healthy, 30)
    assert kinds(learner, broken)[0] == "the query set does not follow"


def test_labels_that_are_the_same_in_every_task() -> None:
    """Class c of 4 has number c in all tasks: the support set is not needed."""
    draw = classes(chosen=lambda generator: torch.arange(WAYS))
    learner = trained(MetaLearner(network(), F.cross_entropy, METHOD), draw, 150, lr=1e-2)
    assert kinds(learner, draw)[0] == "the tasks are memorised"


def test_a_head_that_prefers_a_numbering() -> None:
    """Accuracy with the classes numbered as in training, and otherwise; of few answers, chance explains more."""

    def kinds_of(renumbered: float, answers: int) -> list[str]:
        accuracies = torch.tensor([[0.25, 0.7, 0.9]])
        seen = Observations(torch.tensor([[1.4, 0.4, 0.1]]), torch.tensor([[1.4, 0.8, 0.3]]), accuracies, accuracies)
        seen.ways, seen.answers, seen.renumbered = WAYS, answers, renumbered
        return [f.kind for f in findings(seen)]

    assert kinds_of(0.6, 200) == ["the numbering of classes matters"]
    assert kinds_of(0.85, 200) == []
    assert kinds_of(0.6, 10) == []


def test_unequal_support_sets() -> None:
    draw = classes(shots=(12, 1, 1, 1))
    learner = trained(MetaLearner(network(), F.cross_entropy, METHOD), draw)
    assert kinds(learner, draw)[0] == "unequal support sets"


def test_dead_units() -> None:
    learner = MetaLearner(network(), F.cross_entropy, METHOD)
    with torch.no_grad():
        learner.model[0].bias.fill_(-100)
    assert kinds(learner, classes())[0] == "dead units"


@pytest.mark.parametrize("draw", [classes(scale=60, shift=128), classes(spread=50, scale=10)])
def test_inputs_that_are_not_scaled(draw: Draw) -> None:
    assert kinds(MetaLearner(network(), F.cross_entropy, METHOD), draw)[0] == "inputs not scaled"


def test_inputs_that_are_all_alike() -> None:
    assert kinds(MetaLearner(network(), F.cross_entropy, METHOD), classes(scale=0.0))[0] == "inputs all alike"


def test_a_detached_model() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(SIZE, 24), nn.Linear(24, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x).detach()))

    found = MetaLearner(Detached(), F.cross_entropy, METHOD).diagnose(batch(classes(), 0, 6))
    assert "parameters without a gradient" in [f.kind for f in found]
    assert "body.weight" in next(f for f in found if f.kind == "parameters without a gradient").measured


def test_only_the_norm_layers_are_adapted() -> None:
    """Of a network that they have no say in."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(SIZE), nn.Linear(SIZE, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + 0 * self.norm(x).sum()

    learner = MetaLearner(Unused(), F.cross_entropy, maml(inner_steps=3, adapt=("norm.*",)))
    assert kinds(learner, classes())[0] == "the support loss stays"


def test_answers_that_depend_on_each_other() -> None:
    """Each task shifts its inputs by something large: only the query set's own mean takes it away... half of it."""

    def draw(number: int) -> Task:
        task = classes()(number)
        generator = torch.Generator().manual_seed(number)
        shift = 6 * torch.randn(2, SIZE, generator=generator, dtype=torch.float64)
        return Task(
            Examples(task.support.inputs + shift[0], task.support.targets),
            Examples(task.query.inputs + shift[1], task.query.targets),
        )

    model = nn.Sequential(nn.BatchNorm1d(SIZE), nn.Linear(SIZE, 24), nn.ReLU(), nn.Linear(24, WAYS))
    learner = trained(MetaLearner(model, F.cross_entropy, METHOD), draw)
    assert kinds(learner, draw) == ["answers depend on each other"]


def test_meta_gradients_that_explode_or_vanish() -> None:
    """As a deep network with far too large weights has them, and one that is saturated."""
    for factor, kind in ((1e3, "meta-gradients explode"), (1e-12, "meta-gradients vanish")):
        model = network()

        class Scaled(nn.Module):
            def __init__(self, model: nn.Module = model, factor: float = factor) -> None:
                super().__init__()
                self.model, self.factor = model, factor

            def forward(self, x: Tensor) -> Tensor:
                y = self.model(x)
                return y.detach() + self.factor * (y - y.detach())  # the same values, other gradients

        learner = MetaLearner(Scaled(), F.cross_entropy, maml(inner_steps=2, inner_lr=min(0.1, 0.1 / factor**2)))
        assert kind in [f.kind for f in learner.diagnose(batch(classes(), 0, 4))]


def test_first_order_that_is_another_direction() -> None:
    seen = Observations(torch.ones(2, 3), torch.ones(2, 3), first_order=True, order_cosine=0.1)
    assert "first order is another direction" in [f.kind for f in findings(seen)]
    seen.first_order = False
    assert "first order is another direction" not in [f.kind for f in findings(seen)]


@pytest.mark.parametrize("method", [METHOD, maml_plus_plus(inner_steps=3)])
def test_the_learner_is_left_as_it_was(method) -> None:
    learner = trained(MetaLearner(network(norm=True), F.cross_entropy, method), classes(), 3)
    state = {n: t.clone() for n, t in learner.state_dict().items()}
    rates = {n: t.clone() for n, t in learner.meta.rates.items()}
    grads = {n: t.grad.clone() for n, t in learner.named_parameters()}
    modes, randomness = [m.training for m in learner.model.modules()], torch.get_rng_state()
    learner.diagnose(batch(classes(), 0, 3), epoch=100)
    assert all(t.equal(state[n]) for n, t in learner.state_dict().items())
    assert all(t.equal(rates[n]) for n, t in learner.meta.rates.items())
    assert all(t.grad.equal(grads[n]) for n, t in learner.named_parameters())
    assert modes == [m.training for m in learner.model.modules()]
    assert torch.get_rng_state().equal(randomness)
    assert not any(m._forward_hooks for m in learner.model.modules())


def test_any_model_and_loss() -> None:
    """Outputs that are a dict, targets that are none."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(SIZE, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": torch.tanh(self.body(x))}

    tasks = ((torch.randn(3, 5, SIZE), None), (torch.randn(3, 5, SIZE), None))
    learner = MetaLearner(Two(), lambda outputs, targets: outputs["y"].square().mean(), maml(inner_steps=2))
    assert isinstance(learner.diagnose(tasks), list)
