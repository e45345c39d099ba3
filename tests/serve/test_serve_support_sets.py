"""Support sets as people upload them: classes of unequal size, and images with 16 bits a pixel."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from stand_in import serving_app

import innerloop
from innerloop.serve import Limits, create_app

SIDE = 40


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Of the run that ships."""
    with serving_app(create_app(innerloop.load(), Limits(request_pixels=20 * SIDE * SIDE))) as client:
        yield client


def page(kind: int, number: int = 0, white: int = 4095) -> NDArray[np.uint16]:
    """Dark ink on white, of a class of its own."""
    values = np.full((SIDE, SIDE), white, np.uint16)
    values[8 + number : 12 + number, 4:36] = 0
    return values if kind else values.T.copy()


def eight(values: NDArray[np.uint16], white: int = 4095) -> NDArray[np.uint8]:
    return np.floor(np.minimum(values, white) * (255 / white) + 0.5).astype(np.uint8)


def file(values: NDArray[Any], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def adapt(client: httpx.Client, classes: dict[str, list[bytes]], query: str = "") -> httpx.Response:
    files = [(name, (f"{i}", image)) for name, images in classes.items() for i, image in enumerate(images)]
    return client.post(f"/api/adapt{query}", files=files)


def test_unequal_classes_weigh_the_same_unless_told(client: httpx.Client) -> None:
    classes = {"post": [file(eight(page(0, n))) for n in range(6)], "bar": [file(eight(page(1)))]}
    answers = {how: adapt(client, classes, how and f"?weighing={how}").json() for how in ("", "classes", "images")}
    assert [a["weighing"] for a in answers.values()] == ["classes", "classes", "images"]
    assert answers[""]["support_losses"] == answers["classes"]["support_losses"] != answers["images"]["support_losses"]
    trained = innerloop.load()
    as_they_are = replace(trained.preprocessing, invert=False)
    expected = trained.adaptation({name: [as_they_are.pixels(i) for i in images] for name, images in classes.items()})
    assert answers[""]["support_losses"] == pytest.approx(expected.support_losses.tolist())
    assert "classes have 1 to 6 images; every class counts the same" in answers[""]["notes"]
    assert any("answers lean towards the classes with many" in note for note in answers["images"]["notes"])
    wrong = adapt(client, classes, "?weighing=balanced")
    assert wrong.status_code == 422
    assert "weighing" in wrong.json()["error"]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_twelve_of_sixteen_bits_are_as_their_twins_of_eight(client: httpx.Client, kind: str) -> None:
    deep = {"post": [file(page(0), kind), file(eight(page(0, 2)))], "bar": [file(page(1), kind)]}
    plain = {"post": [file(eight(page(0))), file(eight(page(0, 2)))], "bar": [file(eight(page(1)))]}
    adapted, twin = adapt(client, deep).json(), adapt(client, plain).json()
    assert adapted["support_losses"] == pytest.approx(twin["support_losses"])
    assert any("use 12 bits: 4095 is taken for white" in note for note in adapted["notes"])
    asked = client.post(f"/api/predict/{adapted['id']}", files={"x": ("x", file(page(1, 1), kind))}).json()
    expected = client.post(f"/api/predict/{twin['id']}", files={"x": ("x", file(eight(page(1, 1))))}).json()
    one, other = (torch.tensor(a["predictions"][0]["by_step"]) for a in (asked, expected))
    torch.testing.assert_close(one, other)
    assert asked["notes"] == expected["notes"] == []


def test_an_image_brighter_than_the_examples_is_said(client: httpx.Client) -> None:
    adapted = adapt(client, {"post": [file(page(0))], "bar": [file(page(1))]}).json()
    asked = client.post(f"/api/predict/{adapted['id']}", files={"x": ("x", file(page(1, 1, white=9000)))}).json()
    (note,) = asked["notes"]
    assert "1 image with values above 4095, which is white here (12 bits): what is brighter is cut off" in note


def test_sixteen_bits_asked_of_examples_with_eight_are_said(client: httpx.Client) -> None:
    adapted = adapt(client, {"post": [file(eight(page(0)))], "bar": [file(eight(page(1)))]}).json()
    asked = client.post(f"/api/predict/{adapted['id']}", files={"x": ("x", file(page(1)))}).json()
    assert "the support images had none like that" in asked["notes"][0]


def test_bits_can_be_said(client: httpx.Client) -> None:
    classes = {"post": [file(page(0, white=4000))], "bar": [file(page(1, white=4000))]}
    said = adapt(client, classes, "?bits=14").json()
    twins = {name: [file(eight(page(c, white=4000), 16383))] for c, name in enumerate(classes)}
    assert said["support_losses"] == pytest.approx(adapt(client, twins).json()["support_losses"])
    assert any("use 12 bits; 16383 is white all the same" in note for note in said["notes"])
    for bits in ("4", "17", "many"):
        wrong = adapt(client, classes, f"?bits={bits}")
        assert wrong.status_code == 422
        assert "bits" in wrong.json()["error"]


def test_colours_of_which_half_would_be_read_are_refused(client: httpx.Client) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + struct.pack(">3H", 4000, 2000, 0) * SIDE for _ in range(SIDE))
    deep = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", SIDE, SIDE, 16, 2, 0, 0, 0))
    deep += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    refused = adapt(client, {"post": [file(page(0))], "bar": [deep]})
    assert refused.status_code == 422
    assert "cannot be used: its colours have 16 bits" in refused.json()["error"]


def test_too_many_pixels_are_refused_before_bits_are_looked_for(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("innerloop.serve.uploads.largest_value", lambda _: pytest.fail("decoded"))
    refused = adapt(client, {"post": [file(page(0, n)) for n in range(15)], "bar": [file(page(1))] * 6})
    assert refused.status_code == 413
