"""``kernels.c``, compiled by the system's own C compiler when it is first wanted.

Without a compiler, on another device, in another layout than channels-last: the formulas in PyTorch, the same results.
``INNERLOOP_KERNELS=0`` in the environment asks for that everywhere.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import platformdirs
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TYPES = {torch.float32: "float", torch.float64: "double"}


LARGEST_POOL = 16
"""Window; a place in it is kept in a byte."""


def usable(*tensors: Tensor | None, of_rows: bool = True) -> bool:
    """Whether the kernels can work on these: float32 or float64 on the CPU, the first ``of_rows`` of channels."""
    given = [t for t in tensors if t is not None]
    x = given[0]
    return (
        x.device.type == "cpu"
        and x.dtype in _TYPES
        and all(t.dtype == x.dtype and not _batched(t) for t in given)
        and not are_switched_off()
        and (not of_rows or (x.ndim in _LAYOUTS and x.is_contiguous(memory_format=_LAYOUTS[x.ndim])))
        and library() is not None
    )


_OFF: ContextVar[bool] = ContextVar("kernels are switched off", default=False)


@contextmanager
def switched_off() -> Iterator[None]:
    """In this block the formulas are PyTorch operations, which a trace sees."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


def are_switched_off() -> bool:
    """Whether this is such a block."""
    return _OFF.get()


_LAYOUTS = {2: torch.contiguous_format, 4: torch.channels_last}


def _batched(tensor: Tensor) -> bool:
    """Whether it stands for several tensors, or for one at a level of ``torch.func``, and has no memory to be read."""
    return is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor)


def rows(x: Tensor) -> Tensor:
    """The same values, laid out as rows of channels."""
    return x.contiguous(memory_format=_LAYOUTS[x.ndim])


_SIZES = ("n", "h", "w", "C", "p")
_REALS = ("eps", "slope")
_TENSORS = (
    *("x", "gamma", "beta", "y", "mean", "variance", "r", "pooled", "place"),
    *("dy", "dx", "dgamma", "dbeta"),
    *("u", "gamma_t", "beta_t", "u_star", "y_t", "dx_t", "dgamma_t"),
)
_CONVOLUTION = ("image", "weight", "bias", "weight_t", "bias_t", "dweight", "dbias")
_PACKED = struct.Struct(f"{len(_SIZES)}q{len(_REALS)}d{len(_TENSORS)}Pq{len(_CONVOLUTION)}P")
"""``Arguments`` of kernels.c."""


def call(
    name: str,
    sizes: Sequence[int],
    eps: float,
    slope: float,
    dtype: torch.dtype,
    inputs: int = 0,
    **tensors: Tensor | None,
) -> None:
    """Call a kernel with the tensors that it reads and writes, by their names in kernels.c.

    ``sizes`` are n, h, w, C and p; ``inputs`` is the number of channels of the image, where there is one.

    Raises:
        MemoryError: there is none for an image's activations.
    """
    addresses, of_convolution = (
        [0 if (t := tensors.get(n)) is None else t.data_ptr() for n in names] for names in (_TENSORS, _CONVOLUTION)
    )
    packed = _PACKED.pack(*sizes, eps, slope, *addresses, inputs, *of_convolution)
    if _function(f"{name}_{_TYPES[dtype]}")(packed):
        raise MemoryError("no memory for the activations of one image")


@functools.cache
def _function(name: str) -> Callable[[bytes], int]:
    compiled = library()
    assert compiled is not None
    function: Any = getattr(compiled, name)
    function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    return cast(Callable[[bytes], int], function)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; ``None`` where there is no C compiler or it fails, or where they are switched off."""
    if os.environ.get("INNERLOOP_KERNELS") == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError):
        return None


def _compiled() -> Path:
    """The shared library's path. It is made once for each source, compiler and processor."""
    compiler = shlex.split(os.environ.get("CC", "")) or [
        next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
    ]
    if not compiler[0]:
        raise FileNotFoundError("no C compiler")
    source = Path(__file__).with_name("kernels.c")
    identity = [source.read_text(), *compiler, *_FLAGS, platform.platform(), _processor()]
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    target = platformdirs.user_cache_path("innerloop") / "kernels" / f"{name}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as made:
            path = Path(made) / target.name
            command = [*compiler, *_FLAGS, "-o", str(path), str(source), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            os.replace(path, target)
    return target


def _processor() -> str:
    """What ``-march=native`` depends on: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
