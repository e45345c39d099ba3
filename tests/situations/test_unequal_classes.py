"""Many images of one class and one of each other, with the run that ships: the small classes are still told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import innerloop
from innerloop.classify import Classifier, weighing
from innerloop.classify.weighing import Weighing
from innerloop.cli.main import main
from innerloop.data import strokes
from innerloop.norm_layers import Normalisation

WAYS, LARGE, ASKED = 5, 12, 4
Drawings = dict[str, list[NDArray[np.uint8]]]


@pytest.fixture(autouse=True)
def _float32(_float64_and_seed: None) -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def drawings() -> Drawings:
    """Dark ink on white, of classes that the run has not seen."""
    found = strokes({"train": 1, "val": 1, "test": 4 * WAYS}, drawers=LARGE + ASKED, seed=1)["test"]
    pages, each = 255 - found.images[:, 0].numpy(), LARGE + ASKED
    return {name: list(pages[first : first + each]) for name, first in zip(found.names, found.starts, strict=True)}


def small_classes_told_right(drawings: Drawings, how: Weighing, normalisation: Normalisation) -> float:
    trained, right = innerloop.load(), []
    for first in range(0, len(drawings), WAYS):
        names = list(drawings)[first : first + WAYS]
        support = {name: drawings[name][: LARGE if name == names[0] else 1] for name in names}
        classifier = trained.adapt(support, weighing=how, normalisation=normalisation)
        asked = [(name, image) for name in names for image in drawings[name][LARGE:]]
        found = classifier.predict([image for _, image in asked])
        right += [p.name == name for p, (name, _) in zip(found, asked, strict=True) if name != names[0]]
    return float(np.mean(right))


@pytest.mark.parametrize("normalisation", ["support", "running", "batch"])
def test_small_classes_are_told_whatever_the_large_one_has(drawings: Drawings, normalisation: Normalisation) -> None:
    by_class = small_classes_told_right(drawings, "classes", normalisation)
    by_image = small_classes_told_right(drawings, "images", normalisation)
    assert by_class > 0.8
    assert by_image < by_class - 0.3


@pytest.mark.parametrize("shots", [1, 3, 7])
def test_equal_classes_are_what_they_ever_were(drawings: Drawings, shots: int) -> None:
    """To the bit: the same losses, accuracies, fast weights and answers."""
    support = {name: images[:shots] for name, images in list(drawings.items())[:WAYS]}
    asked = [images[-1] for images in list(drawings.values())[:WAYS]]
    one, other = (innerloop.load().adaptation(support, weighing=how) for how in ("classes", "images"))
    assert torch.equal(one.support_losses, other.support_losses)
    assert torch.equal(one.support_accuracies, other.support_accuracies)
    assert torch.equal(one.probabilities(asked), other.probabilities(asked))
    assert one.notes == other.notes


@pytest.mark.parametrize("shots", range(1, 30))
def test_all_right_is_exactly_one(shots: int) -> None:
    targets = torch.arange(7).repeat_interleave(shots)
    assert float(weighing.accuracy(targets, targets, "classes")) == 1.0


def test_five_hundred_against_one() -> None:
    """As many images weigh as one, and no image is copied to make it so."""
    targets = torch.tensor([0] * 500 + [1])
    logits = torch.randn(501, 2, requires_grad=True)
    weighing.cross_entropy(logits, targets, "classes").backward()
    assert logits.grad is not None
    pull = logits.grad.abs().sum(1)
    missed = 1 - logits.detach().softmax(1).gather(1, targets[:, None])[:, 0]  # |p - y| of two classes is twice that
    torch.testing.assert_close(pull[:500], 2 * missed[:500] / (500 * 2))
    torch.testing.assert_close(pull[500], 2 * missed[500] / 2)


def folder_of(root: Path, drawings: Drawings, shots: list[int]) -> Path:
    for (name, images), n in zip(drawings.items(), shots, strict=False):
        (root / name.replace("/", " ")).mkdir(parents=True)
        for i, image in enumerate(images[:n]):
            Image.fromarray(image).resize((60, 60)).save(root / name.replace("/", " ") / f"{i}.png")
    return root


def test_what_is_said_and_kept(tmp_path: Path, drawings: Drawings, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(Path(innerloop.__file__).parent / "checkpoints" / "strokes")
    folder, out = folder_of(tmp_path / "mine", drawings, [6, 2, 2]), tmp_path / "my.safetensors"
    command = ["adapt", run, str(folder), "--out", str(out), "--overwrite"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "classes have 2 to 6 images; every class counts the same" in said
    assert "(means over classes, each counting the same)" in said
    assert "mean over classes, each counting the same; " in said
    kept = Classifier.load(out).description()
    assert kept["support"]["weighing"] == kept["estimate"]["weighing"] == "classes"
    assert kept["estimate"]["accuracy"] == pytest.approx(np.mean(kept["estimate"]["of_classes"]))
    assert main([*command, "--weighing", "images"]) == 0
    said = capsys.readouterr().out
    assert "every image counts the same: answers lean towards the classes with many" in said
    assert "of 10, a mean over images, each counting the same)" in said
    assert main([*command, "--weighing", "images", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)["estimate"]
    assert estimate["accuracy"] == estimate["correct"] / estimate["images"]


@pytest.mark.parametrize("how", ["classes", "images"])
def test_the_folds_adapt_as_the_classifier_does(drawings: Drawings, how: Weighing) -> None:
    """Holding each image out by hand, with the same weighing."""
    names = list(drawings)[:3]
    support = {name: drawings[name][:n] for name, n in zip(names, (5, 2, 2), strict=True)}
    trained = innerloop.load()
    right: dict[str, list[bool]] = {name: [] for name in names}
    for name in names:
        for i, image in enumerate(support[name]):
            kept = {**support, name: support[name][:i] + support[name][i + 1 :]}
            right[name].append(trained.adapt(kept, weighing=how).predict([image])[0].name == name)
    found = trained.adaptation(support, weighing=how).estimate()
    assert found is not None
    every = [r for of_class in right.values() for r in of_class]
    expected = np.mean([np.mean(r) for r in right.values()] if how == "classes" else every)
    assert found.accuracy == pytest.approx(expected)
    assert found.correct == sum(every)
