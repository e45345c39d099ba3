from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from innerloop.data import images
from innerloop.data.cache import cache_folder
from innerloop.data.images import class_folders, read_images


@pytest.fixture
def root(tmp_path, encoded) -> Path:
    for c in range(2):
        (tmp_path / "classes" / str(c)).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "classes" / str(c) / f"{i}.png").write_bytes(encoded(100 * c + i))
    return tmp_path / "classes"


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """One item for every image that was decoded."""
    calls: list[int] = []
    real = images.decode_image
    monkeypatch.setattr(images, "decode_image", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    return calls


def read(root: Path, **options):
    return read_images("test", class_folders(root), **{"size": 8, "channels": 1, **options})


def test_the_second_time_nothing_is_decoded(root, decoded, own_cache) -> None:
    first = read(root)
    assert len(decoded) == 4
    second = read(root)
    assert len(decoded) == 4
    assert torch.equal(first.images, second.images)
    assert (first.sizes, first.names) == (second.sizes, second.names)
    assert [path.suffix for path in own_cache.iterdir()] == [".safetensors"]


def test_whatever_matters_is_part_of_the_key(root, decoded, encoded) -> None:
    read(root)
    for options in ({"size": 9}, {"channels": 3}, {"invert": True}, {"fit": "crop"}):
        before = len(decoded)
        read(root, **options)
        assert len(decoded) == before + 4
    path = root / "0" / "0.png"
    path.write_bytes(encoded(77))
    os.utime(path, ns=(1, 1))
    assert read(root).images[0, 0, 0, 0] == 77
    (root / "1" / "2.png").write_bytes(encoded(5))
    assert read(root).sizes == (2, 3)


@pytest.mark.parametrize("damage", ["half", "empty", "text", "one byte"])
def test_a_damaged_cache_is_built_anew(root, decoded, own_cache, caplog, damage) -> None:
    good = read(root)
    (path,) = own_cache.iterdir()
    content = path.read_bytes()
    damaged = {
        "half": content[: len(content) // 2],
        "empty": b"",
        "text": b"hello" * 100,
        "one byte": content[:-1] + bytes([content[-1] ^ 1]),
    }[damage]
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(read(root).images, good.images)
    assert "damaged cache" in caplog.text
    assert len(decoded) == 8
    read(root)
    assert len(decoded) == 8


def test_no_cache_and_a_cache_elsewhere(root, decoded, own_cache, tmp_path) -> None:
    read(root, cache=False)
    assert not list(own_cache.iterdir())
    for _ in range(2):
        read(root, cache=tmp_path / "elsewhere")
    assert len(decoded) == 8
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_a_warning(root, tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        assert read(root, cache=tmp_path / "file").sizes == (2, 2)
    assert "cannot write the cache" in caplog.text


def test_where_the_cache_is(monkeypatch, own_cache) -> None:
    assert cache_folder(True) == own_cache
    assert cache_folder(False) is None
    assert cache_folder("/somewhere") == Path("/somewhere")
    monkeypatch.delenv("INNERLOOP_CACHE")
    assert "innerloop" in str(cache_folder(True))
