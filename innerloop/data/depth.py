"""Images with more than 8 bits a value: microscopes, CT and cameras use 10, 12 or 14 of the 16 that a file holds.

What is white, a file does not say. It is the largest number of the bits in use, and these are found over a whole data
set or support set, so that all of its images are scaled alike.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

DEPTHS = (8, 10, 12, 14, 16)
"""Bits that sensors have."""


def is_deep(image: Image.Image) -> bool:
    """Whether an opened image is grey with 16 (or 32) bits a pixel."""
    return image.mode == "I" or image.mode.startswith("I;16")


def may_be_deep(data: bytes) -> bool:
    """Whether an encoded image has to be opened to know: of the common kinds it shows."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return data[24:25] == b"\x10"
    return data[:2] != b"\xff\xd8" and data[:4] not in (b"GIF8", b"RIFF")  # JPEG, GIF, WebP


def largest_value(image: Image.Image | bytes) -> int:
    """The largest value of a deep image; 0 of others, and of what cannot be read, which is said elsewhere."""
    if isinstance(image, bytes):
        if not may_be_deep(image):
            return 0
        try:
            with Image.open(io.BytesIO(image)) as opened:
                return largest_value(opened)
        except Exception:  # Pillow raises nearly anything
            return 0
    return int(np.asarray(image).max()) if is_deep(image) and image.width and image.height else 0


def bits_in_use(largest: Iterable[int]) -> int | None:
    """How many of ``DEPTHS`` the deep images of a set use, by their largest values; None where none is deep."""
    most = max(largest, default=0)
    return next((bits for bits in DEPTHS if most < 2**bits), DEPTHS[-1]) if most else None


def assumed(bits: int) -> str:
    """What a person is to know of it."""
    return (
        f"16-bit images whose values use {bits} bits: {2**bits - 1} is taken for white, in all images and in "
        "prediction (--bits says otherwise)"
    )


def to_eight_bits(image: Image.Image, bits: int | None) -> Image.Image:
    """A deep image with 8 bits a pixel, ``2**bits - 1`` (None: 16 bits) and above for white; any other as it is.

    Raises:
        ValueError: floating-point or 32-bit pixels, which have no fixed range.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save the image with 8 bits a channel")
    if not is_deep(image):
        return image
    # Pillow's own conversion from 16 bits cuts values off at 255. Mode I comes from 16-bit PNGs as well.
    values = np.array(image, dtype=np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no fixed range; save the image with 8 or 16 bits a channel")
    white = 2 ** (bits or 16) - 1
    np.minimum(values, white, out=values)  # in place: a large image's numbers take much memory
    values *= 255
    values += white // 2
    values //= white
    return Image.fromarray(values.astype(np.uint8))


def check_colours(image: Image.Image) -> None:
    """Raise ``ValueError`` for colours with 16 bits that use the lower ones: Pillow reads the upper 8 alone.

    The image is opened and not yet decoded: later, Pillow no longer knows.
    """
    raw = [str(tile[3]) for tile in getattr(image, "tile", [])]
    if is_deep(image):
        return
    if any(";16" in mode for mode in raw) and int(np.asarray(image).max(initial=0)) < 128:
        raise ValueError(
            "its colours have 16 bits, of which the lower ones are in use and cannot be read; save it with 8 bits a "
            "channel"
        )
