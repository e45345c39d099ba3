"""Targets, inputs and outputs in classes of one's own; arrays as slicing, files and other machines leave them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_copies import check_refusal
from by_hand import STEPS, adapted, vectors
from torch import Tensor, nn

from innerloop import MetaLearner, maml


class Plain(nn.Linear):
    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(4, 3)


def by_hand(support: Any) -> Tensor:
    return adapted(Plain(), support)(QUERY)


QUERY = torch.randn(5, 4, dtype=torch.float64)


ARRAYS: dict[str, Any] = {
    "backwards": lambda t: t.flip(0).numpy()[::-1],
    "of another byte order": lambda t: t.numpy().astype(t.numpy().dtype.newbyteorder(">")),
    "not writable": lambda t: np.frombuffer(t.numpy().tobytes(), t.numpy().dtype).reshape(t.shape),
    "in column order": lambda t: np.asfortranarray(t.numpy()),
    "a list of arrays": lambda t: list(t.numpy()),
    "a list of tensors": list,
    "nested lists": lambda t: t.tolist(),
    "a list of NumPy's numbers": lambda t: (
        [np.float64(v) if t.ndim > 1 else np.int64(v) for v in t]
        if t.ndim == 1
        else [[np.float64(v) for v in row] for row in t]
    ),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name: str) -> None:
    """The same support set, or a sentence that says what it is."""
    support = vectors()
    learner = MetaLearner(Plain(), F.cross_entropy, maml(inner_steps=STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            module = learner.adapt(tuple(ARRAYS[name](t) for t in support))
        except (TypeError, ValueError) as error:
            assert "a list of" in name
            check_refusal(error, r"stack")
            return
    torch.testing.assert_close(module(QUERY), by_hand(support))


def test_a_range_of_labels() -> None:
    x, _ = vectors(3)
    learner = MetaLearner(Plain(), F.cross_entropy, maml(inner_steps=STEPS))
    try:
        module = learner.adapt((x, range(3)))
    except TypeError as error:
        check_refusal(error, r"range")
        check_refusal(error, r"targets")
        return
    torch.testing.assert_close(module(QUERY), by_hand((x, torch.arange(3))))
