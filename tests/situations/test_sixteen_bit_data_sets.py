"""Training on images with 12 of 16 bits in use: one white for all splits, found, given, cached, recorded, asked by."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import innerloop
from innerloop.classify import Classifier
from innerloop.classify.export import export
from innerloop.cli.main import main
from innerloop.data import image_folder, mini_imagenet
from innerloop.data.images import Fit
from innerloop.training.config import ConfigError, config_from_json

SIZE = 8
SPLITS = ("train", "val", "test")
READERS: list[Callable[..., Any]] = [image_folder, mini_imagenet]


@pytest.fixture(autouse=True)
def _float32(_float64_and_seed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setenv("INNERLOOP_CACHE", str(tmp_path / "cache"))


def picture(seed: int, white: int) -> NDArray[np.uint16]:
    values = np.random.default_rng(seed).integers(0, white + 1, (SIZE, SIZE)).astype(np.uint16)
    values[0, 0] = white
    return values


def in_eight_bits(values: NDArray[np.uint16], white: int = 4095) -> NDArray[np.uint8]:
    return np.floor(values.astype(np.float64) * 255 / white + 0.5).clip(0, 255).astype(np.uint8)


def of_splits(root: Path, brightest: dict[str, int]) -> Path:
    """Splits whose images go up to values of their own."""
    for s, split in enumerate(SPLITS):
        for i in range(2):
            (root / split / f"n{s}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(10 * s + i, brightest[split])).save(root / split / f"n{s}" / f"{i}.png")
    return root


@pytest.mark.parametrize("reader", READERS)
def test_white_is_the_same_in_every_split(
    tmp_path: Path, reader: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Training on dim images, testing on brighter ones: 900 is dark in all of them."""
    brightest = {"train": 900, "val": 200, "test": 4000}
    root = of_splits(tmp_path / "images", brightest)
    for _ in ("read", "from the cache"):
        caplog.clear()
        dataset = reader(root, size=SIZE)
        (record,) = caplog.records
        assert "use 12 bits: 4095 is taken for white" in record.message
        for s, split in enumerate(SPLITS):
            assert dataset[split].bits == 12
            for i in range(2):
                expected = in_eight_bits(picture(10 * s + i, brightest[split]))
                assert np.array_equal(dataset[split].images[i, 0].numpy(), expected)


