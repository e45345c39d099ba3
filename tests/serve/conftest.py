"""The stand-in model, and a server of it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from stand_in import FakeTrained, serving

from innerloop.serve import Limits


@pytest.fixture
def trained() -> FakeTrained:
    return FakeTrained()


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    """Of a server with narrow limits, which all tests share."""
    limits = Limits(
        upload_bytes=100_000, images=6, image_pixels=10_000, request_pixels=15_000, classes=3, kept=2, steps=9
    )
    with serving(FakeTrained(), limits) as client:
        yield client
