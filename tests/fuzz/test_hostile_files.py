"""Files from strangers that mean harm, by name: each does nothing, and is refused in words."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generators import _LAUGHING_KEY, _LAUGHS, IMAGES, png_of_size, safetensors_file
from targets import _resume, _small_omniglot, _state

import innerloop
from innerloop.classify import Classifier, ModelFileError
from innerloop.cli.main import main
from innerloop.data import BrokenImagesError, ClassImages, mini_imagenet, omniglot
from innerloop.data.cache import load_cached, store_cached
from innerloop.data.images import decode_image
from innerloop.methods import maml
from innerloop.reports.records import read_run
from innerloop.training.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from innerloop.training.config import Config, ConfigError, NetworkConfig, config_from_json, config_to_json
from innerloop.training.run_folder import RunFolder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- programs in place of data ----------------------------------------------------------------------------------------


class Runs:
    """Unpickled, it makes a file called pwned."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


def weapons() -> dict[str, bytes]:
    """Files that run a program in whatever unpickles them."""
    modern, old = io.BytesIO(), io.BytesIO()
    torch.save({"a": Runs()}, modern)
    torch.save({"a": Runs()}, old, _use_new_zipfile_serialization=False)
    saved = io.BytesIO()
    np.save(saved, np.array([Runs()]), allow_pickle=True)
    return {
        "pickle": pickle.dumps(Runs()),
        "pickle of protocol 0": pickle.dumps({"image_data": Runs(), "class_dict": {}}, 0),
        "torch.save": modern.getvalue(),
        "torch.save of old": old.getvalue(),
        "numpy": saved.getvalue(),
    }


WEAPONS = weapons()


def test_they_are_live(here: Path) -> None:
    pickle.loads(WEAPONS["pickle"])
    assert (here / "pwned").exists()


@pytest.mark.parametrize("name", WEAPONS)
def test_a_program_as_mini_imagenet(name: str, here: Path) -> None:
    for split in ("train", "val", "test"):
        (here / f"mini-imagenet-cache-{split}.pkl").write_bytes(WEAPONS[name])
    with pytest.raises(ValueError, match=r"is refused|not a whole pickle|must hold a dict"):
        mini_imagenet(here)
    assert not (here / "pwned").exists()


@pytest.mark.parametrize("name", WEAPONS)
def test_a_program_as_checkpoint(
    name: str, here: Path, make_run: Callable[..., Path], support_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(here / "run")
    for file in ("latest", "previous", "epoch-0001", "epoch-0002"):
        (run / "checkpoints" / f"{file}.safetensors").write_bytes(WEAPONS[name])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_checkpoint(RunFolder(run).latest)
    for command in (["evaluate", "run"], ["adapt", "run", str(support_folder), "--out", "my.safetensors"]):
        assert main(command) == 2
        assert "safetensors" in capsys.readouterr().err
    assert not (here / "pwned").exists()
    assert not (here / "my.safetensors").exists()


@pytest.mark.parametrize("name", WEAPONS)
@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
def test_a_program_as_classifier(name: str, file: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / file).write_bytes(WEAPONS[name])
    (here / "a.png").write_bytes(IMAGES[1])
    with pytest.raises(ModelFileError, match="is not a classifier of innerloop"):
        Classifier.load(file)
    assert main(["predict", file, "a.png"]) == 2
    assert main(["export", file, "--out", "b.onnx", "--onnx"]) == 2
    assert "is not a classifier of innerloop" in capsys.readouterr().err
    assert not (here / "pwned").exists()


@pytest.mark.parametrize("name", WEAPONS)
def test_a_program_in_the_cache(name: str, here: Path) -> None:
    """Whoever can write to the cache gets nothing run: the images are read again."""
    store_cached(here, "strokes", "0" * 32, ClassImages(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), (1,), ("a",)))
    (here / f"strokes-{'0' * 32}.safetensors").write_bytes(WEAPONS[name])
    assert load_cached(here, "strokes", "0" * 32) is None
    assert not (here / "pwned").exists()


def test_postscript_called_png_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by fuzzing: Pillow goes by the content, and gave PostScript to Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    for start in (b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 100) + b"\0" * 20):
        with pytest.raises(ValueError, match="not an image that can be read"):
            decode_image(start + b"%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", size=8, channels=1)


