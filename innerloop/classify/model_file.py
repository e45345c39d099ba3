"""A classifier in one file: safetensors, with JSON in its header and a checksum over both. Nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from innerloop.training.checkpoints import write_atomically

FORMAT_VERSION = 1
_HEADER = "innerloop_classifier"


class ModelFileError(ValueError):
    """A file that is not a classifier that this version can read."""


def save_model(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors and a description (what JSON can hold) to one file, atomically."""
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = json.dumps({"version": FORMAT_VERSION, **description}, sort_keys=True)
    header = {_HEADER: text, "checksum": _checksum(copies, text)}
    write_atomically(path, save(copies, metadata=header))


def load_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file that ``save_model`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: it is not ours, damaged or changed since it was written, or from a newer version.
    """
    if path.is_dir():
        hint = "a run to adapt first: innerloop adapt" if (path / "config.json").is_file() else "a folder"
        raise ModelFileError(f"{str(path)!r} is {hint}, and not the file of a classifier")
    if not path.is_file():
        raise FileNotFoundError(f"no classifier at {str(path)!r}; innerloop adapt makes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ModelFileError(f"{str(path)!r} is not a classifier of innerloop: {_kind(path, error)}") from None
    if _HEADER not in metadata:
        what = (
            "a training checkpoint; innerloop adapt RUN makes a classifier of its run"
            if "innerloop" in metadata
            else ("a safetensors file of another program")
        )
        raise ModelFileError(f"{str(path)!r} is not a classifier of innerloop, but {what}")
    try:
        description = json.loads(metadata[_HEADER])
        version = description["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ModelFileError(f"{str(path)!r} is damaged: its description is not to be understood") from None
    if version != FORMAT_VERSION:
        raise ModelFileError(
            f"{str(path)!r} has format version {version!r}, and this innerloop reads version {FORMAT_VERSION}: "
            "update innerloop (pip install -U innerloop), or adapt again with this one"
        )
    if metadata.get("checksum") != _checksum(tensors, metadata[_HEADER]):
        raise ModelFileError(
            f"{str(path)!r} is damaged or was changed after it was written: its checksum does not match. Adapt again, "
            "or copy it again from where it came from"
        )
    return tensors, description


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of the description and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _kind(path: Path, error: SafetensorError) -> str:
    """What a file is that is no safetensors file."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        return "the file is empty"
    if start.startswith((b"PK", b"\x80")):
        return (
            "it looks like a pickle (.pt, .bin, .pkl), which may run any program when it is opened, and is never read "
            "here. innerloop adapt writes safetensors"
        )
    return f"it is damaged, or no safetensors file ({error})"
