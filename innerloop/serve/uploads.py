"""Requests' bodies: JSON or multipart in, decoded images out, every bound checked before the work it bounds."""

from __future__ import annotations

import base64
import binascii
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import anyio
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field as TextField
from python_multipart.multipart import File, FormParser, parse_options_header
from starlette.requests import Request

from innerloop.data import Preprocessing
from innerloop.data.depth import UnusableImageError, bits_in_use
from innerloop.data.images import Pixels, largest_value
from innerloop.serve.limits import Limits, RefusedError, plural

# What browsers and cameras make. Not every decoder that Pillow has: some run other programs (EPS) or write files.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
_EXPECTED = "PNG, JPEG, GIF, BMP, WebP, TIFF or PNM"


class AdaptRequest(BaseModel):
    """A support set as JSON."""

    model_config = ConfigDict(extra="forbid")

    classes: dict[str, list[str]] = Field(
        description="The examples of each class by its name: image files in base64 (a data: URL will do).",
        examples=[{"cat": ["iVBORw0KGgo..."], "dog": ["iVBORw0KGgo..."]}],
    )


class PredictRequest(BaseModel):
    """Queries as JSON."""

    model_config = ConfigDict(extra="forbid")

    images: list[str] = Field(description="Image files in base64 (a data: URL will do).", examples=[["iVBORw0KGgo..."]])


@dataclass(frozen=True)
class Upload:
    """An image file that has not been decoded.

    Attributes:
        title: what messages call it.
        content: the encoded file.
    """

    title: str
    content: bytes


class Decoded(NamedTuple):
    """Images that were read.

    Attributes:
        pixels: uint8 ``[channels, size, size]`` each.
        largest: the largest value of each that has 16 bits and does not say what is white; 0 of others.
        bits: in which 16-bit images were read; None where there are none, and nothing is known of them.
    """

    pixels: list[Pixels]
    largest: list[int]
    bits: int | None


Model = TypeVar("Model", bound=BaseModel)


async def read_support(request: Request, limits: Limits) -> dict[str, list[Upload]]:
    """The examples of each class of a request.

    Raises:
        RefusedError: the body is not what it should be, or more than the limits allow.
    """
    body, kind = await _body(request, limits)
    support: dict[str, list[Upload]] = {}
    if kind == "json":
        for name, files in _parsed(AdaptRequest, body).classes.items():
            support.setdefault(_class_name(name, limits), []).extend(_from_base64(files, f" of {name!r}", limits))
    else:
        for name, upload in _parts(request, body, limits):
            support.setdefault(_class_name(name, limits), []).append(upload)
    if len(support) > limits.classes:
        raise RefusedError(413, f"{len(support)} classes are more than the limit of {limits.classes}.")
    if len(support) < 2:
        raise RefusedError(422, f"At least two classes are needed; there {_is_are(len(support))}.")
    for name, uploads in support.items():
        if not uploads:
            raise RefusedError(422, f"The class {name!r} has no examples; give it at least one image.")
    _check_count(sum(map(len, support.values())), limits)
    return support


async def read_queries(request: Request, limits: Limits) -> list[Upload]:
    """The images of a request.

    Raises:
        RefusedError: the body is not what it should be, or more than the limits allow.
    """
    body, kind = await _body(request, limits)
    if kind == "json":
        uploads = _from_base64(_parsed(PredictRequest, body).images, "", limits)
    else:
        uploads = [upload for _, upload in _parts(request, body, limits)]
    if not uploads:
        raise RefusedError(422, "There is no image in the request; give at least one.")
    _check_count(len(uploads), limits)
    return uploads


def decode(uploads: Sequence[Upload], preprocessing: Preprocessing, limits: Limits) -> Decoded:
    """Images as uint8 ``[channels, size, size]``, decoded one at a time after the size in every header was checked.

    Args:
        uploads: image files.
        preprocessing: of the model. Its inversion is left to the library, which looks at all examples first. Where it
            does not know how many bits 16-bit images use, they are found over all of these.
        limits: bounds on images.

    Raises:
        RefusedError: 413 an image is too large, 415 it is none, 422 it is damaged.
    """
    opened: list[tuple[Upload, Image.Image]] = []
    pixels = 0
    for upload in uploads:
        image = _opened(upload, limits)
        pixels += image.width * image.height
        if pixels > limits.request_pixels:
            raise RefusedError(
                413, f"The images have more than {limits.request_pixels:,} pixels together; send fewer or smaller ones."
            )
        opened.append((upload, image))
    largest = [largest_value(upload.content) for upload in uploads]
    bits = preprocessing.bits or bits_in_use(largest)
    as_they_are = replace(preprocessing, invert=False, bits=bits)
    return Decoded([_decoded(upload, image, as_they_are) for upload, image in opened], largest, bits)


