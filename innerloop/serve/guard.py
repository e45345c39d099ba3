"""What surrounds every answer: who may ask, security headers, and no stack trace ever."""

from __future__ import annotations

import logging
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from innerloop.serve.limits import RefusedError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

# The page is files of this server and nothing else. Pictures are drawn in the page (blob:, data:).
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

logger = logging.getLogger(__name__)


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: what it surrounds.
        hosts: the host names that requests may be addressed to; None for any. A web page elsewhere that has its own
            name resolve to 127.0.0.1 (DNS rebinding) is a same-origin page to the browser, but its requests still name
            its host.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                # Answers are one person's; the page's files may change with the next version.
                headers.setdefault("Cache-Control", "no-store" if "/api/" in scope["path"] else "no-cache")
            await send(message)

        try:
            self._check(Headers(scope=scope))
            await self._app(scope, receive, send_guarded)
        except Exception as error:
            refused = error if isinstance(error, RefusedError) else None
            if refused is None:
                logger.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            refused = refused or RefusedError(500, "The server made a mistake; its terminal says which.")
            response = JSONResponse({"error": refused.message}, refused.status, refused.headers)
            await response(scope, receive, send_guarded)

    def _check(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            raise RefusedError(403, f"This server does not answer to the host name {host[:100]!r}.")
        origin = headers.get("origin")
        # A browser writes an origin as scheme://host[:port], with the port just where the Host header has it.
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            raise RefusedError(403, f"This server does not answer to pages from elsewhere ({origin[:100]!r}).")


def _name(host: str) -> str | None:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
