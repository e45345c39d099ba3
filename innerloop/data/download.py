"""Downloads that resume, retry, and are checked before anything uses them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

import httpx
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from innerloop.data._progress import progress_bar


class DownloadError(OSError):
    """A file could not be downloaded, or is not the expected one."""


def download(
    url: str,
    path: Path,
    *,
    checksum: str,
    algorithm: Literal["md5", "sha256"] = "sha256",
    attempts: int = 5,
    backoff: float = 1.0,
    timeout: float = 30.0,
    progress: bool = False,
) -> Path:
    """Fetch ``url`` into ``path``, unless a file with the right checksum is already there.

    What arrives is collected in ``path`` + ``.part``, which a later attempt or run goes on from. Only a
    file whose checksum is right gets the name ``path``.

    Args:
        url: what to fetch.
        path: the file to write; its folder is made if need be.
        checksum: the file's digest in hexadecimal.
        algorithm: what the digest was made with. MD5 finds accidents, not attacks.
        attempts: tries in all; connection errors, HTTP 408, 429 and 5xx are tried again.
        backoff: seconds before the second try, doubled for each one after it, a minute at most.
        timeout: seconds to wait for a connection or for more data.
        progress: show a progress bar with the time left.

    Returns:
        ``path``.

    Raises:
        DownloadError: when the tries are used up, the server refuses, or the checksum is wrong.
    """
    if path.exists() and _digest(path, algorithm) == checksum:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    tries = Retrying(
        stop=stop_after_attempt(attempts),
        wait=wait_exponential(multiplier=backoff, max=60),
        retry=retry_if_exception(_worth_another_try),
        reraise=True,
    )
    try:
        with progress_bar(DownloadColumn(), TransferSpeedColumn(), show=progress) as bar:
            for attempt in tries:
                with attempt:
                    _fetch(url, part, timeout, bar)
    except httpx.HTTPStatusError as error:
        raise DownloadError(
            f"cannot download {url}: the server answered {error.response.status_code} "
            f"{error.response.reason_phrase}. Try later, or get the file by other means and put it at {path}"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DownloadError(
            f"cannot download {url}: {str(error) or type(error).__name__}. Check the connection and run "
            f"again (it goes on from where it stopped), or fetch the file by other means and put it at {path}"
        ) from error
    found = _digest(part, algorithm)
    if found != checksum:
        part.unlink()
        raise DownloadError(
            f"{url} is not the expected file: its {algorithm} is {found}, expected {checksum}. "
            f"It was deleted. Try again; if that does not help, fetch it by other means and put it at {path}"
        )
    os.replace(part, path)
    return path


def _worth_another_try(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


def _fetch(url: str, part: Path, timeout: float, bar: Progress) -> None:
    """One try: append to ``part`` what it lacks."""
    have = part.stat().st_size if part.exists() else 0
    # Without "identity" the server may compress, and byte ranges would count compressed bytes.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with httpx.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            # Nothing is left to send: the last run stopped between the last byte and the checksum.
            return
        response.raise_for_status()
        # A server without ranges answers 200 and sends the whole file: start over.
        resumed = response.status_code == httpx.codes.PARTIAL_CONTENT
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        job = bar.add_task(Path(url).name, total=total, completed=start)
        try:
            with part.open("ab" if resumed else "wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
                    bar.advance(job, len(chunk))
                file.flush()
                os.fsync(file.fileno())
        finally:
            bar.remove_task(job)


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
