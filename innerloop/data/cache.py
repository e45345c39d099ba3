"""Decoded datasets kept on disk, so that only the first run decodes them.

A cache file is safetensors: nothing in it is ever executed, and a damaged one is noticed and built anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import platformdirs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from innerloop.data.classes import ClassImages

Cache = bool | str | Path

logger = logging.getLogger(__name__)


def cache_folder(cache: Cache) -> Path | None:
    """Where decoded datasets are kept.

    ``True`` is the environment variable ``INNERLOOP_CACHE`` or else the user's cache folder, ``False``
    nowhere (``None``), and a path that folder.
    """
    if cache is False:
        return None
    if cache is True:
        return Path(os.environ.get("INNERLOOP_CACHE") or platformdirs.user_cache_dir("innerloop"))
    return Path(cache).expanduser()


def fingerprint(*parts: Any) -> str:
    """A hash of everything that decides what a decoded dataset looks like (values that JSON can hold)."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_cached(cache: Cache, kind: str, key: str) -> ClassImages | None:
    """The dataset stored under ``key``; ``None`` if there is none or it is damaged."""
    path = _path(cache, kind, key)
    if path is None or not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads(file.metadata()["innerloop"])
            images = file.get_tensor("images")
        if described["checksum"] != _checksum(images):
            raise ValueError("its checksum does not match")
        return ClassImages(
            images,
            tuple(described["sizes"]),
            tuple(described["names"]),
            described["bits"],
            described["brightest"],
        )
    except Exception as error:
        # Whatever is wrong with it (half a file, a bad disk, an older layout), decoding again puts it right.
        logger.warning("ignoring the damaged cache %s (%s); reading the images again", path, error)
        return None


def store_cached(cache: Cache, kind: str, key: str, classes: ClassImages) -> None:
    """Store a dataset under ``key``; a folder that cannot be written to is a logged warning, not an error."""
    path = _path(cache, kind, key)
    if path is None:
        return
    described = {
        "sizes": classes.sizes,
        "names": classes.names,
        "bits": classes.bits,
        "brightest": classes.brightest,
        "checksum": _checksum(classes.images),
    }
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
        os.close(handle)
        save_file({"images": classes.images}, temporary, metadata={"innerloop": json.dumps(described)})
        # On the disk before it gets its name: a crash leaves the whole file or none.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        # safetensors wraps disk errors in a class of its own. The dataset is already in memory, so carry on.
        logger.warning("cannot write the cache %s (%s); the images will be read again next time", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _path(cache: Cache, kind: str, key: str) -> Path | None:
    folder = cache_folder(cache)
    return None if folder is None else folder / f"{kind}-{key[:32]}.safetensors"


def _checksum(images: Tensor) -> str:
    return hashlib.blake2b(images.contiguous().numpy().data, digest_size=16).hexdigest()
