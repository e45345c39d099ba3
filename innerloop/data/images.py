"""Reading folders of images: listing, decoding, resizing, and saying clearly what is broken."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from innerloop.data._progress import progress_bar
from innerloop.data.cache import Cache, fingerprint, load_cached, store_cached
from innerloop.data.classes import ClassImages
from innerloop.data.depth import (
    UnusableImageError,
    assumed,
    bits_in_use,
    check_bits,
    cut_off,
    depth_of,
    in_range,
    to_eight_bits,
)

# fmt: off
IMAGE_SUFFIXES = frozenset((
    ".apng", ".avif", ".bmp", ".bw", ".dds", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo",
    ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".qoi", ".rgb", ".sgi", ".tga", ".tif", ".tiff", ".webp",
    ".xbm", ".xpm",
))
# What systems and programs leave behind in people's folders: copies, thumbnails and notes of their own.
NOT_OURS = frozenset((
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "desktop.ini", "ehthumbs.db", "lost+found",
    "system volume information", "thumbs.db",
))
# fmt: on
MAX_PIXELS = 40_000_000
"""Images with more pixels are refused before they are decoded: a small file can hold an image that fills memory."""

MAX_SIZE = 4096
"""Images are resized to at most so many pixels a side: a small description can ask for images that fill memory."""

# Part of every cache key: raise it whenever the same file would come out as different pixels.
PREPROCESSING_VERSION = 3
_AT_ONCE = 64  # images a job of the thread pool; one at a time would cost more in hand-over than in decoding

Fit = Literal["stretch", "crop", "ink"]
Pixels = NDArray[np.uint8]

INK_SHARE = 0.8
"""How much of the page's height or width a drawing takes that was cut to its ink."""
_INK_CONTRAST = 64  # of 255

logger = logging.getLogger(__name__)


class BrokenImagesError(ValueError):
    """Some image files cannot be decoded. ``broken`` holds every one of them: ``(file, reason)``."""

    def __init__(self, broken: Sequence[tuple[str, str]], total: int) -> None:
        self.broken = tuple(broken)
        shown = "".join(f"\n  {name}: {reason}" for name, reason in self.broken[:10])
        more = f"\n  ... and {len(self.broken) - 10} more" if len(self.broken) > 10 else ""
        super().__init__(
            f"{len(self.broken)} of {total} images cannot be read:{shown}{more}\n"
            "Repair or remove them, or leave them out with skip_broken=True (--skip-broken)"
        )


@dataclass(frozen=True)
class ImageSource:
    """An image that has not been read yet.

    Attributes:
        name: what messages call it.
        stamp: numbers that change when its content does, such as size and time of modification.
        read: returns the encoded file.
    """

    name: str
    stamp: tuple[int, ...]
    read: Callable[[], bytes]

    @staticmethod
    def of_file(path: Path) -> ImageSource:
        """An image file on disk."""
        status = path.stat()
        return ImageSource(str(path), (status.st_size, status.st_mtime_ns), path.read_bytes)


def check_folder(root: str | Path, what: str) -> Path:
    """``root`` as a path, if it is a folder with something in it.

    Raises ``FileNotFoundError``, ``NotADirectoryError`` or ``ValueError`` (empty) naming it and ``what``
    was expected.
    """
    path = Path(root).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{str(root)!r} does not exist; expected {what}")
    if not path.is_dir():
        raise NotADirectoryError(f"{str(root)!r} is not a folder; expected {what}")
    if not any(visible(path)):
        raise ValueError(f"the folder {str(root)!r} is empty; expected {what}")
    return path


def visible(folder: Path) -> Iterator[Path]:
    """The entries of a folder by name, without hidden ones and what systems leave behind (``NOT_OURS``)."""
    entries = sorted(folder.iterdir())
    return (entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in NOT_OURS)


def subfolders(folder: Path) -> list[Path]:
    """The folders inside a folder by name, without hidden ones."""
    return [entry for entry in visible(folder) if entry.is_dir()]


def image_files(folder: Path) -> list[Path]:
    """The image files directly in a folder by name, going by their suffix; everything else is ignored."""
    return [entry for entry in visible(folder) if entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]


def class_folders(root: Path) -> dict[str, list[ImageSource]]:
    """The images of each class folder in ``root``, by class name.

    Raises ``ValueError`` if there is no class folder, or one without images.
    """
    classes = {folder.name: [ImageSource.of_file(p) for p in image_files(folder)] for folder in subfolders(root)}
    if not classes:
        raise ValueError(f"{str(root)!r} has no folders in it; expected one folder of images for each class")
    empty = [name for name, sources in classes.items() if not sources]
    if empty:
        raise ValueError(
            f"class folder {str(root / empty[0])!r} has no images "
            f"({len(empty)} such folder{'s' if len(empty) > 1 else ''}); image files end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}. Add images or remove the folder"
        )
    return classes


