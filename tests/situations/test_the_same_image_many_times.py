"""Copies of an image in its class, as people make classes equal by hand: an estimate does not judge by heart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import innerloop
from innerloop.classify.estimate import estimate, wilson_interval
from innerloop.cli.main import main


@pytest.fixture(autouse=True)
def _float32(_float64_and_seed: None) -> None:
    torch.set_default_dtype(torch.float32)


def drawing(kind: int, number: int) -> Image.Image:
    image = Image.new("L", (40, 40), 255)
    start, end = [((8, 8), (32, 32)), ((20, 4), (20, 36))][kind]
    ImageDraw.Draw(image).line([(start[0] + number, start[1]), (end[0] - number, end[1])], fill=0, width=3)
    return image


def test_copies_are_held_out_together_and_judged_once() -> None:
    targets = torch.tensor([0, 0, 0, 1, 1, 1])
    same = torch.tensor([0, 0, 2, 3, 3, 5])  # two copies and another, in both classes
    asked: list[tuple[list[int], list[int]]] = []

    def predicted(kept: Tensor, held_out: Tensor) -> Tensor:
        asked.append((kept.tolist(), held_out.tolist()))
        return torch.zeros(len(held_out), dtype=torch.long)

    found = estimate(targets, predicted, same=same)
    assert found is not None
    assert asked == [([2, 3, 4, 5], [0]), ([0, 1, 3, 4, 5], [2]), ([0, 1, 2, 5], [3]), ([0, 1, 2, 3, 4], [5])]
    assert (found.kind, found.images, found.correct) == ("leave-one-out", 4, 2)
    assert (found.low, found.high) == wilson_interval(2, 4)


def test_a_class_of_copies_has_one_image() -> None:
    targets, same = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 3, 4])
    assert estimate(targets, lambda kept, held_out: pytest.fail("adapted"), same=same) is None


def test_whoever_knows_by_heart_is_not_right() -> None:
    """The nearest neighbour tells every copy by its copy, and images of two classes that are all noise by chance."""
    points, targets = torch.randperm(60)[:, None].float().repeat(2, 1), (torch.arange(60) % 2).repeat(2)

    def nearest(kept: Tensor, held_out: Tensor) -> Tensor:
        return targets[kept][torch.cdist(points[held_out], points[kept]).argmin(1)]

    by_heart = estimate(targets, nearest)
    assert by_heart is not None
    assert by_heart.accuracy > 0.9
    found = estimate(targets, nearest, same=torch.arange(60).repeat(2))
    assert found is not None
    assert (found.kind, found.images) == ("k-fold", 60)
    assert found.accuracy < 0.75


def test_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (0, 1):
        (tmp_path / "mine" / f"class {kind}").mkdir(parents=True)
        for copy in range(3):
            drawing(kind, 0).save(tmp_path / "mine" / f"class {kind}" / f"{copy}.png")
    run = str(Path(innerloop.__file__).parent / "checkpoints" / "strokes")
    command = ["adapt", run, str(tmp_path / "mine"), "--out", str(tmp_path / "my.safetensors"), "--overwrite"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "4 images are copies of others of the same class (class 0, class 1): adapting counts them" in said
    assert "with two or more of each, no copies, there is one" in said
    for kind in (0, 1):
        drawing(kind, 2).save(tmp_path / "mine" / f"class {kind}" / "other.png")
    assert main(command) == 0
    assert "of 4), 95% interval" in capsys.readouterr().out


def test_one_image_in_two_classes_is_no_copy_in_its_class() -> None:
    support = {"a": [drawing(0, 0), drawing(0, 2)], "b": [drawing(0, 0), drawing(1, 0)]}
    adaptation = innerloop.load().adaptation(support)
    assert not any("cop" in note for note in adaptation.notes)
    found = adaptation.estimate()
    assert found is not None
    assert found.images == 4
