"""A classifier of a person's own classes: what adapting to their images gives."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from innerloop.classify.estimate import Estimate
from innerloop.classify.images import ImageLike, deep_value, image_name, read_image
from innerloop.classify.model_file import ModelFileError, load_model, save_model
from innerloop.data import Preprocessing
from innerloop.data.depth import misfit, misfits
from innerloop.data.images import Pixels
from innerloop.data.preprocessing import Ink, ink_of
from innerloop.norm_layers import Normalisation, norm_buffer_names, use_batch_statistics
from innerloop.training.building import build_network
from innerloop.training.config import MESSAGE, Config, DataConfig, NetworkConfig

BATCH = 128
"""Images that are classified together."""
_AT_ONCE = 16  # images a job of the thread pool; one at a time would cost more in hand-over than in decoding
_OTHER: dict[Ink, Ink] = {"dark": "bright", "bright": "dark"}

Numbered = tuple[int, ImageLike]


class Read(NamedTuple):
    """An image's name, its pixels or why it has none, and the largest value of one with 16 bits a pixel."""

    name: str
    pixels: Pixels | str
    largest: int = 0


class _Doubtful(NamedTuple):
    """Names of images that answers were given for and hardly can be."""

    other_ink: list[str]
    other_bits: list[str]


logger = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """What an image is taken for.

    Attributes:
        name: the likeliest class.
        probabilities: of every class, by name; they sum to 1.
    """

    name: str
    probabilities: dict[str, float]

    @property
    def probability(self) -> float:
        """Of the likeliest class."""
        return self.probabilities[self.name]


