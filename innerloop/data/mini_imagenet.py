"""mini-ImageNet: 100 classes of 600 images (Vinyals et al. 2016; split of Ravi & Larochelle 2017)."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from innerloop.data._pickles import read_pickle
from innerloop.data.cache import Cache
from innerloop.data.classes import SPLITS, ClassImages, ImageDataset, Split
from innerloop.data.depth import check_bits
from innerloop.data.images import (
    MAX_SIZE,
    ImageSource,
    check_folder,
    class_folders,
    prepare_image,
    read_images,
    say_bits,
    subfolders,
)

_EXPECTED = "one of mini-ImageNet's layouts"
_LAYOUTS = (
    "train, val and test folders of class folders; or an images folder with train.csv, val.csv and test.csv; "
    "or mini-imagenet-cache-train.pkl, -val.pkl and -test.pkl; or "
    "miniImageNet_category_split_train_phase_train.pickle, _val.pickle and _test.pickle"
)
_PICKLES: tuple[dict[Split, str], ...] = (
    {split: f"mini-imagenet-cache-{split}.pkl" for split in SPLITS},
    {
        "train": "miniImageNet_category_split_train_phase_train.pickle",
        "val": "miniImageNet_category_split_val.pickle",
        "test": "miniImageNet_category_split_test.pickle",
    },
)

MAX_IMAGES = 100_000
"""In a pickled split; mini-ImageNet's largest has 38,400. Small pictures made large fill memory."""

Listed = dict[Split, dict[str, list[ImageSource]]]


def mini_imagenet(
    root: str | Path,
    *,
    size: int = 84,
    splits_dir: str | Path | None = None,
    bits: int | None = None,
    skip_broken: bool = False,
    cache: Cache = True,
    progress: bool = False,
) -> ImageDataset:
    """mini-ImageNet in any of the layouts in which people have it; there is no public download.

    ``root`` holds one of

    * ``train``, ``val`` and ``test`` folders of class folders;
    * a folder ``images`` (or the images themselves) and ``train.csv``, ``val.csv`` and ``test.csv`` with
      the columns ``filename,label``, which may also lie in ``splits_dir``;
    * ``mini-imagenet-cache-{train,val,test}.pkl``, or
      ``miniImageNet_category_split_{train_phase_train,val,test}.pickle``. These are read without executing
      anything in them.

    Args:
        root: the folder.
        size: height and width in pixels; other shapes are stretched to it, as the published files were.
        splits_dir: the folder of the CSV files.
        bits: that values of 16-bit grey images use; None finds it over all splits, and says it in a logged warning.
        skip_broken: leave out images that cannot be decoded, with a logged warning, instead of raising.
        cache: keep images decoded from files: ``True``, ``False`` or a folder.
        progress: show a progress bar with the time left.

    Returns:
        uint8 RGB images ``[n, 3, size, size]`` for each split. Classes are named by their WordNet number,
        or ``class0``, ``class1``, ... where the file has no names.

    Raises:
        FileNotFoundError, NotADirectoryError: when ``root`` or a file that belongs to its layout is not
        there.
        ValueError: when no layout fits, or a CSV or pickle file does not hold what it should.
        BrokenImagesError: naming every image that cannot be decoded.
    """
    path = check_folder(root, _EXPECTED)
    check_bits(bits)
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size must be at least 1 pixel and at most {MAX_SIZE}; got {size}")
    for files in _PICKLES:
        if any((path / name).exists() for name in files.values()):
            return {split: _read_split_pickle(path / files[split], size) for split in SPLITS}

    found = _list_folders(path) if splits_dir is None else None
    if found is None:
        found = _list_csv(path, path if splits_dir is None else Path(splits_dir).expanduser())
    if found is None:
        raise ValueError(f"{str(root)!r} holds no mini-ImageNet; expected {_LAYOUTS}")
    listed = found

    def read(split: Split, bits: int | None) -> ClassImages:
        return read_images(
            f"mini_imagenet-{split}",
            listed[split],
            size=size,
            channels=3,
            bits=bits,
            skip_broken=skip_broken,
            cache=cache,
            progress=progress,
        )

    dataset = {split: read(split, bits) for split in SPLITS}
    # A split knows only its own values, and white is the same in all.
    in_use = max(classes.bits or 0 for classes in dataset.values())
    for split, classes in dataset.items():
        if classes.bits not in (None, in_use):
            dataset[split] = read(split, in_use)
    say_bits(max(dataset.values(), key=lambda classes: classes.brightest), bits)
    return dataset


def _list_folders(root: Path) -> Listed | None:
    if not any((root / split).is_dir() and subfolders(root / split) for split in SPLITS):
        return None
    for split in SPLITS:
        check_folder(root / split, f"the class folders of mini-ImageNet's {split} split")
    return {split: class_folders(root / split) for split in SPLITS}


