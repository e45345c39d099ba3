"""Whatever makes the model another one than the learner was made with is noticed, and said with what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from by_hand import STEPS, ConvNet, adapted, images, meta_batch
from torch import nn

from innerloop import MetaLearner, maml, maml_plus_plus
from innerloop.model_state import ModelChangedError


def another_head(model: ConvNet) -> None:
    model.head = nn.Linear(64, 3)


def a_wider_head(model: ConvNet) -> None:
    model.head = nn.Linear(64, 5)


def a_new_layer(model: ConvNet) -> None:
    model.extra = nn.Linear(3, 3)


def a_layer_less(model: ConvNet) -> None:
    model.backbone[3] = nn.Identity()


def another_precision(model: ConvNet) -> None:
    model.float()


def another_device(model: ConvNet) -> None:
    model.to("meta")


def a_frozen_layer(model: ConvNet) -> None:
    model.backbone[0].requires_grad_(False)


def data_of_another_shape(model: ConvNet) -> None:
    model.head.weight.data = torch.randn(5, 64)


def an_assigned_state(model: ConvNet) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def tied_weights(model: ConvNet) -> None:
    model.backbone[4].weight = model.backbone[1].weight


def a_parametrisation(model: ConvNet) -> None:
    nn.utils.parametrizations.weight_norm(model.head)


def a_buffer_of_another_kind(model: ConvNet) -> None:
    model.backbone[1].running_mean = model.backbone[1].running_mean.float()


CHANGES = [
    another_head,
    a_wider_head,
    a_new_layer,
    a_layer_less,
    another_precision,
    another_device,
    a_frozen_layer,
    data_of_another_shape,
    an_assigned_state,
    tied_weights,
    a_parametrisation,
    a_buffer_of_another_kind,
]


@pytest.mark.parametrize("parallel", ["loop", "vmap"])
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_noticed_wherever_the_learner_is_used(change: Callable[[ConvNet], None], parallel: str) -> None:
    model = ConvNet()
    learner = MetaLearner(model, F.cross_entropy, maml_plus_plus(inner_steps=STEPS), parallel=parallel)
    *_, theta = learner.trajectory(images())
    state = {n: t.clone() for n, t in learner.state_dict().items()}
    begun = learner.trajectory(images())
    next(begun)
    change(model)
    for use in (
        lambda: learner.backward(meta_batch(images), epoch=0),
        lambda: learner.adapt(images()),
        lambda: next(learner.trajectory(images())),
        lambda: next(begun),
        lambda: learner.predict(theta, STEPS, images()[0]),
        learner.state_dict,
        lambda: learner.load_state_dict(state),
    ):
        with pytest.raises(ModelChangedError, match="Make a new MetaLearner"):
            use()


def test_a_layer_unfrozen_later_is_named() -> None:
    model = ConvNet()
    model.head.requires_grad_(False)
    learner = MetaLearner(model, F.cross_entropy)
    model.head.requires_grad_(True)
    with pytest.raises(ModelChangedError, match=r"head\.weight has requires_grad True, and had False"):
        learner.adapt(images())


def test_weights_loaded_in_place_are_the_initialisation() -> None:
    model, pretrained = ConvNet(), ConvNet()
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    model.load_state_dict(pretrained.state_dict())
    support, (query, _) = images(), images(5)
    torch.testing.assert_close(learner.adapt(support)(query), adapted(pretrained, support)(query))
    for p in model.parameters():
        p.data = p.data.clone()  # the same numbers elsewhere
    torch.testing.assert_close(learner.adapt(support)(query), adapted(pretrained, support)(query))


def test_weights_of_which_there_is_a_copy_a_step_cannot_be_loaded_behind_its_back() -> None:
    """BNWB keeps gamma and beta for every inner step; frozen layers' statistics under BNRS are copies too."""
    model = ConvNet()
    learner = MetaLearner(model, F.cross_entropy, maml_plus_plus(inner_steps=STEPS))
    model.load_state_dict(ConvNet().state_dict())
    with pytest.raises(ModelChangedError, match="keeps a copy for every inner step, has another value"):
        learner.adapt(images())
    model = ConvNet()
    model.backbone.eval()
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS, bnrs=True))
    model.load_state_dict(ConvNet().state_dict())
    with pytest.raises(ModelChangedError, match="running_mean"):
        learner.adapt(images())


def test_the_model_may_be_used_and_trained_on_the_side() -> None:
    model, tasks = ConvNet(), meta_batch(images)
    learner = MetaLearner(model, F.cross_entropy, maml_plus_plus(inner_steps=STEPS))
    optimiser = torch.optim.Adam(learner.parameters())
    for _ in range(2):
        model(images()[0])  # moves running statistics
        learner.backward(tasks, epoch=0)
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    model(images()[0])
    learner.adapt(images())


def test_a_copy_of_a_learner_is_a_learner_of_the_copied_model() -> None:
    learner = MetaLearner(ConvNet(), F.cross_entropy, maml_plus_plus(inner_steps=STEPS))
    learner.backward(meta_batch(images), epoch=0)
    torch.optim.SGD(learner.parameters(), 0.1).step()
    other, support, (query, _) = copy.deepcopy(learner), images(), images(5)
    expected = learner.adapt(support)(query)
    torch.testing.assert_close(other.adapt(support)(query), expected)
    with torch.no_grad():
        other.model.head.weight.zero_()
    torch.testing.assert_close(learner.adapt(support)(query), expected)


@pytest.mark.parametrize("name", ["model", "method", "mode", "parallel"])
def test_a_learners_own_arguments_cannot_be_exchanged(name: str) -> None:
    learner = MetaLearner(ConvNet(), F.cross_entropy)
    with pytest.raises(AttributeError, match=name):
        setattr(learner, name, getattr(learner, name))
