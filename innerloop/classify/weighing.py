"""How much each support image counts, where classes have different numbers of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Weighing = Literal["classes", "images"]
"""``"classes"``: every class counts the same, however many images it has; ``"images"``: every image does."""


def cross_entropy(logits: Tensor, targets: Tensor, weighing: Weighing) -> Tensor:
    """Mean over classes of the mean over a class's images, or plainly the mean over images.

    Where all classes have equally many images it is the same number, by the same operations.
    """
    if weighing == "images" or _equal(targets):
        return F.cross_entropy(logits, targets)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return _mean_over_classes(losses, targets)


def accuracy(predicted: Tensor, targets: Tensor, weighing: Weighing) -> Tensor:
    """The fraction ``[...]`` that is right of predictions ``[..., n]``, images weighed as in ``cross_entropy``."""
    right = (predicted == targets).float()
    return right.mean(-1) if weighing == "images" or _equal(targets) else _mean_over_classes(right, targets)


def _equal(targets: Tensor) -> bool:
    """Whether all classes that there are have equally many images."""
    counts = targets.bincount()
    present = counts[counts > 0]
    return bool((present == present[0]).all())


def _mean_over_classes(values: Tensor, targets: Tensor) -> Tensor:
    counts = targets.bincount()
    return (values / counts[targets]).sum(-1) / int((counts > 0).sum())


def note(shots: Sequence[int], weighing: Weighing) -> list[str]:
    """What a person may want to know, where one class has twice as many images as another."""
    if max(shots) < 2 * min(shots):
        return []
    range_ = f"classes have {min(shots)} to {max(shots)} images"
    if weighing == "images":
        return [f"{range_}, and every image counts the same: answers lean towards the classes with many"]
    return [f"{range_}; every class counts the same"]