def test_names_that_command_a_terminal(
    here: Path, make_run: Callable[..., Path], support_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stranger's classifier has names of classes: they are printed, not obeyed."""
    from dataclasses import replace

    classifier = innerloop.load(make_run(here / "run")).adapt(support_folder)
    names = tuple(f"\x1b[2J\x1b]0;{i}\x07\n" for i in range(len(classifier.classes)))
    replace(classifier, classes=names).save("my.safetensors")
    assert main(["predict", "my.safetensors", str(support_folder)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert len(said.splitlines()) == 9
    assert r"\x1b[2J" in said


# --- archives ---------------------------------------------------------------------------------------------------------


def archive(*members: tuple[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as out:
        for name, data in members:
            out.writestr(name, data)
    return file.getvalue()


def forged(data: bytes, at: int, value: bytes) -> bytes:
    """The archive with bytes of its first entry in the central directory changed."""
    entry = data.index(b"PK\x01\x02")
    return data[: entry + at] + value + data[entry + at + len(value) :]


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


GOOD = "images_background/A/character01/1.png"
BAD_ARCHIVES = {
    "climbs out": (archive(("images_background/../../../up.png", b"x")), "outside the archive"),
    "climbs out with backslashes": (archive(("a\\..\\..\\b\\up.png", b"x")), "outside the archive"),
    "is absolute": (archive(("/etc/cron.d/x.png", b"x")), "outside the archive"),
    "is on another drive": (archive(("C:/Windows/a/x.png", b"x")), "outside the archive"),
    "is a link": (archive((link(GOOD), b"/etc/passwd")), "a member that is a link"),
    "is there twice": (archive((GOOD, b"x"), ("b", b""), (GOOD, b"y")), "two members of the name"),
    "is encrypted": (forged(archive((GOOD, b"x")), 8, b"\x01\x00"), "a member that is encrypted"),
    "is in bzip2": (archive((GOOD, b"x"), compression=zipfile.ZIP_BZIP2), "an unusual compression"),
    "is a bomb": (archive((GOOD, b"\0" * 5_000_000)), "a member of 5000000 bytes"),
    "says 4 GB": (forged(archive((GOOD, b"x")), 24, b"\xff\xff\xff\x7f"), "a member of 2147483647 bytes"),
    "has a hidden end": (archive((GOOD, b"x")).replace(b"/1.png", b"/1.\0ng"), "without a proper name|whole zip"),
    "is cut off": (archive((GOOD, b"x"))[:-30], "not a whole zip archive"),
    "is of a later version": (forged(archive((GOOD, b"x")), 6, b"\xff\x00"), "not a whole zip archive"),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_whose_member(name: str, here: Path) -> None:
    data, message = BAD_ARCHIVES[name]
    (here / "images_background.zip").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        omniglot(here, cache=False)
    assert [path.name for path in here.iterdir()] == ["images_background.zip"]


def test_an_archive_of_too_many_members(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["innerloop.data.omniglot"], "_MOST_MEMBERS", 3)
    (here / "images_background.zip").write_bytes(archive(*((f"a/b/{i}.png", b"") for i in range(4))))
    with pytest.raises(ValueError, match="has 4 members, 3 at most are expected"):
        omniglot(here, cache=False)


def small_archives(here: Path, first: Callable[[bytes], bytes] = lambda data: data, image: bytes = IMAGES[0]) -> None:
    for part, characters in (("images_background", 3), ("images_evaluation", 2)):
        names = [f"{part}/{part[7:]}/character{c}/{i}.png" for c in range(characters) for i in range(2)]
        odd = part == "images_background"
        data = archive(*((name, image if odd and name == names[0] else IMAGES[0]) for name in names))
        (here / f"{part}.zip").write_bytes(first(data) if odd else data)


def test_an_archive_that_lies_about_a_size(here: Path) -> None:
    """No more is unpacked than is said: 50 MB of zeros that say that they are 64 bytes take no 50 MB."""
    small_archives(here, lambda data: forged(data, 24, struct.pack("<I", 64)), b"\0" * 50_000_000)
    tracemalloc.start()
    with _small_omniglot(), pytest.raises(BrokenImagesError, match="1 of 10 images cannot be read"):
        omniglot(here, size=4, cache=False)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_an_archive_in_an_archive_is_not_opened(here: Path) -> None:
    small_archives(here, image=archive(("a/b/c.png", IMAGES[0])))
    with _small_omniglot(), pytest.raises(BrokenImagesError, match="not an image that can be read"):
        omniglot(here, size=4, cache=False)


def test_two_archives_of_the_same_characters(here: Path) -> None:
    """Found by fuzzing: an IndexError."""
    for part, characters in (("images_background", 3), ("images_evaluation", 2)):
        names = [f"{part}/A/character{c}/{i}.png" for c in range(characters) for i in range(2)]
        (here / f"{part}.zip").write_bytes(archive(*((name, IMAGES[0]) for name in names)))
    with _small_omniglot(), pytest.raises(ValueError, match=r"A/character0 is in .* and in the other part too"):
        omniglot(here, size=4, cache=False)


# --- more than there is memory or time for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        # A few hundred bytes that stand for 2^60 lists: following them took for ever.
        b"}(X\4\0\0\0data" + _LAUGHS + b"X\6\0\0\0labels" + _LAUGHS + b"u.",
        # A tuple of tuples of tuples as a key: hashing it did not end.
        b"}" + _LAUGHING_KEY + b"K\1s.",
        # Something to be remembered as number 2147483647: Python made room for all that come before.
        b"]r\xff\xff\xff\x7f.",
        # A text of 2^62 bytes.
        b"\x8d\0\0\0\0\0\0\0\x40.",
        # A list in itself; a hundred thousand lists in one another.
        b"]q\0h\0a.",
        b"]" * 100_000 + b"a" * 99_999 + b".",
    ],
)
def test_a_pickle_that_swells(data: bytes, here: Path) -> None:
    for split in ("train", "val", "test"):
        (here / f"mini-imagenet-cache-{split}.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=r"is refused|not a whole pickle|must hold a dict"):
        mini_imagenet(here)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": np.zeros((2, 1, 1, 3), np.uint8), "labels": [0, 1, 2]}, "the label of each of 2 images"),
        ({"data": np.zeros((2, 1, 1, 3), np.uint8), "labels": [0.5, 1]}, "the label of each of 2 images"),
        # One image, asked for a thousand times over: a file of nothing that fills memory.
        ({"image_data": np.zeros((1, 1, 1, 3), np.uint8), "class_dict": {"n": [0] * 1000}}, "each image once"),
        ({"data": np.zeros((1, 1, 1, 3), np.uint8), "labels": [0], "catname2label": {"n": float("inf")}}, "values"),
    ],
)
def test_a_pickle_with_numbers_of_its_own(content: Any, message: str, here: Path) -> None:
    for split in ("train", "val", "test"):
        (here / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message):
        mini_imagenet(here)


def test_a_class_for_each_image_takes_no_time_by_their_square(here: Path) -> None:
    """Found by reading: n labels were compared n times, 10^10 comparisons here."""
    n = 100_000
    content = {"data": np.zeros((n, 1, 1, 3), np.uint8), "labels": np.arange(n)}
    for split in ("train", "val", "test"):
        (here / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content))
    assert len(mini_imagenet(here, size=1)["train"].names) == n


def test_a_small_image_of_billions_of_pixels() -> None:
    for width, height in ((2**31 - 1, 2**31 - 1), (50_000, 50_000), (7_000, 7_000)):
        with pytest.raises(ValueError, match=r"megapixels|not an image"):
            decode_image(png_of_size(width, height), size=8, channels=1)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000])
