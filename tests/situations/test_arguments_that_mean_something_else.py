"""Arguments of the wrong kind, and single tasks in the place of a meta-batch, are refused in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import meta_batch, vectors
from torch import nn

from innerloop import Examples, MetaLearner, Method, Task, maml, maml_plus_plus, stack_tasks


def learner(loss: Any = F.cross_entropy, **arguments: Any) -> MetaLearner:
    return MetaLearner(nn.Linear(4, 3), loss, **arguments)


X, Y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
ONE_HOT = F.one_hot(Y).to(torch.float64)
SINGLE = [
    ((X, Y), (X, Y)),
    ((X, Y), (X[:6], Y[:6])),
    Task(Examples(X, Y), Examples(X, Y)),
    ((X, ONE_HOT), (X, ONE_HOT)),
    ((torch.randn(6, 3, 8, 8), Y), (torch.randn(6, 3, 8, 8), Y)),
    ((torch.randn(6, 3, 8, 8), ONE_HOT[:, :1]), (torch.randn(6, 3, 8, 8), ONE_HOT[:, :1])),
    ((torch.randint(9, (6, 5)), Y), (torch.randint(9, (6, 5)), Y)),
    (({"x": X}, Y), ({"x": X}, Y)),
]


@pytest.mark.parametrize("task", SINGLE)
def test_one_tasks_tensors_are_no_meta_batch(task: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)tasks, examples.*innerloop\.stack_tasks\(\[task\]\)"):
        learner().backward(task)


def test_what_may_be_meant_is_warned_of() -> None:
    """Six numbers and their targets: six tasks of one example, or one task?"""
    x, y = torch.randn(6, 1), torch.randn(6, 1)
    with pytest.warns(UserWarning, match=r"read as 6 tasks of 1 examples, each a single number"):
        MetaLearner(nn.Linear(1, 1), F.mse_loss).backward(((x, y), (x, y)))


def test_stacked_it_is_one() -> None:
    one = stack_tasks([Task(Examples(X, Y), Examples(X, Y))])
    assert learner().backward(one).query_losses.shape == (1, 5)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ((X, Y), "a meta-batch is.*got a Tensor"),
        (X, "a meta-batch is.*got a Tensor"),
        (((X, Y),), "got 1 parts"),
        ([Task(Examples(X, Y), Examples(X, Y))] * 3, "of a list of 3, innerloop.stack_tasks makes one"),
        (((X[None], Y[None]), (X[None], object())), "the query targets hold a object"),
    ],
)
def test_what_is_no_meta_batch(tasks: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        learner().backward(tasks)


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (Task(Examples(X, Y), Examples(X, Y)), "this is a Task.*give .support"),
        (X, "a support set is.*got a Tensor"),
        ((X, Y, Y), "got 3 parts"),
    ],
)
def test_what_is_no_support_set(support: Any, message: str) -> None:
    for use in (learner().adapt, learner().trajectory):
        with pytest.raises(ValueError, match=message):
            use(support)


SWITCHES = ["second_order", "meta_sgd", "msl", "da", "bnrs", "bnwb", "lslr", "ca"]
WRONG: list[tuple[str, Any]] = [
    *[(name, value) for name in SWITCHES for value in ("layer", 1, None, 0.0)],
    *[
        (name, v)
        for name in ("inner_steps", "msl_epochs", "da_epochs")
        for v in (2.5, "3", None, True, [1], float("nan"))
    ],
    *[("inner_lr", value) for value in ("0.1", None, True, [0.1], float("nan"), float("inf"), {"head.*": 0.1})],
    *[("inner_rule", value) for value in ("lbfgs", None, 1, torch.optim.SGD)],
    *[(name, v) for name in ("adapt", "adapt_except", "zero_init") for v in ("head.*", None, 1, (1,), {"head.*"})],
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_every_field_of_a_method_is_checked(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        Method(**{name: value})


def test_what_plainly_means_the_same_is_taken() -> None:
    method = Method(inner_steps=np.int64(3), inner_lr=1, adapt=["weight"])
    assert (method.inner_steps, method.inner_lr, method.adapt) == (3, 1.0, ("weight",))
    assert [type(v) for v in (method.inner_steps, method.inner_lr, method.adapt)] == [int, float, tuple]
    assert hash(method) == hash(Method(inner_steps=3, inner_lr=1.0, adapt=("weight",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": maml}, r"call it, maml\(\)"),
        ({"method": "maml"}, "the method must be a Method"),
        ({"mode": "backward"}, "mode must be one of"),
        ({"mode": None}, "mode must be one of"),
        ({"parallel": True}, "parallel must be one of"),
        ({"stored_steps": 2.5}, "stored_steps must be a whole number"),
        ({"stored_steps": -1}, "stored_steps must be 0 or more"),
        ({"precision": "fp16"}, "precision must be one of"),
        ({"loss": "mse"}, "the loss must be a function"),
    ],
)
def test_every_argument_of_a_learner_is_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        learner(**arguments)


@pytest.mark.parametrize("model", [nn.Linear, None, lambda x: x])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(TypeError, match=r"the model must be an nn\.Module"):
        MetaLearner(model, F.cross_entropy)


@pytest.mark.parametrize("epoch", ["1", -1, float("nan"), float("inf"), [0]])
def test_an_epoch_that_is_none(epoch: Any) -> None:
    with pytest.raises(ValueError, match="the epoch must be a number of at least 0"):
        learner(method=maml_plus_plus(bnrs=False, bnwb=False)).backward(meta_batch(vectors), epoch)


@pytest.mark.parametrize("steps", [2.5, "3", True])
def test_steps_that_are_no_number(steps: Any) -> None:
    with pytest.raises(TypeError, match="steps must be a whole number"):
        learner().adapt((X, Y), steps=steps)


def test_a_normalisation_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="must be one of batch, running, support; got 'instance'"):
        learner().adapt((X, Y), normalisation="instance")
    *_, theta = learner().trajectory((X, Y))
    with pytest.raises(ValueError, match="must be one of batch, running, support"):
        learner().predict(theta, 5, X, normalisation="eval")


def test_a_pattern_that_does_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    for method in (maml(zero_init=("2.*",), adapt_except=("2.*",)), maml(bnwb=True, zero_init=("1.*",))):
        with pytest.raises(ValueError, match=r"zero_init.*matches no adapted parameter"):
            MetaLearner(model, F.cross_entropy, method)
