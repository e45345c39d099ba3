from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from innerloop.data import ClassImages, ImageDataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INNERLOOP_CACHE", str(folder))
    monkeypatch.setenv("INNERLOOP_DATA", str(tmp_path_factory.mktemp("data")))
    return folder


@pytest.fixture(scope="session")
def omniglot_root() -> Path:
    given = os.environ.get("INNERLOOP_OMNIGLOT")
    root = Path(given) if given else Path(__file__).parents[2].parent / "shared" / "data" / "omniglot"
    if not root.exists():
        pytest.skip(f"the real Omniglot is not in {root}; set INNERLOOP_OMNIGLOT to its folder")
    return root


@pytest.fixture
def numbered() -> Callable[..., ImageDataset]:
    """A dataset whose every image is told apart by its pixels: they count the images, in base 256."""

    def make(classes: int = 12, per_class: int = 6, shape: tuple[int, int, int] = (1, 4, 4)) -> ImageDataset:
        dataset = {}
        for s, split in enumerate(("train", "val", "test")):
            numbers = torch.arange(classes * per_class) + s * classes * per_class
            images = torch.zeros(len(numbers), *shape, dtype=torch.uint8)
            images[:, :, 0, 0] = (numbers % 256).to(torch.uint8)[:, None]
            images[:, :, 0, 1] = (numbers // 256).to(torch.uint8)[:, None]
            images[:, :, 1, 0] = 200
            names = tuple(f"{split}{c}" for c in range(classes))
            dataset[split] = ClassImages(images, (per_class,) * classes, names)
        return dataset

    return make


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """An encoded image of one colour."""

    def make(colour: object = 128, mode: str = "L", size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
        file = io.BytesIO()
        Image.new(mode, size, colour).save(file, kind)
        return file.getvalue()

    return make
