"""Your own images: a folder of class folders, split by you or by chance."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

from rich.console import Console

from innerloop.data._random import check_whole, shuffled
from innerloop.data.cache import Cache
from innerloop.data.classes import SPLITS, ClassImages, ImageDataset, Split
from innerloop.data.depth import check_bits
from innerloop.data.images import (
    Fit,
    ImageSource,
    check_folder,
    image_files,
    open_image,
    read_images,
    say_bits,
    subfolders,
    visible,
)

_EXPECTED = "a folder of class folders, or train, val and test folders of class folders"
MAX_FOLDERS = 30_000
"""In a folder of classes; ImageNet's largest edition has 21,841. A link to / would be walked for ever."""
MAX_DEPTH = 100
_LOOKED_AT = 500  # images whose width and height are read for the summary

Classes = dict[str, list[Path]]

logger = logging.getLogger(__name__)


@dataclass
class FoundClasses:
    """What there is in a folder of class folders.

    Attributes:
        classes: image files by class name, in the order of their names.
        empty: folders without any image.
        left_out: what else was met and is not used, in words.
    """

    classes: Classes = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass
class _Walk:
    """Through a folder and the folders below it, each once however many links lead to it."""

    root: Path
    found: FoundClasses = field(default_factory=FoundClasses)
    seen: set[tuple[int, int]] = field(default_factory=set)
    """Device and number of every folder that was gone into."""

    def __post_init__(self) -> None:
        self.enters(self.root, "")

    def enters(self, folder: Path, name: str) -> bool:
        """Whether to go into a folder: not into one that a link leads to a second time, or back to."""
        status = folder.stat()
        if (status.st_dev, status.st_ino) in self.seen:
            self.found.left_out.append(f"{name}, which by a link is a folder that is looked at already")
            return False
        self.seen.add((status.st_dev, status.st_ino))
        if len(self.seen) > MAX_FOLDERS:
            raise ValueError(
                f"there are more than {MAX_FOLDERS:,} folders in {str(self.root)!r}. Does a link in it lead to "
                f"more than images? The last folder looked at was {str(folder)!r}"
            )
        if name.count("/") > MAX_DEPTH:
            raise ValueError(
                f"the folders in {str(self.root)!r} are nested more than {MAX_DEPTH} deep, in {name[:40]!r}..."
            )
        return True


def find_classes(root: Path) -> FoundClasses:
    """The classes in a folder, however deep: Omniglot's ``alphabet/character`` as well as ``class``.

    A class is the uppermost folder, below ``root``, that has images in it; images in folders further down belong to it.
    Its name is its path from ``root``. Hidden files, thumbnails and what systems leave behind are passed over. Links
    are followed, but no folder is gone into twice.

    Raises:
        ValueError: there are more than ``MAX_FOLDERS`` folders, or they are nested deeper than ``MAX_DEPTH``.
    """
    walk = _Walk(root)
    stray = [path.name for path in image_files(root)]
    if stray:
        walk.found.left_out.append(f"{_some('image', stray)} beside the class folders")
    _find(root, "", walk)
    return walk.found


def images_below(root: Path) -> list[Path]:
    """All images in a folder and in the folders below it, by name; what ``find_classes`` passes over, left out.

    Raises:
        ValueError: there are more than ``MAX_FOLDERS`` folders, or they are nested deeper than ``MAX_DEPTH``.
    """
    return _images_below(root, root.name, _Walk(root))


def _find(folder: Path, name: str, walk: _Walk) -> None:
    """Add the classes below a folder, or the folder itself if it has images of its own."""
    found = walk.found
    if name and image_files(folder):
        found.classes[name] = _images_below(folder, name, walk)
        return
    before = len(found.classes)
    empty = len(found.empty)
    for inner in subfolders(folder):
        inner_name = f"{name}/{inner.name}".lstrip("/")
        if walk.enters(inner, inner_name):
            _find(inner, inner_name, walk)
    if name and len(found.classes) == before:
        found.empty[empty:] = [name]  # in place of the folders below it, which are empty too


def _images_below(folder: Path, name: str, walk: _Walk) -> list[Path]:
    images = image_files(folder)
    others = [entry.name for entry in visible(folder) if entry.is_file() and entry not in set(images)]
    if others:
        walk.found.left_out.append(f"{_some('file', others)} in {name} that {_are(others)} no image by name")
    for inner in subfolders(folder):
        if walk.enters(inner, f"{name}/{inner.name}"):
            images += _images_below(inner, f"{name}/{inner.name}", walk)
    return images


