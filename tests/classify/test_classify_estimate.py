from __future__ import annotations

import pytest
import torch
from torch import Tensor

from innerloop.classify.estimate import estimate, folds, wilson_interval


@pytest.mark.parametrize(
    ("correct", "images", "low", "high"),
    # By hand, (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with z = 1.95996.
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (81, 100, 0.72219, 0.87486)],
)
def test_wilson_interval(correct: int, images: int, low: float, high: float) -> None:
    assert wilson_interval(correct, images) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize("shots", [[2] * 5, [2, 3, 4], [2] * 100, [50, 2, 2], [7] * 20, [21, 2]])
def test_folds_hold_every_image_out_once_and_never_all_of_a_class(shots: list[int]) -> None:
    targets = torch.repeat_interleave(torch.arange(len(shots)), torch.tensor(shots))
    targets = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
    found = folds(targets)
    assert sorted(torch.cat(found).tolist()) == list(range(len(targets)))
    assert len(found) == min(len(targets), 20)
    for held_out in found:
        left = torch.tensor(shots) - targets[held_out].bincount(minlength=len(shots))
        assert left.min() >= 1
    sizes = [len(f) for f in found]
    assert max(sizes) - min(sizes) <= 1


def test_an_estimate_counts_what_is_right() -> None:
    targets = torch.tensor([0, 0, 1, 1, 1])
    asked: list[tuple[list[int], list[int]]] = []

    def predicted(kept: Tensor, held_out: Tensor) -> Tensor:
        asked.append((kept.tolist(), held_out.tolist()))
        return torch.ones(len(held_out), dtype=torch.long)

    ticks: list[int] = []
    found = estimate(targets, predicted, lambda: ticks.append(1))
    assert found is not None
    assert (found.kind, found.folds, found.images, found.correct) == ("leave-one-out", 5, 5, 3)
    assert found.accuracy == 0.6
    assert (found.low, found.high) == wilson_interval(3, 5)
    assert len(ticks) == 5
    assert asked == [([j for j in range(5) if j != i], [i]) for i in range(5)]


def test_many_images_are_held_out_together() -> None:
    targets = torch.arange(50).repeat_interleave(3)
    found = estimate(targets, lambda kept, held_out: targets[held_out])
    assert found is not None
    assert (found.kind, found.folds, found.images, found.correct) == ("k-fold", 20, 150, 150)


def test_one_shot_gives_no_estimate() -> None:
    assert estimate(torch.tensor([0, 0, 1]), lambda kept, held_out: pytest.fail("adapted")) is None
