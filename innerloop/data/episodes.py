"""Few-shot classification tasks sampled from class images, each a pure function of (seed, split, index)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.data._random import check_whole, choose, raw_words
from innerloop.data.classes import SPLITS, ClassImages, ImageDataset, Split
from innerloop.data.preprocessing import normalised, per_channel
from innerloop.tasks import Examples, Task, select_task


class TaskSource(Protocol):
    """An endless, numbered supply of tasks for each split. A task depends only on its split and number."""

    def task(self, split: Split, index: int) -> Task:
        """Task ``index`` of a split."""
        ...

    def meta_batch(self, split: Split, start: int, size: int) -> Task:
        """Tasks ``start .. start + size - 1``, stacked: every tensor has a leading dimension ``size``."""
        ...


class Episodes:
    """N-way K-shot classification tasks from images of many classes.

    Task ``index`` of a split holds ``ways`` distinct classes, labelled 0 .. ways - 1, and of each class
    ``shots`` support and ``queries`` query images, all distinct. It depends only on ``(seed, split,
    index)`` and the
    dataset: the same for any meta-batch size, worker, device or resumed run. Making it takes constant time
    in ``index``.

    A task's tensors, examples in class-major order (all of class 0, then all of class 1, ...):

    * ``support.inputs`` ``dtype [ways * shots, C, H, W]``, pixel values in [0, 1], or ``(value - mean) /
      std``;
    * ``support.targets`` ``int64 [ways * shots]``;
    * ``query`` likewise with ``queries`` for ``shots``.

    Args:
        dataset: class images of each split; splits may be missing.
        ways: classes in a task.
        shots: support images of each class.
        queries: query images of each class.
        seed: which endless sequence of tasks.
        rotations: in training tasks, rotate each sampled class by a random multiple of 90 degrees (all its
            images alike), so that rotated characters act as new classes. Validation and test tasks are
            never rotated.
        mean: subtracted from each channel, in units of [0, 1]; one number, or one a channel.
        std: divides each channel after that; one number, or one a channel.
        device: where the images are kept and tasks are made.
        dtype: floating-point type of the inputs.

    Raises:
        ValueError: when an argument is out of range, a split has fewer classes than ``ways``, a class has
            fewer images than ``shots + queries``, the splits' image shapes differ, or rotated images are
            not square.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        ways: int,
        shots: int,
        queries: int,
        seed: int = 0,
        rotations: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value in (("ways", ways), ("shots", shots), ("queries", queries)):
            check_whole(name, value, at_least=1)
        check_whole("seed", seed, at_least=0)
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type such as torch.float32; got {dtype}")
        if not dataset or not set(dataset) <= set(SPLITS):
            raise ValueError(f"dataset must map some of {list(SPLITS)} to ClassImages; got the keys {list(dataset)}")
        for split, classes in dataset.items():
            _check_split(split, classes, ways, shots, queries)
        shapes = {split: tuple(classes.images.shape[1:]) for split, classes in dataset.items()}
        if len(set(shapes.values())) != 1:
            raise ValueError(f"the images of all splits must have one shape [C, H, W]; got {shapes}")
        self.input_shape: tuple[int, ...] = next(iter(shapes.values()))
        channels, height, width = self.input_shape
        if rotations and height != width:
            raise ValueError(
                f"rotations=True needs square images; these are {height} x {width} (height x width). "
                "Resize them to a square, or pass rotations=False"
            )
        self.ways, self.shots, self.queries = int(ways), int(shots), int(queries)
        self.seed, self.rotations = int(seed), rotations
        self.device, self.dtype = torch.device(device), dtype
        self.bits = next((classes.bits for classes in dataset.values() if classes.bits), None)
        self._images = {split: classes.images.to(self.device) for split, classes in dataset.items()}
        self._starts = {split: classes.starts for split, classes in dataset.items()}
        self._sizes = {split: classes.sizes for split, classes in dataset.items()}
        self._mean = per_channel("mean", mean, channels, self.device, dtype)
        self._inverse_std = per_channel("std", std, channels, self.device, dtype)
        self._rotated_pixels = _rotation_table(height).to(self.device) if rotations else None
        labels = torch.arange(ways, device=self.device)
        self._support_targets = labels.repeat_interleave(shots)
        self._query_targets = labels.repeat_interleave(queries)

    def task(self, split: Split, index: int) -> Task:
        """Task ``index`` (0 or more, below 2**63) of a split; shapes in the class's docstring."""
        return select_task(self.meta_batch(split, index, 1), 0)

    def meta_batch(self, split: Split, start: int, size: int) -> Task:
        """Tasks ``start .. start + size - 1``, stacked: every tensor has a leading dimension ``size``.

        Raises ``ValueError`` for a split that the dataset lacks, a negative ``start`` or a ``size`` below 1.
        """
        return self._tasks(split, start, size, self._normalised)

    def images(self, split: Split, index: int) -> Task:
        """Task ``index`` with its images as they are stored, uint8 and not normalised: for showing."""
        return select_task(self._tasks(split, index, 1, lambda pixels: pixels), 0)

    def _tasks(self, split: Split, start: int, size: int, convert: Callable[[Tensor], Tensor]) -> Task:
        if split not in self._images:
            raise ValueError(f"the dataset has no split {split!r}; it has {list(self._images)}")
        check_whole("task index", start, at_least=0)
        check_whole("meta-batch size", size, at_least=1)
        rows, turns = self._draw(split, start, size)
        n_support = size * self.ways * self.shots
        turned = self.rotations and split == "train"
        inputs = convert(self._gather(split, rows, turns if turned else None))
        shape = self.input_shape
        support = inputs[:n_support].view(size, self.ways * self.shots, *shape)
        query = inputs[n_support:].view(size, self.ways * self.queries, *shape)
        return Task(
            support=Examples(support, self._support_targets.repeat(size, 1)),
            query=Examples(query, self._query_targets.repeat(size, 1)),
        )

    def _draw(self, split: Split, start: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Image rows and quarter turns of all support images, then of all query images; both ``[n]``."""
        ways, per_class = self.ways, self.shots + self.queries
        starts, sizes = self._starts[split], self._sizes[split]
        stream = f"episodes/{split}"
        rows = np.empty((size, ways, per_class), dtype=np.int64)
        turns = np.empty((size, ways, per_class), dtype=np.int64)
        for t in range(size):
            # One word a class, one a rotation (drawn even if unused, so that switching rotations on changes
            # nothing else), then one an image.
            words = raw_words(self.seed, stream, start + t, ways * (2 + per_class)).tolist()
            image_words = words[2 * ways :]
            for way, chosen in enumerate(choose(words[:ways], len(sizes))):
                of_class = image_words[way * per_class : (way + 1) * per_class]
                first = starts[chosen]
                rows[t, way] = [first + image for image in choose(of_class, sizes[chosen])]
                turns[t, way] = words[ways + way] % 4
        return _support_then_query(rows, self.shots), _support_then_query(turns, self.shots)

    def _gather(self, split: Split, rows: NDArray[np.int64], turns: NDArray[np.int64] | None) -> Tensor:
        """Images ``uint8 [n, C, H, W]`` of the given rows, each turned by its number of quarter turns."""
        pixels = self._images[split][torch.from_numpy(rows).to(self.device)]
        if turns is not None and self._rotated_pixels is not None:
            order = self._rotated_pixels[torch.from_numpy(turns).to(self.device)]
            flat = pixels.flatten(2)
            pixels = flat.gather(2, order[:, None].expand_as(flat)).view_as(pixels)
        return pixels

    def _normalised(self, pixels: Tensor) -> Tensor:
        """``(value - mean) / std`` of pixel values in [0, 1]."""
        return normalised(pixels.to(self.dtype), self._mean, self._inverse_std)


def _check_split(split: Split, classes: ClassImages, ways: int, shots: int, queries: int) -> None:
    if ways > len(classes.sizes):
        raise ValueError(
            f"{ways}-way tasks need {ways} classes, and split {split!r} has {len(classes.sizes)}. "
            "Ask for fewer ways or provide more classes"
        )
    smallest = min(range(len(classes.sizes)), key=classes.sizes.__getitem__)
    if classes.sizes[smallest] < shots + queries:
        raise ValueError(
            f"a task needs {shots} shots + {queries} queries = {shots + queries} images of each class, "
            f"and class {classes.names[smallest]!r} of split {split!r} has {classes.sizes[smallest]}. "
            "Ask for fewer shots or queries, or leave the class out"
        )


def _support_then_query(values: NDArray[np.int64], shots: int) -> NDArray[np.int64]:
    """``[tasks, ways, shots + queries]`` to flat: all support images of all tasks, then all query images."""
    return np.concatenate([values[:, :, :shots].ravel(), values[:, :, shots:].ravel()])


def _rotation_table(side: int) -> Tensor:
    """int64 ``[4, side * side]``: which pixel goes where under 0 .. 3 quarter turns, counter-clockwise."""
    pixels = torch.arange(side * side).view(side, side)
    return torch.stack([torch.rot90(pixels, turns).flatten() for turns in range(4)])
