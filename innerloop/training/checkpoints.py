"""Checkpoints: one safetensors file each, tensors plus JSON in its header. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT_VERSION = 1
_HEADER = "innerloop"


class CheckpointError(ValueError):
    """A file that is not a checkpoint that this version can read."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or as it was before: temporary file, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write values as JSON, atomically."""
    write_atomically(path, (json.dumps(values, indent=2) + "\n").encode())


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and a JSON state to one file, atomically."""
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    header = {_HEADER: json.dumps({"version": FORMAT_VERSION, **state})}
    write_atomically(path, save(copies, metadata=header))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, not ours, or from a newer version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
    if _HEADER not in metadata:
        raise CheckpointError(f"{path} was not written by innerloop: its header has no {_HEADER!r} entry")
    state: dict[str, Any] = json.loads(metadata[_HEADER])
    if state.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {state.get('version')}; this innerloop reads version {FORMAT_VERSION}"
        )
    return tensors, state
