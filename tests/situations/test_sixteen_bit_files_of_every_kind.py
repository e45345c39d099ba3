"""Files with more than 8 bits a value, of every kind that people have: as their 8-bit twins, or refused by name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import innerloop
from innerloop.classify.images import deep_value, read_image
from innerloop.data import Preprocessing
from innerloop.data.images import largest_value

SIDE, WHITE = 8, 4095
AT_TWELVE = Preprocessing(size=SIDE, channels=1, bits=12)
Values = NDArray[np.int64]


@pytest.fixture(autouse=True)
def _float32(_float64_and_seed: None) -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def values() -> Values:
    values = np.random.default_rng(3).integers(0, WHITE + 1, (SIDE, SIDE))
    values[0, 0] = WHITE
    return values


def in_eight_bits(values: Values, white: int = WHITE) -> NDArray[np.uint8]:
    return np.floor(values * (255 / white) + 0.5).clip(0, 255).astype(np.uint8)


def saved(values: Values, kind: str, dtype: str = "<u2", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values.astype(dtype)).save(file, kind, **options)
    return file.getvalue()


def png(values: Values, colour_type: int) -> bytes:
    """A PNG with 16 bits a channel, which Pillow does not write of colours."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">2I5B", SIDE, SIDE, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def pnm(values: Values, kind: str, maxval: int) -> bytes:
    return f"{kind}\n{SIDE} {SIDE}\n{maxval}\n".encode() + values.astype(">u2").tobytes()


def tiff(values: Values, dtype: str, photometric: int = 1, sample_format: int = 1) -> bytes:
    """An uncompressed little-endian TIFF of a grey image."""
    data = values.astype(dtype).tobytes()
    bits = 8 * np.dtype(dtype).itemsize
    entries = [(256, SIDE), (257, SIDE), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1)]
    entries += [(278, SIDE), (279, len(data)), (339, sample_format)]
    start = 8 + 2 + 12 * len(entries) + 4
    listed = [struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in entries]
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + b"".join(listed) + struct.pack("<I", 0) + data


def sgi(values: Values) -> bytes:
    header = struct.pack(">hBBHHHHii4s80si404s", 474, 0, 2, 2, SIDE, SIDE, 1, 0, 65535, b"", b"", 0, b"")
    return header + values[::-1].astype(">u2").tobytes()


def grey(values: Values) -> dict[str, bytes]:
    """Of which white is to be found."""
    return {
        "png": saved(values, "PNG"),
        "tiff": saved(values, "TIFF"),
        "tiff, big-endian": saved(values, "TIFF", ">u2"),
        "tiff, lzw": saved(values, "TIFF", compression="tiff_lzw"),
        "tiff, 32 bits": tiff(values, "<u4"),
        "tiff, signed": tiff(values, "<i2", sample_format=2),
        "pgm, maxval 65535": pnm(values, "P5", 65535),
        "pgm in text, maxval 65535": f"P2\n{SIDE} {SIDE}\n65535\n{' '.join(map(str, values.flat))}\n".encode(),
    }


KINDS = list(grey(np.zeros((SIDE, SIDE), np.int64)))


@pytest.mark.parametrize("kind", KINDS)
def test_grey_is_as_its_twin_of_eight_bits(values: Values, kind: str) -> None:
    file = grey(values)[kind]
    assert np.array_equal(AT_TWELVE.pixels(file)[0], in_eight_bits(values))
    assert np.array_equal(AT_TWELVE.pixels(Image.open(io.BytesIO(file)))[0], in_eight_bits(values))
    assert largest_value(file) == WHITE


@pytest.mark.parametrize("maxval", [300, 1023, 4095, 16383, 65534])
@pytest.mark.parametrize("bits", [None, 12, 16])
def test_a_pgm_that_says_what_is_white_is_taken_at_its_word(values: Values, maxval: int, bits: int | None) -> None:
    """Pillow has scaled it already: it neither says how many bits are in use, nor is it scaled by them again."""
    said = np.minimum(values, maxval)
    file = pnm(said, "P5", maxval)
    found = Preprocessing(size=SIDE, channels=1, bits=bits).pixels(file)[0].astype(int)
    assert np.abs(found - in_eight_bits(said, maxval)).max() <= 1
    assert largest_value(file) == 0


@pytest.mark.parametrize("bits", [12, 16, None])
def test_a_negative_is_turned_over_as_those_of_eight_bits_are(values: Values, bits: int | None) -> None:
    white = 2 ** (bits or 16) - 1
    found = Preprocessing(size=SIDE, channels=1, bits=bits).pixels(tiff(values, "<u2", photometric=0))[0]
    assert np.array_equal(found, in_eight_bits(white - values, white))
    eight = tiff(in_eight_bits(values).astype(np.int64), "u1", photometric=0)
    assert np.array_equal(Preprocessing(size=SIDE, channels=1).pixels(eight)[0], 255 - in_eight_bits(values))