def _list_csv(root: Path, tables: Path) -> Listed | None:
    if not any((tables / f"{split}.csv").exists() for split in SPLITS):
        return None
    images = root / "images" if (root / "images").is_dir() else root
    paths: dict[Split, dict[str, list[Path]]] = {}
    for split in SPLITS:
        paths[split] = {}
        for filename, label in _rows(tables / f"{split}.csv"):
            paths[split].setdefault(label, []).append(images / filename)
    everything = [p for classes in paths.values() for of_class in classes.values() for p in of_class]
    missing = [p for p in everything if not p.is_file()]
    if missing:
        shown = "".join(f"\n  {p}" for p in missing[:10])
        more = f"\n  ... and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise FileNotFoundError(
            f"{len(missing)} of the {len(everything)} images that the CSV files in {str(tables)!r} list are "
            f"not in {str(images)!r}:{shown}{more}\nPut them there, or point root at the folder that has them"
        )
    return {
        split: {label: [ImageSource.of_file(p) for p in of_class] for label, of_class in sorted(classes.items())}
        for split, classes in paths.items()
    }


def _rows(table: Path) -> list[tuple[str, str]]:
    """The (file name, label) rows of a Ravi & Larochelle CSV file."""
    if not table.is_file():
        raise FileNotFoundError(f"{str(table)!r} does not exist; train.csv, val.csv and test.csv belong together")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"filename", "label"} <= set(reader.fieldnames or ()):
                raise ValueError(f"{str(table)!r} must have the columns filename,label; it has {reader.fieldnames}")
            rows = [(row["filename"] or "", row["label"] or "") for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{str(table)!r} is not a CSV file in UTF-8: {error}") from None
    for line, (filename, label) in enumerate(rows, start=2):
        if not filename or not label or Path(filename).name != filename:
            raise ValueError(
                f"row {line} of {str(table)!r} must be a plain file name and a label; got {filename!r}, {label!r}"
            )
    if not rows:
        raise ValueError(f"{str(table)!r} lists no images")
    return rows


def _read_split_pickle(path: Path, size: int) -> ClassImages:
    """One split from a pickled dict: {image_data, class_dict}, or {data, labels} and maybe catname2label."""
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; the files of the three splits belong together")
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a dict; it holds a {type(content).__name__}")
    try:
        if {"image_data", "class_dict"} <= content.keys():
            pixels = _uint8_images(content["image_data"], path)
            rows = {str(name): np.ravel(of_class) for name, of_class in content["class_dict"].items()}
        elif {"data", "labels"} <= content.keys():
            pixels = _uint8_images(content["data"], path)
            labels = np.ravel(content["labels"])
            if len(labels) != len(pixels) or labels.dtype.kind not in "iu":
                raise ValueError(f"{str(path)!r} must have a whole number as the label of each of {len(pixels)} images")
            names = {int(c): str(name) for name, c in (content.get("catname2label") or {}).items()}
            found, starts = np.unique(np.sort(labels), return_index=True)
            of_class = np.split(np.argsort(labels, kind="stable"), starts[1:])
            rows = {names.get(int(c), f"class{int(c)}"): of for c, of in zip(found, of_class, strict=True)}
        else:
            raise ValueError(
                f"{str(path)!r} must hold the keys image_data and class_dict, or data and labels; "
                f"it holds {sorted(map(str, content))}"
            )
        order = np.concatenate([np.empty(0, dtype=np.int64), *rows.values()])
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{str(path)!r} has a mini-ImageNet file's keys but not its values: {error}") from error
    if not order.size or order.dtype.kind not in "iu" or order.min() < 0 or order.max() >= len(pixels):
        raise ValueError(f"{str(path)!r} must number its {len(pixels)} images from 0 for each class, and does not")
    if len(np.unique(order)) != len(order) or len(order) > MAX_IMAGES:
        raise ValueError(
            f"{str(path)!r} must number each image once, {MAX_IMAGES:,} at most; it has {len(order)} numbers"
        )
    if pixels.shape[1:3] == (size, size):
        images = torch.from_numpy(pixels[order].transpose(0, 3, 1, 2).copy())
    else:
        images = torch.empty((len(order), 3, size, size), dtype=torch.uint8)
        for place, row in enumerate(order):
            resized = prepare_image(Image.fromarray(pixels[row]), size=size, channels=3, fit="stretch", invert=False)
            images[place] = torch.from_numpy(resized.copy())
    return ClassImages(images, tuple(map(len, rows.values())), tuple(rows))


def _uint8_images(data: object, path: Path) -> NDArray[np.uint8]:
    try:
        pixels = np.asarray(data)
    except ValueError as error:
        raise ValueError(f"the images in {str(path)!r} must all have one shape ({error})") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise ValueError(
            f"{str(path)!r} must hold uint8 images [n, height, width, 3]; it holds {pixels.dtype} {pixels.shape}"
        )
    return pixels
