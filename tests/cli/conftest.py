from __future__ import annotations

import pytest


@pytest.fixture
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a small run's time goes into its figures: none are drawn, for tests of something else."""
    monkeypatch.setattr("innerloop.training.figures.write_figures", lambda *arguments: [])
