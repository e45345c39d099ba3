"""Support sets as people have them, and what is wrong with some."""

from __future__ import annotations

import io
import logging
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from innerloop.classify.images import read_image
from innerloop.classify.support import read_support
from innerloop.data import BrokenImagesError, Preprocessing

AS_THEY_ARE = Preprocessing(size=16, channels=1)
Draw = Callable[..., Image.Image]


def read(source: object, **options: bool):
    return read_support(source, AS_THEY_ARE, **options)  # type: ignore[arg-type]


def test_a_folder_of_class_folders(support_folder: Path, shapes: Draw) -> None:
    (support_folder / "post" / "2.png").unlink()
    (support_folder / "dot" / "Thumbs.db").write_bytes(b"x")
    (support_folder / "@eaDir").mkdir()
    (support_folder / "__MACOSX" / "dot").mkdir(parents=True)
    shapes("bar").save(support_folder / "__MACOSX" / "dot" / "0.png")
    found = read(support_folder)
    assert found.classes == ("bar", "dot", "post")
    assert found.shots == (3, 3, 2)
    assert found.pixels.shape == (8, 1, 16, 16)
    assert found.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert found.ink == "dark"


def test_images_of_every_kind_by_class_name(support_folder: Path, shapes: Draw) -> None:
    file = support_folder / "dot" / "0.png"
    image = shapes("dot", 0)
    grey = np.asarray(image)
    kinds = [
        str(file),
        file,
        file.read_bytes(),
        image,
        grey,
        grey[:, :, None],
        grey[None],
        torch.from_numpy(grey.copy()),
        grey / 255,
        np.stack([grey] * 3, axis=2),
    ]
    found = read({"dot": kinds, "post": [shapes("post")]})
    for pixels in found.pixels[: len(kinds)]:
        assert torch.equal(pixels, found.pixels[0])


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((2, 3, 4, 5), np.uint8), "an array of shape (2, 3, 4, 5) is no image"),
        (np.zeros((0, 5), np.uint8), "an array of shape (0, 5) is no image"),
        (np.full((5, 5), 3.0), "values in [0, 1]"),
        (np.full((5, 5), np.nan), "values in [0, 1]"),
        (np.zeros((5, 5), np.int32), "got int32"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        read_image(array, AS_THEY_ARE)


def test_what_is_no_image_at_all() -> None:
    with pytest.raises(TypeError, match="got int"):
        read_image(7, AS_THEY_ARE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="class 'a' needs a list of images; got a single str"):
        read({"a": "a.png", "b": "b.png"})


def test_folders_that_make_no_classifier(tmp_path: Path, support_folder: Path, shapes: Draw) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no folders of images in it"):
        read(support_folder / "dot")
    (support_folder / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' has no images in it"):
        read(support_folder)
    with pytest.raises(ValueError, match="only one class, 'bar'; to tell"):
        read({"bar": [shapes("bar")]})
    with pytest.raises(ValueError, match="class 'dot' has no images"):
        read({"bar": [shapes("bar")], "dot": []})
    with pytest.raises(ValueError, match="no class;"):
        read({})
    (tmp_path / "one" / "only").mkdir(parents=True)
    shapes("dot").save(tmp_path / "one" / "only" / "a.png")
    with pytest.raises(ValueError, match="only one class, 'only' in "):
        read(tmp_path / "one")


@pytest.mark.parametrize(
    ("one", "other"),
    [("Cat", "cat "), ("straße", "STRASSE"), ("big  cat", "big cat"), (unicodedata.normalize("NFD", "Käfer"), "käfer")],
)
def test_names_that_are_the_same_to_a_person(shapes: Draw, one: str, other: str) -> None:
    with pytest.raises(ValueError, match="have one name but for"):
        read({one: [shapes("dot")], other: [shapes("bar")]})


def test_names_in_any_script(tmp_path: Path, shapes: Draw) -> None:
    names = ['it\'s "a" cat', "Ωμέγα", "猫 犬", "a, b\tc", "می‌خواهم", unicodedata.normalize("NFD", "Käfer")]
    for i, name in enumerate(names):
        (tmp_path / "classes" / name).mkdir(parents=True)
        shapes("dot", i).save(tmp_path / "classes" / name / "a b'c.png")
    found = read(tmp_path / "classes")
    assert set(found.classes) == {'it\'s "a" cat', "Ωμέγα", "猫 犬", "a, b c", "می‌خواهم", "Käfer"}
    with pytest.raises(ValueError, match="nothing in it can be seen"):
        read({" ": [shapes("dot")], "b": [shapes("bar")]})
    for name in ("a\udcff", "a\x00b", "\x1b[31mred"):
        with pytest.raises(ValueError, match="not all of it is text"):
            read({name: [shapes("dot")], "b": [shapes("bar")]})


def test_every_broken_image_is_named(support_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = (support_folder / "dot" / "0.png").read_bytes()
    (support_folder / "dot" / "a.png").write_bytes(b"")
    (support_folder / "dot" / "b.png").write_text("a text")
    (support_folder / "dot" / "c.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BrokenImagesError, match="3 of 12 images cannot be read") as caught:
        read(support_folder)
    assert [Path(name).name for name, _ in caught.value.broken] == ["a.png", "b.png", "c.png"]
    assert read(support_folder, skip_broken=True).shots == (3, 3, 3)
    assert "3 of 12" in caplog.text
    for file in (support_folder / "bar").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="no image of class 'bar' can be read"):
        read(support_folder, skip_broken=True)


def test_images_of_all_modes(shapes: Draw) -> None:
    grey = shapes("dot")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    file = io.BytesIO()
    grey.save(file, "GIF", save_all=True, append_images=[shapes("bar")])
    clear = Image.merge("LA", (Image.new("L", grey.size, 20), grey.point(lambda value: 255 - value)))
    found = read({"dot": [grey, grey.convert("CMYK"), deep, file.getvalue(), clear], "bar": [shapes("bar")]})
    for other in found.pixels[1:5]:
        assert (other.int() - found.pixels[0].int()).abs().max() < 40
    assert (found.pixels[5].int() - found.pixels[0].int()).abs().max() > 150


def test_an_upload_that_would_fill_memory_is_refused(shapes: Draw) -> None:
    with pytest.raises(ValueError, match="10000 x 10000 pixels are more than the limit of 40 megapixels"):
        read_image(Image.new("1", (10_000, 10_000)), AS_THEY_ARE)


def test_the_same_image_in_two_classes(support_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (support_folder / "bar" / "copy.png").write_bytes((support_folder / "dot" / "1.png").read_bytes())
    with caplog.at_level(logging.WARNING):
        read(support_folder)
    assert "the same image is in two classes" in caplog.text
    assert "copy.png" in caplog.text
    assert str(Path("dot") / "1.png") in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_that_lead_back(support_folder: Path) -> None:
    (support_folder / "dot" / "again").symlink_to(support_folder)
    (support_folder / "itself").symlink_to(support_folder / "itself")
    found = read(support_folder)
    assert found.shots == (3, 3, 3)
    assert any("looked at already" in note for note in found.notes)


def test_ink(shapes: Draw, caplog: pytest.LogCaptureFixture) -> None:
    dark, bright = shapes("dot"), shapes("bar", ink=230, page=10)
    assert read({"a": [dark], "b": [shapes("bar")]}).ink == "dark"
    assert read({"a": [bright], "b": [shapes("dot", ink=230, page=10)]}).ink == "bright"
    assert caplog.text == ""
    assert read({"a": [dark], "b": [bright]}).ink is None
    assert "1 support images are dark ink on a light page and 1 bright ink" in caplog.text
    photographs = [Image.effect_noise((40, 40), 120) for _ in range(4)]
    assert read({"a": photographs[:2], "b": photographs[2:]}).ink is None
