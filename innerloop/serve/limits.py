"""What one request may ask for, and how it is told that it asked for too much."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on a request and on what is kept between requests.

    Attributes:
        upload_bytes: of a request's body.
        upload_seconds: for a request's body to arrive.
        images: in a request.
        image_pixels: width x height of an image, known from its header before it is decoded.
        request_pixels: of all images of a request together.
        classes: in a support set.
        name_length: characters of a class's name.
        steps: inner steps.
        kept: classifiers; the one unused for longest goes when another comes.
        kept_bytes: of their weights after all inner steps; the same.
        idle_seconds: after which an unused classifier goes.
        waiting: requests that wait for the model while another is computed. More are turned away.
        wait_seconds: that they wait before they are turned away.
    """

    upload_bytes: int = 16 * 2**20
    upload_seconds: float = 60
    images: int = 200
    image_pixels: int = 25_000_000
    request_pixels: int = 75_000_000
    classes: int = 50
    name_length: int = 80
    steps: int = 50
    kept: int = 64
    kept_bytes: int = 2**30
    idle_seconds: float = 3600
    waiting: int = 16
    wait_seconds: float = 10


class RefusedError(Exception):
    """A request that is answered with an error: an HTTP status and one sentence for a person."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}


def plural(count: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"