def read_images(
    kind: str,
    classes: Mapping[str, Sequence[ImageSource]],
    *,
    size: int,
    channels: int,
    fit: Fit = "stretch",
    invert: bool = False,
    bits: int | None = None,
    skip_broken: bool = False,
    cache: Cache = True,
    progress: bool = False,
) -> ClassImages:
    """Decode every class's images to ``size`` x ``size`` pixels, or take them from the cache.

    Args:
        kind: the dataset's name, for the cache's file name and the progress bar.
        classes: the images of each class, by class name.
        size: height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        fit: what happens to images that are not square; see :func:`decode_image`.
        invert: turn dark ink on bright paper into bright ink on dark.
        bits: that values of 16-bit images use; None finds it over all of them (``ClassImages.bits``).
        skip_broken: leave out what cannot be decoded, with a logged warning, instead of raising.
        cache: see :func:`innerloop.data.cache.cache_folder`.
        progress: show a progress bar with the time left.

    Raises:
        BrokenImagesError: naming every image that cannot be decoded.
        ValueError: if ``skip_broken`` leaves a class without images.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size must be at least 1 pixel and at most {MAX_SIZE}; got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB); got {channels}")
    check_bits(bits)
    contents = [(name, [(s.name, s.stamp) for s in sources]) for name, sources in classes.items()]
    key = fingerprint(kind, PREPROCESSING_VERSION, size, channels, fit, invert, bits, contents)
    cached = load_cached(cache, kind, key)
    if cached is not None and cached.images.shape[1:] == (channels, size, size) and cached.names == tuple(classes):
        return cached

    sources = [source for of_class in classes.values() for source in of_class]
    images = torch.empty((len(sources), channels, size, size), dtype=torch.uint8)
    pixels = images.numpy()
    broken: dict[int, str] = {}
    deep: dict[int, int] = {}  # largest value of each 16-bit image

    def decoded(data: bytes, bits: int | None) -> Pixels:
        return decode_image(data, size=size, channels=channels, fit=fit, invert=invert, bits=bits)

    def decode(rows: Sequence[int], bits: int | None) -> int:
        for row in rows:
            try:
                data = sources[row].read()
                pixels[row] = decoded(data, bits)
                if row not in deep and (largest := largest_value(data)):
                    deep[row] = largest
            except Exception as error:
                # Pillow's decoders raise nearly anything on damaged files (OSError, SyntaxError,
                # struct.error, zlib.error, ...), and whatever it was must not hide the other broken files.
                broken[row] = str(error) or type(error).__name__
        return len(rows)

    def decode_all(rows: Sequence[int], bits: int | None, what: str) -> None:
        job = bar.add_task(what, total=len(rows))
        chunks = [rows[first : first + _AT_ONCE] for first in range(0, len(rows), _AT_ONCE)]
        for done in pool.map(lambda chunk: decode(chunk, bits), chunks):
            bar.advance(job, done)

    with progress_bar(show=progress) as bar, ThreadPoolExecutor() as pool:
        decode_all(range(len(sources)), bits, f"Reading {kind}")
        found = bits or bits_in_use(deep.values())
        if found not in (bits, 16):
            decode_all(sorted(deep), found, f"Scaling {kind} from {found} bits")

    in_use = found if deep else None
    brightest = max(deep.values(), default=0)
    if not broken:
        result = ClassImages(images, tuple(map(len, classes.values())), tuple(classes), in_use, brightest)
        store_cached(cache, kind, key, result)
        return result
    named = [(sources[row].name, broken[row]) for row in sorted(broken)]
    if not skip_broken:
        raise BrokenImagesError(named, len(sources))
    # Not cached, so that every run says again what it leaves out.
    logger.warning("left out %d of %d images: %s", len(named), len(sources), BrokenImagesError(named, len(sources)))
    kept = _without(images, classes, set(broken))
    return replace(kept, bits=in_use, brightest=brightest)


def _without(images: torch.Tensor, classes: Mapping[str, Sequence[ImageSource]], broken: set[int]) -> ClassImages:
    sizes: list[int] = []
    first = 0
    for name, sources in classes.items():
        whole = sum(row not in broken for row in range(first, first + len(sources)))
        if not whole:
            raise ValueError(f"all {len(sources)} images of class {name!r} are broken; remove the class")
        sizes.append(whole)
        first += len(sources)
    kept = [row for row in range(len(images)) if row not in broken]
    return ClassImages(images[kept], tuple(sizes), tuple(classes))


def decode_image(
    data: bytes, *, size: int, channels: int, fit: Fit = "stretch", invert: bool = False, bits: int | None = None
) -> Pixels:
    """An encoded image as uint8 ``[channels, size, size]``.

    It is turned the way its EXIF orientation says. Transparency is laid over white paper; 16-bit grey is scaled to 8
    bits, ``2**bits - 1`` for white (None: all 16 bits). ``fit="stretch"`` resizes to the square whatever the aspect
    ratio; ``"crop"`` resizes the shorter side and cuts the longer one's ends off; ``"ink"`` is for drawings, see
    :func:`centred_ink`.

    Of an animation, the first picture is taken.

    Raises any of Pillow's errors for data that is not a whole image, and ``ValueError`` for images of more
    than ``MAX_PIXELS`` pixels and for floating-point images.
    """
    if not data:
        raise ValueError("the file is empty")
    with open_image(io.BytesIO(data)) as opened:
        return image_pixels(opened, size=size, channels=channels, fit=fit, invert=invert, bits=bits)


def image_pixels(
    image: Image.Image,
    *,
    size: int,
    channels: int,
    fit: Fit = "stretch",
    invert: bool = False,
    bits: int | None = None,
) -> Pixels:
    """An opened image, decoded or not, as uint8 ``[channels, size, size]``; see :func:`decode_image`."""
    if image.width * image.height > MAX_PIXELS:
        raise UnusableImageError(
            f"{image.width} x {image.height} pixels are more than the limit of {MAX_PIXELS // 10**6} megapixels; "
            "make the image smaller"
        )
    depth = depth_of(image)
    image = to_eight_bits(ImageOps.exif_transpose(image), bits, depth)
    return prepare_image(image, size=size, channels=channels, fit=fit, invert=invert)


def largest_value(image: Image.Image | bytes) -> int:
    """The largest value of a 16-bit image whose white is to be found; 0 of others, and of what cannot be read."""
    if isinstance(image, bytes):
        if not _may_be_deep(image):
            return 0
        try:
            with open_image(io.BytesIO(image)) as opened:
                return largest_value(opened)
        except Exception:  # Pillow raises nearly anything; what is broken is said where the image is read
            return 0
    if image.width * image.height > MAX_PIXELS or not depth_of(image).white_unknown:
        return 0
    values = np.asarray(image)
    return int(values.max()) if in_range(values) else 0


def _may_be_deep(data: bytes) -> bool:
    """Whether an encoded image has to be opened to know: of the common kinds the first bytes tell."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return data[24:26] == b"\x10\0"  # 16 bits, grey
    return data[:2] != b"\xff\xd8" and data[:4] not in (b"GIF8", b"RIFF")  # JPEG, GIF, WebP


