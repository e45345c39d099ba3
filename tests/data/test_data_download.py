from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket

import pytest

from innerloop.data.download import DownloadError, download

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves CONTENT with byte ranges; `plan` says what goes wrong with the next requests."""

    def __init__(self) -> None:
        self.plan: list[str] = []
        self.ranges: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                server.ranges.append(wanted)
                action = server.plan.pop(0) if server.plan else "fine"
                if action.isdigit():
                    self.send_error(int(action))
                    return
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and action != "no ranges" else 0
                if start >= len(CONTENT):
                    self.send_error(416)
                    return
                rest = CONTENT[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[: len(rest) // 2] if action == "drop" else rest)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/file.bin"


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()


def get(server: Server, path, **options):
    return download(server.url, path, **{"checksum": SHA256, "backoff": 0.01, **options})


def test_a_plain_download(server, tmp_path) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    assert get(server, path) == path
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
    get(server, path)
    assert len(server.ranges) == 1


def test_md5(server, tmp_path) -> None:
    get(server, tmp_path / "f", checksum=hashlib.md5(CONTENT).hexdigest(), algorithm="md5")


def test_a_dropped_connection_goes_on_where_it_stopped(server, tmp_path) -> None:
    server.plan = ["drop", "drop"]
    assert get(server, tmp_path / "f").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_a_later_run_goes_on_where_the_last_stopped(server, tmp_path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT[:1000])
    assert get(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-"]


def test_a_whole_part_is_only_checked(server, tmp_path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT)
    assert get(server, tmp_path / "f").read_bytes() == CONTENT


def test_a_server_without_ranges(server, tmp_path) -> None:
    (tmp_path / "f.part").write_bytes(b"x" * 1000)
    server.plan = ["no ranges"]
    assert get(server, tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("status", ["500", "503", "429"])
def test_server_errors_are_tried_again(server, tmp_path, status) -> None:
    server.plan = [status, status]
    assert get(server, tmp_path / "f").read_bytes() == CONTENT
    assert len(server.ranges) == 3


def test_the_tries_are_limited(server, tmp_path) -> None:
    server.plan = ["500"] * 10
    with pytest.raises(DownloadError, match="500"):
        get(server, tmp_path / "f", attempts=3)
    assert len(server.ranges) == 3


def test_not_found_is_not_tried_again(server, tmp_path) -> None:
    server.plan = ["404"]
    with pytest.raises(DownloadError, match=r"cannot download http://127.*404.*put it at .*f"):
        get(server, tmp_path / "f")
    assert len(server.ranges) == 1


def test_a_wrong_checksum(server, tmp_path) -> None:
    with pytest.raises(DownloadError, match=rf"its sha256 is {SHA256}, expected 1234") as caught:
        get(server, tmp_path / "f", checksum="1234")
    assert "deleted" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_offline(tmp_path) -> None:
    with socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file.bin"
    with pytest.raises(DownloadError, match=r"Check the connection.*put it at") as caught:
        download(url, tmp_path / "f", checksum="0", attempts=2, backoff=0.01)
    assert url in str(caught.value)
    with pytest.raises(DownloadError, match="cannot download"):
        download("nonsense", tmp_path / "f", checksum="0")
