"""Forces as the gradient of an energy, with the graph kept in training mode only, as force fields are written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_copies import equal_or_refused, exact_or_refused, meta_gradient_by_copies
from by_hand import STEPS, adapted, meta_batch
from torch import Tensor, nn

from innerloop import MetaLearner, maml


class ForceField(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, positions: Tensor) -> dict[str, Tensor]:
        positions = positions.detach().requires_grad_()
        energy = self.energy(positions).sum(1)
        (slope,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
        return {"energy": energy, "forces": -slope}


class ByFunctions(ForceField):
    def forward(self, positions: Tensor) -> dict[str, Tensor]:
        def energy(x: Tensor) -> Tensor:
            return self.energy(x).sum()

        slope = torch.func.vmap(torch.func.grad(energy))(positions)
        return {"energy": self.energy(positions).sum(1), "forces": -slope}


def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return F.mse_loss(outputs["energy"], targets[:, 0]) + F.mse_loss(outputs["forces"], targets)


def atoms() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3), torch.randn(6, 3)


@pytest.mark.filterwarnings("ignore:.*cannot be vmapped")
@pytest.mark.parametrize("mode", ["reverse", "mixed", "auto"])
@pytest.mark.parametrize("build", [ForceField, ByFunctions])
def test_training(build: type[ForceField], mode: Any) -> None:
    model, tasks = build(), meta_batch(atoms)
    _, expected = meta_gradient_by_copies(build(), tasks, loss)
    exact_or_refused(
        lambda: MetaLearner(model, loss, maml(inner_steps=STEPS), mode, stored_steps=1).backward(tasks),
        model, expected, "energy",
    )  # fmt: skip


@pytest.mark.parametrize("build", [ForceField, ByFunctions])
def test_adapting_and_predicting(build: type[ForceField]) -> None:
    support, (query, _) = atoms(), atoms()
    learner = MetaLearner(build(), loss, maml(inner_steps=STEPS))

    def forces(outputs: dict[str, Tensor]) -> Tensor:
        return outputs["forces"]

    expected = forces(adapted(build(), support, loss)(query))
    equal_or_refused(lambda: forces(learner.adapt(support)(query)), expected, "evaluation mode|training mode")

    def predicted() -> Tensor:
        *_, theta = learner.trajectory(support)
        return forces(learner.predict(theta, STEPS, query))

    equal_or_refused(predicted, expected, "evaluation mode|training mode")
