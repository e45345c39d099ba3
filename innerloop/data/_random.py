"""Random numbers that depend only on where they are asked for, never on what was asked before.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a key and a counter into
random words, so number ``index`` of a stream costs the same whatever the index. Only NumPy's raw 64-bit
words are
used: NumPy keeps raw streams fixed across versions, but not the methods of its ``Generator``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def check_whole(name: str, value: int, at_least: int, below: int = 2**63) -> None:
    """Raise ``ValueError`` unless ``value`` is an int (not a bool) in ``[at_least, below)``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not at_least <= value < below:
        limit = "2**63" if below == 2**63 else str(below)
        raise ValueError(f"{name} must be a whole number, at least {at_least} and below {limit}; got {value!r}")


@lru_cache(maxsize=64)
def _stream_key(stream: str) -> int:
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")


def raw_words(seed: int, stream: str, index: int, count: int) -> NDArray[np.uint64]:
    """``count`` random 64-bit words: a pure function of ``(seed, stream, index)``, in constant time."""
    # The counter has 256 bits. Philox counts up from its low end, so an index in the next 64 bits never
    # overlaps.
    generator = np.random.Philox(counter=int(index) << 64, key=int(seed) | _stream_key(stream) << 64)
    words: NDArray[np.uint64] = generator.random_raw(count)
    return words


def uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Doubles in ``[0, 1)`` from the high 53 bits of each word."""
    numbers: NDArray[np.float64] = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def choose(words: Sequence[int], n: int) -> list[int]:
    """As many distinct numbers of ``range(n)`` as there are words, in random order.

    The first steps of a Fisher-Yates shuffle that stores only the places it has moved, so the cost does not
    depend on ``n``. A word's remainder modulo ``n`` is biased by less than ``n / 2**64``.
    """
    moved: dict[int, int] = {}
    chosen = []
    for place, word in enumerate(words):
        other = place + word % (n - place)
        chosen.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return chosen


def shuffled(n: int, seed: int, stream: str) -> list[int]:
    """``range(n)`` in an order that is a pure function of ``(seed, stream, n)``."""
    return choose(raw_words(seed, stream, 0, n).tolist(), n)
