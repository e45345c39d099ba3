"""Mixed precision, complex numbers, gradients inside a forward, compiled models, operators without derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    STEPS,
    WAYS_TO_A_GRADIENT,
    ConvNet,
    adapted,
    assert_same_gradients,
    images,
    meta_batch,
    meta_gradient,
    vectors,
)
from torch import Tensor, nn

import innerloop
from innerloop import MetaLearner, fomaml, maml, meta_sgd
from innerloop.explanations import BatchOfOneError, UnsuitableModelError

Context = Callable[[], AbstractContextManager[Any]]
ROUNDED: Context = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731


class RoundsInside(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with ROUNDED():
            return self.model(x).float()


def conv4() -> nn.Module:
    return innerloop.nn.Conv4(3, 1, 16, 4)


def large_images() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 1, 16, 16), torch.arange(6) % 3


@pytest.mark.parametrize(("mode", "parallel"), [("reverse", "loop"), ("mixed", "loop"), ("mixed", "vmap")])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("build", "examples"), [(ConvNet, images), (conv4, large_images)])
def test_autocast(build: Any, examples: Any, inside: bool, mode: str, parallel: str) -> None:
    """Looped over, it is the loop by hand under autocast; vmapped, it rounds elsewhere, by as much."""
    torch.set_default_dtype(torch.float32)
    model, tasks = build(), meta_batch(examples)
    context: Context = nullcontext if inside else ROUNDED
    if inside:
        model = RoundsInside(model)
    with context():
        loss, expected = meta_gradient(model, tasks)
        learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel=parallel)
        result = learner.backward(tasks)
        outputs = learner.adapt(tuple(t[0] for t in tasks[0]))(tasks[1][0][0])
    assert outputs.isfinite().all()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    if parallel == "vmap":
        torch.testing.assert_close(result.loss, loss, rtol=0.1, atol=0.02)
        return
    torch.testing.assert_close(result.loss, loss, rtol=1e-3, atol=1e-4)
    a = torch.cat([p.grad.flatten() for p in model.parameters()])
    b = torch.cat([expected[n].flatten() for n, _ in model.named_parameters()])
    assert (a - b).norm() / b.norm() < 0.02


def test_a_grad_scaler_scales_the_gradient_and_not_the_loss() -> None:
    model, tasks = nn.Linear(4, 3), meta_batch(vectors)
    loss, expected = meta_gradient(model, tasks)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    optimiser, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    result = learner.backward(tasks, scaler=scaler)
    torch.testing.assert_close(result.loss, loss)
    assert_same_gradients(model, {n: 1024 * g for n, g in expected.items()})
    scaler.step(optimiser)
    scaler.update()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * expected[name])


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rotate = nn.Parameter(torch.randn(4, 4, dtype=torch.complex128))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(torch.complex128) @ self.rotate).abs())


@pytest.mark.parametrize(("mode", "parallel"), [*WAYS_TO_A_GRADIENT, ("auto", "auto")])
def test_complex_parameters(mode: str, parallel: str) -> None:
    model, tasks = Complex(), meta_batch(vectors)
    _, expected = meta_gradient(model, tasks)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel=parallel)
    learner.backward(tasks)
    assert_same_gradients(model, expected)
    support, (query, _) = vectors(), vectors(5)
    torch.testing.assert_close(learner.adapt(support)(query), adapted(model, support)(query))


@pytest.mark.parametrize("method", [maml(inner_rule="adam", inner_steps=2), meta_sgd(inner_steps=2), maml(lslr=True)])
def test_complex_parameters_have_real_rates(method: innerloop.Method) -> None:
    gradients = []
    for mode, parallel in WAYS_TO_A_GRADIENT:
        torch.manual_seed(2)
        learner = MetaLearner(Complex(), F.cross_entropy, method, mode, parallel=parallel)
        torch.manual_seed(3)
        learner.backward(meta_batch(vectors))
        gradients.append({n: t.grad for n, t in learner.named_parameters()})
        assert not any(t.is_complex() for n, t in learner.named_parameters() if n.startswith("rates/"))
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-12)


class Force(nn.Module):
    """The gradient of an energy, as force fields and physics-informed networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def places() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3), torch.randn(6, 3)


