"""State that a forward keeps elsewhere than in a buffer or a plain attribute goes along, or is refused by name."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_copies import equal_or_refused, exact_or_refused, meta_gradient_by_copies
from by_hand import STEPS, adapted, meta_batch, vectors
from torch import Tensor, nn

from innerloop import MetaLearner, maml

WAYS = [("reverse", "loop", 5), ("mixed", "loop", 0), ("auto", "auto", 5)]


class Base(nn.Module):
    """Subtracts what it remembers of the calls before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.setup()

    def setup(self) -> None:
        """What a class keeps."""

    def remembered(self, features: Tensor) -> Tensor | float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        features = torch.tanh(self.body(x))
        return self.head(features - self.remembered(features.detach()))


class AskedForWithHasattr(Base):
    def remembered(self, features: Tensor) -> Tensor | float:
        kept = self.kept if hasattr(self, "kept") else 0.0
        self.kept = features.mean(0)
        return kept


class AskedForWithGetattr(Base):
    def remembered(self, features: Tensor) -> Tensor | float:
        kept = getattr(self, "kept", None)
        self.kept = features.mean(0)
        return 0.0 if kept is None else kept


class AskedForWithIsinstance(Base):
    def setup(self) -> None:
        self.kept: Any = None

    def remembered(self, features: Tensor) -> Tensor | float:
        kept = self.kept if isinstance(self.kept, Tensor) else 0.0
        self.kept = features.mean(0)
        return kept


class TriedFor(Base):
    def setup(self) -> None:
        self.kept: Any = None

    def remembered(self, features: Tensor) -> Tensor | float:
        try:
            return 1.0 * self.kept
        except Exception:
            return 0.0
        finally:
            self.kept = features.mean(0)


class MeanOfTheFirstBatch(Base):
    def setup(self) -> None:
        self.kept: Tensor | None = None

    def remembered(self, features: Tensor) -> Tensor | float:
        if self.kept is None:
            self.kept = features.mean(0)
        return self.kept


class InANestOfDicts(Base):
    def setup(self) -> None:
        self.kept = {"features": {"mean": torch.zeros(5)}}

    def remembered(self, features: Tensor) -> Tensor | float:
        before = self.kept["features"]["mean"]
        self.kept["features"]["mean"] = 0.9 * before + 0.1 * features.mean(0)
        return before


class InATensorInAList(Base):
    def setup(self) -> None:
        self.kept = [torch.zeros(5)]

    def remembered(self, features: Tensor) -> Tensor | float:
        return self.kept[0].mul_(0.9).add_(0.1 * features.mean(0)).clone()


class InATensorsData(Base):
    def setup(self) -> None:
        self.kept = torch.zeros(5)

    def remembered(self, features: Tensor) -> Tensor | float:
        self.kept.data.mul_(0.9).add_(0.1 * features.mean(0))
        return self.kept.clone()


class InANamespace(Base):
    def setup(self) -> None:
        self.kept = types.SimpleNamespace(mean=torch.zeros(5))

    def remembered(self, features: Tensor) -> Tensor | float:
        self.kept.mean = 0.9 * self.kept.mean + 0.1 * features.mean(0)
        return self.kept.mean


