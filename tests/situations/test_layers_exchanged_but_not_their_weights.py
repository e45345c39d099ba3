"""Layers exchanged after the learner was made, for others with the very same parameters, are used or noticed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from by_copies import exact_or_refused
from by_hand import STEPS, ConvNet, images, meta_batch, meta_gradient
from torch import nn

from innerloop import MetaLearner, maml, maml_plus_plus


def synchronised(model: ConvNet) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def another_head_with_the_same_weights(model: ConvNet) -> None:
    head = nn.Linear(64, 3)
    head.weight, head.bias = model.head.weight, model.head.bias
    model.head = head


def a_backbone_put_together_anew(model: ConvNet) -> None:
    model.backbone = nn.Sequential(*model.backbone)


@pytest.mark.parametrize("mode", ["reverse", "mixed"])
@pytest.mark.parametrize("change", [synchronised, another_head_with_the_same_weights, a_backbone_put_together_anew])
def test_training(change: Callable[[ConvNet], None], mode: str) -> None:
    model, tasks = ConvNet(), meta_batch(images)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, "loop", stored_steps=1)
    change(model)
    _, expected = meta_gradient(model, tasks)
    exact_or_refused(lambda: learner.backward(tasks), model, expected, "Make a new MetaLearner")


def test_gradients_that_are_accumulated_are_not_warned_of() -> None:
    model, tasks = ConvNet(), meta_batch(images)
    learner = MetaLearner(model, F.cross_entropy, maml_plus_plus(inner_steps=STEPS))
    optimiser = torch.optim.SGD(learner.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            for _ in range(3):
                learner.backward(tasks, epoch=0)
            optimiser.step()
            optimiser.zero_grad()
