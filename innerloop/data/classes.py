"""Images of many classes, held in memory: what every image dataset is read into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    """

    images: Tensor
    sizes: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images must be uint8 [n, C, H, W], got {self.images.dtype} {tuple(self.images.shape)}")
        if len(self.sizes) != len(self.names) or sum(self.sizes) != len(self.images):
            raise ValueError(
                f"{len(self.images)} images, {len(self.names)} names and sizes that sum to {sum(self.sizes)} do not fit"
            )


ImageDataset = Mapping[Split, ClassImages]
