"""Images of microscopes and scanners: 16 bits a pixel in the file, 12 of them in use."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import innerloop
from innerloop.classify import Classifier
from innerloop.cli.main import main
from innerloop.data import Preprocessing, image_folder
from innerloop.training.run_folder import RunFolder

SIZE = 8


@pytest.fixture(autouse=True)
def _float32(_float64_and_seed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setenv("INNERLOOP_CACHE", str(tmp_path / "cache"))


def picture(seed: int, bits: int = 12) -> NDArray[np.uint16]:
    """Values of so many bits, the largest among them."""
    values = np.random.default_rng(seed).integers(0, 2**bits, (SIZE, SIZE), dtype=np.uint16)
    values[0, 0] = 2**bits - 1
    return values


def in_eight_bits(values: NDArray[np.uint16], bits: int = 12) -> NDArray[np.uint8]:
    return np.floor(values.astype(np.float64) * 255 / (2**bits - 1) + 0.5).astype(np.uint8)


def classes(root: Path, mixed: bool = False, kind: str = "png", count: int = 5, shots: int = 3) -> Path:
    for c in range(count):
        (root / f"class {c}").mkdir(parents=True)
        for i in range(shots):
            values = picture(10 * c + i)
            image = Image.fromarray(in_eight_bits(values) if mixed and i % 2 else values)
            if kind == "pgm" and image.mode == "I;16":
                image = image.convert("I")  # which Pillow 10 writes as PGM too
            image.save(root / f"class {c}" / f"{i}.{kind}")
    return root


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_folder_is_scaled_by_the_bits_in_use(
    tmp_path: Path, mixed: bool, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = classes(tmp_path / "images", mixed, kind)
    for _ in ("read", "from the cache"):
        caplog.clear()
        dataset = image_folder(root, size=SIZE, channels=1)
        assert "use 12 bits: 4095 is taken for white" in caplog.text
        for split in dataset.values():
            assert split.bits == 12
            for name, first in zip(split.names, split.starts, strict=True):
                for i in range(3):
                    expected = in_eight_bits(picture(10 * int(name.split()[1]) + i))
                    assert np.array_equal(split.images[first + i, 0].numpy(), expected)


def test_the_bits_are_those_of_the_whole_set(tmp_path: Path) -> None:
    """A dark image is dark: one bright one, in another class, says what white is."""
    root = classes(tmp_path / "images")
    dark = np.full((SIZE, SIZE), 100, np.uint16)
    Image.fromarray(dark).save(root / "class 1" / "0.png")
    dataset = image_folder(root, size=SIZE, channels=1)
    images = {n: s.images[f, 0] for s in dataset.values() for n, f in zip(s.names, s.starts, strict=True)}
    assert (images["class 1"] == round(100 * 255 / 4095)).all()


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_bits_given_are_taken(tmp_path: Path, bits: int) -> None:
    dataset = image_folder(classes(tmp_path / "images"), size=SIZE, channels=1, bits=bits)
    values = np.minimum(picture(0), 2**bits - 1)
    images = {n: s.images[f, 0] for s in dataset.values() for n, f in zip(s.names, s.starts, strict=True)}
    assert np.array_equal(images["class 0"].numpy(), in_eight_bits(values, bits))


def test_all_sixteen_bits_are_as_ever(tmp_path: Path) -> None:
    values = picture(0, 16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    pixels = Preprocessing(size=SIZE, channels=1).pixels(file.getvalue())
    assert np.array_equal(pixels[0], in_eight_bits(values, 16))


def test_colours_that_cannot_be_read_whole_are_refused() -> None:
    """Pillow reads the upper 8 of 16 bits: of 12 in use, 4 would be left."""
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (7, 3, 1)).save(file, "PNG")
    eight = file.getvalue()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + struct.pack(">3H", 4000, 2000, 0) * SIZE for _ in range(SIZE))
    deep = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", SIZE, SIZE, 16, 2, 0, 0, 0))
    deep += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    Preprocessing(size=SIZE, channels=3).pixels(eight)
    with pytest.raises(ValueError, match=r"colours have 16 bits.*save it with 8 bits a channel"):
        Preprocessing(size=SIZE, channels=3).pixels(deep)


def run_of(folder: Path, root: Path) -> Path:
    arguments = (
        f"train folder --data {root} --out {folder} --ways 2 --shots 1 --queries 1 --image-size 16 --channels 1 "
        "--filters 4 --epochs 1 --iterations 1 --meta-batch 1 --val-tasks 1 --test-tasks 1 --inner-steps 1 "
        "--threads 1 --processes 1 --ratios 0.4 0.3 0.3 --zero-init head.* --quiet"
    )
    assert main(arguments.split()) == 0
    return folder


def test_a_run_records_them_and_prediction_uses_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = classes(tmp_path / "images", count=7)
    folder = run_of(tmp_path / "run", root)
    logging.getLogger().addHandler(caplog.handler)  # the command has set up logging anew
    _, config = RunFolder(folder).read_config()
    assert config.data.bits == 12
    trained = innerloop.load(folder)
    assert trained.preprocessing.bits == 12
    support = {"a": [picture(0)], "b": [picture(10)]}
    adapted = trained.adapt(support)
    eight = trained.adapt({name: [in_eight_bits(v) for v in values] for name, values in support.items()})
    asked = [picture(20), picture(30)]
    expected = eight.probabilities([in_eight_bits(v) for v in asked])
    torch.testing.assert_close(adapted.probabilities(asked), expected)
    torch.testing.assert_close(eight.probabilities(asked), expected)  # the run's bits, though its support had none
    adapted.save(tmp_path / "my.safetensors")
    torch.testing.assert_close(Classifier.load(tmp_path / "my.safetensors").probabilities(asked), expected)
    assert not caplog.records
    adapted.predict([picture(0, 14)])
    assert "values above 4095, which is white here (12 bits): what is brighter is cut off" in caplog.text


def test_of_a_run_that_has_seen_none_the_support_set_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained = innerloop.load()
    support = {"a": [picture(0), in_eight_bits(picture(1))], "b": [picture(10), picture(11)]}
    classifier = trained.adapt(support)
    assert classifier.preprocessing.bits == 12
    assert any("4095 is taken for white" in note for note in classifier.notes)
    eight = {name: [v if v.dtype == np.uint8 else in_eight_bits(v) for v in values] for name, values in support.items()}
    plain = trained.adapt(eight)
    asked = picture(20)
    torch.testing.assert_close(
        classifier.probabilities([asked]), plain.probabilities([in_eight_bits(asked)]), rtol=1e-4, atol=1e-5
    )
    with caplog.at_level(logging.WARNING):
        plain.predict([asked])  # it knows nothing of bits
    assert "say how many bits they use (--bits)" in caplog.text


def test_the_commands_take_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(Path(innerloop.__file__).parent / "checkpoints" / "strokes")
    root = classes(tmp_path / "images", count=2)
    out = tmp_path / "my.safetensors"
    assert main(["adapt", run, str(root), "--out", str(out), "--bits", "14", "--no-estimate"]) == 0
    assert Classifier.load(out).preprocessing.bits == 14
    capsys.readouterr()
    assert main(["predict", str(out), str(root / "class 0" / "0.png"), "--bits", "12"]) == 0
    assert "class" in capsys.readouterr().out
    assert main(["adapt", run, str(root), "--out", str(out), "--bits", "4", "--overwrite"]) == 2
