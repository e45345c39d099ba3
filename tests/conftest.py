"""For every test: one core, since the models are too small for more and other work shares the machine."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("innerloop.training.building.available_cores", lambda: 1)
