"""A person's labelled images of new classes, read and looked over."""

from __future__ import annotations

import hashlib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from innerloop.classify.images import ImageLike, deep_value, image_name, read_image
from innerloop.data import BrokenImagesError, Preprocessing
from innerloop.data.depth import bits_of
from innerloop.data.folder import find_classes
from innerloop.data.images import Pixels, check_folder
from innerloop.data.preprocessing import Ink, ink_of

SupportSource = str | os.PathLike[str] | Mapping[str, Iterable[ImageLike]]
"""A folder with a folder of images for each class, or images by class name."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Support:
    """A support set.

    Attributes:
        classes: names, in the order of the classifier's outputs.
        pixels: uint8 ``[n, C, H, W]``, class after class, before any inversion.
        targets: int64 ``[n]``.
        ink: of its drawings, where they are drawings and agree; else None.
        bits: that its 16-bit images use, as the preprocessing has it or as they show; None where there are none.
        notes: what a person may want to know of it.
        same: int64 ``[n]``, a number of its own for each image, and one for images with the same pixels.
    """

    classes: tuple[str, ...]
    pixels: Tensor
    targets: Tensor
    ink: Ink | None
    notes: tuple[str, ...] = ()
    bits: int | None = None
    same: Tensor | None = None

    @property
    def shots(self) -> tuple[int, ...]:
        """Images of each class."""
        return tuple(torch.bincount(self.targets, minlength=len(self.classes)).tolist())


def read_support(source: SupportSource, preprocessing: Preprocessing, *, skip_broken: bool = False) -> Support:
    """Read a support set.

    What is doubtful and not wrong (the same image in two classes, drawings in bright and in dark ink) is a logged
    warning.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: there are fewer than two classes, one without images, or two of one name.
        BrokenImagesError: naming every image that cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        classes, notes = _in_folder(source)
        where = f" in {os.fspath(source)!r}"
    else:
        classes, notes, where = _given(source), [], ""
    names = _checked_names(list(classes))
    empty = [name for name, images in zip(names, classes.values(), strict=True) if not images]
    if empty:
        raise ValueError(f"class {empty[0]!r} has no images; a class needs at least one")
    if len(names) < 2:
        found = f"only one class, {names[0]!r}" if names else "no class"
        raise ValueError(f"{found}{where}; to tell classes apart takes two or more, each with its images")
    images = [(name, image) for name, of_class in zip(names, classes.values(), strict=True) for image in of_class]
    bits, said = _bits([image for _, image in images], preprocessing.bits)
    preprocessing, notes = replace(preprocessing, bits=bits), [*notes, *said]
    # Inverted or not, it is decided later.
    kept, broken = _read([image for _, image in images], preprocessing)
    if broken:
        named = [(_described(*images[i], i), reason) for i, reason in sorted(broken.items())]
        if not skip_broken:
            raise BrokenImagesError(named, len(images))
        logger.warning("left out: %s", BrokenImagesError(named, len(images)))
    number = {name: i for i, name in enumerate(names)}
    targets = [number[images[i][0]] for i in kept]
    lost = set(range(len(names))) - set(targets)
    if lost:
        raise ValueError(f"no image of class {names[min(lost)]!r} can be read")
    pixels = list(kept.values())
    same = _same(pixels)
    _warn_of_copies(same, targets, [_described(*images[i], i) for i in kept])
    notes += _copies_in_a_class(same, targets, names)
    tensors = torch.from_numpy(np.stack(pixels)), torch.tensor(targets)
    return Support(tuple(names), *tensors, _common_ink(pixels), tuple(notes), bits, torch.tensor(same))


def _bits(images: Sequence[ImageLike], known: int | None) -> tuple[int | None, list[str]]:
    """How many bits the 16-bit images use, and what is to be said of it."""
    with ThreadPoolExecutor() as pool:
        deep = [value for value in pool.map(deep_value, images) if value]
    return bits_of(deep, known)


def _in_folder(source: str | os.PathLike[str]) -> tuple[dict[str, list[ImageLike]], list[str]]:
    root = check_folder(Path(source), "a folder with a folder of images for each class")
    found = find_classes(root)
    if found.empty:
        raise ValueError(
            f"class folder {str(root / found.empty[0])!r} has no images in it"
            + (f", and {len(found.empty) - 1} more have none" if len(found.empty) > 1 else "")
            + ". Add images or remove the folder"
        )
    if not found.classes:
        raise ValueError(f"{str(root)!r} has no folders of images in it; expected one folder of images for each class")
    return {name: list(images) for name, images in found.classes.items()}, [f"left out: {w}" for w in found.left_out]


