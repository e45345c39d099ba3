"""Batch norm in evaluation mode, its statistics fixed, as with a pretrained backbone: it stays so everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from by_hand import STEPS, ConvNet, adapted, assert_same_gradients, images, meta_batch, meta_gradient
from torch import Tensor, nn

from innerloop import MetaLearner, maml, maml_plus_plus

NORMALISATIONS = ["batch", "running", "support"]


class KeepsItsBackboneFrozen(ConvNet):
    """The usual override: training mode is never the backbone's."""

    def train(self, mode: bool = True) -> KeepsItsBackboneFrozen:
        super().train(mode)
        self.backbone.eval()
        return self


class OwnNorm(nn.Module):
    """A batch norm somebody wrote."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.momentum = 0.1

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            with torch.no_grad():
                self.running_mean += self.momentum * (mean - self.running_mean)
                self.running_var += self.momentum * (var - self.running_var)
        else:
            mean, var = self.running_mean, self.running_var
        scale = self.weight / (var + 1e-5).sqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def frozen_by_override() -> nn.Module:
    return KeepsItsBackboneFrozen().train()


def frozen_by_hand() -> nn.Module:
    model = ConvNet()
    model.backbone.eval()
    return model


def one_layer_frozen() -> nn.Module:
    model = ConvNet()
    model.backbone[1].eval()
    return model


def the_whole_model_in_evaluation_mode() -> nn.Module:
    return ConvNet().eval()


def own_layers_frozen() -> nn.Module:
    model = ConvNet(OwnNorm)
    model.backbone.eval()
    return model


FROZEN = [frozen_by_override, frozen_by_hand, the_whole_model_in_evaluation_mode, own_layers_frozen]


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("build", FROZEN)
def test_adapting_and_predicting_keep_the_statistics(build: Callable[[], nn.Module], normalisation: str) -> None:
    model = build()
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    support, (query, _) = images(), images(5)
    expected = adapted(model, support)(query)
    torch.testing.assert_close(learner.adapt(support, normalisation=normalisation)(query), expected)
    *_, theta = learner.trajectory(support)
    torch.testing.assert_close(learner.predict(theta, STEPS, query, normalisation, support[0]), expected.detach())
    one = learner.adapt(support, normalisation=normalisation)(query[:1])  # a query set of one
    torch.testing.assert_close(one, expected[:1])


@pytest.mark.parametrize("mode", ["reverse", "mixed"])
@pytest.mark.parametrize("build", [*FROZEN, one_layer_frozen])
def test_training_keeps_the_statistics(build: Callable[[], nn.Module], mode: str) -> None:
    model, tasks = build(), meta_batch(images)
    loss, expected = meta_gradient(model, tasks)
    before = {n: b.clone() for n, b in model.named_buffers() if not n.startswith("backbone.4")}
    result = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel="loop").backward(tasks)
    torch.testing.assert_close(result.loss, loss)
    assert_same_gradients(model, expected)
    if build is not one_layer_frozen:
        assert all(b.equal(before[n]) for n, b in model.named_buffers() if n in before)


def test_layers_that_are_not_frozen_follow_the_normalisation() -> None:
    model = one_layer_frozen()
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    support, (query, _) = images(), images(5)
    torch.testing.assert_close(learner.adapt(support)(query), adapted(model, support)(query))
    by_running = learner.adapt(support, normalisation="running")
    by_hand = adapted(model, support)
    by_hand.load_state_dict({n: b for n, b in model.state_dict().items() if "running" in n}, strict=False)
    torch.testing.assert_close(by_running(query), by_hand.eval()(query))


def test_a_model_put_into_evaluation_mode_before_it_is_asked_is_not_frozen() -> None:
    model = ConvNet()
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    support, (query, _) = images(), images(5)
    expected = adapted(model, support)(query)
    learner.backward(meta_batch(images))
    torch.testing.assert_close(learner.adapt(support)(query), expected)
    model.eval()  # the habit
    torch.testing.assert_close(learner.adapt(support)(query), expected)


def test_frozen_layers_have_their_statistics_at_every_step_under_maml_plus_plus() -> None:
    model = frozen_by_hand()
    learner = MetaLearner(model, F.cross_entropy, maml_plus_plus(inner_steps=STEPS, bnwb=False, lslr=False))
    support, (query, _) = images(), images(5)
    torch.testing.assert_close(learner.adapt(support)(query), adapted(model, support)(query))


@pytest.mark.parametrize("normalisation", ["batch", "support"])
def test_a_norm_layer_somebody_wrote_normalises_in_use_as_in_training(normalisation: str) -> None:
    model = ConvNet(OwnNorm)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    support, (query, _) = images(), images(5)
    by_hand = adapted(model, support)
    if normalisation == "support":
        for module in by_hand.modules():
            if isinstance(module, OwnNorm):
                module.momentum = 1.0
        by_hand(support[0])
        by_hand.eval()
    torch.testing.assert_close(learner.adapt(support, normalisation=normalisation)(query), by_hand(query))