def _decoded(upload: Upload, image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    with image:
        try:
            return preprocessing.pixels(image)
        except UnusableImageError as error:
            raise RefusedError(422, f"{upload.title} cannot be used: {error}.") from error
        except Exception as error:
            # Pillow's decoders raise nearly anything on damaged files (OSError, SyntaxError, struct.error, ...).
            raise RefusedError(422, f"{upload.title} is damaged and cannot be read.") from error


def _opened(upload: Upload, limits: Limits) -> Image.Image:
    too_large = f"{upload.title} has too many pixels; the limit is {limits.image_pixels:,} (width x height)."
    try:
        image = Image.open(io.BytesIO(upload.content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise RefusedError(413, too_large) from None
    except Exception:
        raise RefusedError(415, f"{upload.title} is not an image that can be read; send {_EXPECTED}.") from None
    if image.width * image.height > limits.image_pixels:
        raise RefusedError(413, too_large)
    return image


async def _body(request: Request, limits: Limits) -> tuple[bytes, str]:
    """The body and whether it is ``json`` or ``multipart``."""
    kinds = {b"application/json": "json", b"multipart/form-data": "multipart"}
    given = request.headers.get("content-type", "")
    kind = kinds.get(parse_options_header(given)[0])
    if kind is None:
        raise RefusedError(415, f"Send application/json or multipart/form-data, not {given[:100] or 'nothing'}.")
    too_large = RefusedError(
        413,
        f"The request is larger than the limit of {limits.upload_bytes / 2**20:g} MB; send fewer or smaller images.",
    )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.upload_bytes:
        raise too_large
    body = bytearray()
    try:
        with anyio.fail_after(limits.upload_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.upload_bytes:
                    raise too_large
    except TimeoutError:
        raise RefusedError(408, f"The request did not arrive within {limits.upload_seconds:g} seconds.") from None
    return bytes(body), kind


def _parsed(model: type[Model], body: bytes) -> Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            raise RefusedError(400, f"The request is not valid JSON: {first['ctx']['error']}.") from None
        place = ".".join(map(str, first["loc"])) or "the request"
        raise RefusedError(422, f"{place[:100]}: {first['msg']}.") from None


def _parts(request: Request, body: bytes, limits: Limits) -> list[tuple[str, Upload]]:
    """The files of a multipart body with the names of their fields.

    Starlette's own ``request.form()`` spools files to disk; here nothing is ever written.
    """
    parts: list[tuple[str, Upload]] = []
    ended = False

    def on_file(part: File) -> None:
        _check_count(len(parts) + 1, limits)
        name, title = _text(part.field_name), _text(part.file_name)
        part.file_object.seek(0)
        parts.append((name, Upload(f"The file {title[:100]!r}", part.file_object.read())))
        part.close()

    def on_field(part: TextField) -> None:
        name = _text(part.field_name)[:100]
        raise RefusedError(422, f"The field {name!r} is text, not a file; curl sends a file as -F '{name}=@FILE'.")

    def on_end() -> None:
        nonlocal ended
        ended = True

    boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary")
    config = {"MAX_MEMORY_FILE_SIZE": float("inf")}
    try:
        parser = FormParser("multipart/form-data", on_field, on_file, on_end, boundary, config=config)
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError, AssertionError):
        ended = False
    if not ended:
        raise RefusedError(400, "The request is not valid multipart/form-data.")
    return parts


def _text(name: bytes | None) -> str:
    return (name or b"").decode("utf-8", "replace")


def _from_base64(files: list[str], of: str, limits: Limits) -> list[Upload]:
    _check_count(len(files), limits)
    uploads = []
    for number, file in enumerate(files, start=1):
        title = f"Image {number}{of}"
        if file.startswith("data:"):
            file = file.partition(",")[2]
        try:
            uploads.append(Upload(title, base64.b64decode(file, validate=True)))
        except (binascii.Error, ValueError):
            raise RefusedError(400, f"{title} is not valid base64.") from None
    return uploads


def _class_name(name: str, limits: Limits) -> str:
    name = name.strip()
    if not name:
        raise RefusedError(422, "A class has no name; every class needs one.")
    if len(name) > limits.name_length:
        raise RefusedError(422, f"The class name {name[:20]!r}... is longer than {limits.name_length} characters.")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise RefusedError(422, f"The class name {name!r} has characters that cannot be shown.")
    return name


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.images:
        raise RefusedError(413, f"The request has more than the limit of {plural(limits.images, 'image')}.")


def _is_are(count: int) -> str:
    return "is one" if count == 1 else f"are {count or 'none'}"