@pytest.mark.filterwarnings("ignore:.*cannot be vmapped")
@pytest.mark.parametrize("mode", ["reverse", "mixed"])
@pytest.mark.parametrize("off", [nullcontext, torch.no_grad, torch.inference_mode])
def test_a_model_that_takes_gradients_itself(off: Context, mode: str) -> None:
    model, tasks = Force(), meta_batch(places)
    _, expected = meta_gradient(model, tasks, F.mse_loss)
    learner = MetaLearner(model, F.mse_loss, maml(inner_steps=STEPS), mode)
    support, (query, _) = places(), places()
    answer = adapted(model, support, F.mse_loss)(query.clone()).detach()
    with off():
        learner.backward(tasks)
        *_, theta = learner.trajectory(support)
        predicted = learner.predict(theta, STEPS, query)
        module = learner.adapt(support)
    assert_same_gradients(model, expected)
    torch.testing.assert_close(predicted, answer)
    assert not predicted.requires_grad
    torch.testing.assert_close(module(query.clone()).detach(), answer)
    assert not query.requires_grad


@pytest.mark.parametrize("mode", ["reverse", "mixed", "first-order"])
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_training_where_autograd_is_switched_off(off: Context, mode: str) -> None:
    model, tasks = ConvNet(), meta_batch(images)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel="loop")
    learner.backward(tasks)
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    with off():
        learner.backward(tasks)
    assert_same_gradients(model, expected)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_a_compiled_model_is_refused_in_second_order_with_what_to_do() -> None:
    build = lambda: torch.compile(copy.deepcopy(plain), backend="aot_eager")  # noqa: E731
    plain, tasks = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), meta_batch(vectors)
    with pytest.raises(UnsuitableModelError, match=r"compiled model cannot be differentiated twice.*not compiled"):
        MetaLearner(build(), F.cross_entropy, maml(inner_steps=2), parallel="loop").backward(tasks)
    compiled = build()
    MetaLearner(compiled, F.cross_entropy, fomaml(inner_steps=2), parallel="loop").backward(tasks)
    MetaLearner(plain, F.cross_entropy, fomaml(inner_steps=2), parallel="loop").backward(tasks)
    for a, b in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(10, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


@pytest.mark.parametrize(("mode", "parallel"), [("auto", "auto"), ("reverse", "loop"), ("mixed", "loop")])
def test_an_operator_without_a_second_derivative_is_named(mode: str, parallel: str) -> None:
    def words() -> tuple[Tensor, Tensor]:
        return torch.randint(10, (6, 5)), torch.arange(6) % 3

    tasks = meta_batch(words)
    with pytest.raises(UnsuitableModelError, match=r"embedding_bag.*words: EmbeddingBag.*second_order=False"):
        MetaLearner(Bag(), F.cross_entropy, maml(inner_steps=2), mode, parallel=parallel).backward(tasks)
    MetaLearner(Bag(), F.cross_entropy, fomaml(inner_steps=2), parallel="loop").backward(tasks)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), r"weight of 0 \(LazyLinear\) has no shape yet: call the model"),
        (lambda: nn.DataParallel(nn.Linear(4, 3)), r"DataParallel.*give its \.module"),
        (lambda: nn.Sequential(nn.DataParallel(nn.Linear(4, 3))), r"0 is a DataParallel"),
    ],
)
def test_a_model_that_can_never_work_is_refused_at_once(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MetaLearner(model(), F.cross_entropy)


@pytest.mark.parametrize("parallel", ["loop", "vmap"])
def test_one_image_through_batch_statistics_names_the_layer(parallel: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    learner = MetaLearner(model, F.cross_entropy, parallel=parallel)
    with pytest.raises(BatchOfOneError, match=r"1 \(BatchNorm1d\).*layer\.eval\(\)"):
        learner.backward(meta_batch(lambda: vectors(1)))
