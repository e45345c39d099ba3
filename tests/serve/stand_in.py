"""A stand-in for a meta-trained model, and images to give it."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from torch import Tensor

from innerloop.data import Preprocessing
from innerloop.data.images import Pixels
from innerloop.methods import Method
from innerloop.serve import Limits, create_app
from innerloop.training.config import Config, DataConfig

STEPS = 3


@dataclass
class FakeAdaptation:
    """The nearest class mean in pixels, surer with each step; after none, every class is as probable."""

    means: Mapping[str, Tensor]
    steps: int
    notes: tuple[str, ...] = ("a note",)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.means)

    @property
    def fast_weights(self) -> list[dict[str, Tensor]]:
        return [{"head": torch.zeros(250)}] * (self.steps + 1)

    @property
    def support_losses(self) -> Tensor:
        return 1 / torch.arange(1, self.steps + 2)

    @property
    def support_accuracies(self) -> Tensor:
        return torch.arange(self.steps + 1) / self.steps

    def probabilities(self, images: Sequence[Pixels]) -> Tensor:
        distances = torch.cdist(torch.stack([_vector(i) for i in images]), torch.stack(list(self.means.values())))
        return (-torch.arange(self.steps + 1)[:, None, None] * distances).softmax(-1)


def _vector(image: Pixels) -> Tensor:
    assert image.shape == (1, 8, 8)
    return torch.from_numpy(image.astype(np.float32) / 255).flatten()


class FakeTrained:
    """What ``innerloop.load`` gives, as far as the server looks at it. ``hold`` keeps adaptations waiting."""

    preset = "quickstart"
    config = Config(DataConfig(ways=5, shots=1), method=Method(inner_steps=STEPS))
    preprocessing = Preprocessing(size=8, channels=1, invert=True)

    def __init__(self, any_ways: bool = True) -> None:
        self.any_ways = any_ways
        self.hold = threading.Event()
        self.hold.set()
        self.entered = threading.Event()
        self.at_once = self.most_at_once = 0
        self.fails: Exception | None = None

    def adaptation(self, examples: Mapping[str, Sequence[Pixels]], steps: int | None = None) -> FakeAdaptation:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.entered.set()
        try:
            assert self.hold.wait(30)
            if self.fails is not None:
                raise self.fails
        finally:
            self.at_once -= 1
        means = {name: torch.stack([_vector(i) for i in images]).mean(0) for name, images in examples.items()}
        return FakeAdaptation(means, STEPS if steps is None else steps)


def png(shade: int, size: tuple[int, int] = (20, 20), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, shade).save(buffer, kind)
    return buffer.getvalue()


def text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def serving(trained: FakeTrained, limits: Limits) -> AbstractContextManager[httpx.Client]:
    """A client of a real server of a stand-in."""
    untyped: Any = trained
    return serving_app(create_app(untyped, limits))


@contextmanager
def serving_app(app: FastAPI) -> Iterator[httpx.Client]:
    """A client of a real server, which runs in a thread at a free port."""
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=30, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
