"""Images of many classes, held in memory: what every image dataset is read into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class ClassImages:
    """The images of one split, class after class.

    Attributes:
        images: uint8 ``[n_images, channels, height, width]``; bright is ink for drawn characters.
        sizes: how many images each class has, ``n_images`` in all; class ``c``'s images follow those of the
            classes before it.
        names: one name a class.
        bits: in which the 16-bit images among them were read; None where there are none.
        brightest: the largest value of those 16-bit images, as their files have it.
    """

    images: Tensor
    sizes: tuple[int, ...]
    names: tuple[str, ...]
    bits: int | None = None
    brightest: int = 0

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [n, C, H, W], got {self.images.dtype} {tuple(self.images.shape)}")
        if not all(type(size) is int and size >= 0 for size in self.sizes):
            raise ValueError(f"sizes must be whole numbers from 0, got {self.sizes}")
        if len(self.sizes) != len(self.names) or sum(self.sizes) != len(self.images):
            raise ValueError(
                f"{len(self.images)} images, {len(self.names)} names and {len(self.sizes)} sizes that sum to "
                f"{sum(self.sizes)} do not fit"
            )

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each class's images begin in ``images``."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    def select(self, classes: Sequence[int]) -> ClassImages:
        """The given classes (by number, in the given order) with copies of their images."""
        starts = self.starts
        rows = [torch.arange(starts[c], starts[c] + self.sizes[c]) for c in classes]
        return ClassImages(
            images=self.images[torch.cat(rows)] if rows else self.images[:0].clone(),
            sizes=tuple(self.sizes[c] for c in classes),
            names=tuple(self.names[c] for c in classes),
            bits=self.bits,
            brightest=self.brightest,
        )


ImageDataset = Mapping[Split, ClassImages]
