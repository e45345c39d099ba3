"""Hostile input: whole files with something wrong in them, and values of the wrong kind in the right places."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from PIL import Image

NUMBERS: list[Any] = [
    *(
        0,
        1,
        -1,
        2,
        3,
        7,
        255,
        256,
        2**31 - 1,
        2**31,
        2**32,
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63),
        10**30,
        -(10**30),
    ),
    *(10**400, 0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
]
TEXTS = [
    *(
        "",
        " ",
        "a",
        "0",
        "1",
        "-1",
        "1e999",
        "nan",
        "null",
        "true",
        "../../etc/passwd",
        "/etc/passwd",
        "~",
        "~root",
        "\x00",
    ),
    *(
        "a\x00b",
        "\x1b[2J\x1b]0;x\x07",
        "\u202e",
        "\ud800",
        "é",
        "e\u0301",
        "深七",
        "🦋",
        "\u2028",
        "x" * 300,
        "x" * 70_000,
    ),
    *("__class__", "__proto__", "{0.__class__}", "%s%n", "$(touch pwned)", "`id`", "[red]", "--help", "conv4", "cpu"),
]
NAMES = ["a", "b", "name", "version", "config", "data", "epoch", "__class__", "\x00", "", "🦋", "\ud800"]


def value(r: Random, depth: int = 2) -> Any:
    """What JSON can hold, and worse."""
    match r.randrange(12 if depth else 10):
        case 0:
            return r.choice([None, True, False])
        case 1 | 2 | 3:
            return r.choice(NUMBERS)
        case 4 | 5 | 6:
            return r.choice(TEXTS)
        case 7:
            return r.choice(
                [r.randint(-10, 10), r.randrange(2**70), r.gauss(0, 1), r.uniform(-1, 1) * 10.0 ** r.randint(-300, 300)]
            )
        case 8:
            return "".join(
                chr(r.choice([r.randrange(32), r.randrange(32, 127), r.randrange(0xD800, 0x11000)])) for _ in range(4)
            )
        case 9:
            return r.choice([[], {}, [None], [[]]])
        case 10:
            return [value(r, depth - 1) for _ in range(r.randint(1, 3))]
        case _:
            return {r.choice(NAMES): value(r, depth - 1) for _ in range(r.randint(1, 3))}


# --- bytes ------------------------------------------------------------------------------------------------------------


def mutated(data: bytes, r: Random, most: int = 4) -> bytes:
    """``data`` with some bytes flipped, cut out, doubled, moved, made numbers of, or followed by others."""
    out = bytearray(data)
    for _ in range(r.randint(1, most)):
        at = r.randrange(len(out) + 1)
        length = min(r.choice([1, 2, 4, 8, 16, 100, 1000]), len(out))
        match r.randrange(10):
            case 0 if at < len(out):
                out[at] ^= 1 << r.randrange(8)
            case 1 if at < len(out):
                out[at] = r.choice([0, 1, 0x7F, 0x80, 0xFF, r.randrange(256)])
            case 2:
                del out[at : at + length]
            case 3:
                out = out[:at]
            case 4:
                out[at:at] = out[at : at + length]
            case 5:
                other = r.randrange(len(out) + 1)
                out[at:at] = out[other : other + length]
            case 6:
                number = r.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1])
                code, size = r.choice([("<H", 2), (">H", 2), ("<I", 4), (">I", 4), ("<Q", 8)])
                out[at : at + size] = struct.pack(code, number % 2 ** (8 * size))
            case 7:
                out[at:at] = r.randbytes(length)
            case 8:
                out[at:at] = bytes([r.randrange(256)]) * r.choice([1, 10, 1000, 10_000])
            case _:
                text = r.choice(TEXTS).encode("utf-8", "surrogatepass")
                out[at : at + len(text)] = text
    return bytes(out)


# --- JSON -------------------------------------------------------------------------------------------------------------


def _places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    here = [path] if path else []
    if isinstance(document, dict):
        return here + [p for key, value in document.items() for p in _places(value, (*path, key))]
    if isinstance(document, list):
        return here + [p for i, value in enumerate(document) for p in _places(value, (*path, i))]
    return here


def changed(r: Random, document: Any, most: int = 3) -> Any:
    """A JSON document with values replaced, left out, added and moved; now and then something else."""
    if r.random() < 0.03:
        return value(r)
    document = copy.deepcopy(document)
    for _ in range(r.randint(0, most)):
        places = _places(document)
        if not places:
            break
        *way, last = r.choice(places)
        holder = document
        for step in way:
            holder = holder[step]
        what = r.choice(["replace"] * 5 + ["remove", "add", "swap", "wrap", "double"])
        if what == "remove":
            del holder[last]
        elif what == "add" and isinstance(holder, dict):
            holder[r.choice(NAMES)] = value(r)
        elif what == "swap" and isinstance(holder, dict):
            other = r.choice(places)[-1]
            holder[str(other)] = holder.pop(last)
        elif what == "wrap":
            holder[last] = [holder[last]]
        elif what == "double" and isinstance(holder, list):
            holder *= 2
        else:
            holder[last] = value(r)
    return document


def json_bytes(document: Any, r: Random) -> bytes:
    """A document as JSON, mostly; some are nested deeply, have keys twice, another encoding, or damage."""
    text = json.dumps(document, ensure_ascii=r.random() < 0.5, indent=r.choice([None, 2]))
    match r.randrange(12):
        case 0:
            at = text.find(":") + 1
            deep = r.choice([50, 990, 3000, 100_000])
            opening, closing = r.choice([("[", "]"), ('{"a":', "}")])
            text = text[:at] + opening * deep + "1" + closing * r.choice([deep, 0]) + "," + text[at:]
        case 1 if text.startswith("{") and len(text) > 2:
            text = text[:-1] + "," + text[1:]
        case 2:
            text = text.replace(
                r.choice("0123456789"), r.choice(["9" * 5000, "1e99999", "NaN", "-Infinity", "1E400"]), 1
            )
        case 3:
            return text.encode(r.choice(["utf-16", "utf-32", "utf-8-sig"]), "replace")
        case 4 | 5:
            return mutated(text.encode("utf-8", "surrogatepass"), r)
        case _:
            pass
    return text.encode("utf-8", "surrogatepass")


# --- safetensors ------------------------------------------------------------------------------------------------------

Tensors = dict[str, tuple[str, list[int], bytes]]
"""Type, shape and bytes by name."""


def safetensors_file(tensors: Tensors, metadata: Any, change: Callable[[Any], Any] = lambda header: header) -> bytes:
    """A file as safetensors lays it out; ``change`` may have its way with the header."""
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for name, (kind, shape, values) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(change(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def of_torch(tensors: dict[str, Any]) -> Tensors:
    """torch's tensors (float32, uint8 and int64) as they lie in a file."""
    kinds = {"torch.float32": "F32", "torch.int64": "I64", "torch.uint8": "U8"}
    return {n: (kinds[str(t.dtype)], list(t.shape), t.contiguous().numpy().tobytes()) for n, t in tensors.items()}


