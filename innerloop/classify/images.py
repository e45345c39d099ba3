"""Images as people have them: files, bytes, Pillow images, arrays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from innerloop.data import Preprocessing
from innerloop.data.depth import eight_bits
from innerloop.data.images import Pixels, largest_value

ImageLike = Image.Image | str | os.PathLike[str] | bytes | NDArray[Any] | torch.Tensor
"""A path, the bytes of an image file, a Pillow image, or an array or tensor ``[h, w]``, ``[h, w, 1, 3 or 4]`` or
``[1 or 3, h, w]``: uint8, floating point in [0, 1], or uint16, which is read as 16-bit images are."""


def read_image(image: ImageLike, preprocessing: Preprocessing) -> Pixels:
    """An image as uint8 ``[channels, size, size]``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no image, too large, or an array that is none.
    """
    try:
        if isinstance(image, bytes | Image.Image):
            return preprocessing.pixels(image)
        if isinstance(image, np.ndarray | torch.Tensor):
            return preprocessing.pixels(_from_array(image, preprocessing.bits))
        if isinstance(image, str | os.PathLike):
            return preprocessing.pixels(Path(image).read_bytes())
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:
        # Pillow's decoders raise nearly anything on damaged files: SyntaxError, struct.error, zlib.error, ...
        raise ValueError(f"a damaged image: {str(error) or type(error).__name__}") from error
    raise TypeError(f"an image is a path, bytes, a Pillow image, an array or a tensor; got {type(image).__name__}")


def deep_value(image: ImageLike) -> int:
    """The largest value of an image with 16 bits a value whose white is to be found; 0 of any other."""
    if isinstance(image, np.ndarray | torch.Tensor):
        try:
            values = _values(image)
        except (ValueError, TypeError):  # said by read_image
            return 0
        colours = values[:, :, :3] if values.ndim == 3 else values
        return int(colours.max()) if _is_deep(values) else 0
    if isinstance(image, str | os.PathLike):
        try:
            image = Path(image).read_bytes()
        except OSError:  # said by read_image
            return 0
    return largest_value(image) if isinstance(image, bytes | Image.Image) else 0


def image_name(image: ImageLike, number: int) -> str:
    """What messages call the image: its path, or its number counted from 1."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {number}"


def _values(array: NDArray[Any] | torch.Tensor) -> NDArray[Any]:
    """An array's values as ``[h, w]`` or ``[h, w, 3 or 4]``."""
    values = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))) or 0 in values.shape:
        raise ValueError(
            f"an array of shape {tuple(array.shape)} is no image: expected [h, w], [h, w, 1, 3 or 4] or [1 or 3, h, w]"
        )
    return values


def _is_deep(values: NDArray[Any]) -> bool:
    return values.dtype.kind == "u" and values.dtype.itemsize == 2  # of either byte order


def _from_array(array: NDArray[Any] | torch.Tensor, bits: int | None) -> Image.Image:
    values = _values(array)
    if np.issubdtype(values.dtype, np.floating):
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("an array of floating-point pixels needs values in [0, 1]; divide by their range first")
        values = (values * 255).round().astype(np.uint8)
    elif values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif _is_deep(values):
        values = eight_bits(values, bits)
    elif values.dtype != np.uint8:
        raise ValueError(
            f"an array of pixels is uint8, uint16 or floating point in [0, 1]; got {values.dtype}. Other whole numbers "
            "have no fixed range: .astype(numpy.uint16) if they are those of 16-bit images"
        )
    return Image.fromarray(np.ascontiguousarray(values))