def say_bits(classes: ClassImages, given: int | None) -> None:
    """Log what was assumed of 16-bit images, or that some do not fit into the bits that were given."""
    if classes.bits is None:
        return
    if given is None:
        logger.warning(assumed(classes.bits))
    elif classes.brightest >= 2**given:
        logger.warning(cut_off(f"16-bit images, up to {classes.brightest},", given))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's names for what files with ``IMAGE_SUFFIXES`` hold.

    Pillow goes by what is in a file, not by its name, and hands a PostScript program over to Ghostscript: such formats
    are not among them.
    """
    known = Image.registered_extensions()
    return tuple(sorted({known[suffix] for suffix in IMAGE_SUFFIXES if suffix in known} & Image.OPEN.keys()))


def open_image(file: BinaryIO | Path) -> Image.Image:
    """An image file, opened and not yet decoded.

    Raises:
        OSError, ValueError: it is no image of a kind in ``IMAGE_SUFFIXES``, or larger than ``MAX_PIXELS``.
    """
    try:
        return Image.open(file, formats=_formats())
    except Image.DecompressionBombError:  # Pillow's own limit, which lies above ours
        raise ValueError(f"more pixels than the limit of {MAX_PIXELS // 10**6} megapixels; make it smaller") from None
    except UnidentifiedImageError:
        raise ValueError("not an image that can be read, whatever its name says") from None


def prepare_image(image: Image.Image, *, size: int, channels: int, fit: Fit, invert: bool) -> Pixels:
    """A decoded image as uint8 ``[channels, size, size]``; see :func:`decode_image`."""
    image = _without_alpha(to_eight_bits(image, None)).convert("L" if channels == 1 else "RGB")
    # Lanczos filters over the area that a pixel comes from, so thin pen strokes survive being made smaller;
    # it is also what MAML's authors resized Omniglot and mini-ImageNet with.
    if fit == "ink":
        image = centred_ink(image)
    if fit == "crop":
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)
    elif image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels: Pixels = np.asarray(image, dtype=np.uint8).reshape(size, size, channels).transpose(2, 0, 1)
    return np.invert(pixels) if invert else pixels


def centred_ink(image: Image.Image) -> Image.Image:
    """A drawing, mode L or RGB, cut to its ink and laid in the middle of a square page, at one size.

    So it does not matter where on the page, and how large, somebody drew. The page is what the border shows; ink is
    what differs from it by a quarter of the range. A page without ink comes back as it is.
    """
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    page = np.median(border, axis=0).round().astype(np.uint8)
    distance = np.abs(pixels.astype(np.int16) - page)
    ink = (distance if distance.ndim == 2 else distance.max(axis=2)) > _INK_CONTRAST
    if not ink.any():
        return image
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = int(bottom - top), int(right - left)
    side = max(height, width, round(max(height, width) / INK_SHARE))
    square = Image.new(image.mode, (side, side), tuple(page.tolist()) if page.ndim else int(page))
    square.paste(image.crop((left, top, right, bottom)), ((side - width) // 2, (side - height) // 2))
    return square


def _without_alpha(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