@pytest.mark.parametrize("reader", READERS)
def test_what_is_brighter_than_was_said_is_cut_off_and_said(
    tmp_path: Path, reader: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    root = of_splits(tmp_path / "images", {"train": 4095, "val": 4095, "test": 20_000})
    for _ in ("read", "from the cache"):
        caplog.clear()
        dataset = reader(root, size=SIZE, bits=12)
        assert "16-bit images, up to 20000, with values above 4095, which is white here (12 bits)" in caplog.text
        assert np.array_equal(dataset["test"].images[0, 0].numpy(), in_eight_bits(picture(20, 20_000)))
    caplog.clear()
    reader(of_splits(tmp_path / "fitting", dict.fromkeys(SPLITS, 4095)), size=SIZE, bits=12)
    assert not caplog.records


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bits", [0, 4, 17, True, 12.0])
def test_bits_that_there_are_not(tmp_path: Path, reader: Callable[..., Any], bits: object) -> None:
    root = of_splits(tmp_path / "images", dict.fromkeys(SPLITS, 4095))
    with pytest.raises(ValueError, match="bits must be a whole number from 8 to 16"):
        reader(root, size=SIZE, bits=bits)


def test_the_cache_keeps_bits_apart(tmp_path: Path) -> None:
    root = of_splits(tmp_path / "images", dict.fromkeys(SPLITS, 4095))
    for white, bits in ((4095, 12), (65535, 16), (1023, 10), (4095, None), (4095, 12)):
        images = image_folder(root, size=SIZE, bits=bits)["train"].images
        assert np.array_equal(images[0, 0].numpy(), in_eight_bits(picture(0, 4095), white))


@pytest.mark.parametrize("fit", ["stretch", "crop", "ink"])
@pytest.mark.parametrize("invert", [False, True])
def test_turning_over_and_centring_go_by_the_scaled_values(tmp_path: Path, fit: Fit, invert: bool) -> None:
    """A drawing of 12 bits and its twin of 8: at 16 bits its ink would be too faint to be seen."""
    for name, white in (("eight", 255), ("twelve", 4095)):
        for s, split in enumerate(SPLITS):
            (tmp_path / name / split / f"n{s}").mkdir(parents=True)
            page = np.full((32, 32), white, np.uint16 if white > 255 else np.uint8)
            page[10 + s : 14 + s, 4:20] = 0
            Image.fromarray(page).save(tmp_path / name / split / f"n{s}" / "0.png")
    eight, twelve = (image_folder(tmp_path / n, size=SIZE, fit=fit, invert=invert) for n in ("eight", "twelve"))
    for one, other in zip(eight.values(), twelve.values(), strict=True):
        assert torch.equal(one.images, other.images)


def test_a_broken_image_says_nothing_of_bits(tmp_path: Path) -> None:
    root = of_splits(tmp_path / "images", dict.fromkeys(SPLITS, 4095))
    Image.fromarray(np.full((SIZE, SIZE), 100_000, np.int32)).save(root / "train" / "n0" / "huge.tif")
    dataset = image_folder(root, size=SIZE, skip_broken=True)
    assert dataset["train"].bits == 12
    assert np.array_equal(dataset["train"].images[0, 0].numpy(), in_eight_bits(picture(0, 4095)))


def test_bits_of_a_data_set_that_has_none_are_refused() -> None:
    for dataset in ("omniglot", "strokes"):
        with pytest.raises(ConfigError, match=f"--bits is for 16-bit images, and --dataset {dataset} has none"):
            config_from_json({"data": {"dataset": dataset, "bits": 12}})


def test_a_run_of_sixteen_bits_and_images_of_twelve_is_said(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    """The run's white is kept, by which these are dark; whoever reads the note can say --bits 12."""
    config = config_from_json({"data": {"dataset": "folder", "channels": 1, "image_size": 16, "bits": 16}})
    trained = innerloop.load(make_run(tmp_path / "run", config))
    support = {"a": [picture(0, 4095)], "b": [picture(1, 4095)]}
    notes = trained.adapt(support).notes
    assert any("use 12 bits; 65535 is white all the same" in note and "--bits 12" in note for note in notes)
    twelve = trained.adapt(support, bits=12)
    assert not any("white all the same" in note for note in twelve.notes)
    assert twelve.preprocessing.bits == 12


def test_watching_the_steps_says_it_too(caplog: pytest.LogCaptureFixture) -> None:
    adaptation = innerloop.load().adaptation({"a": [picture(0, 4095)], "b": [picture(1, 4095)]})
    adaptation.probabilities([picture(2, 4095)])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        adaptation.probabilities([picture(3, 16383)])
    assert "1 image (image 1) with values above 4095, which is white here (12 bits)" in caplog.text


def test_an_exported_classifier_says_by_what_to_divide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "my.safetensors", tmp_path / "exported.pt"
    innerloop.load().adapt({"a": [picture(0, 4095)], "b": [picture(1, 4095)]}).save(file)
    command = ["export", str(file), "--torchscript", "--overwrite", "--out", str(out)]
    assert main(command) == 0
    assert "divide 16-bit images by 4095; what is above is 1" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits"] == 12
    extra = {"innerloop.json": ""}
    export(Classifier.load(file), out, "torchscript")
    torch.jit.load(out, _extra_files=extra)  # type: ignore[no-untyped-call]
    assert json.loads(json.loads(extra["innerloop.json"])["innerloop"])["preprocessing"]["bits"] == 12
