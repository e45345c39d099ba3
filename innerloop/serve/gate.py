"""One computation on the model at a time, and a short queue before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from innerloop.serve.limits import Limits, RefusedError

T = TypeVar("T")


class Gate:
    """Runs work in a thread, one piece at a time.

    One at a time because an inner step lends the model its fast weights while it is called, so that two threads would
    see each other's; and because one already uses every core.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = anyio.Lock()
        self._waiting = 0

    async def run(self, work: Callable[[], T]) -> T:
        """What ``work`` returns.

        Raises:
            RefusedError: 503, too many wait already, or it was not this one's turn in time.
        """
        await self._enter()
        try:
            return await anyio.to_thread.run_sync(work)
        finally:
            self._lock.release()

    async def _enter(self) -> None:
        busy = RefusedError(503, "The server is busy with other requests; try again in a moment.", {"Retry-After": "2"})
        if self._waiting >= self._limits.waiting:
            raise busy
        self._waiting += 1
        try:
            with anyio.fail_after(self._limits.wait_seconds):
                await self._lock.acquire()
        except TimeoutError:
            raise busy from None
        finally:
            self._waiting -= 1