def other_tensors(r: Random, tensors: Tensors) -> Tensors:
    """Tensors with some of another type or shape, some missing and some more."""
    tensors = dict(tensors)
    for _ in range(r.randint(0, 3)):
        name = r.choice(sorted(tensors) or ["a"])
        what = r.choice(["remove", "type", "shape", "cut", "rename", "values", "empty"])
        kind, shape, data = tensors.pop(name, ("F32", [1], b"abcd"))
        if what == "type":
            kind = r.choice(["F16", "BF16", "F64", "I8", "I64", "BOOL", "U8", "F8_E4M3", "C64", "F4", "X"])
            size = {"F16": 2, "BF16": 2, "F64": 8, "I64": 8, "C64": 8}.get(kind, 1)
            data = (data * 8)[: int(np.prod(shape, dtype=np.int64)) * size]
        elif what == "shape":
            shape = r.choice([[*shape, 1], [1, *shape], shape[::-1], [len(data) // 4], [], [0], [2**62, 4]])
        elif what == "cut":
            data = data[: len(data) // 2]
        elif what == "rename":
            name = r.choice([*NAMES, "optimizer/x/y", "optimizer/99999999999/exp_avg", "random/cuda", "learner/"])
        elif what == "values":
            data = r.choice([b"\xff", b"\x00", b"\x7f\x80\x00\x00"]) * len(data)
            data = data[: int(np.prod(shape, dtype=np.int64)) * (4 if kind == "F32" else 8 if kind == "I64" else 1)]
        elif what == "empty":
            shape, data = [0], b""
        if what != "remove":
            tensors[name] = (kind, shape, data)
    return tensors


# --- images -----------------------------------------------------------------------------------------------------------


def _encoded(mode: str, kind: str, side: int = 6, **options: Any) -> bytes:
    file = io.BytesIO()
    ramp = Image.fromarray(np.arange(side * side, dtype=np.uint8).reshape(side, side) * 5)
    (ramp.convert(mode) if not mode.startswith("I;") else Image.new(mode, (side, side), 999)).save(
        file, kind, **options
    )
    return file.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_size(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG file that says it is this large, with whatever data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


IMAGES = [
    *(_encoded(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(_encoded(mode, "JPEG") for mode in ("L", "RGB", "CMYK")),
    *(_encoded("RGB", kind) for kind in ("BMP", "GIF", "TIFF", "PPM", "TGA", "PCX", "SGI", "DDS", "WEBP", "JPEG2000")),
    _encoded("L", "TIFF", compression="tiff_lzw"),
    _encoded("F", "TIFF"),
    _encoded("I", "TIFF"),
]
BOMBS = [
    png_of_size(2**31 - 1, 2**31 - 1),
    png_of_size(50_000, 50_000, zlib.compress(b"\0" * 10**6)),
    png_of_size(6_000, 6_000, zlib.compress(b"\0" * 10**6)),
    png_of_size(0, 5),
    b"P5\n999999999 999999999\n255\n" + b"\0" * 100,
    b"P5\n6000 6000\n255\n",
    b"GIF89a"
    + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    + b","
    + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    + b"\x08\0;",
    b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(pwned) (w) file closefile\nshowpage\n%%EOF\n",
    b"\x89PNG\r\n\x1a\n"
    + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))
    + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 50_000_000))
    + png_chunk(b"IDAT", zlib.compress(b"\0" * 20))
    + png_chunk(b"IEND", b""),
]


def image_bytes(r: Random) -> bytes:
    """An image file; most are whole."""
    what = r.randint(0, 9)
    if what < 5:
        return r.choice(IMAGES)
    if what == 9:
        return r.choice([*BOMBS, b"", b"\0" * 40])
    return mutated(r.choice(IMAGES), r)


# --- zip archives -----------------------------------------------------------------------------------------------------


def zip_bytes(r: Random, names: list[str]) -> bytes:
    """An archive with these members, or others, some of them strange."""
    names = list(names)
    strange = [
        "../x.png",
        "/x.png",
        "..\\..\\a\\b\\x.png",
        "C:\\a\\b\\x.png",
        "a/b/../../../c/x.png",
        "a/b/\x00.png",
        "深/七/🦋.png",
    ]
    for _ in range(r.choice([0, 0, 0, 1, 2])):
        at = r.randrange(len(names))
        names[at] = r.choice([*strange, r.choice(names), names[at] + "/", "", "/".join("ab" * 200) + ".png"])
    file = io.BytesIO()
    odd = r.random() < 0.3
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED if r.random() < 0.5 else zipfile.ZIP_STORED
            data = IMAGES[r.randrange(2)]
            if odd and r.random() < 0.1:
                data = image_bytes(r)
                info.compress_type = r.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_DEFLATED])
                info.external_attr = r.choice([0, 0o120777 << 16, 0o40755 << 16, 0xFFFFFFFF])
            archive.writestr(info, data)
    data = bytearray(file.getvalue())
    if r.random() < 0.3:  # lies in the central directory
        at = data.find(b"PK\x01\x02", r.randrange(len(data)))
        if at >= 0:
            where, size = r.choice(
                [(6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (38, 4), (42, 4)]
            )
            data[at + where : at + where + size] = r.choice([b"\1", b"\xff", b"\0", r.randbytes(1)]) * size
    return mutated(bytes(data), r) if r.random() < 0.4 else bytes(data)


# --- pickles ----------------------------------------------------------------------------------------------------------

_OPCODES = [
    b"cos\nsystem\n(S'touch pwned'\ntR.",
    b"cbuiltins\neval\n(S'1'\ntR.",
    b"\x8c\x02os\x8c\x06system\x93\x8c\x05touch\x85R.",
    b"r\xff\xff\xff\x7f",  # LONG_BINPUT far away
    b"p99999999999\n",
    b"j\xff\xff\xff\x7f",
    b"\x8e" + b"\xff" * 7 + b"\x7f",  # BINBYTES8 of many bytes
    b"\x8d" + b"\xff\xff\xff\xff\x0f\0\0\0",
    b"\x95" + b"\xff" * 7 + b"\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"I" + b"9" * 5000 + b"\n",
    *(
        b"0",
        b"1",
        b"2",
        b"(",
        b"]",
        b"}",
        b")",
        b"a",
        b"e",
        b"s",
        b"u",
        b"t",
        b"d",
        b"l",
        b"\x85",
        b"\x86",
        b"R",
        b"b",
        b"\x81",
    ),
    *(
        b"\x94",
        b"h\0",
        b"h\1",
        b"q\0",
        b"N",
        b"\x88",
        b"K\1",
        b"Q",
        b"P1\n",
        b"\x82\1",
        b"\x97",
        b"\x98",
        b"\x8f",
        b"\x90",
        b"\x91",
    ),
    *(b"(lp0\n", b"g0\n", b"F1e999\n", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"c_codecs\nencode\n", b"."),
]
_LAUGHS = b"]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
_LAUGHING_KEY = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))


