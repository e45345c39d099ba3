"""What is done to an image before a network sees it: a value that travels with a run and its classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from innerloop.data.depth import check_bits
from innerloop.data.images import MAX_SIZE, Fit, Pixels, decode_image, image_pixels

Ink = Literal["dark", "bright"]

# A drawing has a page: most of its pixels are alike, and so is its border. Levels are of 0 to 255.
_ALIKE = 48
_PAGE_SHARE = 0.5
_LIGHT, _DARK = 170, 85


@dataclass(frozen=True)
class Preprocessing:
    """How image files become a network's inputs.

    Attributes:
        size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        fit: what happens to images that are not square; see ``decode_image``.
        invert: turn dark ink on bright paper into bright ink on dark.
        mean: subtracted from each channel, in units of [0, 1]; None for nothing.
        std: divides each channel after that; None for nothing.
        ink: what the network takes ink to be, once ``invert`` is done; None where images are no drawings, or it is
            not known.
        bits: that the values of 16-bit images use, ``2**bits - 1`` being white; None where it is not known, and all
            16 are taken.
    """

    size: int
    channels: int
    fit: Fit = "stretch"
    invert: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    ink: Ink | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be done to an image."""
        if not 1 <= self.size <= MAX_SIZE:
            raise ValueError(f"size must be at least 1 pixel and at most {MAX_SIZE}; got {self.size}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB); got {self.channels}")
        check_bits(self.bits)
        per_channel("mean", self.mean, self.channels)
        per_channel("std", self.std, self.channels)

    def pixels(self, image: bytes | Image.Image) -> Pixels:
        """An encoded or an opened image as uint8 ``[channels, size, size]``.

        Raises what ``decode_image`` raises.
        """
        if isinstance(image, bytes):
            return decode_image(
                image, size=self.size, channels=self.channels, fit=self.fit, invert=self.invert, bits=self.bits
            )
        return image_pixels(
            image, size=self.size, channels=self.channels, fit=self.fit, invert=self.invert, bits=self.bits
        )

    def inputs(self, pixels: Tensor) -> Tensor:
        """float32 ``[n, channels, size, size]`` for uint8 pixels of the same shape, as ``Episodes`` makes them."""
        mean = per_channel("mean", self.mean, self.channels)
        inverse_std = per_channel("std", self.std, self.channels)
        return normalised(pixels.to(torch.float32), mean, inverse_std)


def normalised(pixels: Tensor, mean: Tensor | None, inverse_std: Tensor | None) -> Tensor:
    """``(value - mean) / std`` of floating-point pixel values 0 .. 255 taken to [0, 1], in place."""
    # Products with rounded constants, not quotients: CUDA may turn a division by a constant into a
    # product, and the same task must have the same bits on every device.
    inputs = pixels.mul_(1 / 255)
    if mean is not None:
        inputs.sub_(mean)
    if inverse_std is not None:
        inputs.mul_(inverse_std)
    return inputs


def per_channel(
    name: Literal["mean", "std"],
    values: Sequence[float] | None,
    channels: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """``mean``, or the inverse of ``std``, as ``[channels or 1, 1, 1]``.

    Raises ``ValueError`` for another number of values, or such as cannot be a mean or a deviation.
    """
    if values is None:
        return None
    tensor = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(tensor) not in (1, channels):
        raise ValueError(f"{name} must be one number, or one for each of {channels} channels; got {values!r}")
    if not torch.isfinite(tensor).all() or (name == "std" and not (tensor > 0).all()):
        raise ValueError(f"{name} must be finite{' and positive' if name == 'std' else ''}; got {values!r}")
    tensor = 1 / tensor if name == "std" else tensor
    return tensor.to(device, dtype).view(-1, 1, 1)


def ink_of(pixels: Pixels) -> Ink | None:
    """Whether an image ``[channels, height, width]`` is dark ink on a light page or bright ink on a dark one.

    None for what looks like neither: a page is as bright (or dark) at the border as in most of the image, and a
    photograph is not. An empty page has an ink too, the one that would be seen on it.
    """
    grey = pixels.mean(0)
    border = np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])
    page = float(np.median(border))
    if (np.abs(grey - page) <= _ALIKE).mean() < _PAGE_SHARE:
        return None
    return "dark" if page >= _LIGHT else "bright" if page <= _DARK else None