class Unreadable(NamedTuple):
    """An image that was not classified, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network adapted to a support set, with all that it takes to use it on images.

    Attributes:
        network: in evaluation mode; normalised images ``[n, C, H, W]`` to logits ``[n, ways]``.
        classes: names of the outputs.
        preprocessing: what is done to an image first.
        architecture: what the network is built from.
        normalisation: the statistics of its norm layers. With ``"support"`` and ``"running"`` an image's answer
            depends on nothing but the image; with ``"batch"`` on all images it is asked about together with.
        ink: of the support images, as they came; None where they are no drawings.
        notes: what a person may want to know of how it was made.
        support: a summary of the support set.
        provenance: where it comes from.
        estimate: of its accuracy, from the support set; None where that cannot tell, or was not asked.
    """

    network: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    architecture: NetworkConfig
    normalisation: Normalisation
    ink: Ink | None = None
    notes: tuple[str, ...] = ()
    support: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    estimate: Estimate | None = None

    def predict(self, images: Iterable[ImageLike]) -> list[Prediction]:
        """The likeliest class of each image, with the probabilities of all classes.

        Raises:
            ValueError: some images cannot be read; ``stream`` goes on with the others.
        """
        return _all_readable(list(self.stream(images)))

    def probabilities(self, images: Iterable[ImageLike]) -> Tensor:
        """Probabilities ``[n, ways]`` of images.

        Raises:
            ValueError: some images cannot be read.
        """
        found = [torch.tensor(list(p.probabilities.values())) for p in self.predict(images)]
        return torch.stack(found) if found else torch.empty(0, len(self.classes))

    def stream(self, images: Iterable[ImageLike], threads: int | None = None) -> Iterator[Prediction | Unreadable]:
        """A prediction for each image, in order, as soon as its batch is done; ``Unreadable`` for what is no image.

        Images are decoded by ``threads`` threads while others are classified. Drawings in another ink than the
        support's, and 16-bit images that do not fit the bits in use, are said in a logged warning at the end.
        """
        numbered = enumerate(images, start=1)
        doubtful = _Doubtful([], [])
        with ThreadPoolExecutor(threads) as pool:
            # An image of a classifier by batch statistics depends on all the others.
            size = BATCH if self.normalisation != "batch" else None
            for part in _read_ahead(pool, numbered, self._read, size):
                yield from self._classified(part, doubtful)
        if doubtful.other_bits:
            logger.warning(misfits(named(doubtful.other_bits), self.preprocessing.bits))
        if other_ink := doubtful.other_ink:
            logger.warning(
                "%d image%s (%s%s) %s not in %s ink as the support images are: what is said of %s is hardly right",
                *(len(other_ink), "s" * (len(other_ink) > 1), ", ".join(other_ink[:3]), ", ..." * (len(other_ink) > 3)),
                *("are" if len(other_ink) > 1 else "is", self.ink, "them" if len(other_ink) > 1 else "it"),
            )

    def _read(self, numbered: Numbered) -> Read:
        number, image = numbered
        name = image_name(image, number)
        try:
            image = Path(image).read_bytes() if isinstance(image, str | os.PathLike) else image
            return Read(name, read_image(image, self.preprocessing), deep_value(image))
        except (OSError, ValueError) as error:
            return Read(name, str(error))

    def _classified(self, part: list[Read], doubtful: _Doubtful) -> Iterator[Prediction | Unreadable]:
        """The answers for a batch; adds to ``doubtful`` what is drawn in another ink, or has other bits."""
        read = [(name, pixels) for name, pixels, _ in part if not isinstance(pixels, str)]
        answers = iter(self.pixel_probabilities([pixels for _, pixels in read]).tolist())
        if self.ink is not None:
            inverted = _OTHER[self.ink] if self.preprocessing.invert else self.ink
            doubtful.other_ink.extend(name for name, pixels in read if ink_of(pixels) not in (None, inverted))
        doubtful.other_bits.extend(r.name for r in part if misfit(r.largest, self.preprocessing.bits))
        for name, pixels, _ in part:
            if isinstance(pixels, str):
                yield Unreadable(name, pixels)
            else:
                shares = dict(zip(self.classes, next(answers), strict=True))
                yield Prediction(max(shares, key=shares.__getitem__), shares)

    @torch.no_grad()
    def pixel_probabilities(self, pixels: list[Pixels]) -> Tensor:
        """Probabilities ``[n, ways]`` of images that have been read with this classifier's preprocessing."""
        if not pixels:
            return torch.empty(0, len(self.classes))
        inputs = self.preprocessing.inputs(torch.from_numpy(np.stack(pixels)))
        logits: Tensor = self.network(inputs.contiguous(memory_format=torch.channels_last))
        return logits.softmax(1)

    def with_estimate(self, estimate: Estimate | None) -> Classifier:
        """The same classifier, its accuracy estimated."""
        return replace(self, estimate=estimate)

    def description(self) -> dict[str, Any]:
        """All of it but the network, as JSON can hold it: what its file has in the header."""
        estimate = self.estimate
        return {
            "classes": list(self.classes),
            "preprocessing": asdict(self.preprocessing),
            "network": asdict(self.architecture),
            "normalisation": self.normalisation,
            "ink": self.ink,
            "notes": list(self.notes),
            "support": dict(self.support),
            "provenance": dict(self.provenance),
            "estimate": None if estimate is None else {**asdict(estimate), "accuracy": estimate.accuracy},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one file: safetensors, with a description in its header; see docs/classify.md."""
        save_model(Path(path), self.network.state_dict(), self.description())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Classifier:
        """The classifier that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ModelFileError: it is not ours, was damaged or changed, or is from a newer version.
        """
        tensors, values = load_model(Path(path))
        try:
            described = _DESCRIPTION.validate_python(values)
            network = adapted_network(
                described.network, described.preprocessing, len(described.classes), described.normalisation
            )
            wanted = network.state_dict()
            if described.normalisation == "batch":  # files of version 0.1 hold no statistics, which nobody asks for
                none = {n: torch.zeros_like(wanted[n], device="cpu") for n in norm_buffer_names(network)}
                tensors = {**none, **tensors}
            for name, tensor in tensors.items():
                if name in wanted and tensor.dtype != wanted[name].dtype:
                    raise ValueError(f"{name} has numbers of type {tensor.dtype}, expected {wanted[name].dtype}")
            network.load_state_dict(tensors, assign=True)
        except (ValueError, RuntimeError, TypeError, OverflowError) as error:
            raise ModelFileError(f"{str(path)!r} does not hold what a classifier needs: {error}"[:MESSAGE]) from None
        return Classifier(
            network=network.to(memory_format=torch.channels_last).eval(),  # type: ignore[call-overload]
            classes=described.classes,
            preprocessing=described.preprocessing,
            architecture=described.network,
            normalisation=described.normalisation,
            ink=described.ink,
            notes=described.notes,
            support=described.support,
            provenance=described.provenance,
            estimate=described.estimate,
        )


@dataclass(frozen=True)
class _Description:
    """The JSON of a classifier's file."""

    version: int
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    network: NetworkConfig
    normalisation: Normalisation
    ink: Ink | None
    notes: tuple[str, ...]
    support: dict[str, Any]
    provenance: dict[str, Any]
    estimate: Estimate | None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for classes that cannot be told apart by name."""
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"its classes need names, each another; got {self.classes[:10]}")


_DESCRIPTION = TypeAdapter(_Description)


def adapted_network(
    architecture: NetworkConfig, preprocessing: Preprocessing, ways: int, normalisation: Normalisation
) -> nn.Module:
    """A network without values (on the meta device) that an adapted one's tensors fit into."""
    data = replace(DataConfig(), ways=ways, channels=preprocessing.channels, image_size=preprocessing.size)  # type: ignore[arg-type]
    with torch.device("meta"):
        network = build_network(Config(data=data, network=architecture))
    if normalisation == "batch":
        use_batch_statistics(network)
    return network


def _read_ahead(
    pool: ThreadPoolExecutor, images: Iterator[Numbered], read: Callable[[Numbered], Read], size: int | None
) -> Iterator[list[Read]]:
    """Batches of what ``read`` makes of images, in order; two batches are read ahead, not all.

    A size of None makes one batch of everything.
    """

    def read_some(some: list[Numbered]) -> list[Read]:
        return [read(image) for image in some]

    jobs: deque[Future[list[Read]]] = deque()
    batch: list[Read] = []
    while True:
        while len(jobs) < 2 * BATCH // _AT_ONCE and (some := list(islice(images, _AT_ONCE))):
            jobs.append(pool.submit(read_some, some))
        if not jobs:
            break
        batch += jobs.popleft().result()
        if size is not None and len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def named(names: list[str]) -> str:
    """So many images, and the names of the first."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} image{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more})"


def _all_readable(results: list[Prediction | Unreadable]) -> list[Prediction]:
    """The predictions, if every image has one."""
    broken = [r for r in results if isinstance(r, Unreadable)]
    if broken:
        shown = "".join(f"\n  {name}: {reason}" for name, reason in broken[:10])
        more = f"\n  ... and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise ValueError(f"{len(broken)} of {len(results)} images cannot be read:{shown}{more}")
    return [r for r in results if isinstance(r, Prediction)]
