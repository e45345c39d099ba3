"""Errors say what was given and what to do, and leave everything as it was."""

import re

import pytest
import torch
from oracle import WAYS, make, statistics
from torch import Tensor, nn
from zoo import CASES

from innerloop import METHODS, Examples, MetaLearner, Method, NonFiniteLossError, Task, anil, boil, maml, maml_plus_plus

CONV = CASES["conv_batch_norm"]


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be at least 1, got 0"),
        ({"msl_epochs": 0}, "msl_epochs must be at least 1, got 0"),
        ({"da_epochs": -1}, "da_epochs must be at least 0, got -1"),
        ({"inner_rule": "lbfgs"}, "inner_rule must be one of sgd, momentum, adam, got 'lbfgs'"),
        ({"lslr": True, "meta_sgd": True}, "lslr and meta_sgd both learn the inner rates"),
        ({"adapt": "head.*"}, "adapt is a tuple of patterns: write ('head.*',)"),
        ({"adapt_except": "head.*"}, "adapt_except is a tuple of patterns: write ('head.*',)"),
    ],
)
def test_values_that_do_not_make_a_method(switches: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Method(**switches)


def test_unknown_switch() -> None:
    for make_method in METHODS.values():
        with pytest.raises(TypeError, match="inner_step"):
            make_method(inner_step=3)


@pytest.mark.parametrize("method", [anil("classifier.*"), boil("classifier.*")])
def test_a_pattern_without_a_match_is_named_with_the_parameters_there_are(method: Method) -> None:
    with pytest.raises(ValueError, match=r"ConvNet matches 'classifier\.\*'") as caught:
        MetaLearner(CONV.model(), CONV.loss, method)
    for name, _ in CONV.model().named_parameters():
        assert name in str(caught.value)


def test_nothing_left_to_adapt() -> None:
    with pytest.raises(ValueError, match="nothing is left to adapt"):
        MetaLearner(CONV.model(), CONV.loss, maml(adapt_except=("*",)))
    only_norm = nn.Sequential(nn.BatchNorm1d(3))
    MetaLearner(only_norm, CONV.loss, maml())
    with pytest.raises(ValueError, match=r"nothing is left to adapt.*BNWB"):
        MetaLearner(only_norm, CONV.loss, maml_plus_plus())
    with pytest.raises(ValueError, match="no trainable parameter"):
        MetaLearner(CONV.model().requires_grad_(False), CONV.loss)


@pytest.mark.parametrize("mode", ["forward", "", "MIXED"])
def test_unknown_mode(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode must be one of auto, reverse, mixed, first-order; got '{mode}'"):
        MetaLearner(CONV.model(), CONV.loss, mode=mode)


def test_unknown_parallel() -> None:
    with pytest.raises(ValueError, match="parallel must be one of auto, loop, vmap; got 'threads'"):
        MetaLearner(CONV.model(), CONV.loss, parallel="threads")


@pytest.mark.parametrize("switch", ["msl", "da"])
def test_schedules_need_the_epoch(switch: str) -> None:
    learner = MetaLearner(CONV.model(), CONV.loss, maml(**{switch: True}))
    with pytest.raises(ValueError, match="need the epoch"):
        learner.backward(CONV.tasks())
    MetaLearner(CONV.model(), CONV.loss, maml(ca=True, bnrs=True)).backward(CONV.tasks())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, y: nn.functional.cross_entropy(out, y, reduction="none"), r"torch.float64 of shape \(6,\)"),
        (lambda out, y: out.sum().reshape(1), r"torch.float64 of shape \(1,\)"),
        (lambda out, y: out.argmax(), r"torch.int64 of shape \(\)"),
        (lambda out, y: 0.5, "got float"),
    ],
)
def test_a_loss_that_is_no_scalar(loss, message: str, way: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(CONV.model(), loss, maml(inner_steps=1), way).backward(CONV.tasks())


class Scale(nn.Module):
    """One weight; each example says by how much its loss is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.weight * x


def _tasks(support: list[float], query: list[float]) -> Task:
    s, q = (torch.tensor(v).view(-1, 1) for v in (support, query))
    return Task(Examples(s, torch.zeros_like(s)), Examples(q, torch.zeros_like(q)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("support", "query", "task", "step", "which"),
    [
        ([1.0, 1.0, torch.nan], [1.0, 1.0, 1.0], 2, 1, "support"),
        ([1.0, torch.inf, torch.nan], [1.0, 1.0, 1.0], 1, 1, "support"),
        ([1.0, 1.0, 1.0], [1.0, torch.nan, 1.0], 1, 1, "query"),
        ([1.0, 1e100, 1.0], [1.0, 1e-100, 1.0], 1, 2, "support"),  # w_1 ~ 1e199: its square is beyond float64
        ([1.0, 1e70, 1.0], [1.0, 1e200, 1.0], 1, 1, "query"),  # support loss infinite at step 3, query loss at step 1
    ],
)
def test_a_loss_that_is_not_finite(
    support: list[float], query: list[float], task: int, step: int, which: str, way: str
) -> None:
    model = Scale()
    learner = make(model, lambda out, y: (out - y).square().mean(), maml(inner_steps=3, msl=True), way)
    learner.backward(_tasks([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]), epoch=0)
    grad, kept = model.weight.grad.clone(), statistics(learner)
    message = f"the {which} loss of task {task} is .* at inner step {step}"
    with pytest.raises(NonFiniteLossError, match=message) as caught:
        learner.backward(_tasks(support, query), epoch=0)
    assert (caught.value.task, caught.value.inner_step, caught.value.which) == (task, step, which)
    assert isinstance(caught.value, ArithmeticError)
    assert model.weight.grad.equal(grad)
    assert all(t.equal(kept[n]) for n, t in statistics(learner).items())


@pytest.mark.parametrize("way", WAYS)
def test_query_losses_that_do_not_count_may_be_anything(way: str) -> None:
    """Their NaN says that they were not computed."""
    learner = make(Scale(), lambda out, y: (out - y).square().mean(), maml(inner_steps=3), way)
    assert learner.backward(_tasks([1.0], [1.0])).query_losses[:, :2].isnan().all()
    with pytest.raises(NonFiniteLossError, match="query loss of task 0 is nan at inner step 3"):
        learner.backward(_tasks([1.0], [torch.nan]))


def test_a_meta_batch_of_unequal_leading_sizes() -> None:
    learner = MetaLearner(CONV.model(), CONV.loss, maml())
    tasks = CONV.tasks(3)
    uneven = tasks._replace(query=Examples(tasks.query.inputs[:2], tasks.query.targets))
    with pytest.raises(ValueError, match=r"leading sizes \[2, 3\].*stack_tasks"):
        learner.backward(uneven)
    with pytest.raises(ValueError, match=r"leading sizes \[0, 3\]"):
        learner.backward(tasks._replace(query=Examples(tasks.query.inputs, torch.tensor(1))))
    with pytest.raises(ValueError, match=r"leading sizes \[0\]"):
        learner.backward(torch.utils._pytree.tree_map(lambda t: t[:0], tasks))
