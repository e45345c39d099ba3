from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from innerloop.data import BrokenImagesError, image_folder
from innerloop.data.images import class_folders, decode_image, prepare_image, read_images


def as_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode(data: bytes, channels: int = 1, size: int = 8, **options) -> np.ndarray:
    pixels = decode_image(data, size=size, channels=channels, **options)
    assert pixels.shape == (channels, size, size)
    assert pixels.dtype == np.uint8
    return pixels


def test_modes(encoded) -> None:
    assert (decode(encoded(1, "1")) == 255).all()
    assert (decode(encoded(90, "L"), channels=3) == 90).all()
    assert decode(encoded((10, 20, 30), "RGB"), channels=3)[:, 0, 0].tolist() == [10, 20, 30]
    assert (decode(encoded(2**15, "I;16")) == 128).all()
    assert (decode(encoded(65535, "I;16"), channels=3) == 255).all()
    cmyk = decode(encoded((0, 0, 0, 0), "CMYK", kind="TIFF"), channels=3)
    assert (cmyk == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert decode(as_bytes(palette), channels=3)[:, 0, 0].tolist() == [200, 100, 50]


def test_transparency_lies_on_white_paper(encoded) -> None:
    assert (decode(encoded((0, 0, 0, 0), "RGBA"), channels=3) == 255).all()
    assert (decode(encoded((0, 255), "LA")) == 0).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    assert (decode(as_bytes(palette, transparency=1)) == 255).all()


def test_exif_orientation_is_obeyed() -> None:
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = decode(as_bytes(image, "PNG", exif=exif))
    assert (turned[0, 4:] == 255).all()
    assert (turned[0, :4] == 0).all()


def test_thin_strokes_survive_being_made_smaller() -> None:
    image = Image.new("1", (105, 105), 1)
    for x in range(50, 53):
        image.paste(0, (x, 20, x + 1, 80))
    small = decode(as_bytes(image), size=28, invert=True)[0]
    assert small[10, 12:16].max() > 150
    assert len(np.unique(small)) > 2
    assert small[0].max() == 0


def test_fit() -> None:
    image = Image.new("L", (24, 8), 0)
    image.paste(255, (8, 0, 16, 8))
    assert (decode(as_bytes(image), fit="crop") == 255).all()
    assert decode(as_bytes(image), fit="stretch")[0, 0, 0] < 20


def test_invert(encoded) -> None:
    assert (decode(encoded(10, "L"), invert=True) == 245).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_they_are_decoded(encoded, monkeypatch) -> None:
    small = encoded(size=(20, 20))
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    for sides in ((10_000, 10_000), (100_000, 100_000)):
        # A header may claim any size; its checksum is the only thing to put right.
        header = b"IHDR" + struct.pack(">II", *sides) + small[24:29]
        claimed = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
        with pytest.raises(ValueError, match="than the limit of 40 megapixels"):
            decode(claimed)


def test_what_is_no_image_says_so() -> None:
    with pytest.raises(ValueError, match="the file is empty"):
        decode(b"")
    with pytest.raises(ValueError, match="not an image that can be read"):
        decode(b"just some text")


def test_the_first_picture_of_an_animation_is_taken() -> None:
    first, second = Image.new("L", (8, 8), 40), Image.new("L", (8, 8), 200)
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert (decode(as_bytes(first, kind, save_all=True, append_images=[second], **options)) == 40).all()


def test_floating_point_images_are_refused(encoded) -> None:
    with pytest.raises(ValueError, match="floating-point"):
        decode(encoded(0.5, "F", kind="TIFF"))


def break_images(folder: Path, encoded) -> dict[str, bytes]:
    whole = as_bytes(Image.effect_noise((64, 64), 50))
    broken = {"empty.png": b"", "text.png": b"not an image\n", "truncated.png": whole[: len(whole) // 2]}
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    return broken


@pytest.fixture
def root(tmp_path, encoded) -> Path:
    for c in range(4):
        folder = tmp_path / "classes" / f"class{c}"
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"{i}.png").write_bytes(encoded(10 * c + i))
    return tmp_path / "classes"


def test_all_broken_images_are_named_and_counted(root, encoded) -> None:
    broken = break_images(root / "class1", encoded)
    with pytest.raises(BrokenImagesError, match="3 of 15 images cannot be read") as caught:
        read_images("test", class_folders(root), size=8, channels=1)
    assert {Path(name).name for name, _ in caught.value.broken} == set(broken)
    assert "--skip-broken" in str(caught.value)
    for name in broken:
        assert str(root / "class1" / name) in str(caught.value)


def test_only_the_first_ten_are_shown(root) -> None:
    for i in range(13):
        (root / "class0" / f"bad{i}.jpg").write_bytes(b"bad")
    with pytest.raises(BrokenImagesError, match=r"and 3 more") as caught:
        read_images("test", class_folders(root), size=8, channels=1)
    assert len(caught.value.broken) == 13


def test_skip_broken(root, encoded, caplog) -> None:
    break_images(root / "class1", encoded)
    for _ in range(2):  # said again every time
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            classes = read_images("test", class_folders(root), size=8, channels=1, skip_broken=True)
        assert "left out 3 of 15 images" in caplog.text
        assert classes.sizes == (3, 3, 3, 3)
        assert classes.images[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]


def test_a_class_of_broken_images_only(root) -> None:
    for path in (root / "class2").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="all 3 images of class 'class2' are broken"):
        read_images("test", class_folders(root), size=8, channels=1, skip_broken=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read anything")
def test_unreadable_files_are_broken(root) -> None:
    (root / "class0" / "0.png").chmod(0)
    with pytest.raises(BrokenImagesError, match=r"1 of 12.*\n.*Permission"):
        read_images("test", class_folders(root), size=8, channels=1)


def test_other_files_are_ignored(root) -> None:
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", ".hidden.png"):
        (root / "class0" / name).write_bytes(b"x")
    (root / ".git").mkdir()
    (root / "readme.md").write_text("x")
    listed = class_folders(root)
    assert list(listed) == ["class0", "class1", "class2", "class3"]
    assert [Path(source.name).name for source in listed["class0"]] == ["0.png", "1.png", "2.png"]


def test_folders_that_are_not_there(tmp_path, root) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*nowhere' does not exist; expected a folder of class folders"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        image_folder(root / "class0" / "0.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is empty; expected"):
        image_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match="has no folders in it"):
        image_folder(root / "class0")


def test_bad_sizes(root) -> None:
    with pytest.raises(ValueError, match="size must be at least 1"):
        image_folder(root, size=0)
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(RGB\); got 4"):
        image_folder(root, channels=4)


def test_progress_bar_is_for_terminals(root, capsys, monkeypatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    read_images("mine", class_folders(root), size=8, channels=1, cache=False, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # how rich is told that it writes to a terminal
    read_images("mine", class_folders(root), size=8, channels=1, cache=False, progress=True)
    assert "Reading mine" in capsys.readouterr().err


@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_drawing_is_the_same_wherever_and_however_large_it_was_drawn(dark: bool, mode: str) -> None:
    """A frame of 3:2, drawn twice at different places and sizes on pages of different shapes."""
    page, ink = (255, 0) if dark else (0, 255)
    drawn = []
    for width, height, scale, left, top in ((300, 320, 4, 5, 180), (600, 400, 8, 200, 60)):
        pixels = np.full((height, width), page, dtype=np.uint8)
        pixels[top : top + 20 * scale, left : left + 30 * scale] = ink
        pixels[top + 5 * scale : top + 15 * scale, left + 5 * scale : left + 25 * scale] = page
        image = Image.fromarray(pixels).convert(mode)
        drawn.append(prepare_image(image, size=40, channels=1 if mode == "L" else 3, fit="ink", invert=False))
    first, second = (d.astype(int) for d in drawn)
    assert abs(first - second).mean() < 4
    is_ink = (abs(second[0] - page) > 128).nonzero()
    rows, columns = is_ink[0], is_ink[1]
    assert 30 <= columns.max() - columns.min() + 1 <= 34  # 0.8 of 40
    assert abs((columns.max() + columns.min()) / 2 - 19.5) <= 1
    assert abs((rows.max() + rows.min()) / 2 - 19.5) <= 1
    assert 19 <= rows.max() - rows.min() + 1 <= 23  # two thirds of that: not stretched


def test_a_page_without_ink_stays_as_it_is() -> None:
    image = Image.new("L", (30, 20), 250)
    assert (prepare_image(image, size=10, channels=1, fit="ink", invert=False) == 250).all()
