"""Activations that are computed again in the backward pass are computed with the fast weights again."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from by_copies import equal_or_refused, exact_or_refused
from by_hand import STEPS, adapted, meta_batch, meta_gradient, vectors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from innerloop import MetaLearner, maml

WAYS = [("reverse", "loop"), ("mixed", "loop"), ("first-order", "loop"), ("auto", "auto")]


class Deep(nn.Module):
    """A block in the middle that may be checkpointed, as ``gradient_checkpointing_enable()`` does it."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        if self.reentrant is None:
            return self.head(self.block(y))
        return self.head(checkpoint(self.block, y, use_reentrant=self.reentrant))


class RecomputesByHand(torch.autograd.Function):
    """A reversible network's block in short: the backward pass calls the layer again."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.layer(x)
        found = torch.autograd.grad(y, [x, *ctx.layer.parameters()], gradient)
        return found[0], None, *found[1:]


@pytest.mark.filterwarnings("ignore:.*cannot be vmapped")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("mode", "parallel"), WAYS)
def test_training(mode: str, parallel: str, reentrant: bool) -> None:
    model, tasks = Deep(reentrant), meta_batch(vectors)
    if mode == "first-order":
        plain = Deep(None)
        MetaLearner(plain, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel=parallel).backward(tasks)
        expected = {n: p.grad for n, p in plain.named_parameters()}
    else:
        _, expected = meta_gradient(Deep(None), tasks)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel=parallel, stored_steps=1)
    exact_or_refused(lambda: learner.backward(tasks), model, expected, "checkpoint")


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapting_and_predicting(reentrant: bool) -> None:
    support, (query, _) = vectors(), vectors(5)
    expected = adapted(Deep(None), support)(query)
    learner = MetaLearner(Deep(reentrant), F.cross_entropy, maml(inner_steps=STEPS))

    def predicted() -> Tensor:
        *_, theta = learner.trajectory(support)
        return learner.predict(theta, STEPS, query)

    equal_or_refused(lambda: learner.adapt(support)(query), expected, "checkpoint")
    equal_or_refused(predicted, expected, "checkpoint")


def test_a_layer_called_again_by_a_function_of_ones_own() -> None:
    class Reversible(Deep):
        def forward(self, x: Tensor) -> Tensor:
            y = RecomputesByHand.apply(torch.tanh(self.first(x)), self.block, *self.block.parameters())
            return self.head(y)

    support, (query, _) = vectors(), vectors(5)
    expected = adapted(Deep(None), support)(query)
    learner = MetaLearner(Reversible(None), F.cross_entropy, maml(inner_steps=STEPS))
    equal_or_refused(lambda: learner.adapt(support)(query), expected, "RecomputesByHand|backward")


def test_a_hook_that_reads_a_weight_in_the_backward_pass() -> None:
    def decayed(module: nn.Module, grad_input: tuple[Tensor | None], grad_output: tuple[Tensor]) -> tuple[Tensor]:
        return (grad_input[0] * module.weight.detach().norm(),)

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].register_full_backward_hook(decayed)
    support, (query, _) = vectors(), vectors(5)
    expected = adapted(copy.deepcopy(model), support)(query)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    equal_or_refused(lambda: learner.adapt(support)(query), expected, "hook")