def pickle_bytes(r: Random) -> bytes:
    """A pickle of mini-ImageNet's arrays; most have something else in them too."""
    images = np.zeros((3, 4, 4, 3), np.uint8)
    content: Any = r.choice(
        [
            {"image_data": images, "class_dict": {"n01": [0, 1], "n02": np.array([2])}},
            {"data": images, "labels": [0, 0, 1], "catname2label": {"n01": 0, "n02": 1}},
            {"data": list(images), "labels": np.array([0, 0, 1])},
        ]
    )
    if r.random() < 0.5:
        key = r.choice(list(content))
        odd = [
            *(np.zeros((0, 4, 4, 3), np.uint8), np.array([None]), np.array(["a"]), np.array(2**63, np.uint64)),
            *(np.zeros((3, 4, 4, 3), np.float32), np.array([1 + 2j]), np.array([], np.int64), np.array([-1, 5])),
            *(b"abc", {1: 2}, {"n01": "012"}, {"n01": {}}, {None: [0]}, [[0], [1, 2]], set(), 10**4000, range(3)),
            *({"n01": [[0, 1], [2]]}, {"n": 2**70}, {"n": [2**70]}, {"a": [0.5]}, {b"n": [0]}, {"a": [True]}),
        ]
        content[key] = r.choice([value(r), r.choice(odd)])
    data = pickle.dumps(content, r.randrange(6))
    match r.randint(0, 9):
        case 0 | 1:
            return mutated(data, r)
        case 2 | 3:
            at = r.randrange(len(data))
            return data[:at] + r.choice(_OPCODES) + data[at:]
        case 4:
            return b"".join(r.choice(_OPCODES) for _ in range(r.randint(1, 30))) + b"."
        case 5:
            end = r.choice([b".", b"}(h\0h\1u.", b"\x85."])
            return r.choice(
                [
                    _LAUGHS + end,
                    b"}" + _LAUGHING_KEY + b"K\1s.",
                    b"}(X\4\0\0\0data" + _LAUGHS + b"X\6\0\0\0labels" + _LAUGHS + b"u.",
                    b"}(X\4\0\0\0dataK\1X\6\0\0\0labels" + _LAUGHS + b"u.",
                    b"]q\0h\0a.",
                    b"(" * 20_000 + b".",
                    b"]" * 20_000 + b"a" * 19_999 + b".",
                ]
            )
        case _:
            return data