def _given(source: Mapping[str, Iterable[ImageLike]]) -> dict[str, list[ImageLike]]:
    for name, images in source.items():
        if not isinstance(name, str):
            raise TypeError(f"class names are strings; got {name!r}")
        if isinstance(images, str | bytes):
            raise TypeError(f"class {name!r} needs a list of images; got a single {type(images).__name__}")
    return {name: list(images) for name, images in source.items()}


def _checked_names(given: Sequence[str]) -> list[str]:
    """Names in Unicode's composed form, white space put right; no two alike but for that and upper or lower case."""
    names = [" ".join(unicodedata.normalize("NFC", name).split()) for name in given]
    seen: dict[str, str] = {}
    for raw, name in zip(given, names, strict=True):
        if not name:
            raise ValueError(f"{raw!r} is no name for a class: nothing in it can be seen")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
            raise ValueError(f"{raw!r} is no name for a class: not all of it is text. Rename it")
        alike = unicodedata.normalize("NFC", name.casefold())
        if alike in seen:
            raise ValueError(
                f"classes {seen[alike]!r} and {raw!r} have one name but for white space, accents' encoding or upper "
                "case; rename one, or put their images into one folder"
            )
        seen[alike] = raw
    return names


def _read(images: Sequence[ImageLike], preprocessing: Preprocessing) -> tuple[dict[int, Pixels], dict[int, str]]:
    """Pixels, or the reason why not, by the image's number."""

    def read(image: ImageLike) -> Pixels | str:
        try:
            return read_image(image, preprocessing)
        except (OSError, ValueError) as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(read, images))
    broken = {i: result for i, result in enumerate(results) if isinstance(result, str)}
    return {i: result for i, result in enumerate(results) if not isinstance(result, str)}, broken


def _described(name: str, image: ImageLike, number: int) -> str:
    return image_name(image, number + 1) if isinstance(image, str | Path) else f"an image of class {name!r}"


def _same(pixels: Sequence[Pixels]) -> list[int]:
    """For each image the number of the first that is the same, told by what the network would see of it."""
    first: dict[bytes, int] = {}
    return [first.setdefault(hashlib.sha256(image.tobytes()).digest(), i) for i, image in enumerate(pixels)]


def _warn_of_copies(same: Sequence[int], targets: Sequence[int], names: Sequence[str]) -> None:
    """Warn of one image in two classes."""
    for i, j in enumerate(same):
        if targets[i] != targets[j]:
            logger.warning("the same image is in two classes: %s and %s", names[j], names[i])


def _copies_in_a_class(same: Sequence[int], targets: Sequence[int], names: Sequence[str]) -> list[str]:
    """What is to be said of images that are in their own class twice."""
    of_class = Counter(targets)
    of_class.subtract(Counter(target for target, _ in set(zip(targets, same, strict=True))))
    with_copies = [names[c] for c in sorted(of_class) if of_class[c]]
    count = sum(of_class.values())
    if not count:
        return []
    shown = ", ".join(with_copies[:3]) + (", ..." if len(with_copies) > 3 else "")
    return [
        f"{count} image{'s are copies' if count > 1 else ' is a copy'} of others of the same class ({shown}): adapting "
        "counts them, the estimate of accuracy counts an image and its copies once"
    ]


def _common_ink(pixels: Sequence[Pixels]) -> Ink | None:
    inks = Counter(ink_of(image) for image in pixels)
    # Photographs have no ink; a few drawings in which no page can be made out do not outvote the rest.
    found = {ink: count for ink, count in inks.items() if ink is not None}
    if len(found) > 1 and inks[None] < len(pixels) / 2:
        logger.warning(
            "%d support images are dark ink on a light page and %d bright ink on a dark one; a classifier needs them "
            "alike",
            *(found["dark"], found["bright"]),
        )
    unanimous = len(found) == 1 and inks[None] <= len(pixels) / 2
    return next(iter(found)) if unanimous else None
