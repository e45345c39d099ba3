from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from innerloop.data import Episodes, omniglot
from innerloop.data import omniglot as exported
from innerloop.data.download import DownloadError

PARTS = {"images_background": 964, "images_evaluation": 659}


def write_zip(folder: Path, part: str, characters: int, image: bytes, drawings: int = 20, prefix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"__MACOSX/{part}/A/character01/0001_01.png", b"junk")
        for c in range(characters):
            alphabet, number = f"{part[7:11]}{c // 40:02d}", c % 40 + 1
            for d in range(drawings):
                archive.writestr(f"{prefix}{part}/{alphabet}/character{number:02d}/{c:04d}_{d:02d}.png", image)
    return path


@pytest.fixture(scope="module")
def zipped(tmp_path_factory, encoded) -> Path:
    root = tmp_path_factory.mktemp("omniglot")
    for part, characters in PARTS.items():
        write_zip(root, part, characters, encoded(1, "1", (2, 2)))
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Of what is in ``zipped``, so that 32,460 images are decoded once."""
    return tmp_path_factory.mktemp("cache")


def test_the_paper_s_split(zipped, cache) -> None:
    dataset = omniglot(zipped, size=2, cache=cache)
    assert {split: len(classes.names) for split, classes in dataset.items()} == {
        "train": 1150,
        "val": 50,
        "test": 423,
    }
    names = [name for classes in dataset.values() for name in classes.names]
    assert len(set(names)) == 1623
    assert "back00/character01" in names
    assert dataset["train"].images.shape == (23000, 1, 2, 2)
    assert dataset["train"].images.max() == 0  # white paper
    again, other = omniglot(zipped, size=2, cache=cache), omniglot(zipped, size=2, cache=cache, seed=1)
    assert again["val"].names == dataset["val"].names != other["val"].names
    assert {name[:4] for name in dataset["test"].names} == {"back", "eval"}
    background = omniglot(zipped, size=2, cache=cache, split="background")
    assert {split: len(classes.names) for split, classes in background.items()} == {
        "train": 914,
        "val": 50,
        "test": 659,
    }
    assert {name[:4] for name in background["test"].names} == {"eval"}
    assert {name[:4] for split in ("train", "val") for name in background[split].names} == {"back"}


def test_unzipped_and_nested(tmp_path, zipped, cache) -> None:
    place = tmp_path / "data" / "omniglot-py"
    with zipfile.ZipFile(zipped / "images_evaluation.zip") as archive:
        archive.extractall(place / "images_evaluation")
    (place / "images_background.zip").symlink_to(zipped / "images_background.zip")
    nested = omniglot(tmp_path, size=2, cache=False)
    assert nested["test"].names == omniglot(zipped, size=2, cache=cache)["test"].names


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no Omniglot in .*download=True.*or put https://github.com"):
        omniglot(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no Omniglot in '.*omniglot'"):
        omniglot()
    with pytest.raises(FileNotFoundError, match="no Omniglot in"):
        omniglot(tmp_path / "nowhere")


def test_half_of_it(tmp_path, zipped) -> None:
    (tmp_path / "images_background.zip").symlink_to(zipped / "images_background.zip")
    with pytest.raises(ValueError, match=r"964 of Omniglot's 1623 characters:\n  images_evaluation .* is missing"):
        omniglot(tmp_path)


def test_missing_characters_and_drawings(tmp_path, encoded) -> None:
    image = encoded(1, "1", (2, 2))
    write_zip(tmp_path, "images_background", 3, image)
    write_zip(tmp_path, "images_evaluation", 2, image, drawings=19)
    with pytest.raises(ValueError, match="5 of Omniglot's 1623") as caught:
        omniglot(tmp_path)
    assert "has 3 characters, expected 964" in str(caught.value)
    assert "has 19 drawings, expected 20" in str(caught.value)


@pytest.mark.parametrize("prefix", ["../", "/"])
def test_members_outside_the_archive(tmp_path, encoded, prefix) -> None:
    for part in PARTS:
        write_zip(tmp_path, part, 1, encoded(), prefix=prefix)
    with pytest.raises(ValueError, match="a member outside the archive"):
        omniglot(tmp_path)


def test_not_a_zip(tmp_path) -> None:
    for part in PARTS:
        (tmp_path / f"{part}.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="is not a whole zip archive"):
        omniglot(tmp_path)


def test_download_is_asked_for_what_is_missing(tmp_path, zipped, cache, monkeypatch) -> None:
    asked = []

    def fetch(url: str, path: Path, **options: object) -> None:
        asked.append((url, options["checksum"]))
        path.symlink_to(zipped / path.name)

    monkeypatch.setitem(exported.__globals__, "fetch", fetch)
    (tmp_path / "images_background.zip").symlink_to(zipped / "images_background.zip")
    dataset = omniglot(tmp_path, size=2, download=True, cache=cache)
    assert len(dataset["test"].names) == 423
    assert asked == [
        (
            "https://github.com/brendenlake/omniglot/raw/master/python/images_evaluation.zip",
            "6b91aef0f799c5bb55b94e3f2daec811",
        )
    ]


def test_a_failed_download_says_where_to_put_the_files(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(exported.__globals__, "URL", "http://127.0.0.1:9")
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    with pytest.raises(DownloadError, match=rf"127.0.0.1:9/images_background.zip.*put it at {tmp_path}"):
        omniglot(tmp_path, download=True)


def test_bad_arguments(zipped) -> None:
    with pytest.raises(ValueError, match="split must be 'paper' or 'background'; got 'random'"):
        omniglot(zipped, split="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed"):
        omniglot(zipped, seed=-1)


@pytest.mark.omniglot
def test_the_real_thing(omniglot_root, tmp_path, monkeypatch) -> None:
    dataset = omniglot(omniglot_root, cache=tmp_path)
    monkeypatch.setattr("innerloop.data.images.decode_image", None)  # the second time nothing is decoded
    again = omniglot(omniglot_root, cache=tmp_path)
    for split in dataset:
        assert torch.equal(dataset[split].images, again[split].images)
    assert dataset["train"].images.shape == (23000, 1, 28, 28)
    assert {"Greek/character01", "Tengwar/character25"} <= {n for c in dataset.values() for n in c.names}
    ink = dataset["train"].images.float().mean() / 255
    assert 0.07 < ink < 0.1  # bright on dark
    Episodes(dataset, ways=20, shots=1, queries=1, rotations=True).meta_batch("train", 0, 8)
