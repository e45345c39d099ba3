"""Norm layers that people write or wrap, and answers that must not depend on what was asked before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from by_hand import STEPS, ConvNet, adapted, images
from torch import Tensor, nn

from innerloop import MetaLearner, maml


class Ghost(nn.Module):
    """Ghost batch norm: in training, each half of the batch by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(half) for half in x.chunk(2)]) if self.training else self.norm(x)


def test_one_layer_left_in_training_mode() -> None:
    """``model.eval(); model.norm.train()``: all other layers are frozen, in training and in use."""
    support, (query, _) = images(), images(5)
    model = ConvNet()
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    model.eval()
    model.backbone[4].train()
    torch.testing.assert_close(learner.adapt(support)(query), adapted(model, support)(query))


@pytest.mark.parametrize(
    "norm",
    [
        lambda c: nn.BatchNorm2d(c, momentum=None),
        lambda c: nn.BatchNorm2d(c, track_running_stats=False),
        lambda c: nn.BatchNorm2d(c, affine=False),
        lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
        nn.SyncBatchNorm,
    ],
)
@pytest.mark.parametrize("normalisation", ["batch", "running", "support"])
def test_frozen_layers_of_every_kind(norm: Callable[[int], nn.Module], normalisation: str) -> None:
    support, (query, _) = images(), images(5)
    model = ConvNet(norm)
    model.backbone.eval()
    expected = adapted(model, support)(query)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    torch.testing.assert_close(learner.adapt(support, normalisation=normalisation)(query), expected)
