"""Checkpoint files: whole or not there, ours or refused, never unpickled."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from innerloop.training.checkpoints import (
    CheckpointError,
    load_checkpoint,
    remove_leftovers,
    save_checkpoint,
    write_atomically,
)


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
    with pytest.raises(CheckpointError, match=r"version 99, of a newer innerloop.*Upgrade"):
        load_checkpoint(tmp_path / "newer")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "missing")


def test_no_flipped_bit_goes_unseen(tmp_path: Path) -> None:
    path = tmp_path / "c"
    tensors = {"a": torch.randn(5), "b": torch.arange(3), "empty": torch.zeros(0, 2), "half": torch.ones(2).bfloat16()}
    save_checkpoint(path, tensors, {"epoch": 3})
    whole = path.read_bytes()
    missed = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            loaded, state = load_checkpoint(path)
        except CheckpointError:
            continue
        # The header's padding and the like do not matter; nothing that is read may differ.
        if state["epoch"] != 3 or any(not torch.equal(loaded[n], t) for n, t in tensors.items()):
            missed.append(place)
    assert not missed


def test_every_cut_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, {"a": torch.randn(5)}, {"epoch": 3})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


def test_version_1_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    header = {"innerloop": json.dumps({"version": 1, "epoch": 3})}
    save_file({"a": torch.ones(2)}, tmp_path / "old", metadata=header)
    tensors, state = load_checkpoint(tmp_path / "old")
    assert torch.equal(tensors["a"], torch.ones(2))
    assert state["epoch"] == 3
    # What is of version 2 and has lost its checksum is not taken for an old one.
    save_file({"a": torch.ones(2)}, tmp_path / "lost", metadata={"innerloop": json.dumps({"version": 2})})
    with pytest.raises(CheckpointError, match="damaged: what it holds does not have the checksum"):
        load_checkpoint(tmp_path / "lost")


def test_a_write_past_a_limit_leaves_the_old_file_and_says_so(tmp_path: Path) -> None:
    """The kernel itself refuses, in the middle of the file."""
    program = """
import resource, sys
from pathlib import Path
import torch
from innerloop.training.checkpoints import WriteError, load_checkpoint, save_checkpoint
path = Path(sys.argv[1])
save_checkpoint(path, {"a": torch.zeros(10)}, {"epoch": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_checkpoint(path, {"a": torch.zeros(10_000)}, {"epoch": 2}, previous=path.with_name("previous"))
except WriteError as error:
    print(error)
print(load_checkpoint(path)[1]["epoch"], *sorted(p.name for p in path.parent.iterdir()))
"""
    pytest.importorskip("resource")
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "c")], capture_output=True, text=True, check=True
    )
    said, left = ran.stdout.splitlines()
    assert "c cannot be written: File too large. What was there before is as it was; raise the limit" in said
    assert left == "1 c"


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".latest.safetensors.123.tmp", ".a.png.0f.part", "notes.tmp", ".hidden"):
        (tmp_path / name).touch()
    remove_leftovers([tmp_path, tmp_path / "not there"])
    assert {p.name for p in tmp_path.iterdir()} == {"notes.tmp", ".hidden"}
