"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawings each (Lake et al. 2015, MIT licence)."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import platformdirs

from innerloop.data._random import check_whole, shuffled
from innerloop.data.cache import Cache
from innerloop.data.classes import ImageDataset, Split
from innerloop.data.download import download as fetch
from innerloop.data.images import (
    IMAGE_SUFFIXES,
    Fit,
    ImageSource,
    check_folder,
    image_files,
    read_images,
    subfolders,
)

URL = "https://github.com/brendenlake/omniglot/raw/master/python"
# Characters, and the MD5 of the public archive.
PARTS: Mapping[str, tuple[int, str]] = {
    "images_background": (964, "68d2efa1b9178cc56df9314c21c6e718"),
    "images_evaluation": (659, "6b91aef0f799c5bb55b94e3f2daec811"),
}
DRAWINGS = 20
_MOST_MEMBERS = 100_000
"""The larger archive has 20,000 and something; packed on a Mac, twice as many."""
_MOST_BYTES = 2**20
"""Of a drawing, which has some hundred: a small archive can hold a member that fills memory."""
_ENCRYPTED = 0x1
PAPER_CLASSES: Mapping[Split, int] = {"train": 1150, "val": 50, "test": 423}
BACKGROUND_VAL = 50

Characters = dict[str, list[ImageSource]]


def omniglot(
    root: str | Path | None = None,
    *,
    size: int = 28,
    split: Literal["paper", "background"] = "paper",
    seed: int = 0,
    download: bool = False,
    fit: Fit = "stretch",
    skip_broken: bool = False,
    cache: Cache = True,
    progress: bool = False,
) -> ImageDataset:
    """Omniglot from its public archives, zipped or unzipped.

    Args:
        root: a folder with ``images_background`` and ``images_evaluation`` (folders or ``.zip``) in it or
            at most two folders below it. Default: ``omniglot`` in the environment variable
            ``INNERLOOP_DATA`` or else in the user's data folder.
        size: height and width in pixels; the drawings are 105 x 105.
        split: ``"paper"`` shuffles all 1623 characters and takes 1150 for training, 50 for validation and
            423 for testing, as the MAML papers do. ``"background"`` keeps the authors' division: the 659
            characters of the evaluation alphabets are the test split, and 50 of the 964 background
            characters validate.
        seed: decides the shuffle of ``"paper"``, or which 50 characters validate.
        download: fetch the archives (14 MB) into ``root`` if they are not there.
        fit: see :func:`innerloop.data.images.decode_image`.
        skip_broken: leave out drawings that cannot be decoded, with a logged warning, instead of raising.
        cache: keep the decoded images: ``True``, ``False`` or a folder.
        progress: show progress bars with the time left.

    Returns:
        uint8 images ``[n, 1, size, size]`` for each split; ink is bright, paper 0. Class names are
        ``Alphabet/characterNN``.

    Raises:
        FileNotFoundError: when there is no Omniglot at ``root``.
        ValueError: when characters or drawings are missing, or an archive's member names are not to be
            trusted.
        BrokenImagesError: naming every drawing that cannot be decoded.
        DownloadError: when the download fails.
    """
    if split not in ("paper", "background"):
        raise ValueError(f"split must be 'paper' or 'background'; got {split!r}")
    check_whole("seed", seed, at_least=0)
    folder = _default_root() if root is None else Path(root).expanduser()
    if download:
        for part, (_, md5) in PARTS.items():
            if _find_part(folder, part) is None:
                file = f"{part}.zip"
                fetch(f"{URL}/{file}", folder / file, checksum=md5, algorithm="md5", progress=progress)
    characters = _list_characters(folder)
    everything = read_images(
        "omniglot",
        characters,
        size=size,
        channels=1,
        invert=True,
        fit=fit,
        skip_broken=skip_broken,
        cache=cache,
        progress=progress,
    )
    return {name: everything.select(numbers) for name, numbers in _split_classes(split, seed).items()}


def evaluation_characters(root: str | Path, split: str, seed: int) -> Characters:
    """The evaluation alphabets' characters that neither train nor validate, by ``Alphabet/characterNN``.

    Raises ``FileNotFoundError`` and ``ValueError`` as :func:`omniglot` does.
    """
    characters = _list_characters(Path(root).expanduser())
    names = list(characters)
    background = PARTS["images_background"][0]
    return {names[c]: characters[names[c]] for c in _split_classes(split, seed)["test"] if c >= background}


def _split_classes(split: str, seed: int) -> dict[Split, list[int]]:
    """The characters' numbers in each split; the background's 964 come before the evaluation's 659."""
    n_background = PARTS["images_background"][0]
    n_all = n_background + PARTS["images_evaluation"][0]
    if split == "background":
        order = shuffled(n_background, seed, "omniglot/background")
        train, val = order[BACKGROUND_VAL:], order[:BACKGROUND_VAL]
        return {"train": train, "val": val, "test": list(range(n_background, n_all))}
    order = shuffled(n_all, seed, "omniglot/paper")
    n_train, n_val = PAPER_CLASSES["train"], PAPER_CLASSES["val"]
    return {
        "train": order[:n_train],
        "val": order[n_train : n_train + n_val],
        "test": order[n_train + n_val :],
    }


def _default_root() -> Path:
    return Path(os.environ.get("INNERLOOP_DATA") or platformdirs.user_data_dir("innerloop")) / "omniglot"