class Meter:
    def __init__(self) -> None:
        self.mean = torch.zeros(5)

    def update(self, value: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * value


class InAMeter(Base):
    def setup(self) -> None:
        self.kept = Meter()

    def remembered(self, features: Tensor) -> Tensor | float:
        self.kept.update(features.mean(0))
        return self.kept.mean


class InAnArray(Base):
    def setup(self) -> None:
        self.kept = np.zeros(5)

    def remembered(self, features: Tensor) -> Tensor | float:
        self.kept *= 0.9
        self.kept += 0.1 * features.mean(0).numpy()
        return torch.from_numpy(self.kept.copy())


class OnALayerOfTorch(Base):
    def setup(self) -> None:
        self.body.kept = 0

    def remembered(self, features: Tensor) -> Tensor | float:
        self.body.kept += 1
        return 0.1 * self.body.kept


class ByAHook(Base):
    def setup(self) -> None:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            module.kept = 0.9 * getattr(module, "kept", 0.0) + 0.1 * output.detach().mean(0)
            return output - module.kept

        self.body.register_forward_hook(hook)

    def remembered(self, features: Tensor) -> Tensor | float:
        return 0.0


class OnAParametrisedModel(Base):
    def setup(self) -> None:
        self.kept, self.scale = 0, nn.Parameter(torch.ones(5))
        nn.utils.parametrize.register_parametrization(self, "scale", nn.Identity())

    def remembered(self, features: Tensor) -> Tensor | float:
        self.kept += 1
        return 0.1 * self.kept * self.scale


class LayersChangePlaces(Base):
    def setup(self) -> None:
        self.one, self.kept = nn.Linear(5, 5), nn.Linear(5, 5)

    def remembered(self, features: Tensor) -> Tensor | float:
        self.one, self.kept = self.kept, self.one
        return self.one(features)


KEPT = [
    AskedForWithHasattr, AskedForWithGetattr, AskedForWithIsinstance, TriedFor, MeanOfTheFirstBatch, InANestOfDicts,
    InATensorInAList, InATensorsData, InANamespace, InAMeter, InAnArray, OnALayerOfTorch, ByAHook,
    OnAParametrisedModel, LayersChangePlaces,
]  # fmt: skip
NAMED = "kept|call|state"


@pytest.mark.filterwarnings("ignore:.*cannot be vmapped")
@pytest.mark.parametrize(("mode", "parallel", "stored"), WAYS)
@pytest.mark.parametrize("build", KEPT)
def test_training_takes_it_along_or_names_it(
    build: Callable[[], nn.Module], mode: Any, parallel: Any, stored: int
) -> None:
    tasks = meta_batch(vectors)
    expected = {} if build is LayersChangePlaces else meta_gradient_by_copies(build(), tasks)[1]
    model = build()
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS), mode, parallel, stored)
    if build is LayersChangePlaces:
        with pytest.raises((ValueError, RuntimeError), match=r"one|kept"):
            learner.backward(tasks)
        return
    exact_or_refused(lambda: learner.backward(tasks), model, expected, NAMED)


@pytest.mark.parametrize("build", [c for c in KEPT if c is not LayersChangePlaces])
def test_adapting_twice_gives_what_two_loops_give_or_names_it(build: Callable[[], nn.Module]) -> None:
    learner = MetaLearner(build(), F.cross_entropy, maml(inner_steps=STEPS))
    for _ in range(2):
        support, (query, _) = vectors(), vectors(5)
        expected = adapted(build(), support)(query)
        equal_or_refused(lambda s=support, q=query: learner.adapt(s)(q), expected, NAMED)


def test_parameters_that_a_first_call_sets() -> None:
    """ActNorm: the first batch decides the offset, and a buffer says that it has been decided."""

    class ActNorm(Base):
        def setup(self) -> None:
            self.offset = nn.Parameter(torch.zeros(5))
            self.register_buffer("decided", torch.tensor(False))

        def remembered(self, features: Tensor) -> Tensor | float:
            if not self.decided:
                self.offset.data.copy_(features.mean(0))
                self.decided.fill_(True)
            return self.offset

    support, (query, _) = vectors(), vectors(5)
    expected = adapted(ActNorm(), support)(query)
    learner = MetaLearner(ActNorm(), F.cross_entropy, maml(inner_steps=STEPS), parallel="loop")
    equal_or_refused(lambda: learner.adapt(support)(query), expected, "offset|decided")


def test_a_complex_buffer() -> None:
    class Rotates(Base):
        def setup(self) -> None:
            self.register_buffer("kept", torch.zeros(5, dtype=torch.complex128))

        def remembered(self, features: Tensor) -> Tensor | float:
            before = self.kept
            self.kept = 0.9 * before + (0.1 + 0.2j) * features.mean(0)
            return before.imag

    model, tasks = Rotates(), meta_batch(vectors)
    _, expected = meta_gradient_by_copies(model, tasks)
    learner = MetaLearner(model, F.cross_entropy, maml(inner_steps=STEPS))
    exact_or_refused(lambda: learner.backward(tasks), model, expected, "kept")
