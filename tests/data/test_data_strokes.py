from __future__ import annotations

import hashlib

import pytest
import torch

from innerloop.data import Episodes, strokes


@pytest.fixture(scope="module")
def drawn():
    return strokes({"train": 60, "test": 40}, drawers=8)


def test_shapes(drawn) -> None:
    assert set(drawn) == {"train", "test"}
    assert drawn["train"].images.shape == (480, 1, 28, 28)
    assert drawn["test"].sizes == (8,) * 40
    assert drawn["train"].names[:2] == ("train/character00000", "train/character00001")
    assert strokes({"val": 1}, drawers=2, size=84)["val"].images.shape == (2, 1, 84, 84)


def test_a_character_does_not_depend_on_what_else_is_drawn(drawn) -> None:
    fewer = strokes({"train": 21}, drawers=8)["train"]
    assert torch.equal(fewer.images, drawn["train"].images[: 21 * 8])
    drawers = strokes({"train": 3}, drawers=2)["train"].images.view(3, 2, 28, 28)
    assert torch.equal(drawers, drawn["train"].images.view(60, 8, 28, 28)[:3, :2])


def test_the_very_drawings_are_pinned(drawn) -> None:
    # The canvas is 1-bit and its coordinates are rounded from doubles, so the last bits of a platform's sine
    # do not show. This hash may only change with a note in the changelog.
    digest = hashlib.sha256(drawn["train"].images[:160].numpy().tobytes()).hexdigest()
    assert digest == "b59095f309a5176fc13b4be8051b9f519bbe626c3196495f93b74684f31c1321"


def test_splits_seeds_and_characters_differ(drawn) -> None:
    other = strokes({"train": 5}, drawers=8, seed=1)["train"].images
    assert not torch.equal(other, drawn["train"].images[:40])
    assert not torch.equal(drawn["test"].images[:40], drawn["train"].images[:40])
    assert len(torch.unique(drawn["train"].images.flatten(1), dim=0)) == 480


def test_they_look_like_omniglot(drawn) -> None:
    images = drawn["train"].images.float() / 255
    # Omniglot at 28 x 28: mean 0.084, 8% of pixels above one half, characters 59% as high as the page.
    assert 0.065 < images.mean() < 0.1
    assert 0.06 < (images > 0.5).float().mean() < 0.1
    assert images.amax((1, 2, 3)).min() > 0.5
    dark = images[:, 0] > 0.3
    heights = dark.any(2).sum(1).float() / 28
    assert 0.45 < heights.mean() < 0.7
    assert images[:, 0, 0].sum() == images[:, 0, :, 0].sum() == images[:, 0, :, -1].sum() == 0


def test_they_are_neither_trivial_nor_hopeless_for_the_nearest_neighbour(drawn) -> None:
    # 5-way 1-shot on raw pixels gets 45% on Omniglot.
    tasks = Episodes(drawn, ways=5, shots=1, queries=3).meta_batch("test", 0, 300)
    nearest = torch.cdist(tasks.query.inputs.flatten(2), tasks.support.inputs.flatten(2)).argmin(-1)
    assert 0.36 < (nearest == tasks.query.targets).float().mean() < 0.58


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": {"training": 3}}, "must map some of"),
        ({"classes": {}}, "must map some of"),
        ({"classes": {"val": 0}}, r"classes\['val'\] must be a whole number, at least 1"),
        ({"classes": {"val": 1}, "drawers": 0}, "drawers must be"),
        ({"classes": {"val": 1}, "size": 4}, "size must be a whole number, at least 8"),
        ({"classes": {"val": 1}, "seed": -2}, "seed must be"),
    ],
)
def test_bad_arguments(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        strokes(**arguments)
