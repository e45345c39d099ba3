"""Images with more than 8 bits a value: microscopes, CT and cameras use 10, 12 or 14 of the 16 that a file holds.

What is white, a file mostly does not say. It is the largest number of the bits in use, and these are found over a whole
data set or support set, so that all of its images are scaled alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DEPTHS = (8, 10, 12, 14, 16)
"""Bits that sensors have."""
LARGEST = 2**16 - 1
_WHITE_IS_ZERO = 262, 0  # TIFF's tag PhotometricInterpretation, and its value
_SIXTEEN_BITS_A_CHANNEL = re.compile(r"(?<!BGR);16")  # Pillow's BGR;16 has 16 bits a pixel


class UnusableImageError(ValueError):
    """An image that is whole, and cannot be used."""


class Depth(NamedTuple):
    """What an opened image says of its values.

    Attributes:
        deep: it is grey, with 16 (or 32) bits a pixel.
        scaled: it is deep, and its file says what is white, to which Pillow scales: PGM by its ``maxval``.
        halved: its values have 16 bits, of which Pillow reads the upper 8: colours, transparency, SGI.
        white_is_zero: it is deep, and a negative, which Pillow leaves one (TIFF).
    """

    deep: bool
    scaled: bool = False
    halved: bool = False
    white_is_zero: bool = False

    @property
    def white_unknown(self) -> bool:
        """Whether what is white has to be found."""
        return self.deep and not self.scaled


def depth_of(image: Image.Image) -> Depth:
    """Of an image that is not decoded yet: later, Pillow no longer knows all of it."""
    deep = image.mode == "I" or image.mode.startswith("I;16")
    codecs = [(str(tile[0]), tile[3]) for tile in getattr(image, "tile", [])]
    maxima = [int(args[-1]) for codec, args in codecs if codec.startswith("ppm")]
    if deep:
        tag, zero = _WHITE_IS_ZERO
        negative = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(tag) == zero
        return Depth(True, scaled=any(most < LARGEST for most in maxima), white_is_zero=negative)
    halved = any(codec == "SGI16" or _SIXTEEN_BITS_A_CHANNEL.search(str(args)) for codec, args in codecs)
    return Depth(False, halved=halved or LARGEST in maxima)


def in_range(values: NDArray[np.generic]) -> bool:
    """Whether there are values, and all of them are those of 16 bits."""
    return bool(values.size and values.min() >= 0 and values.max() <= LARGEST)


def bits_in_use(largest: Iterable[int]) -> int | None:
    """How many of ``DEPTHS`` the deep images of a set use, by their largest values; None where none is deep."""
    most = max(largest, default=0)
    return next((bits for bits in DEPTHS if most < 2**bits), DEPTHS[-1]) if most else None


def check_bits(bits: int | None) -> None:
    """Raise ``ValueError`` for what is no number of bits in use."""
    if bits is not None and not (type(bits) is int and DEPTHS[0] <= bits <= DEPTHS[-1]):
        raise ValueError(f"bits must be a whole number from 8 to 16; got {bits!r}")


def assumed(bits: int) -> str:
    """What a person is to know of bits that were found."""
    return (
        f"16-bit images whose values use {bits} bits: {2**bits - 1} is taken for white, in all images and in "
        "prediction (--bits says otherwise)"
    )


def dimmer(found: int, bits: int) -> str:
    """What a person is to know of images that use fewer bits than were said, or than the run's did."""
    return (
        f"16-bit images whose values use {found} bits; {2**bits - 1} is white all the same ({bits} bits, as in "
        f"training or as given), and they are dark. --bits {found} makes {2**found - 1} white"
    )


def bits_of(largest: Sequence[int], known: int | None) -> tuple[int | None, list[str]]:
    """The bits to read a set's deep images by, by their largest values, and what a person is to know of that.

    ``known`` are those that were given, or are the run's; None finds them.
    """
    found = bits_in_use(largest)
    if known is None or found is None:
        return known or found, [assumed(found)] if found else []
    beyond = sum(value >= 2**known for value in largest)
    if beyond:
        return known, [cut_off(f"{beyond} 16-bit image{'s' * (beyond != 1)}", known)]
    return known, [dimmer(found, known)] if found < known else []


def cut_off(images: str, bits: int) -> str:
    """What a person is to know of images that do not fit into the bits in use."""
    return (
        f"{images} with values above {2**bits - 1}, which is white here ({bits} bits): what is brighter is cut off. "
        "--bits 16 takes all"
    )


def misfit(largest: int, bits: int | None) -> bool:
    """Whether an image's largest value (0: it is not deep) is not one of the bits in use, or of all 16 if unknown."""
    return largest >= 2**bits if bits else bits_in_use([largest]) not in (None, DEPTHS[-1])


def misfits(images: str, bits: int | None) -> str:
    """What a person is to know of images to predict that are misfits."""
    if bits:
        return cut_off(images, bits)
    return (
        f"{images} with 16 bits a pixel, of which not all are in use, and the support images had none like that: "
        f"{LARGEST} is taken for white; say how many bits they use (--bits)"
    )


def eight_bits(values: NDArray[np.generic], bits: int | None, white_is_zero: bool = False) -> NDArray[np.uint8]:
    """Whole numbers from 0 as 0 .. 255, ``2**bits - 1`` (None: 16 bits) and above for white."""
    white = 2 ** (bits or DEPTHS[-1]) - 1
    scaled = np.minimum(values, white).astype(np.int32)
    if white_is_zero:
        np.subtract(white, scaled, out=scaled)  # in place: a large image's numbers take much memory
    scaled *= 255
    scaled += white // 2
    scaled //= white
    result: NDArray[np.uint8] = scaled.astype(np.uint8)
    return result


def to_eight_bits(image: Image.Image, bits: int | None, depth: Depth | None = None) -> Image.Image:
    """A deep image with 8 bits a pixel, ``2**bits - 1`` (None: 16 bits) and above for white; any other as it is.

    Args:
        image: opened, and decoded or not.
        bits: in use.
        depth: what ``depth_of`` found before it was decoded.

    Raises:
        UnusableImageError: floating-point or 32-bit pixels, which have no fixed range, or those of which Pillow reads
            the upper 8 bits and only the lower ones are in use.
    """
    depth = depth or depth_of(image)
    if image.mode == "F":
        raise UnusableImageError("floating-point pixels have no fixed range; save the image with 8 bits a channel")
    if depth.halved:
        _check_upper_half(image)
    if not depth.deep:
        return image
    # Pillow's own conversion from 16 bits cuts values off at 255. Mode I comes from 16-bit PNGs as well.
    values = np.asarray(image)
    if not in_range(values):
        raise UnusableImageError(
            f"values from {values.min()} to {values.max()} have no fixed range; save the image with 8 bits, or with "
            "16 bits from 0"
        )
    return Image.fromarray(eight_bits(values, None if depth.scaled else bits, depth.white_is_zero))


def _check_upper_half(image: Image.Image) -> None:
    """Raise ``UnusableImageError`` where the uppermost of 16 bits is not in use, alpha aside."""
    extrema = image.getextrema()
    by_band = extrema if isinstance(extrema[0], tuple) else (extrema,)
    largest = max(most for band, (_, most) in zip(image.getbands(), by_band, strict=True) if band not in ("A", "a"))
    if largest < 128:
        raise UnusableImageError(
            "its colours have 16 bits, of which the upper ones are not in use and the lower ones cannot be read; save "
            "it with 8 bits a channel"
        )
