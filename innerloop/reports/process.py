"""The process of a method on one task, as a small record: what ``process.json`` holds and ``process_panel`` draws."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from innerloop.reports.files import write_text

VERSION = 1
MOST_CLASSES, MOST_SHOTS = 5, 2
"""So many classes, and support images of each, are kept and shown."""


@dataclass(frozen=True)
class Moment:
    """How the outer loss is made at one time in training.

    Attributes:
        epoch: from 1.
        loss_weights: w_1 .. w_K of the query losses.
        derivative_order: 1 or 2, of the meta-gradient.
    """

    epoch: int
    loss_weights: list[float]
    derivative_order: int


@dataclass(frozen=True)
class ProcessRecord:
    """One task going through the inner and the outer loop. K inner steps, theta^0 .. theta^K.

    Raises ``ValueError`` for lists that do not belong together.
    """

    method: str
    """By its name in the papers."""
    task: str
    """``Omniglot 20-way 1-shot, test task 0``."""
    checkpoint_epoch: int
    """The epoch whose meta-parameters were used, the best on validation."""
    ways: int
    shots: int
    queries: int
    """Query images of each class."""
    support_images: list[list[str]]
    """Of the first few classes: their first few support images, each a PNG in base64."""
    query_images: list[str]
    """Of the same classes: one query image each."""
    support_losses: list[float]
    """``[K+1]``, at theta^0 .. theta^K; inner step k descends the one at theta^(k-1)."""
    query_losses: list[float]
    """``[K+1]``, at theta^0 .. theta^K."""
    query_accuracies: list[float]
    """``[K+1]``, fractions."""
    rates: dict[str, list[float]]
    """Inner rate of every adapted parameter tensor at inner step 1 .. K, in network order."""
    start: Moment
    end: Moment
    first_order_epochs: int
    """Epochs at the start of training whose meta-gradients are first order."""
    learned: list[str]
    """What the outer loop learns besides the initialisation theta^0."""
    version: int = VERSION

    def __post_init__(self) -> None:
        steps = self.steps
        if steps < 1:
            raise ValueError("a process needs one inner step at least: query_losses has K + 1 values")
        sizes = {
            "support_losses": (len(self.support_losses), steps + 1),
            "query_accuracies": (len(self.query_accuracies), steps + 1),
            "start.loss_weights": (len(self.start.loss_weights), steps),
            "end.loss_weights": (len(self.end.loss_weights), steps),
            **{f"rates[{name!r}]": (len(values), steps) for name, values in self.rates.items()},
        }
        for name, (found, wanted) in sizes.items():
            if found != wanted:
                raise ValueError(f"{name} must have {wanted} values for {steps} inner steps, got {found}")

    @property
    def steps(self) -> int:
        """K."""
        return len(self.query_losses) - 1

    def outer_loss(self, moment: Moment) -> float:
        """The part of the outer loss that the task has, with the weights of that time."""
        losses = zip(moment.loss_weights, self.query_losses[1:], strict=True)
        return sum(weight * loss for weight, loss in losses if weight)


def encoded_image(image: NDArray[np.uint8]) -> str:
    """An image ``[C, H, W]``, C 1 or 3, as a PNG in base64."""
    pixels = np.moveaxis(np.asarray(image, dtype=np.uint8), 0, -1)
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(out, format="PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def decoded_image(text: str) -> NDArray[np.uint8]:
    """``[H, W]`` or ``[H, W, 3]``, what ``encoded_image`` was given."""
    with Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"]) as image:
        return np.asarray(image, dtype=np.uint8)


def few_images(
    images: NDArray[np.uint8], labels: Sequence[int] | NDArray[np.int64], ways: int, most: int
) -> list[list[str]]:
    """The first ``most`` images of each of the first few classes, encoded."""
    of_class = [np.flatnonzero(np.asarray(labels) == c)[:most] for c in range(min(ways, MOST_CLASSES))]
    return [[encoded_image(images[i]) for i in indices] for indices in of_class]


def write_process(path: Path, record: ProcessRecord) -> Path:
    """Write a record as JSON."""
    return write_text(path, json.dumps(asdict(record), indent=1) + "\n")


def read_process(path: Path) -> ProcessRecord:
    """What ``write_process`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a record, or one of another version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}, and this innerloop reads version {VERSION}")
        return ProcessRecord(**{**values, "start": _moment(values["start"]), "end": _moment(values["end"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a record of a process: {error}") from None


def _moment(values: Mapping[str, Any]) -> Moment:
    return Moment(**values)
