"""Buffers changed in place or reassigned are state, from step to step; other things left on a model are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import STEPS, WAYS_TO_A_GRADIENT, assert_same_gradients, meta_batch, meta_gradient, vectors
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from innerloop import MetaLearner, maml


class Centred(nn.Module):
    """Subtracts a moving mean, which each call moves."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("mu", torch.zeros(4), persistent=persistent)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.body(x - self.mu)))
        self.moved(x)
        return y

    def moved(self, x: Tensor) -> None:
        self.mu = 0.9 * self.mu + 0.1 * x.mean(0)


class InPlace(Centred):
    def moved(self, x: Tensor) -> None:
        self.mu.mul_(0.9).add_(0.1 * x.mean(0))


class Counts(Centred):
    """A whole number, reassigned."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x) * (1 + 0.1 * self.calls)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Centred())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def with_buffers_kept(model: nn.Module, tensors: dict[str, Tensor], args: Any) -> Any:
    """A call whose reassigned buffers are found in ``tensors`` after it."""
    with _reparametrize_module(model, tensors):
        y = model(*args)
        tensors.update(dict(model.named_buffers()))
    return y


@pytest.mark.parametrize(("mode", "parallel"), WAYS_TO_A_GRADIENT)
@pytest.mark.parametrize("build", [Centred, lambda: Centred(persistent=False), InPlace, Counts, Nested])
def test_a_buffer_goes_from_step_to_step(build: Any, mode: str, parallel: str) -> None:
    model, tasks = build(), meta_batch(vectors)
    loss, expected = meta_gradient(model, tasks, call=with_buffers_kept)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel=parallel, stored_steps=1)
    result = learner.backward(tasks)
    torch.testing.assert_close(result.loss, loss)
    assert_same_gradients(model, expected)


def test_after_a_meta_batch_a_buffer_is_the_mean_over_tasks() -> None:
    model, tasks = Centred(), meta_batch(vectors)
    MetaLearner(model, F.cross_entropy, maml(inner_steps=1)).backward(tasks)
    (support, _), (query, _) = tasks
    left = 0.9 * 0.1 * support.mean(1) + 0.1 * query.mean(1)
    torch.testing.assert_close(model.mu, left.mean(0))


class Remembers(Centred):
    """The same state in an attribute that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x - self.last)
        self.last = 0.5 * self.last + x.mean(0).detach()
        return y


class CountsInPython(Centred):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Lists(Centred):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.history.append(x.mean(0).detach())
        return super().forward(x - self.history[0])


class ChangesATensorInPlace(Centred):
    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x - self.last)
        self.last.add_(x.mean(0).detach())
        return y


@pytest.mark.parametrize("mode", ["reverse", "mixed", "first-order"])
@pytest.mark.parametrize(
    ("build", "name"),
    [(Remembers, "last"), (CountsInPython, "calls"), (Lists, "history"), (ChangesATensorInPlace, "last")],
)
def test_state_that_is_no_buffer_is_refused_by_name(build: type[nn.Module], name: str, mode: str) -> None:
    model = build()
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel="loop")
    for use in (lambda: learner.backward(meta_batch(vectors)), lambda: learner.adapt(vectors())):
        with pytest.raises(ValueError, match=rf"{name} and reads it.*register_buffer\('{name}'"):
            use()


def test_a_buffer_of_another_shape_is_refused_by_name() -> None:
    class Grows(Centred):
        def moved(self, x: Tensor) -> None:
            self.mu = torch.cat([self.mu, self.mu])

    with pytest.raises(ValueError, match=r"shape \[8\].*in the place of the buffer mu"):
        MetaLearner(Grows(), F.cross_entropy).adapt(vectors())


def test_a_buffer_made_by_a_forward_is_refused_by_name() -> None:
    class Lazily(Centred):
        def moved(self, x: Tensor) -> None:
            self.register_buffer("scale", x.std(0))

    model = Lazily()
    with pytest.raises(ValueError, match="makes the buffer scale"):
        MetaLearner(model, F.cross_entropy).adapt(vectors())
    assert "scale" not in dict(model.named_buffers())


class Watched(nn.Module):
    """Keeps features to be looked at, caches a constant, and has an auxiliary loss that the loss function reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.features: Tensor | None = None
        self.scale: Tensor | None = None
        self.log: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = torch.linspace(0.5, 1.5, x.shape[1])
        self.features = torch.tanh(self.body(x * self.scale))
        self.log.append(self.features.detach())
        self.penalty = self.features.square().mean()
        return self.head(self.features)


@pytest.mark.parametrize(("mode", "parallel"), WAYS_TO_A_GRADIENT)
def test_what_only_serves_the_call_is_no_state(mode: str, parallel: str) -> None:
    model, tasks = Watched(), meta_batch(vectors)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + model.penalty

    value, expected = meta_gradient(model, tasks, loss)
    result = MetaLearner(model, loss, maml(inner_steps=STEPS), mode, parallel=parallel).backward(tasks)
    torch.testing.assert_close(result.loss, value)
    assert_same_gradients(model, expected)


def test_a_loss_that_looks_at_the_model_sees_the_fast_weights() -> None:
    model, tasks = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), meta_batch(vectors)

    def decayed(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) + 0.1 * sum(p.square().sum() for p in model.parameters())

    class WithPenalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.model(x), sum(p.square().sum() for p in self.model.parameters())

    value, expected = meta_gradient(WithPenalty(), tasks, lambda out, y: F.cross_entropy(out[0], y) + 0.1 * out[1])
    result = MetaLearner(model, decayed, maml(inner_steps=STEPS)).backward(tasks)
    torch.testing.assert_close(result.loss, value)
    assert_same_gradients(model, {n.removeprefix("model."): g for n, g in expected.items()})


def test_a_model_that_fails_is_left_as_it_was() -> None:
    class FailsLater(Centred):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            y = super().forward(x)
            if float(self.mu.abs().max()) > 0.01 and x.shape[0] == 6:
                raise ZeroDivisionError("on purpose")
            return y

    model = FailsLater()
    attributes, state = set(vars(model)), {n: t.clone() for n, t in model.state_dict().items()}
    learner = MetaLearner(model, F.cross_entropy, parallel="loop")
    with pytest.raises(ZeroDivisionError):
        learner.backward(meta_batch(vectors))
    assert set(vars(model)) == attributes
    assert all(t.equal(state[n]) for n, t in model.state_dict().items())
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