def _list_characters(root: Path) -> Characters:
    """All 1623 characters by name, background first; raises if any is missing."""
    found = {part: _find_part(root, part) for part in PARTS}
    if not any(found.values()):
        raise FileNotFoundError(
            f"no Omniglot in {str(root)!r}: expected images_background and images_evaluation, as folders or "
            f".zip. Let it be fetched with download=True (--download), or put {URL}/images_background.zip "
            f"and {URL}/images_evaluation.zip there"
        )
    characters: Characters = {}
    problems: list[str] = []
    for part, (expected, _) in PARTS.items():
        place = found[part]
        listed = {} if place is None else _in_zip(place) if place.is_file() else _in_folder(place)
        if place is None:
            problems.append(f"{part} (a folder or .zip, {expected} characters) is missing")
        elif len(listed) != expected:
            problems.append(f"{str(place)!r} has {len(listed)} characters, expected {expected}")
        problems += [
            f"{name} in {str(place)!r} has {len(drawings)} drawings, expected {DRAWINGS}"
            for name, drawings in listed.items()
            if len(drawings) != DRAWINGS
        ]
        problems += [f"{name} is in {str(place)!r}, and in the other part too" for name in listed if name in characters]
        characters |= listed
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        total = sum(expected for expected, _ in PARTS.values())
        raise ValueError(
            f"{str(root)!r} holds {len(characters)} of Omniglot's {total} characters:{shown}{more}\n"
            "Unpack the archives again, or fetch them with download=True (--download) into an empty folder"
        )
    return characters


def _find_part(root: Path, part: str) -> Path | None:
    """The folder or archive of one part of Omniglot in ``root`` or at most two folders below it."""
    level = [root] if root.is_dir() else []
    for _ in range(3):
        for folder in level:
            unpacked = folder / part
            # Unpacking into a folder of the archive's name gives images_background/images_background.
            if (unpacked / part).is_dir():
                return unpacked / part
            if unpacked.is_dir():
                return unpacked
            if (archive := folder / f"{part}.zip").is_file():
                return archive
        level = [inner for folder in level for inner in subfolders(folder)]
    return None


def _in_folder(folder: Path) -> Characters:
    check_folder(folder, "Omniglot's alphabets, each a folder of character folders")
    return {
        f"{alphabet.name}/{character.name}": [ImageSource.of_file(path) for path in image_files(character)]
        for alphabet in subfolders(folder)
        for character in subfolders(alphabet)
    }


def _in_zip(path: Path) -> Characters:
    """The characters in an archive; the drawings are read from it without unpacking."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:
        # zipfile raises nearly anything on damaged archives: BadZipFile, NotImplementedError, struct.error, ...
        raise ValueError(f"{str(path)!r} is not a whole zip archive ({error}); fetch it again") from error
    members = archive.infolist()
    wrong = _what_is_wrong(members)
    if wrong:
        raise ValueError(f"{str(path)!r} {wrong}: it is not Omniglot's archive, do not trust it")
    characters: Characters = {}
    for info in sorted(members, key=lambda info: info.filename):
        member = PurePosixPath(info.filename)
        hidden = any(piece.startswith((".", "__MACOSX")) for piece in member.parts)
        if info.is_dir() or hidden or len(member.parts) < 3 or member.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        source = ImageSource(
            f"{path}/{info.filename}", (info.file_size, info.CRC), partial(_read_member, archive, info)
        )
        characters.setdefault("/".join(member.parts[-3:-1]), []).append(source)
    return characters


def _what_is_wrong(members: list[zipfile.ZipInfo]) -> str | None:
    """Why an archive is not to be trusted, from what it says of its members."""
    if len(members) > _MOST_MEMBERS:
        return f"has {len(members)} members, {_MOST_MEMBERS} at most are expected"
    seen: set[str] = set()
    for info in members:
        if _leads_outside(info.filename) or _leads_outside(info.orig_filename):
            return f"has a member outside the archive, {info.filename!r}"
        if not info.filename or "\0" in info.orig_filename:
            return f"has a member without a proper name, {info.orig_filename!r}"
        if stat.S_ISLNK(info.external_attr >> 16):
            return f"has a member that is a link, {info.filename!r}"
        if info.flag_bits & _ENCRYPTED:
            return f"has a member that is encrypted, {info.filename!r}"
        if info.filename in seen:
            return f"has two members of the name {info.filename!r}"
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return f"has a member in an unusual compression, {info.filename!r}"
        if info.file_size > _MOST_BYTES:
            return f"has a member of {info.file_size} bytes, {info.filename!r}, and a drawing has {_MOST_BYTES} at most"
        seen.add(info.filename)
    return None


def _leads_outside(name: str) -> bool:
    if not name.startswith("/") and not any(what in name for what in ("..", ":", "\\")):
        return False  # nearly all, found out quickly
    # Windows reads more into a name than others do: it has drives, and backslashes separate.
    return any(
        p.is_absolute() or p.drive or p.root or ".." in p.parts for p in (PurePosixPath(name), PureWindowsPath(name))
    )


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A drawing; no more of it is unpacked than it is said to have."""
    with archive.open(info) as file:
        data = file.read(info.file_size)
    if len(data) != info.file_size:
        raise ValueError(f"has {len(data)} bytes, and the archive says {info.file_size}")
    return data
