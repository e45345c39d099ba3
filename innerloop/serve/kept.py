"""The adaptations of the last hour, each under a name that cannot be guessed."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from innerloop.serve.limits import Limits, RefusedError

T = TypeVar("T")


class _Thing(NamedTuple, Generic[T]):
    value: T
    size: int  # bytes
    used: float  # when it last was, by the clock


class Kept(Generic[T]):
    """A bounded memory of things by id: what was unused for longest, or for too long, is forgotten."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._things: OrderedDict[str, _Thing[T]] = OrderedDict()  # the longest unused first

    def __len__(self) -> int:
        self._forget()
        return len(self._things)

    def keep(self, value: T, size: int) -> str:
        """Keep something of so many bytes; returns its id, 128 random bits."""
        name = secrets.token_urlsafe(16)
        self._things[name] = _Thing(value, size, self._clock())
        self._forget()
        return name

    def get(self, name: str) -> T:
        """What is kept under an id, which counts as use.

        Raises:
            RefusedError: 404, there is nothing of that id, or no longer.
        """
        self._forget()
        if name not in self._things:
            minutes = round(self._limits.idle_seconds / 60)
            raise RefusedError(
                404,
                f"There is no classifier with this id. It may have been forgotten: the server keeps the last "
                f"{self._limits.kept}, for {minutes} minutes after their last use. Adapt again.",
            )
        self._things[name] = self._things[name]._replace(used=self._clock())
        self._things.move_to_end(name)
        return self._things[name].value

    def drop(self, name: str) -> None:
        """Forget what is kept under an id.

        Raises:
            RefusedError: 404, there is nothing of that id.
        """
        self.get(name)
        del self._things[name]

    def _forget(self) -> None:
        oldest = self._clock() - self._limits.idle_seconds
        while self._things and next(iter(self._things.values())).used < oldest:
            self._things.popitem(last=False)
        # The newest stays, whatever its size.
        while len(self._things) > 1 and (
            len(self._things) > self._limits.kept or self._size() > self._limits.kept_bytes
        ):
            self._things.popitem(last=False)

    def _size(self) -> int:
        return sum(thing.size for thing in self._things.values())