def _some(what: str, names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"


def _are(names: Sequence[str]) -> str:
    return "are" if len(names) > 1 else "is"


def image_folder(
    root: str | Path,
    *,
    size: int = 84,
    channels: int = 3,
    ratios: tuple[float, float, float] = (0.6, 0.2, 0.2),
    at_least: int = 1,
    seed: int = 0,
    fit: Fit = "crop",
    invert: bool = False,
    bits: int | None = None,
    skip_broken: bool = False,
    cache: Cache = True,
    progress: bool = False,
) -> ImageDataset:
    """Images sorted into class folders.

    ``root`` holds either ``train``, ``val`` and ``test`` folders of class folders, which share no class, or
    the class folders themselves; then the *classes* are shared out to the splits by ``ratios`` in an order
    decided by ``seed``. Class folders may lie in folders of their own; see ``find_classes``. Classes with too few
    images are left out, with a logged warning.

    Args:
        root: the folder.
        size: height and width in pixels. The shorter side is resized to it, and the longer one's ends are
            cut off.
        channels: 1 (grey) or 3 (RGB).
        ratios: shares of the classes for train, val and test; they sum to 1, and each gets at least one
            class.
        at_least: images that a class needs: a task's shots and queries.
        seed: decides which classes go to which split.
        fit: what happens to images that are not square; see :func:`innerloop.data.images.decode_image`.
        invert: turn dark ink on bright paper into bright ink on dark.
        bits: that values of 16-bit images use; None finds it over all images, and says it in a logged warning.
        skip_broken: leave out images that cannot be decoded, with a logged warning, instead of raising.
        cache: keep the decoded images: ``True``, ``False`` or a folder.
        progress: say what was found, and show a progress bar with the time left.

    Returns:
        uint8 images ``[n, channels, size, size]`` for each split, classes by name.

    Raises:
        FileNotFoundError, NotADirectoryError: when ``root`` is not a folder.
        ValueError: when it is empty or has no images, a split is missing or would get no class, or a class is in
            two splits.
        BrokenImagesError: naming every image that cannot be decoded.
    """
    check_whole("seed", seed, at_least=0)
    check_whole("at_least", at_least, at_least=1)
    check_bits(bits)
    path = check_folder(root, _EXPECTED)
    given = _given_splits(path)
    found = list(given.values()) if given else [find_classes(path)]
    kept = [_large_enough(f, at_least) for f in found]
    if not any(kept):
        raise ValueError(_nothing_left(path, found, at_least))
    splits = dict(zip(SPLITS, kept, strict=True)) if given else _split_by_chance(kept[0], ratios, seed)
    if progress:
        for line in _summary(path, splits, found, by_chance=not given):
            Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)

    everything = read_images(
        "folder",
        {
            f"{split}/{name}": [ImageSource.of_file(image) for image in images]
            for split in SPLITS
            for name, images in splits[split].items()
        },
        size=size,
        channels=channels,
        fit=fit,
        invert=invert,
        bits=bits,
        skip_broken=skip_broken,
        cache=cache,
        progress=progress,
    )
    say_bits(everything, bits)
    dataset: dict[Split, ClassImages] = {}
    first = 0
    for split in SPLITS:
        selected = everything.select(range(first, first + len(splits[split])))
        dataset[split] = _without_small(replace(selected, names=tuple(splits[split])), at_least)
        first += len(splits[split])
    return dataset


def _large_enough(found: FoundClasses, at_least: int) -> Classes:
    """The classes with images enough; the others are said."""
    small = {name: len(images) for name, images in found.classes.items() if len(images) < at_least}
    small |= dict.fromkeys(found.empty, 0)
    _say_too_small(small, len(found.classes) + len(found.empty), at_least)
    return {name: images for name, images in found.classes.items() if name not in small}


def _without_small(classes: ClassImages, at_least: int) -> ClassImages:
    """The classes that still have images enough when broken ones are left out."""
    small = {n: size for n, size in zip(classes.names, classes.sizes, strict=True) if size < at_least}
    _say_too_small(small, len(classes.names), at_least)
    return classes.select([c for c, name in enumerate(classes.names) if name not in small]) if small else classes


def _say_too_small(small: Mapping[str, int], of: int, at_least: int) -> None:
    if small:
        shown = "".join(f"\n  {name}: {size} image{'s' * (size != 1)}" for name, size in list(small.items())[:10])
        more = f"\n  ... and {len(small) - 10} more" if len(small) > 10 else ""
        logger.warning(
            "left out %d of %d classes, with fewer than %d image%s each:%s%s",
            *(len(small), of, at_least, "s" * (at_least != 1), shown, more),
        )


