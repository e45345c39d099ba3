"""Your own images: a folder of class folders, split by you or by chance."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from innerloop.data._random import check_whole, shuffled
from innerloop.data.cache import Cache
from innerloop.data.classes import SPLITS, ClassImages, ImageDataset, Split
from innerloop.data.images import ImageSource, check_folder, class_folders, read_images, subfolders

_EXPECTED = "a folder of class folders, or train, val and test folders of class folders"


def image_folder(
    root: str | Path,
    *,
    size: int = 84,
    channels: int = 3,
    ratios: tuple[float, float, float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    invert: bool = False,
    skip_broken: bool = False,
    cache: Cache = True,
    progress: bool = False,
) -> ImageDataset:
    """Images sorted into class folders.

    ``root`` holds either ``train``, ``val`` and ``test`` folders of class folders, which share no class, or
    the class folders themselves; then the *classes* are shared out to the splits by ``ratios`` in an order
    decided by ``seed``. Images lie directly in their class folder; hidden files and files of other kinds
    are ignored.

    Args:
        root: the folder.
        size: height and width in pixels. The shorter side is resized to it, and the longer one's ends are
            cut off.
        channels: 1 (grey) or 3 (RGB).
        ratios: shares of the classes for train, val and test; they sum to 1, and each gets at least one
            class.
        seed: decides which classes go to which split.
        invert: turn dark ink on bright paper into bright ink on dark.
        skip_broken: leave out images that cannot be decoded, with a logged warning, instead of raising.
        cache: keep the decoded images: ``True``, ``False`` or a folder.
        progress: show a progress bar with the time left.

    Returns:
        uint8 images ``[n, channels, size, size]`` for each split, classes by name.

    Raises:
        FileNotFoundError, NotADirectoryError: when ``root`` is not a folder.
        ValueError: when it is empty, a class has no images, a split is missing or would get no class, or a
            class is in two splits.
        BrokenImagesError: naming every image that cannot be decoded.
    """
    check_whole("seed", seed, at_least=0)
    path = check_folder(root, _EXPECTED)
    splits = _given_splits(path) or _split_by_chance(class_folders(path), ratios, seed)

    everything = read_images(
        "folder",
        {f"{split}/{name}": sources for split in SPLITS for name, sources in splits[split].items()},
        size=size,
        channels=channels,
        fit="crop",
        invert=invert,
        skip_broken=skip_broken,
        cache=cache,
        progress=progress,
    )
    dataset: dict[Split, ClassImages] = {}
    first = 0
    for split in SPLITS:
        selected = everything.select(range(first, first + len(splits[split])))
        dataset[split] = ClassImages(selected.images, selected.sizes, tuple(splits[split]))
        first += len(splits[split])
    return dataset


def _given_splits(root: Path) -> dict[Split, dict[str, list[ImageSource]]] | None:
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
    splits = {split: class_folders(root / split) for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        shared = sorted(splits[one].keys() & splits[other].keys())
        if shared:
            raise ValueError(
                f"{len(shared)} classes are in both {one!r} and {other!r} of {str(root)!r}: {shared[:3]}. "
                "Few-shot learning is judged on classes never seen in training: move each class into one "
                "split (or rename it, if it only has the same name)"
            )
    return splits


def _split_by_chance(
    classes: dict[str, list[ImageSource]], ratios: tuple[float, float, float], seed: int
) -> dict[Split, dict[str, list[ImageSource]]]:
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
    splits: dict[Split, dict[str, list[ImageSource]]] = {}
    for split, first, last in zip(SPLITS, edges, edges[1:], strict=False):
        splits[split] = {names[c]: classes[names[c]] for c in sorted(order[first:last])}
    return splits