def test_json_nested_without_end_or_of_endless_numbers(text: str, here: Path, make_run: Callable[..., Path]) -> None:
    """Found by fuzzing: a RecursionError, and a ValueError that did not say which file."""
    run = RunFolder(make_run(here / "run"))
    (run.path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json is not a run's config"):
        run.read_config()
    run = RunFolder(make_run(here / "another"))
    run.metrics.write_text(f"{text}\n{{}}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1 is not JSON"):
        read_run(run.path)
    run.latest.write_bytes(safetensors_file({}, {"innerloop": text}))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(run.latest)
    (here / "model").write_bytes(safetensors_file({}, {"innerloop_classifier": text, "checksum": ""}))
    with pytest.raises(ModelFileError, match="is damaged"):
        Classifier.load("model")


def test_numbers_too_large_for_a_record(here: Path) -> None:
    """Found by fuzzing: an OverflowError."""
    (here / "metrics.jsonl").write_text('{"epoch": 1e999}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_run(here)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("data", "image_size", 10**6),
        ("data", "ways", 10**30),
        ("method", "inner_steps", 10**9),
        ("method", "inner_lr", float("nan")),
        ("method", "inner_lr", 1e300),
        ("outer", "outer_lr", 1e300),
        ("outer", "outer_lr", float("nan")),
        ("outer", "outer_lr_min", 1e300),
        ("outer", "clip", float("inf")),
        ("compute", "threads", 10**6),
        ("compute", "processes", 10**6),
        ("compute", "seed", 2**70),
        ("evaluation", "test_steps", 10**9),
    ],
)
def test_settings_that_no_machine_has_room_for(section: str, name: str, value: Any) -> None:
    values = config_to_json(Config())
    values[section][name] = value
    with pytest.raises(ConfigError):
        config_from_json(values)


