"""Fifteen images of one class and one of each other: every class counts the same, unless told otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

import innerloop
from innerloop.classify import weighing
from innerloop.classify.estimate import estimate, wilson_interval
from innerloop.cli.main import main

SHOTS = [4, 1, 1]


@pytest.fixture(autouse=True)
def _float32(_float64_and_seed: None) -> None:
    torch.set_default_dtype(torch.float32)


def balanced(logits: Tensor, targets: Tensor) -> Tensor:
    """By PyTorch's weights of classes."""
    counts = targets.bincount()
    return F.cross_entropy(logits, targets, weight=len(targets) / (len(counts) * counts))


def test_the_loss_is_a_mean_over_classes() -> None:
    targets = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    logits = torch.randn(7, 3)
    torch.testing.assert_close(weighing.cross_entropy(logits, targets, "classes"), balanced(logits, targets))
    of_classes = [F.cross_entropy(logits[targets == c], targets[targets == c]) for c in range(3)]
    torch.testing.assert_close(weighing.cross_entropy(logits, targets, "classes"), torch.stack(of_classes).mean())
    assert weighing.cross_entropy(logits, targets, "images").equal(F.cross_entropy(logits, targets))
    equal = torch.arange(6) % 3
    assert weighing.cross_entropy(logits[:6], equal, "classes").equal(F.cross_entropy(logits[:6], equal))


def test_so_is_the_accuracy() -> None:
    targets, predicted = torch.tensor([0, 0, 0, 0, 1, 2]), torch.tensor([0, 0, 0, 0, 0, 2])
    assert float(weighing.accuracy(predicted, targets, "classes")) == pytest.approx((1 + 0 + 1) / 3)
    assert float(weighing.accuracy(predicted, targets, "images")) == pytest.approx(5 / 6)


def test_the_estimate_is_a_mean_over_classes_and_says_so() -> None:
    """Whoever answers with the large class is right half the time of two classes, and not in 8 of 10."""
    targets = torch.tensor([0] * 8 + [1] * 2)
    always_first = lambda kept, held_out: torch.zeros(len(held_out), dtype=torch.long)  # noqa: E731
    found = estimate(targets, always_first, weighing="classes")
    assert found is not None
    assert (found.accuracy, found.of_classes, found.correct, found.weighing) == (0.5, (1.0, 0.0), 8, "classes")
    images = 2 / ((1 / 8 + 1 / 2) / 2)  # as many of each class would tell it as exactly
    assert (found.low, found.high) == pytest.approx(wilson_interval(images / 2, images))
    by_images = estimate(targets, always_first, weighing="images")
    assert by_images is not None
    assert (by_images.accuracy, by_images.weighing) == (0.8, "images")


def drawing(kind: int, number: int) -> Image.Image:
    image = Image.new("L", (40, 40), 255)
    draw = ImageDraw.Draw(image)
    lines = [((8, 8), (32, 32)), ((20, 4), (20, 36)), ((4, 20), (36, 20))][kind]
    draw.line([(x + number % 3, y + number // 3) for x, y in lines], fill=0, width=3)
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind, shots in enumerate(SHOTS):
        (tmp_path / "classes" / f"class {kind}").mkdir(parents=True)
        for number in range(shots):
            drawing(kind, number).save(tmp_path / "classes" / f"class {kind}" / f"{number}.png")
    return tmp_path / "classes"


def test_the_fast_weights_are_those_of_a_loss_over_classes(folder: Path) -> None:
    """The first step's gradient, by hand."""
    adaptation = innerloop.load().adaptation(folder, steps=1)
    learner, (inputs, targets) = adaptation.learner, adaptation.examples
    model = learner.model.train()
    scale = len(SHOTS) / innerloop.load().config.data.ways
    tensors = {**learner.meta.adapted, **learner.meta.fixed_at_step(0), **learner.statistics.at_step(0)}
    tensors = {n: t.detach().clone() for n, t in tensors.items()}
    head = {n: tensors[n].requires_grad_() for n in ("head.weight", "head.bias")}
    loss = scale * balanced(torch.func.functional_call(model, tensors, (inputs,)), targets)
    for (name, start), gradient in zip(head.items(), torch.autograd.grad(loss, list(head.values())), strict=True):
        moved = start - learner.meta.rates[name][0] * gradient
        torch.testing.assert_close(adaptation.fast_weights[1][name], moved.detach(), rtol=1e-3, atol=1e-5)


def test_the_command_says_it_and_has_a_switch(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(Path(innerloop.__file__).parent / "checkpoints" / "strokes")
    records = {}
    for how in ("classes", "images"):
        out = tmp_path / f"{how}.safetensors"
        assert main(["adapt", run, str(folder), "--out", str(out), "--weighing", how, "--json"]) == 0
        records[how] = json.loads(capsys.readouterr().out)
        assert records[how]["support"]["weighing"] == how
    assert records["classes"]["support_losses"] != records["images"]["support_losses"]
    assert any("every class counts the same" in note for note in records["classes"]["notes"])
    assert any("every image counts the same" in note for note in records["images"]["notes"])


def test_a_weighing_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="weighing must be one of classes, images; got 'balanced'"):
        innerloop.load().adapt({"a": [drawing(0, 0)], "b": [drawing(1, 0)]}, weighing="balanced")  # type: ignore[arg-type]