def _nothing_left(root: Path, found: Sequence[FoundClasses], at_least: int) -> str:
    if any(f.classes for f in found):
        largest = max(len(images) for f in found for images in f.classes.values())
        return (
            f"no class in {str(root)!r} has {at_least} images, which a task takes of each class (shots + queries); the "
            f"largest has {largest}. Ask for fewer shots or queries, or add images"
        )
    if not subfolders(root):
        return f"{str(root)!r} has no folders in it; expected one folder of images for each class"
    return f"no folder in {str(root)!r} has images in it; expected one folder of images for each class"


def _summary(
    root: Path, splits: Mapping[Split, Classes], found: Sequence[FoundClasses], *, by_chance: bool
) -> list[str]:
    """What was found, for a person to see that it is what they meant."""
    of_class = {f"{split}/{name}": images for split in SPLITS for name, images in splits[split].items()}
    sizes = sorted(len(images) for images in of_class.values())
    each = f"{sizes[0]} to {sizes[-1]} (median {statistics.median(sizes):g})" if sizes[0] != sizes[-1] else sizes[0]
    division = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    lines = [
        f"{root}: {len(of_class)} classes, {sum(sizes)} images, {each} a class, {_dimensions(of_class)}",
        f"classes: {division}{', shared out by chance' if by_chance else ''}",
    ]
    left_out = [what for f in found for what in f.left_out]
    lines += [f"left out: {what}" for what in left_out[:5]]
    return lines + ([f"... and {len(left_out) - 5} more left out"] if len(left_out) > 5 else [])


def _dimensions(classes: Classes) -> str:
    """Widths and heights, of some images if there are many."""
    every = [image for images in classes.values() for image in images]
    seen: list[tuple[int, int]] = []
    for image in every[:: -(-len(every) // _LOOKED_AT)]:
        try:
            with open_image(image) as opened:
                seen.append(opened.size)
        except Exception:  # reading the images says later, and of all of them, what is broken
            continue
    if not seen:
        return "none of them readable"
    (w, h), (most_w, most_h) = (tuple(pick(side) for side in zip(*seen, strict=True)) for pick in (min, max))
    return f"{w} x {h} pixels" if (w, h) == (most_w, most_h) else f"{w} to {most_w} x {h} to {most_h} pixels"


def _given_splits(root: Path) -> dict[Split, FoundClasses] | None:
    """The user's own splits, or ``None`` if ``root`` holds class folders (one may be called "train")."""
    present = [split for split in SPLITS if (root / split).is_dir() and subfolders(root / split)]
    if not present:
        return None
    missing = [split for split in SPLITS if split not in present]
    if missing:
        raise ValueError(
            f"{str(root)!r} has class folders in {present} but none in {missing}; give each of "
            f"{list(SPLITS)} its class folders, or put all class folders directly into the "
            "folder to have them split for you"
        )
    splits = {split: find_classes(root / split) for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        shared = sorted(splits[one].classes.keys() & splits[other].classes.keys())
        if shared:
            raise ValueError(
                f"{len(shared)} classes are in both {one!r} and {other!r} of {str(root)!r}: {shared[:3]}. "
                "Few-shot learning is judged on classes never seen in training: move each class into one "
                "split (or rename it, if it only has the same name)"
            )
    return splits


def _split_by_chance(classes: Classes, ratios: tuple[float, float, float], seed: int) -> dict[Split, Classes]:
    if len(ratios) != 3 or not all(ratio > 0 for ratio in ratios) or abs(sum(ratios) - 1) > 1e-6:
        raise ValueError(f"ratios must be three positive numbers (train, val, test) that sum to 1; got {ratios}")
    names = list(classes)
    n_train = round(ratios[0] * len(names))
    n_val = round((ratios[0] + ratios[1]) * len(names)) - n_train
    counts = (n_train, n_val, len(names) - n_train - n_val)
    if min(counts) < 1:
        raise ValueError(
            f"{len(names)} classes split by ratios {ratios} give {counts} (train, val, test), and each split "
            "needs at least one class. Add classes or change the ratios"
        )
    order = shuffled(len(names), seed, "folder")
    edges = (0, n_train, n_train + n_val, len(names))
    splits: dict[Split, Classes] = {}
    for split, first, last in zip(SPLITS, edges, edges[1:], strict=False):
        splits[split] = {names[c]: classes[names[c]] for c in sorted(order[first:last])}
    return splits
