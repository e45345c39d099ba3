"""``innerloop serve``: a page in the browser and an HTTP API over a meta-trained model."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from innerloop.training.config import ConfigError
from innerloop.training.progress import Progress


@dataclass(frozen=True)
class ServeArguments:
    """Open a page where one draws or drops a few examples of each class, and watches the network adapt to them.

    The same over HTTP: /api/adapt, /api/predict/ID; /openapi.json describes it. Nothing is written to disk. Needs
    pip install 'innerloop[serve]'.
    """

    run: tyro.conf.Positional[Path | None] = None
    """Folder of a run (default: the checkpoint that ships with the package)."""
    host: str = "127.0.0.1"
    """Address to listen at. With any but this machine's own (127.0.0.1, ::1), whoever can reach it can use it."""
    port: int = 8000
    """Port to listen at (0: any that is free)."""
    open: bool = True
    """Open the page in the browser, where there is a display."""


def run(arguments: Sequence[str]) -> int:
    """Serve as the command line says, until Ctrl-C."""
    chosen = tyro.cli(ServeArguments, args=list(arguments), prog="innerloop serve")
    if not 0 <= chosen.port <= 65535:
        raise ConfigError(f"--port must be between 0 and 65535, got {chosen.port}")
    try:
        import uvicorn

        from innerloop.serve import create_app
        from innerloop.serve.guard import LOOPBACK
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving needs more packages ({error.name} is missing): pip install 'innerloop[serve]'"
        ) from None
    from innerloop.classify import load

    # The port before the model: whether it is free is known at once.
    with _listening(chosen.host, chosen.port) as listening:
        local = _is_loopback(listening.getsockname()[0])
        with Progress().waiting("loading the model"):
            trained = load(chosen.run)
        app = create_app(trained, hosts=LOOPBACK if local else None)
        address = _address(chosen.host, listening)
        if not local:
            Console(stderr=True).print(
                f"[bold yellow]warning:[/] {chosen.host} is open to the network, without a password or encryption: "
                "whoever can reach this machine can use the server. --host 127.0.0.1 keeps it to this machine.",
                highlight=False,
            )
        print(f"innerloop serves at {address}  (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        if chosen.open and _has_display():
            # The socket listens already, so the browser's request waits for the server rather than failing.
            webbrowser.open(address)
        server.run(sockets=[listening])
    # A Ctrl-C mostly ends in KeyboardInterrupt, but on a busy machine the server has been seen to return instead.
    return 130 if server.should_exit else 0


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises:
        ConfigError: the port is taken or not allowed, or the host is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host!r} is no address: {error.strerror}") from None
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    if sys.platform != "win32":  # there it would share a port in use
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        reasons = {
            errno.EADDRINUSE: f"port {port} is taken by another program",
            errno.EACCES: f"port {port} needs a privileged user",
            errno.EADDRNOTAVAIL: f"--host {host!r} is not an address of this machine",
        }
        reason = reasons.get(error.errno or 0, str(error))
        raise ConfigError(
            f"cannot listen at {host}:{port}: {reason}; choose another port with --port (0: any free one)"
        ) from None
    return listening


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _address(host: str, listening: socket.socket) -> str:
    """What a browser on this machine opens."""
    name, port = listening.getsockname()[:2]
    if ipaddress.ip_address(name.partition("%")[0]).is_unspecified:
        host = "127.0.0.1" if listening.family == socket.AF_INET else "::1"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _has_display() -> bool:
    """Whether a browser window can be shown; over ssh or in a container there is none."""
    return sys.platform in ("win32", "darwin") or any(os.environ.get(v) for v in ("DISPLAY", "WAYLAND_DISPLAY"))