def test_a_network_larger_than_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by fuzzing: PyTorch's own error, with a stack trace."""
    monkeypatch.setattr("innerloop.training.trainer.build_tasks", lambda *_, **__: None)
    for filters in (10**6, 10**9, 10**15):
        assert main(["train", "quickstart", "--filters", str(filters)]) == 2
        assert "larger than this machine's memory" in " ".join(capsys.readouterr().err.split())


def test_a_run_whose_config_asks_for_more_than_its_checkpoint_has(
    here: Path, make_run: Callable[..., Path], support_folder: Path
) -> None:
    """The config of a stranger's run says 4,000 filters, a gigabyte, and its checkpoint has 8: shapes come first."""
    method = maml(inner_steps=1, zero_init=("head.*",))
    run = RunFolder(make_run(here / "run", Config(network=NetworkConfig(filters=8), method=method)))
    config = json.loads((run.path / "config.json").read_text())
    config["config"]["network"]["filters"] = 4000
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not fit its config.json"):
        innerloop.load(run.path).adapt(support_folder)


def test_a_checkpoint_that_does_not_say_how_good_it_is(here: Path, make_run: Callable[..., Path]) -> None:
    """Found by fuzzing: a KeyError."""
    run = RunFolder(make_run(here / "run"))
    tensors, _ = load_checkpoint(run.epoch_checkpoint(1))
    for state in ({}, {"val": "good", "epoch": 1}, {"val": 1.0, "epoch": [1]}):
        save_checkpoint(run.epoch_checkpoint(1), tensors, state)
        with pytest.raises(CheckpointError, match="does not say its epoch"):
            innerloop.load(run.path)


def test_a_checkpoint_with_a_number_in_place_of_an_array(
    here: Path, make_run: Callable[..., Path], support_folder: Path
) -> None:
    """Found by fuzzing: an IndexError."""
    method = maml(inner_steps=1, zero_init=("head.*",))
    run = RunFolder(make_run(here / "run", Config(network=NetworkConfig(filters=8), method=method)))
    tensors, state = load_checkpoint(run.epoch_checkpoint(1))
    bias = next(name for name, tensor in tensors.items() if tensor.dim() == 1)
    save_checkpoint(run.epoch_checkpoint(1), {**tensors, bias: torch.tensor(0.0)}, state)
    with pytest.raises(CheckpointError, match=r"does not fit its config.json"):
        innerloop.load(run.path).adapt(support_folder)


@pytest.mark.parametrize(("dtype", "size"), [("BOOL", 1), ("C64", 8), ("I64", 8), ("F8_E4M3", 1)])
def test_a_state_whose_optimiser_counts_in_other_numbers(dtype: str, size: int, here: Path) -> None:
    """Found by fuzzing: the first update after going on ended in PyTorch's own error."""
    tensors, state = _state()
    text = json.dumps({**state, "version": 1})
    _resume((safetensors_file(tensors, {"innerloop": text}), None))
    shutil.rmtree("run")
    other = {**tensors, "optimizer/0/step": (dtype, [], bytes(size))}
    with pytest.raises(CheckpointError, match="are counted in"):
        _resume((safetensors_file(other, {"innerloop": text}), None))
