"""Functions whose backward pass has no derivative are refused in second order, whatever autograd makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_copies import exact_or_refused, meta_gradient_by_copies
from by_hand import STEPS, assert_same_gradients, meta_batch, vectors
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from innerloop import MetaLearner, fomaml, maml
from innerloop.explanations import UnsuitableModelError


class Cube(torch.autograd.Function):
    """As deformable convolutions and many compiled operators are bound."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Cubes(nn.Module):
    def __init__(self, cube: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head, self.cube = nn.Linear(4, 5), nn.Linear(5, 3), cube

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cube(torch.tanh(self.body(x))))


@pytest.mark.filterwarnings("ignore:.*cannot be vmapped")
@pytest.mark.parametrize(("mode", "parallel"), [("reverse", "loop"), ("mixed", "loop"), ("auto", "auto")])
def test_once_differentiable(mode: Any, parallel: Any) -> None:
    """Autograd leaves the second derivative out, silently: the node that would raise leads to no weight."""
    model, tasks = Cubes(Cube.apply), meta_batch(vectors)
    _, expected = meta_gradient_by_copies(Cubes(lambda x: x**3), tasks)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel)
    exact_or_refused(lambda: learner.backward(tasks), model, expected, "second derivative|differentiated twice")


@pytest.mark.filterwarnings("ignore:.*cannot be vmapped")
def test_once_differentiable_in_first_order() -> None:
    model, tasks = Cubes(Cube.apply), meta_batch(vectors)
    _, expected = meta_gradient_by_copies(Cubes(lambda x: x**3), tasks, first_order=True)
    MetaLearner(model, F.cross_entropy, fomaml(inner_steps=STEPS)).backward(tasks)
    assert_same_gradients(model, expected)


@pytest.mark.parametrize("mode", ["reverse", "mixed"])
def test_a_compiled_loss(mode: Any) -> None:
    model, tasks = Cubes(torch.relu), meta_batch(vectors)
    _, expected = meta_gradient_by_copies(model, tasks)
    compiled = torch.compile(F.cross_entropy, backend="aot_eager")
    learner = MetaLearner(model, compiled, maml(inner_steps=STEPS), mode, "loop", stored_steps=1)
    exact_or_refused(lambda: learner.backward(tasks), model, expected, "compiled|second derivative")


def by_distance(y: Tensor) -> Tensor:
    return torch.cdist(y, y + 1)


def by_segments(y: Tensor) -> Tensor:
    return torch.segment_reduce(y, "sum", lengths=torch.tensor([2, 2, 2]))[torch.arange(6) % 3]


def margins(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.multi_margin_loss(outputs, targets)


def alignment(outputs: Tensor, targets: Tensor) -> Tensor:
    steps = outputs[:, None].log_softmax(2)
    return F.ctc_loss(steps, targets[None, :2].clamp_min(1), torch.tensor([len(steps)]), torch.tensor([2]))


@pytest.mark.filterwarnings("ignore:.*cannot be vmapped")
@pytest.mark.parametrize(
    ("inside", "loss", "operator"),
    [
        (by_distance, F.cross_entropy, "cdist"),
        (by_segments, F.cross_entropy, "segment_reduce"),
        (torch.relu, margins, "multi_margin"),
        (torch.relu, alignment, "ctc"),
    ],
)
def test_operators_of_torch(inside: Any, loss: Any, operator: str) -> None:
    class Inside(Cubes):
        def forward(self, x: Tensor) -> Tensor:
            y = self.cube(torch.tanh(self.body(x)))
            return self.head(y if y.shape[1] == 5 else y[:, :5])

    tasks = meta_batch(vectors)
    for parallel in ("loop", "vmap"):
        with pytest.raises(UnsuitableModelError, match=rf"{operator}.*no second derivative.*second_order=False"):
            MetaLearner(Inside(inside), loss, maml(inner_steps=2), "mixed", parallel).backward(tasks)
    model = Inside(inside)
    _, expected = meta_gradient_by_copies(Inside(inside), tasks, loss, first_order=True)
    MetaLearner(model, loss, fomaml(inner_steps=STEPS)).backward(tasks)
    assert_same_gradients(model, expected)


def test_one_spatial_element_through_instance_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Unflatten(1, (5, 1)), nn.InstanceNorm1d(5), nn.Flatten(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"2 \(InstanceNorm1d\)"):
        MetaLearner(model, F.cross_entropy, parallel="loop").backward(meta_batch(vectors))


@pytest.mark.parametrize("model", [nn.Flatten(), nn.Linear(4, 3).requires_grad_(False)])
def test_nothing_to_learn(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no parameters|frozen|requires_grad"):
        MetaLearner(model, F.cross_entropy)


def test_a_model_made_under_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(4, 3)
    with pytest.raises((ValueError, TypeError, UnsuitableModelError), match="inference_mode"):
        MetaLearner(model, F.cross_entropy, parallel="loop").backward(meta_batch(vectors))
