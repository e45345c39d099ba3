"""Checkpoint files: whole or not there, ours or refused, never unpickled."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from innerloop.training.checkpoints import CheckpointError, load_checkpoint, save_checkpoint, write_atomically


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    tensors = {
        "a/b": torch.randn(3, 4, dtype=torch.float64),
        "count": torch.tensor(7),
        "view": torch.randn(4, 4).t(),
    }
    save_checkpoint(tmp_path / "c", tensors, {"epoch": 3, "best": [[0.25, 1]]})
    loaded, state = load_checkpoint(tmp_path / "c")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], tensors[n]) and loaded[n].dtype == tensors[n].dtype for n in tensors)
    assert (state["epoch"], state["best"]) == (3, [[0.25, 1]])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {ran}",)

    (tmp_path / "c").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_checkpoint(tmp_path / "c")
    assert not ran.exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", {"a": torch.zeros(100)}, {})
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "c")


def test_files_of_others_and_of_newer_versions_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="not written by innerloop"):
        load_checkpoint(tmp_path / "theirs")
    save_checkpoint(tmp_path / "newer", {"a": torch.zeros(1)}, {"version": 99})
    with pytest.raises(CheckpointError, match="version 99"):
        load_checkpoint(tmp_path / "newer")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "missing")
