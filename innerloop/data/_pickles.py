"""Reading pickled NumPy arrays from strangers without running anything that they wrote.

A pickle is a program: unpickling calls whatever it names. Here it can name only NumPy's array-building
functions, and gets stand-ins for those, which check what they are given and build plain arrays of numbers
from plain bytes. NumPy's own unpickling code, which trusts its input, never sees the file.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_pickle(path: Path) -> Any:
    """The content of a pickle made of plain Python values and numeric NumPy arrays, from Python 2 or 3.

    Raises ``ValueError`` naming what is forbidden in it (any other class or function, arrays of objects),
    or that the file is damaged.
    """
    with path.open("rb") as file:
        try:
            return _plain(_ArrayUnpickler(file, encoding="latin1").load())
        except _ForbiddenError as error:
            raise ValueError(
                f"{str(path)!r} is refused: {error}. Such a pickle may run any program; only plain values "
                "and arrays of whole numbers are read. If you made it yourself, save it as one of those"
            ) from error
        except Exception as error:
            # A truncated or altered pickle can raise nearly anything from inside the unpickler.
            raise ValueError(f"{str(path)!r} is not a whole pickle file of plain values and arrays: {error}") from error


class _ForbiddenError(Exception):
    pass


class _PickledDtype:
    """Stands in for ``numpy.dtype``: bool, int or unsigned int of at most 8 bytes, nothing else."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or code not in {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {
            "b1"
        }:
            raise _ForbiddenError(f"it holds an array of dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise _ForbiddenError(f"it holds an array of byte order {state[1]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """Stands in for an ``ndarray`` until its bytes arrive."""

    def __init__(self, *_: Any) -> None:
        self.array: NDArray[Any] = np.empty(0, dtype=np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = _from_bytes(data, dtype, shape, "F" if is_fortran else "C")


class _ArrayName:
    """Stands in for the class ``numpy.ndarray``, which pickles only pass to ``_reconstruct``."""


def _from_bytes(data: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    if not isinstance(dtype, _PickledDtype):
        raise _ForbiddenError(f"it holds an array of {dtype!r}")
    if isinstance(data, str):  # Python 2's byte strings come out of encoding="latin1" as text
        data = data.encode("latin1")
    array = np.frombuffer(data, dtype=dtype.dtype).reshape(shape, order=order)
    native: NDArray[Any] = array.astype(dtype.dtype.newbyteorder("="), copy=False)
    return native


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _PickledArray:
    pending = _PickledArray()
    pending.array = _from_bytes(data, dtype, shape, order)
    return pending


def _scalar(dtype: Any, data: Any) -> int:
    return int(_from_bytes(data, dtype, (), "C")[()])


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _ForbiddenError(f"it encodes bytes as {encoding!r}")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _PickledDtype,
    ("numpy", "ndarray"): _ArrayName,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _PickledArray),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise _ForbiddenError(f"it names {module}.{name}")
        return _STAND_INS[module, name]


def _plain(value: Any) -> Any:
    """``value`` with the arrays themselves in place of their stand-ins."""
    if isinstance(value, _PickledArray):
        return value.array
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    return value
