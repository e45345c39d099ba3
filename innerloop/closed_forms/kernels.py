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
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import platformdirs
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_TYPES = {torch.float32: ("float", ctypes.c_float), torch.float64: ("double", ctypes.c_double)}


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels can work on these activations: float32 or float64 on the CPU, rows of channels."""
    given = [t for t in tensors if t is not None]
    x = given[0]
    return (
        x.device.type == "cpu"
        and x.dtype in _TYPES
        and all(t.dtype == x.dtype and not is_functorch_wrapped_tensor(t) for t in given)
        and (x.ndim == 2 or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)))
        and library() is not None
    )


def rows(x: Tensor) -> Tensor:
    """The same values, laid out as rows of channels."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)


def call(
    name: str, x: Tensor, sizes: Sequence[int], scalars: Sequence[float], tensors: Sequence[Tensor | None]
) -> None:
    """Call a kernel in x's dtype: sizes, then real numbers, then tensors' memory (``None`` is a null pointer)."""
    c_name, c_real = _TYPES[x.dtype]
    compiled = library()
    assert compiled is not None
    function: Callable[..., int] = getattr(compiled, f"{name}_{c_name}")
    failed = function(
        *map(ctypes.c_int64, sizes),
        *map(c_real, scalars),
        *[ctypes.c_void_p(t.data_ptr()) if t is not None else None for t in tensors],
    )
    if failed:
        raise MemoryError(f"no memory for the sums of {x.shape[1]} channels")


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
