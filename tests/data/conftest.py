from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from PIL import Image

from innerloop.data import ClassImages, ImageDataset


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
