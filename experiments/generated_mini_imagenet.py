"""Generated pictures in the layouts in which people have mini-ImageNet, and every mini-ImageNet row trained on them.

    python experiments/generated_mini_imagenet.py OUT                          64, 16 and 20 classes of 20 pictures
    python experiments/generated_mini_imagenet.py OUT --lists DIR              all that DIR/{train,val,test}.csv name
    python experiments/generated_mini_imagenet.py OUT --layout cache --train   and then train and test every row on them

It shows that what a person with the images would type runs from end to end. Its accuracies say nothing of
mini-ImageNet.
"""

from __future__ import annotations

import csv
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image

from innerloop.training.progress import Progress

Layout = Literal["folders", "lists", "cache", "category-split"]
SPLITS = {"train": 64, "val": 16, "test": 20}
CATEGORY_SPLIT = {"train": "train_phase_train", "val": "val", "test": "test"}
SHORT = ("--epochs", "2", "--iterations", "3", "--val-tasks", "4", "--test-tasks", "4", "--seeds", "0")


@dataclass(frozen=True)
class Arguments:
    """Write the pictures, and train on them if asked to."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write to."""
    layout: Layout = "folders"
    """Class folders in train, val and test; images with CSV lists; or one of the two sorts of pickled files."""
    images: int = 20
    """For each class."""
    lists: Path | None = None
    """Folder of the CSV files whose pictures are to be made (layout lists)."""
    train: bool = False
    """Then run the grids of all rows, shortened, 1-shot and 5-shot."""


def main() -> None:
    """Write, and train."""
    chosen = tyro.cli(Arguments, description=__doc__)
    write(chosen.out, "lists" if chosen.lists else chosen.layout, chosen.images, chosen.lists)
    for shots in (1, 5) if chosen.train else ():
        for grid in ("ablation", "steps", "strided"):
            preset = ["--preset", f"mini-imagenet-5way-{shots}shot", "--data", str(chosen.out)]
            runs = chosen.out / "runs" / f"{grid}-{shots}shot"
            command = ["ablate", grid, *preset, *SHORT, "--out", str(runs)]
            subprocess.run([sys.executable, "-m", "innerloop", *command], check=True)


def write(out: Path, layout: Layout, images: int, lists: Path | None = None) -> None:
    """Write the pictures of all splits."""
    progress = Progress()
    for number, (split, classes) in enumerate(SPLITS.items()):
        names = _listed(lists / f"{split}.csv") if lists else _invented(1000 * number, classes, images)
        with progress.task(split, len(names)) as bar:
            pictures = _pictures(names, bar.advance)
            if layout == "folders":
                for (file, label), picture in pictures:
                    _save(out / split / label / file, picture)
            elif layout == "lists":
                for (file, _), picture in pictures:
                    _save(out / "images" / file, picture)
                with (out / f"{split}.csv").open("w", newline="", encoding="utf-8") as table:
                    csv.writer(table).writerows([("filename", "label"), *names])
            else:
                _pickle(out, layout, split, names, np.stack([picture for _, picture in pictures]))


def _invented(first: int, classes: int, images: int) -> list[tuple[str, str]]:
    labels = [f"n{first + c:08d}" for c in range(classes)]
    return [(f"{label}{i:08d}.jpg", label) for label in labels for i in range(images)]


def _listed(table: Path) -> list[tuple[str, str]]:
    with table.open(newline="", encoding="utf-8") as file:
        return [(row["filename"], row["label"]) for row in csv.DictReader(file)]


def _pictures(
    names: Iterable[tuple[str, str]], tick: Callable[[], None]
) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """A picture for each: stripes of its class's colour, direction and width, under noise of its own."""
    y, x = np.mgrid[:84, :84] / 84
    for i, (file, label) in enumerate(names):
        of_class = np.random.default_rng(int(label[1:]))
        colour, angle, waves = of_class.uniform(60, 195, 3), of_class.uniform(0, np.pi), of_class.uniform(2, 12)
        own = np.random.default_rng(i)
        stripes = np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)) + own.uniform(0, 2 * np.pi))
        picture = colour + 40 * stripes[..., None] + own.normal(0, 20, (84, 84, 3))
        tick()
        yield (file, label), np.clip(picture, 0, 255).astype(np.uint8)


def _save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def _pickle(out: Path, layout: Layout, split: str, names: list[tuple[str, str]], pictures: np.ndarray) -> None:
    labels = [label for _, label in names]
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    if layout == "cache":
        file = out / f"mini-imagenet-cache-{split}.pkl"
        of_class = {label: [i for i, own in enumerate(labels) if own == label] for label in number}
        content: dict[str, object] = {"image_data": pictures, "class_dict": of_class}
    else:
        file = out / f"miniImageNet_category_split_{CATEGORY_SPLIT[split]}.pickle"
        content = {"data": pictures, "labels": [number[label] for label in labels], "catname2label": number}
    out.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(content))


if __name__ == "__main__":
    main()
