from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from innerloop.data import Preprocessing, strokes
from innerloop.data.preprocessing import ink_of


def pixels(image: Image.Image) -> np.ndarray:
    return Preprocessing(size=28, channels=1).pixels(image)


@pytest.mark.parametrize("kind", ["bar", "dot", "post", "slope", "box"])
def test_ink_of_drawings(shapes: Callable[..., Image.Image], kind: str) -> None:
    assert ink_of(pixels(shapes(kind))) == "dark"
    assert ink_of(pixels(shapes(kind, ink=90, page=200))) == "dark"
    assert ink_of(pixels(shapes(kind, ink=250, page=0))) == "bright"


def test_ink_of_drawn_strokes() -> None:
    images = strokes({"train": 20, "val": 1, "test": 1}, size=28)["train"].images.numpy()
    assert {ink_of(image) for image in images} == {"bright"}
    assert {ink_of(255 - image) for image in images} == {"dark"}


def test_what_is_no_drawing_has_no_ink() -> None:
    assert ink_of(pixels(Image.effect_noise((60, 60), 120))) is None
    assert ink_of(pixels(Image.linear_gradient("L"))) is None
    assert ink_of(pixels(Image.new("L", (60, 60), 128))) is None
    photograph = Image.linear_gradient("L").rotate(90)
    assert ink_of(pixels(photograph)) is None


def test_inputs() -> None:
    values = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    plain = Preprocessing(size=2, channels=3)
    assert plain.inputs(values)[0, :, 0, 0].tolist() == pytest.approx([0, 0.2, 1])
    colour = Preprocessing(size=2, channels=3, mean=(0.5, 0.2, 0.0), std=(0.5, 1.0, 2.0))
    assert colour.inputs(values)[0, :, 0, 0].tolist() == pytest.approx([-1, 0, 0.5], abs=1e-6)
    assert values[0, 2, 0, 0] == 255  # unchanged
    with pytest.raises(ValueError, match="one for each of 3 channels"):
        Preprocessing(size=2, channels=3, mean=(0.5, 0.5)).inputs(values)
