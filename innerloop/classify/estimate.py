"""How good a classifier is, as far as its own support set can tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from innerloop.classify.weighing import Weighing

MOST_FOLDS = 20
"""Every fold is an adaptation of its own; so many take seconds."""


@dataclass(frozen=True)
class Estimate:
    """Accuracy on support images that were held out of the adaptation in turn.

    Attributes:
        kind: ``"leave-one-out"``: each image alone; ``"k-fold"``: several at a time.
        folds: adaptations that were made.
        images: how many were judged, each once; copies of an image, in its class, are one.
        correct: how many of them were given their own class.
        low: lower end of the 95% Wilson interval of the accuracy.
        high: its upper end.
        weighing: ``"classes"``: the accuracy is a mean over classes, each of whatever number of images;
            ``"images"``: of all images.
        of_classes: accuracy of each class, where classes are weighed.
    """

    kind: Literal["leave-one-out", "k-fold"]
    folds: int
    images: int
    correct: int
    low: float
    high: float
    weighing: Weighing = "images"
    of_classes: tuple[float, ...] = ()

    @property
    def accuracy(self) -> float:
        """The fraction that is correct, of each class or of all images."""
        return sum(self.of_classes) / len(self.of_classes) if self.of_classes else self.correct / self.images


def wilson_interval(correct: float, images: float) -> tuple[float, float]:
    """The 95% interval of a fraction (Wilson 1927), which is of use for small numbers and for 0% and 100% too."""
    z = 1.959963984540054
    p, n = correct / images, images
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def firsts(targets: Tensor, same: Tensor | None = None) -> Tensor:
    """Numbers ``[m]`` of the images that are judged: of copies in a class the first. Arguments as of ``estimate``."""
    if same is None:
        return torch.arange(len(targets))
    first: dict[tuple[int, int], int] = {}
    for i, image in enumerate(zip(targets.tolist(), same.tolist(), strict=True)):
        first.setdefault(image, i)
    return torch.tensor(sorted(first.values()))


def folds(targets: Tensor, most: int = MOST_FOLDS) -> list[Tensor]:
    """Which images to hold out in each fold: every image once, and never all of a class.

    One image a fold where there are at most ``most`` of them; else ``most`` folds, each class spread over them.
    """
    n = len(targets)
    if n <= most:
        return [torch.tensor([i]) for i in range(n)]
    # Classes follow each other from fold to fold, so that all folds are of one size, as near as can be.
    fold = torch.empty(n, dtype=torch.long)
    fold[targets.argsort(stable=True)] = torch.arange(n) % most
    return [(fold == f).nonzero().flatten() for f in range(most)]


def estimate(
    targets: Tensor,
    predicted: Callable[[Tensor, Tensor], Tensor],
    tick: Callable[[], None] = lambda: None,
    weighing: Weighing = "images",
    same: Tensor | None = None,
) -> Estimate | None:
    """Adapt again and again without some of the images, and judge those; None where a class has a single image.

    Args:
        targets: ``[n]``, the support images' classes, 0 .. ways - 1.
        predicted: ``predicted(kept, held_out)`` adapts to the images of the first numbers and gives the classes it
            finds for the second.
        tick: called after each fold.
        weighing: whether the accuracy is a mean over classes or over images. The interval of the first is Wilson's for
            as many images as would tell it as exactly if all classes were told equally well: ways / mean(1 / shots).
        same: ``[n]``, a number of its own for each image, and one for copies. A copy that stayed would tell what was
            held out, so that copies are held out together, and judged once.
    """
    judged = firsts(targets, same)
    own = targets[judged]
    shots = own.bincount(minlength=int(targets.max()) + 1)
    if int(shots.min()) < 2:
        return None
    every, copies = torch.arange(len(targets)), torch.arange(len(targets)) if same is None else same
    held_out_sets = folds(own)
    right = torch.zeros(len(judged), dtype=torch.long)
    for fold in held_out_sets:
        held_out = judged[fold]
        gone = (copies[:, None] == copies[held_out]) & (targets[:, None] == targets[held_out])
        kept = every[~gone.any(1)]
        right[fold] = (predicted(kept, held_out) == targets[held_out]).long()
        tick()
    correct, images = int(right.sum()), float(len(judged))
    of_classes: tuple[float, ...] = ()
    mean = correct / images
    if weighing == "classes" and int(shots.min()) < int(shots.max()):
        of_classes = tuple((own.bincount(right.double()) / shots).tolist())
        mean, images = sum(of_classes) / len(of_classes), float(len(shots) / (1 / shots).double().mean())
    return Estimate(
        "leave-one-out" if len(held_out_sets) == len(judged) else "k-fold",
        len(held_out_sets),
        len(judged),
        correct,
        *wilson_interval(mean * images, images),
        weighing,
        of_classes,
    )
