"""``innerloop predict``: what images are, by a classifier that ``innerloop adapt`` made."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated
from unicodedata import category

import torch
import tyro
from pydantic import Field

from innerloop.classify import Classifier, Prediction, Unreadable
from innerloop.cli.arguments import parsed
from innerloop.data.folder import images_below
from innerloop.training.config import ConfigError, Threads
from innerloop.training.progress import Progress

_BREAKING = frozenset({"Cc", "Zl", "Zp"})
"""Unicode's categories of what a terminal would obey: control characters, line and paragraph separators."""


@dataclass(frozen=True)
class PredictArguments:
    """Classify images: a line for each, in the order given. Those that cannot be read are named on standard error, the
    others go on, and the exit code is 1.
    """

    model: tyro.conf.Positional[Path]
    """File of the classifier, made by innerloop adapt."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, and folders of them (with the folders in them)."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """A JSON object a line, with the probabilities of all classes."""
    csv: Annotated[bool, tyro.conf.arg(name="csv")] = False
    """Comma-separated: image, class, probability."""
    bits: Annotated[int, Field(ge=8, le=16)] | None = None
    """Bits that values of 16-bit images use, such as 12. Default: those of the classifier."""
    threads: Threads = 0
    """CPU threads of the network (0: PyTorch's choice); images are decoded by others."""


def run(arguments: Sequence[str]) -> int:
    """Predict as the command line says."""
    chosen = parsed(PredictArguments, arguments, "innerloop predict")
    if chosen.json and chosen.csv:
        raise ConfigError("--json and --csv are two ways to print: take one of them")
    if not chosen.images:
        raise ConfigError("no images given: name image files, or a folder of them")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    classifier = Classifier.load(chosen.model)
    if chosen.bits:
        classifier = replace(classifier, preprocessing=replace(classifier.preprocessing, bits=chosen.bits))
    images = [image for path in chosen.images for image in _images(path)]
    show = _as_json if chosen.json else _as_csv if chosen.csv else _as_text
    if chosen.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerow(["image", "class", "probability"])
    failed = 0
    # Where the answers go to the terminal themselves, they are the progress.
    progress = Progress(shown=not sys.stdout.isatty())
    with progress.task("images", len(images)) if len(images) > 1 else nullcontext() as bar:
        for path, found in zip(images, classifier.stream(images), strict=True):
            if isinstance(found, Unreadable):
                failed += 1
                print(f"{_printable(path)}: {found.reason}", file=sys.stderr)
            else:
                show(path, found)
            if bar is not None:
                bar.advance()
    if failed:
        print(f"{failed} of {len(images)} images cannot be read", file=sys.stderr)
    return 1 if failed else 0


def _images(path: Path) -> list[Path]:
    """The images in a folder, or the file itself."""
    if not path.is_dir():
        return [path]  # what is wrong with it is said when it is read
    found = images_below(path)
    if not found:
        raise ConfigError(f"{str(path)!r} has no image files in it")
    return found


def _as_text(path: Path, found: Prediction) -> None:
    print(f"{_printable(path)}\t{_printable(found.name)}\t{found.probability:.1%}", flush=True)


def _as_json(path: Path, found: Prediction) -> None:
    values = {"image": str(path), "class": found.name, "probability": found.probability}
    print(json.dumps({**values, "probabilities": found.probabilities}), flush=True)


def _as_csv(path: Path, found: Prediction) -> None:
    csv.writer(sys.stdout, lineterminator="\n").writerow([_text(path), found.name, f"{found.probability:.6f}"])
    sys.stdout.flush()


def _text(path: Path) -> str:
    """A path as text that can be printed, bytes that are none written out."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _printable(what: Path | str) -> str:
    """A path or a name on one line."""
    text = _text(what) if isinstance(what, Path) else what
    return "".join(c.encode("unicode_escape").decode() if category(c) in _BREAKING else c for c in text)
