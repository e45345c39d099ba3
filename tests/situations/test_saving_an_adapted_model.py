"""What ``adapt`` returns is an ordinary module: saved, loaded, copied, pickled, exported, fine-tuned."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from by_hand import STEPS, ConvNet, images, meta_batch, vectors
from torch import Tensor, nn

import innerloop
from innerloop import MetaLearner, maml, maml_plus_plus

NORMALISATIONS = ["batch", "running", "support"]


def trained(model: nn.Module) -> MetaLearner:
    learner = MetaLearner(model, F.cross_entropy, maml_plus_plus(inner_steps=STEPS))
    learner.backward(meta_batch(images), epoch=0)
    return learner


def fresh(normalisation: str, adapted: nn.Module) -> nn.Module:
    """Another model that has loaded the state; in training mode it normalises with its batch's statistics."""
    model = type(adapted)()
    model.load_state_dict(adapted.state_dict())
    return model.train(normalisation == "batch")


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_its_state_is_that_of_a_fresh_model(normalisation: str) -> None:
    adapted, (query, _) = trained(ConvNet()).adapt(images(), normalisation=normalisation), images(5)
    assert adapted.state_dict().keys() == ConvNet().state_dict().keys()
    torch.testing.assert_close(fresh(normalisation, adapted)(query), adapted(query))
    file = io.BytesIO()
    torch.save(adapted.state_dict(), file)
    file.seek(0)
    adapted.load_state_dict(torch.load(file, weights_only=True))


def test_the_state_after_batch_normalisation_holds_the_support_sets_statistics() -> None:
    learner, support, (query, _) = trained(ConvNet()), images(), images(5)
    by_batch, by_support = (learner.adapt(support, normalisation=n) for n in ("batch", "support"))
    in_evaluation = ConvNet()
    in_evaluation.load_state_dict(by_batch.state_dict())
    torch.testing.assert_close(in_evaluation.eval()(query), by_support(query))


def deep_copied(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return copy.deepcopy(model)


def pickled(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def exported(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return torch.export.export(model, (x,)).module()


def traced(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        function: Callable[[Tensor], Tensor] = torch.jit.trace(model, x)
    return function


def moved_and_back(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return copy.deepcopy(model).float().double().train().eval()


@pytest.mark.parametrize("way", [deep_copied, pickled, exported, traced])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_its_outputs_travel_with_it(normalisation: str, way: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    adapted, (query, _) = trained(ConvNet()).adapt(images(), normalisation=normalisation), images(5)
    torch.testing.assert_close(way(adapted, query)(query), adapted(query))


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_training_mode_and_back_changes_nothing(normalisation: str) -> None:
    adapted, (query, _) = trained(ConvNet()).adapt(images(), normalisation=normalisation), images(5)
    expected = adapted(query)
    torch.testing.assert_close(moved_and_back(adapted, query)(query), expected, rtol=1e-4, atol=1e-5)
    assert adapted.train().eval()(query).equal(expected)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_it_is_fine_tuned_as_any_model(normalisation: str) -> None:
    adapted, (x, y) = trained(ConvNet()).adapt(images(), normalisation=normalisation), images()
    other = fresh(normalisation, adapted)
    for model in (adapted, other):
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
    for a, b in zip(adapted.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    if normalisation != "batch":
        torch.testing.assert_close(adapted.eval()(x), other.eval()(x))


def test_it_can_be_meta_learned_again() -> None:
    adapted = trained(ConvNet()).adapt(images())
    again = MetaLearner(adapted, F.cross_entropy, maml(inner_steps=STEPS))
    again.backward(meta_batch(images))
    again.adapt(images())


@pytest.mark.parametrize("normalisation", ["running", "support"])
def test_a_learner_of_a_module_by_batch_has_no_other_normalisation(normalisation: str) -> None:
    again = MetaLearner(trained(ConvNet()).adapt(images()), F.cross_entropy, maml(inner_steps=STEPS))
    with pytest.raises(ValueError, match=r"backbone\.1 uses its batch's statistics.*fresh model"):
        again.adapt(images(), normalisation=normalisation)
    *_, theta = again.trajectory(images())
    with pytest.raises(ValueError, match="fresh model"):
        again.predict(theta, STEPS, images()[0], normalisation, images()[0])
    again.adapt(images())


def test_networks_that_come_with_the_package() -> None:
    learner = MetaLearner(innerloop.nn.Conv4(3, 1, 16, 4), F.cross_entropy, maml(inner_steps=1))
    support = torch.randn(6, 1, 16, 16), torch.arange(6) % 3
    adapted = learner.adapt(support)
    other = innerloop.nn.Conv4(3, 1, 16, 4)
    other.load_state_dict(adapted.state_dict())
    torch.testing.assert_close(other.train()(support[0]), adapted(support[0]))


@pytest.mark.parametrize(
    "normed",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*(vmapped|batching rule|deprecated).*")
def test_reparametrised_layers(normed: Callable[[nn.Module], nn.Module]) -> None:
    """``weight_norm`` and ``spectral_norm``; those of old leave a computed weight on the layer."""
    build = lambda: nn.Sequential(normed(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))  # noqa: E731
    learner, support = MetaLearner(build(), F.cross_entropy, maml(inner_steps=STEPS)), vectors()
    learner.backward(meta_batch(vectors))
    adapted = learner.adapt(support)
    copied = copy.deepcopy(adapted)
    other = build()
    other.load_state_dict(adapted.state_dict())
    *_, theta = learner.trajectory(support)
    expected = learner.predict(theta, STEPS, support[0])
    for model in (adapted, copied, other.eval()):
        torch.testing.assert_close(model(support[0]).detach(), expected)


def test_what_cannot_be_copied_is_named() -> None:
    model = nn.Linear(4, 3)
    model.numbers = (i for i in range(3))
    with pytest.raises(TypeError, match=r"numbers \(generator\) cannot be copied"):
        MetaLearner(model, F.cross_entropy).adapt(vectors())


def test_one_example_through_batch_statistics_says_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    adapted = MetaLearner(model, F.cross_entropy).adapt(vectors())
    with pytest.raises(ValueError, match=r"BatchNorm1d uses the statistics of the batch.*normalisation='support'"):
        adapted(torch.randn(1, 4))