@pytest.mark.parametrize("kind", ["grey and alpha", "colours", "colours and alpha", "ppm", "sgi"])
@pytest.mark.parametrize("bits", [None, 12, 16])
def test_what_pillow_reads_half_of_is_refused(values: Values, kind: str, bits: int | None) -> None:
    """Of 12 bits in use 4 would be left, whatever is said of bits, and an opaque alpha does not hide it."""
    opaque = np.full_like(values, 65535)
    file = {
        "grey and alpha": png(np.stack([values, opaque], axis=-1), 4),
        "colours": png(np.stack([values] * 3, axis=-1), 2),
        "colours and alpha": png(np.stack([values] * 3 + [opaque], axis=-1), 6),
        "ppm": pnm(np.stack([values] * 3, axis=-1), "P6", 65535),
        "sgi": sgi(values),
    }[kind]
    preprocessing = Preprocessing(size=SIDE, channels=3, bits=bits)
    with pytest.raises(ValueError, match=r"colours have 16 bits.*save it with 8 bits a channel"):
        preprocessing.pixels(file)
    with pytest.raises(ValueError, match="colours have 16 bits"):
        preprocessing.pixels(Image.open(io.BytesIO(file)))


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_that_use_all_sixteen_bits_are_read(values: Values, alpha: bool) -> None:
    bands = np.stack([values * 16 + 15] * 3 + [np.full_like(values, 65535)] * alpha, axis=-1)
    found = Preprocessing(size=SIDE, channels=3).pixels(png(bands, 6 if alpha else 2))
    assert np.abs(found.astype(int) - in_eight_bits(values)).max() <= 1


def test_a_ppm_that_says_what_is_white(values: Values) -> None:
    found = Preprocessing(size=SIDE, channels=3).pixels(pnm(np.stack([values] * 3, axis=-1), "P6", WHITE))
    assert np.abs(found.astype(int) - in_eight_bits(values)).max() <= 1


def test_a_dark_bitmap_with_sixteen_bits_a_pixel_has_five_or_six_a_colour() -> None:
    """Which Pillow reads whole."""
    pixels = struct.pack("<H", 0b00100_001000_00100) * SIDE * SIDE
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)
    info = struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 16, 3, len(pixels), 0, 0, 0, 0) + masks
    start = 14 + len(info)
    file = struct.pack("<2sIHHI", b"BM", start + len(pixels), 0, 0, start) + info + pixels
    found = Preprocessing(size=SIDE, channels=3).pixels(file)
    assert 0 < found.max() < 64


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda v: tiff(v, "<f4", sample_format=3), "floating-point pixels have no fixed range"),
        (lambda v: tiff(v - 1024, "<i2", sample_format=2), "values from -1024 to 3071 have no fixed range"),
        (lambda v: tiff(v * 100, "<u4"), "values from 0 to 409500 have no fixed range"),
    ],
)
def test_values_without_a_range_are_refused(values: Values, make: Callable[[Values], bytes], said: str) -> None:
    values[1, 1] = 0
    with pytest.raises(ValueError, match=said):
        AT_TWELVE.pixels(make(values))
    assert largest_value(make(values)) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda v: v.astype(np.uint16),
        lambda v: v.astype(">u2"),
        lambda v: v.astype(np.uint16)[:, :, None],
        lambda v: v.astype(np.uint16)[None],
        lambda v: torch.from_numpy(v.astype(np.uint16)),
        lambda v: np.stack([v] * 3, axis=2).astype(np.uint16),
        lambda v: np.stack([v, v, v, np.full_like(v, 65535)], axis=2).astype(np.uint16),
        lambda v: Image.fromarray(v.astype(np.uint16)),
        lambda v: Image.fromarray(v.astype(np.int32)),
    ],
)
def test_arrays_are_read_as_files_are(values: Values, make: Callable[[Values], Any]) -> None:
    image = make(values)
    assert deep_value(image) == WHITE
    assert np.array_equal(read_image(image, AT_TWELVE)[0], in_eight_bits(values))


@pytest.mark.parametrize("kind", ["int16", "int32", "int64", "uint32"])
def test_other_whole_numbers_are_refused_with_the_way_out(values: Values, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"got {kind}.*astype\(numpy.uint16\)"):
        read_image(values.astype(kind), AT_TWELVE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_of_one_class_comes_out_alike(values: Values, kind: str) -> None:
    """Each image once with 8 bits and once with 12 of 16: the network sees the same."""
    other = np.roll(values, 3)
    twins = [[grey(v)[kind], saved(in_eight_bits(v).astype(np.int64), "PNG", "u1")] for v in (values, other)]
    support = innerloop.load().adaptation({"a": twins[0], "b": twins[1]}).support
    assert torch.equal(support.pixels[0], support.pixels[1])
    assert torch.equal(support.pixels[2], support.pixels[3])
    assert support.bits == 12


def test_a_pgm_at_its_word_among_others(values: Values) -> None:
    """The 65535 that Pillow makes of it is not taken for bits in use, by which all others would be black."""
    classes = {"a": [saved(values, "PNG"), pnm(values, "P5", WHITE)], "b": [saved(np.roll(values, 3), "TIFF")]}
    support = innerloop.load().adaptation(classes).support
    assert support.bits == 12
    assert (support.pixels[0].int() - support.pixels[1].int()).abs().max() <= 2


def test_a_large_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its largest value is looked for."""
    file = saved(np.full((SIDE, SIDE), WHITE), "PNG")
    monkeypatch.setattr("innerloop.data.images.MAX_PIXELS", SIDE * SIDE - 1)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    assert largest_value(file) == 0
    with pytest.raises(ValueError, match="pixels are more than the limit"):
        AT_TWELVE.pixels(file)


def test_a_postscript_program_is_not_opened_to_look_for_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.EpsImageFile._open", lambda *_: pytest.fail("opened"))
    assert largest_value(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n") == 0
