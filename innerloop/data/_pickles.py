"""Reading pickled NumPy arrays from strangers without running anything that they wrote.

A pickle is a program: unpickling calls whatever it names. Here it can name only NumPy's array-building
functions, and gets stand-ins for those, which check what they are given and build plain arrays of numbers
from plain bytes. Neither Python's nor NumPy's unpickling code, which trust their input, ever sees the file.
"""

from __future__ import annotations

import codecs
import mmap
import os
import pickle
import struct
from collections.abc import Callable, Sequence
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
        if not file.seek(0, os.SEEK_END):
            raise ValueError(f"{str(path)!r} is not a whole pickle file: it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _plain(_Reader(data).load())
            except _ForbiddenError as error:
                raise ValueError(
                    f"{str(path)!r} is refused: {error}. Such a pickle may run any program; only plain values "
                    "and arrays of whole numbers are read. If you made it yourself, save it as one of those"
                ) from error
            except Exception as error:
                # A truncated or altered pickle can raise nearly anything where its values are put together.
                raise ValueError(
                    f"{str(path)!r} is not a whole pickle file of plain values and arrays: {error}"
                ) from error


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

    def set_state(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise _ForbiddenError(f"it holds an array of byte order {state[1]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """Stands in for an ``ndarray`` until its bytes arrive."""

    def __init__(self, *_: Any) -> None:
        self.array: NDArray[Any] = np.empty(0, dtype=np.uint8)

    def set_state(self, state: tuple[Any, ...]) -> None:
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


def _find(module: str, name: str) -> Callable[..., Any]:
    if (module, name) not in _STAND_INS:
        raise _ForbiddenError(f"it names {module}.{name}")
    return _STAND_INS[module, name]


class _Reader:
    """Carries out a pickle's instructions, those that plain values and arrays are made of.

    Python's own unpickler can be made to fill memory (a value remembered under a huge number) and to run for years
    (tuples of tuples as the key of a dictionary), so it does not see the file either.
    """

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data, self.at = data, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The value that the pickle makes."""
        while (code := self.take(1)) != pickle.STOP:
            if code in _CONSTANTS:
                self.stack.append(_CONSTANTS[code]())
            elif code in _SIZED:
                size, make = _SIZED[code]
                self.stack.append(make(self.take(int.from_bytes(self.take(size), "little"))))
            else:
                self.step(code)
        return self.stack.pop()

    def take(self, size: int) -> bytes:
        """The next bytes."""
        if size > len(self.data) - self.at:
            raise ValueError("it ends too early")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int, signed: bool = False) -> int:
        """The next bytes as a number."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self) -> bytes:
        """What comes before the next line break."""
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise ValueError("it ends too early")
        line = self.take(end - self.at)
        self.at += 1
        return line

    def marked(self) -> list[Any]:
        """What has come since the last mark."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def step(self, code: bytes) -> None:
        """One instruction."""
        stack = self.stack
        match code:
            case pickle.PROTO:
                self.take(1)
            case pickle.FRAME:
                self.take(8)
            case pickle.MARK:
                self.marks.append(len(stack))
            case pickle.INT | pickle.LONG:
                stack.append(_decimal(self.line()))
            case pickle.BININT:
                stack.append(self.number(4, signed=True))
            case pickle.BININT1 | pickle.BININT2:
                stack.append(self.number(1 if code == pickle.BININT1 else 2))
            case pickle.FLOAT:
                stack.append(float(self.line()))
            case pickle.BINFLOAT:
                stack.append(struct.unpack(">d", self.take(8))[0])
            case pickle.STRING:
                stack.append(codecs.escape_decode(self.line().strip()[1:-1])[0].decode("latin1"))
            case pickle.UNICODE:
                stack.append(self.line().decode("raw-unicode-escape"))
            case pickle.TUPLE:
                stack.append(tuple(self.marked()))
            case pickle.LIST:
                stack.append(self.marked())
            case pickle.DICT:
                values = self.marked()
                stack.append({})
                self.set_items(values)
            case pickle.TUPLE1 | pickle.TUPLE2 | pickle.TUPLE3:
                count = 1 + (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3).index(code)
                stack[-count:] = [tuple(stack[-count:])]
            case pickle.APPEND | pickle.APPENDS:
                values = self.marked() if code == pickle.APPENDS else [stack.pop()]
                if not isinstance(stack[-1], list):
                    raise _ForbiddenError(f"it appends to a {type(stack[-1]).__name__}")
                stack[-1].extend(values)
            case pickle.SETITEM:
                values = [stack.pop(), stack.pop()]
                self.set_items(values[::-1])
            case pickle.SETITEMS:
                self.set_items(self.marked())
            case pickle.PUT | pickle.BINPUT | pickle.LONG_BINPUT | pickle.MEMOIZE:
                self.memo[self.memo_key(code)] = stack[-1]
            case pickle.GET | pickle.BINGET | pickle.LONG_BINGET:
                stack.append(self.memo[self.memo_key(code)])
            case pickle.GLOBAL | pickle.INST:
                stack.append(_find(self.line().decode(), self.line().decode()))
                if code == pickle.INST:
                    raise _ForbiddenError("it makes an object")
            case pickle.STACK_GLOBAL:
                name, module = stack.pop(), stack.pop()
                stack.append(_find(module, name))
            case pickle.REDUCE:
                arguments, function = stack.pop(), stack.pop()
                if not callable(function):  # only stand-ins are
                    raise _ForbiddenError(f"it calls a {type(function).__name__}")
                stack.append(function(*arguments))
            case pickle.BUILD:
                state = stack.pop()
                if not isinstance(stack[-1], _PickledDtype | _PickledArray):
                    raise _ForbiddenError(f"it sets the state of a {type(stack[-1]).__name__}")
                stack[-1].set_state(state)
            case _:
                raise _ForbiddenError(f"it has the instruction {code!r}, which plain values and arrays do not need")

    def set_items(self, values: Sequence[Any]) -> None:
        """Keys and values in turn into the dictionary at the top."""
        if not isinstance(self.stack[-1], dict):
            raise _ForbiddenError(f"it sets items of a {type(self.stack[-1]).__name__}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | bytes | int | float | None):
                raise _ForbiddenError(f"it has a {type(key).__name__} as a key")
            self.stack[-1][key] = value

    def memo_key(self, code: bytes) -> int:
        """Under what an instruction remembers or recalls."""
        if code == pickle.MEMOIZE:
            return len(self.memo)
        if code in (pickle.PUT, pickle.GET):
            return _decimal(self.line())
        return self.number(1 if code in (pickle.BINPUT, pickle.BINGET) else 4)


def _decimal(line: bytes) -> int:
    """A number in figures. Protocol 0 writes True as 01."""
    if len(line) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(line)} figures")
    return line == b"01" if line in (b"00", b"01") else int(line.removesuffix(b"L"))


def _long(data: bytes) -> int:
    if len(data) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _latin1(data: bytes) -> str:
    """Python 2's byte strings, as pickle's encoding="latin1" has them."""
    return data.decode("latin1")


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


_MOST_DIGITS = 100
_MOST_VALUES = 10**6
"""mini-ImageNet's largest file has 38,400 images and as many labels."""

_CONSTANTS: dict[bytes, Callable[[], Any]] = {
    pickle.NONE: lambda: None,
    pickle.NEWTRUE: lambda: True,
    pickle.NEWFALSE: lambda: False,
    pickle.EMPTY_TUPLE: tuple,
    pickle.EMPTY_LIST: list,
    pickle.EMPTY_DICT: dict,
}
_SIZED: dict[bytes, tuple[int, Callable[[bytes], Any]]] = {
    pickle.LONG1: (1, _long),
    pickle.LONG4: (4, _long),
    pickle.SHORT_BINSTRING: (1, _latin1),
    pickle.BINSTRING: (4, _latin1),
    pickle.SHORT_BINUNICODE: (1, _utf8),
    pickle.BINUNICODE: (4, _utf8),
    pickle.BINUNICODE8: (8, _utf8),
    pickle.SHORT_BINBYTES: (1, bytes),
    pickle.BINBYTES: (4, bytes),
    pickle.BINBYTES8: (8, bytes),
    pickle.BYTEARRAY8: (8, bytes),
}
"""Instructions followed by a size in so many bytes, and by the value."""


def _plain(value: Any) -> Any:
    """``value`` with the arrays themselves in place of their stand-ins.

    A list that is in two places is written once and is here twice, so that a short file may mean more values than
    there are atoms: they are counted.
    """
    left = _MOST_VALUES

    def plain(value: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _ForbiddenError(f"it stands for more than {_MOST_VALUES:,} values")
        if isinstance(value, _PickledArray):
            return value.array
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([plain(v) for v in value])
        return value

    return plain(value)
