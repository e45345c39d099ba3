"""Inputs as tokenisers, NumPy and plain Python make them."""

from __future__ import annotations

import collections
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import STEPS, assert_same_gradients, meta_batch, meta_gradient, vectors
from torch import Tensor, nn

from innerloop import MetaLearner, maml

TASKS, TOKENS, WIDTH = 2, 5, 4


class BatchEncoding(collections.UserDict):  # type: ignore[type-arg]
    """A mapping that is no dict, as Hugging Face's tokenisers return it."""


class Text(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, width), nn.Linear(width, 3)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, scale: float = 1.0, centre: bool = False, mode: str = "mean"
    ) -> Tensor:
        words = self.embedding(ids) * scale
        words = words - words.mean(1, keepdim=True).detach() * 0.5 if centre else words
        words = words if mask is None else words * mask[..., None]
        return self.head(words.sum(1) if mode == "sum" else words.mean(1))


EXTRAS: list[dict[str, Any]] = [{}, {"mask": None}, {"scale": 2.0}, {"centre": True, "mask": None}, {"mode": "sum"}]


@pytest.mark.parametrize("kind", [dict, BatchEncoding, collections.OrderedDict])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("parallel", ["auto", "loop", "vmap"])
def test_mappings_with_options_in_them(kind: Any, extra: dict[str, Any], parallel: str) -> None:
    model = Text()
    ids, labels = torch.randint(10, (2, TASKS, 6, TOKENS)), (torch.arange(6) % 3).expand(TASKS, 6)

    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.text(ids, **extra)

    _, expected = meta_gradient(Filled(), ((ids[0], labels), (ids[1], labels)))
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), parallel=parallel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.backward(tuple((kind({"ids": half, **extra}), labels) for half in ids))
        learner.adapt((kind({"ids": ids[0, 0], **extra}), labels[0]))
        *_, theta = learner.trajectory((kind({"ids": ids[0, 0], **extra}), labels[0]))
        learner.predict(theta, STEPS, kind({"ids": ids[1, 0], **extra}))
    assert_same_gradients(model, {n.removeprefix("text."): g for n, g in expected.items()})


@pytest.mark.parametrize("width", [WIDTH, 2000])
def test_a_model_that_cannot_be_vmapped_for_its_inputs_is_looped_over(width: int) -> None:
    class Branches(Text):
        def forward(self, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
            return super().forward(ids, mask, scale=2.0 if bool((ids[0, 0] > 4).item()) else 1.0)

    torch.manual_seed(1)
    model = Branches(width)
    ids, labels = torch.randint(10, (2, TASKS, 6, TOKENS)), (torch.arange(6) % 3).expand(TASKS, 6)
    tasks = ((ids[0], labels), (ids[1], labels))
    _, expected = meta_gradient(model, tasks)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.backward(tasks)
    assert [w for w in caught if "cannot be vmapped" in str(w.message)] if width == WIDTH else not caught
    assert_same_gradients(model, expected)


def as_arrays(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.numpy(), tree)


def as_lists(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.tolist(), tree)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [as_arrays, as_lists])
@pytest.mark.parametrize("parallel", ["loop", "vmap"])
def test_arrays_and_lists_take_the_models_precision(given: Any, precision: torch.dtype, parallel: str) -> None:
    tasks = meta_batch(vectors)
    model = nn.Linear(4, 3).to(precision)
    in_precision = torch.utils._pytree.tree_map(lambda t: t.to(precision) if t.is_floating_point() else t, tasks)
    _, expected = meta_gradient(model, in_precision)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), parallel=parallel)
    learner.backward(given(tasks))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)
    support = tuple(half[0] for half in tasks[0])
    adapted = learner.adapt(given(support))
    *_, theta = learner.trajectory(given(support))
    torch.testing.assert_close(
        learner.predict(theta, STEPS, given(support[0])), adapted(support[0].to(precision)).detach()
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.array([["a", "b"], ["c", "d"]]), "makes no tensor"),
        ([[1.0, 2.0], [3.0]], "a list of numbers makes no tensor"),
        ([["a", "b"], [object(), "d"]], "hold a object"),
    ],
)
def test_what_holds_no_numbers_is_named(inputs: Any, message: str) -> None:
    labels = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises((TypeError, ValueError), match=message):
        MetaLearner(nn.Linear(2, 3), F.cross_entropy).backward(((inputs, labels), (inputs, labels)))


def test_the_callers_arrays_stay() -> None:
    class Subtracts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(1.0))

    x, y = as_arrays(vectors())
    before = x.copy()
    MetaLearner(Subtracts(4, 3), F.cross_entropy).adapt((x, y))
    assert np.array_equal(x, before)
