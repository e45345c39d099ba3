"""For every test: one core, since the models are small and other work shares the machine, and an empty cache."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _one_core() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("innerloop.training.building.available_cores", lambda: 1)
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INNERLOOP_CACHE", str(folder))
    monkeypatch.setenv("INNERLOOP_DATA", str(tmp_path_factory.mktemp("data")))
    return folder


@pytest.fixture(scope="session")
def omniglot_root() -> Path:
    given = os.environ.get("INNERLOOP_OMNIGLOT")
    root = Path(given) if given else Path(__file__).parents[1].parent / "shared" / "data" / "omniglot"
    if not root.exists():
        pytest.skip(f"the real Omniglot is not in {root}; set INNERLOOP_OMNIGLOT to its folder")
    return root
