"""Checkpoints: one safetensors file each, tensors plus JSON in its header. Nothing is ever unpickled.

A file is written to a temporary name, synced, and renamed, and carries a checksum of all it holds, which is compared
when it is read: what a crash, a full disk or a bad one left is found out and never trained on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from innerloop.reports.formats import CHECKPOINT_VERSION, check_version

_HEADER, _CHECKSUM = "innerloop", "blake2b"


class CheckpointError(ValueError):
    """A file that is not a whole checkpoint of ours."""


class NewerFormatError(CheckpointError):
    """A checkpoint of a later version than this one reads."""


class WriteError(OSError):
    """The disk is full, or a file cannot be written for another reason; what was there before is as it was."""


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``, and see it on the disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def write_atomically(path: Path, data: bytes, before: Callable[[], None] = lambda: None) -> None:
    """Write a file so that it is there whole or as it was before, also after a crash of the machine.

    Temporary file, fsync, rename, fsync of the folder. ``before`` is called right before the rename.

    Raises:
        WriteError: it could not be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            write_all(descriptor, data)
        finally:
            os.close(descriptor)
        before()
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> WriteError:
    """``error`` with what to do about it."""
    hint = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some of your quota",
        errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
        errno.EROFS: "mount the file system for writing",
        errno.EACCES: "mend the folder's permissions",
    }.get(error.errno or 0, "see what the system has to say of it")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return WriteError(f"{path} cannot be written: {reason}. What was there before is as it was; {hint} and go on")


def sync_folder(folder: Path) -> None:
    """See a folder's entries (renamed and new files) on the disk. Windows has no such thing."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write values as JSON, atomically."""
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Remove the temporary files of writers that were killed."""
    for folder in folders:
        for file in (*folder.glob(".*.tmp"), *folder.glob(".*.part")):
            file.unlink(missing_ok=True)


def save_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], previous: Path | None = None
) -> None:
    """Write tensors and a JSON state to one file, atomically.

    With ``previous``, the file that was at ``path`` is kept under that name. At any moment one of the two is whole.

    Raises:
        WriteError: it could not be written; what was there before is as it was.
    """
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    header = json.dumps({"version": CHECKPOINT_VERSION, **state})
    data = save(copies, metadata={_HEADER: header, _CHECKSUM: _checksum(copies, header)})

    def keep() -> None:
        if previous is not None and path.exists():
            os.replace(path, previous)

    write_atomically(path, data, before=keep)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint.

    Fields of the state that this version does not know are left in it; a later version that writes something that may
    not be ignored raises the format's version.

    Raises:
        FileNotFoundError: there is no such file.
        NewerFormatError: it is from a newer version.
        CheckpointError: it is damaged or not ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
    state = _state(path, metadata)
    if state["version"] >= 2 and metadata.get(_CHECKSUM) != _checksum(tensors, metadata[_HEADER]):
        raise CheckpointError(f"{path} is damaged: what it holds does not have the checksum that it was written with")
    return {name: t.to(device) for name, t in tensors.items()}, state


def _state(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _HEADER not in metadata:
        raise CheckpointError(f"{path} was not written by innerloop: its header has no {_HEADER!r} entry")
    try:
        state = json.loads(metadata[_HEADER])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its state is not JSON ({error})") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is damaged: its state is not a JSON object")
    version = state.get("version")
    newer = isinstance(version, int) and version > CHECKPOINT_VERSION
    check_version(str(path), version, CHECKPOINT_VERSION, NewerFormatError if newer else CheckpointError)
    return state


def _checksum(tensors: Mapping[str, Tensor], header: str) -> str:
    """BLAKE2b of the state and of every tensor's name, type, shape and bytes."""
    digest = hashlib.blake2b(header.encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
